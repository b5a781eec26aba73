"""NoProp-DT against slow transcriptions of the paper's equations."""

import math

import pytest
import torch

from noprop_dist.config import MethodCard
from noprop_dist.method.base import squared_loss, start
from noprop_dist.method.discrete import Discrete

LOW, HIGH, ETA = 1e-3, 0.99, 0.1


def level(t, blocks):
    return min(max(math.sin(math.pi * t / (2 * blocks)) ** 2, LOW), HIGH)


def method(blocks, **settings):
    return Discrete(MethodCard(alpha_min=LOW, alpha_max=HIGH, eta=ETA, **settings), blocks)


def drawn(discrete, index, u):
    return discrete.draw(index, u, u)


def loss(discrete, index, estimate, u):
    return squared_loss(estimate, drawn(discrete, index, u))


def advance(discrete, t, denoise, paths, noise, last):
    return discrete.advance(t - 1, lambda z, time: denoise(z), paths, lambda number: noise, last)


def assert_moments(samples, mean, variance):
    """Samples (N, d): mean and variance of every dimension within four standard errors."""
    count = len(samples)
    mean_error, variance_error = math.sqrt(variance / count), variance * math.sqrt(2 / (count - 1))
    assert (samples.mean(dim=0) - mean).abs().max() < 4 * mean_error
    assert (samples.var(dim=0) - variance).abs().max() < 4 * variance_error


@pytest.mark.parametrize("blocks", [1, 2, 7, 10])
def test_losses_of_all_blocks_add_up_to_equation_8(blocks):
    torch.manual_seed(0)
    batch, dim = 5, 3
    estimates = [torch.randn(batch, dim) for _ in range(blocks)]
    u = torch.randn(batch, dim, dtype=torch.float64)

    expectation = 0.0  # over t, uniform on 1…T
    for t in range(1, blocks + 1):
        now, before = level(t, blocks), level(t - 1, blocks)
        rise = now / (1 - now) - before / (1 - before)
        distance = 0.0
        for row in range(batch):
            for column in range(dim):
                distance += (float(estimates[t - 1][row, column]) - float(u[row, column])) ** 2
        expectation += rise * distance / batch / blocks
    expected = blocks / 2 * ETA * expectation

    losses = [loss(method(blocks), t, estimates[t], u) for t in range(blocks)]
    assert all(loss.shape == () for loss in losses)
    # each block's loss carries the whole factor T/2, so E_t is the mean of the blocks' losses
    assert sum(map(float, losses)) / blocks == pytest.approx(expected, rel=1e-12)


def test_uniform_weight_is_the_plain_squared_distance_for_every_block():
    estimate, u = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [3.0, 0.0]])
    uniform = method(4, loss_weight="uniform")
    assert [loss(uniform, index, estimate, u).item() for index in range(4)] == [7.0] * 4


def test_loss_of_half_precision_estimates_is_taken_in_float32():
    assert loss(method(4), 1, torch.ones(2, 3, dtype=torch.bfloat16), torch.zeros(2, 3)).dtype == torch.float32


@pytest.mark.parametrize("t", [1, 2, 5, 10])
def test_block_t_trains_on_the_latent_that_the_chain_will_hand_it(t):
    """z_{t-1} ~ q(z_{t-1}|y), not z_t."""
    torch.manual_seed(t)
    u = torch.tensor([2.0, -1.0]).expand(20_000, 2)
    before = level(t - 1, 10)
    assert_moments(drawn(method(10), t - 1, u).z, math.sqrt(before) * u[0], 1 - before)


def test_with_a_wrong_label_z_is_noised_from_it_but_the_right_one_is_the_target():
    torch.manual_seed(0)
    u, wrong = torch.tensor([2.0, -1.0]).expand(20_000, 2), torch.tensor([-1.0, 5.0]).expand(20_000, 2)
    draw = method(10).draw(8, u, wrong)
    assert_moments(draw.z, math.sqrt(level(8, 10)) * wrong[0], 1 - level(8, 10))
    assert draw.target.equal(u)


def test_the_prior_loss_is_the_kl_of_two_gaussians():
    u = torch.randn(6, 3)
    q = torch.distributions.Normal(math.sqrt(LOW) * u, math.sqrt(1 - LOW))
    kl = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0)).sum(dim=1).mean()
    torch.testing.assert_close(method(4).prior_loss(u), kl)


def test_the_head_trains_on_the_last_latent():
    torch.manual_seed(0)
    u = torch.tensor([2.0, -1.0]).expand(20_000, 2)
    assert_moments(method(10).final_latent(u), math.sqrt(HIGH) * u[0], 1 - HIGH)


def test_training_input_is_fresh_at_each_call_and_repeats_with_the_seed():
    u, discrete = torch.zeros(4, 2), method(3)
    torch.manual_seed(5)
    first, second = drawn(discrete, 1, u).z, drawn(discrete, 1, u).z
    torch.manual_seed(5)
    assert drawn(discrete, 1, u).z.equal(first)
    assert not first.equal(second)


def test_chains_start_from_noise_and_the_mean_path_from_zero():
    noise = torch.randn(3, 4, 2)
    paths = start(noise)
    assert paths.shape == (5, 4, 2)
    assert paths[1:4].equal(noise)
    assert not paths[0].any()
    assert not paths[4].any()


def run_oracle(blocks, paths, u):
    """All paths (1 + S + 1, B, d) through T perfect blocks."""
    discrete = method(blocks)
    for t in range(1, blocks + 1):
        paths, _ = advance(discrete, t, lambda z: u.expand_as(z), paths, torch.randn_like(paths[1:-1]), last=blocks)
    return paths


@pytest.mark.parametrize("blocks", [1, 2, 10])
def test_a_perfect_stochastic_chain_ends_on_the_distribution_of_z_t(blocks):
    torch.manual_seed(blocks)
    u = torch.tensor([3.0, -2.0])
    start = level(0, blocks)
    chains = math.sqrt(start) * u + math.sqrt(1 - start) * torch.randn(1, 20_000, 2)
    paths = torch.cat([torch.zeros(1, 20_000, 2), chains, torch.zeros(1, 20_000, 2)])
    assert_moments(run_oracle(blocks, paths, u)[1], math.sqrt(HIGH) * u, 1 - HIGH)


@pytest.mark.parametrize("blocks", [1, 2, 10, 50])
def test_a_perfect_mean_path_ends_at_the_mean_of_z_t(blocks):
    u = torch.tensor([3.0, -2.0], dtype=torch.float64)
    paths = torch.zeros(3, 1, 2, dtype=torch.float64)
    paths[0] = math.sqrt(level(0, blocks)) * u
    end = run_oracle(blocks, paths, u)[0, 0]
    # 1e-6: an estimate is taken in float32, which holds this u exactly
    torch.testing.assert_close(end, math.sqrt(HIGH) * u, rtol=1e-6, atol=0)


def test_one_step_is_a_times_estimate_plus_b_times_z_plus_noise():
    torch.manual_seed(0)
    blocks, t, samples = 5, 3, 2
    paths, noise = torch.randn(samples + 2, 4, 2), torch.randn(samples, 4, 2)
    after, estimate = advance(method(blocks), t, torch.tanh, paths, noise, last=blocks)
    now, before = level(t, blocks), level(t - 1, blocks)
    alpha = before / now
    for row in range(samples + 1):
        z = math.sqrt(now) * (1 - alpha) / (1 - before) * paths[row].tanh()
        z = z + math.sqrt(alpha) * (1 - now) / (1 - before) * paths[row]
        if row > 0:
            z = z + math.sqrt((1 - now) * (1 - alpha) / (1 - before)) * noise[row - 1]
        torch.testing.assert_close(after[row], z)
    assert estimate.equal(paths[0].tanh())


def test_a_step_leaves_its_input_as_it_was():
    paths = torch.randn(4, 3, 2)
    copy = paths.clone()
    advance(method(5), 2, torch.tanh, paths, torch.randn(2, 3, 2), last=5)
    assert paths.equal(copy)


def test_at_an_early_exit_the_estimate_itself_is_the_result():
    paths, noise = torch.randn(4, 3, 2), torch.randn(2, 3, 2)
    after, _ = advance(method(5), 3, torch.tanh, paths, noise, last=3)
    assert after[:-1].equal(paths[:-1].tanh())
    whole, _ = advance(method(3), 3, torch.tanh, paths, noise, last=3)
    assert not whole[:-1].isclose(paths[:-1].tanh()).all(), "the last block of a whole chain is no early exit"


@pytest.mark.parametrize("last", [1, 3, 5])
def test_the_average_is_the_mean_of_all_estimates_along_stochastic_chains(last):
    torch.manual_seed(0)
    seen = []

    def denoise(z):
        estimate = torch.randn_like(z)
        seen.append(estimate[1:])
        return estimate

    discrete = method(5)
    paths = start(torch.randn(3, 4, 2))
    for t in range(1, last + 1):
        paths, _ = advance(discrete, t, denoise, paths, torch.randn(3, 4, 2), last=last)
    torch.testing.assert_close(paths[-1], torch.cat(seen).mean(dim=0))
