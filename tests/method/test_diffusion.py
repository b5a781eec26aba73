"""NoProp-CT against slow transcriptions of the paper's equations."""

import math
from itertools import pairwise

import pytest
import torch

from noprop_dist.config import InferenceCard, MethodCard
from noprop_dist.method.base import squared_loss
from noprop_dist.method.diffusion import Diffusion
from noprop_dist.method.schedule import LearnedSchedule

LOW, HIGH, ETA = 1e-3, 0.99, 0.7
SOLVERS = ["sde", "euler", "midpoint", "heun", "rk4", "dopri5"]


def method(blocks=1, solver="auto", steps=50, **settings):
    card = MethodCard(name="ct", eta=ETA, alpha_min=LOW, alpha_max=HIGH, **settings)
    return Diffusion(card, InferenceCard(solver=solver, steps=steps, tolerance=1e-5), blocks)


def alpha_bar(time):
    """The cosine schedule between its clips, written out."""
    first, last = math.asin(math.sqrt(LOW)), math.asin(math.sqrt(HIGH))
    return math.sin(first + (last - first) * time) ** 2


def snr(time):
    return alpha_bar(time) / (1 - alpha_bar(time))


def assert_moments(samples, mean, variance):
    """Samples (N, d): mean and variance of every dimension within four standard errors."""
    count = len(samples)
    assert (samples.mean(dim=0) - mean).abs().max() < 4 * math.sqrt(variance / count)
    assert (samples.var(dim=0) - variance).abs().max() < 4 * variance * math.sqrt(2 / (count - 1))


def test_with_one_block_the_loss_is_equation_9s_term_by_term():
    """½·η·SNR′(t)·‖û−u‖² of each row at its own time: the mean of the products."""
    torch.manual_seed(0)
    u, output = torch.randn(6, 3), torch.randn(6, 3)
    draw = method().draw(0, u, u)
    expected = 0.0
    for row in range(6):
        t = float(draw.time[row])
        slope = (snr(t + 1e-5) - snr(t - 1e-5)) / 2e-5
        distance = sum((float(output[row, column]) - float(u[row, column])) ** 2 for column in range(3))
        expected += 0.5 * ETA * slope * distance / 6
    assert squared_loss(output, draw).item() == pytest.approx(expected, rel=1e-3)
    assert draw.target.equal(u)


def test_z_is_drawn_from_q_at_the_rows_own_time():
    torch.manual_seed(0)
    u = torch.tensor([2.0, -1.0]).expand(50_000, 2)
    draw = method().draw(0, u, u)
    assert 0 <= draw.time.min() < 0.001
    assert 0.999 < draw.time.max() <= 1
    levels = torch.tensor([alpha_bar(float(t)) for t in draw.time])[:, None]
    assert_moments((draw.z - levels.sqrt() * u) / (1 - levels).sqrt(), 0.0, 1.0)


def test_the_losses_of_k_blocks_add_up_to_equation_9s_integral():
    """For a constant error ‖û−u‖² = 1: ½·η·(SNR(1) − SNR(0)), cut into intervals by the blocks."""
    torch.manual_seed(0)
    u = torch.zeros(100_000, 1)
    for index in range(4):
        draw = method(4).draw(index, u, u)
        share = snr((index + 1) / 4) - snr(index / 4)
        assert squared_loss(torch.ones_like(u), draw).item() == pytest.approx(ETA / 2 * share, rel=0.05)


def test_uniform_weight_is_the_plain_squared_distance():
    u = torch.zeros(5, 2)
    draw = method(loss_weight="uniform").draw(0, u, u)
    assert squared_loss(torch.ones(5, 2), draw).item() == 2


def test_with_a_wrong_label_z_is_noised_from_it_but_the_right_one_is_the_target():
    u, wrong = torch.zeros(20_000, 1), torch.full((20_000, 1), 5.0)
    draw = method(4).draw(3, u, wrong)
    assert draw.z.mean() > 4
    assert draw.target.equal(u)


def oracle_paths(u, count, level):
    """The mean path at its mean, ``count`` stochastic rows on q(z_0|y), and an empty average."""
    noise = torch.randn(1, count, len(u))
    mean = math.sqrt(level) * u.expand(1, count, -1)
    return torch.cat([mean, mean + math.sqrt(1 - level) * noise, torch.zeros_like(mean)])


def through(diffusion, paths, denoise, gammas=None):
    blocks, shape = diffusion.intervals.blocks, paths[1:-1].shape

    def noise(number):
        return torch.randn(shape, generator=torch.Generator().manual_seed(number))

    for index in range(blocks):
        gamma = gammas[index] if gammas else None

        paths, _ = diffusion.advance(index, denoise, paths, noise, blocks, gamma)
    return paths


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("blocks", [1, 4])
def test_a_perfect_network_carries_z_to_the_label(solver, blocks):
    torch.manual_seed(0)
    u = torch.tensor([3.0, -2.0])
    steps = 400 if solver == "euler" else 50
    paths = through(method(blocks, solver, steps), oracle_paths(u, 20_000, LOW), lambda z, time: u.expand_as(z))
    error = 0.02 if solver in ("euler", "heun") else 0.002
    torch.testing.assert_close(paths[0], (math.sqrt(HIGH) * u).expand(20_000, 2), atol=error, rtol=0)
    ends = paths[1]
    assert (ends.mean(dim=0) - math.sqrt(HIGH) * u).abs().max() < 4 * 0.1 / math.sqrt(20_000) + error
    assert (ends.std(dim=0) - math.sqrt(1 - HIGH)).abs().max() < 0.003
    torch.testing.assert_close(paths[-1], u.expand(20_000, 2), atol=1e-4, rtol=0)


@pytest.mark.parametrize("trains_ends", [True, False])
def test_a_perfect_network_carries_z_along_a_learned_schedule(trains_ends):
    torch.manual_seed(0)
    u = torch.tensor([3.0, -2.0])
    card = MethodCard(name="ct", schedule="learned", alpha_min=LOW, alpha_max=HIGH)
    ends = [0.0, 1.0] if trains_ends else [0.0, 0.5, 1.0]
    gammas = [LearnedSchedule(card, *pair) for pair in pairwise(ends)]
    for solver in ("sde", "rk4"):
        diffusion = method(len(gammas), solver, schedule="learned")
        with torch.no_grad():
            paths = through(diffusion, oracle_paths(u, 100, LOW), lambda z, time: u.expand_as(z), gammas)
        torch.testing.assert_close(paths[0], (math.sqrt(HIGH) * u).expand(100, 2), atol=0.005, rtol=0)


def test_an_ancestral_step_is_eqs_3_to_5_on_the_grid():
    torch.manual_seed(0)
    paths, noise = torch.randn(4, 5, 2), {number: torch.randn(2, 5, 2) for number in (1, 2, 3)}
    after, _ = method(1, "sde", steps=3).advance(0, lambda z, time: torch.tanh(z + time), paths, noise.__getitem__, 1)
    z = paths[:3]
    for step in (1, 2, 3):
        before, now = alpha_bar((step - 1) / 3), alpha_bar(step / 3)
        alpha = before / now
        estimate = torch.tanh(z + (step - 1) / 3)
        z = math.sqrt(now) * (1 - alpha) / (1 - before) * estimate + math.sqrt(alpha) * (1 - now) / (1 - before) * z
        z[1:] += math.sqrt((1 - now) * (1 - alpha) / (1 - before)) * noise[step]
    torch.testing.assert_close(after[:3], z)


@pytest.mark.parametrize("solver", ["sde", "rk4"])
def test_cutting_the_time_among_identical_blocks_changes_nothing(solver):
    torch.manual_seed(0)
    paths = oracle_paths(torch.tensor([1.0, 2.0]), 5, LOW)
    one, four = (through(method(blocks, solver, 40), paths, lambda z, time: torch.tanh(z + time)) for blocks in (1, 4))
    torch.testing.assert_close(one, four, atol=1e-5, rtol=1e-5)


def test_at_an_early_exit_the_estimate_itself_is_the_result():
    paths = torch.randn(4, 5, 2)
    after, estimate = method(4, "rk4").advance(1, lambda z, time: torch.full_like(z, 7.0), paths, lambda number: paths[1:3], 2)
    assert (after[:3] == 7).all()
    assert (estimate == 7).all()


def test_the_end_points_learn_from_cross_entropy_and_kl_only_where_they_are_trained():
    torch.manual_seed(0)
    u, card = torch.randn(8, 3), MethodCard(name="ct", schedule="learned", alpha_min=LOW, alpha_max=HIGH)
    diffusion, whole = method(schedule="learned"), LearnedSchedule(card, 0.0, 1.0)
    draw = diffusion.draw(0, u, u, whole)
    seen = []

    def head_loss(z):
        seen.append(z)
        return z.sum()

    loss = diffusion.extra_loss(u, draw, u, head_loss, whole)
    loss.backward()
    assert (whole.ends.grad != 0).all()
    level = torch.sigmoid(-whole.ends[1]).item()
    kl = torch.distributions.kl_divergence(
        torch.distributions.Normal(math.sqrt(level) * u, math.sqrt(1 - level)), torch.distributions.Normal(0.0, 1.0)
    )
    assert loss.item() == pytest.approx((seen[0].sum() + kl.sum(dim=1).mean()).item(), rel=1e-4)
    part = LearnedSchedule(card, 0.0, 0.5)
    assert method(2, schedule="learned").extra_loss(u, draw, u, head_loss, part) == 0


def test_the_head_and_the_prior_follow_end_points_that_move():
    """Eq 9 has one ᾱ_1 and one ᾱ_0, for the block, the head and inference alike."""
    torch.manual_seed(0)
    u = torch.tensor([2.0, -1.0]).expand(20_000, 2)
    whole = LearnedSchedule(MethodCard(name="ct", schedule="learned"), 0.0, 1.0)
    with torch.no_grad():
        whole.ends.copy_(torch.tensor([-2.0, 5.0]))
    diffusion = method(schedule="learned")
    last, first = (float(torch.sigmoid(torch.tensor(value))) for value in (2.0, -5.0))
    assert_moments(diffusion.final_latent(u, whole), math.sqrt(last) * u[0], 1 - last)
    assert_moments(method().final_latent(u), math.sqrt(HIGH) * u[0], 1 - HIGH)
    q = torch.distributions.Normal(math.sqrt(first) * u, math.sqrt(1 - first))
    kl = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0)).sum(dim=1).mean()
    torch.testing.assert_close(diffusion.prior_loss(u, whole), kl, rtol=1e-4, atol=0)
    assert not diffusion.prior_loss(u, whole).requires_grad


def test_the_loss_reaches_a_learned_schedule():
    torch.manual_seed(0)
    u = torch.randn(8, 3)
    gamma = LearnedSchedule(MethodCard(name="ct", schedule="learned"), 0.25, 0.5)
    draw = method(4, schedule="learned").draw(1, u, u, gamma)
    squared_loss(torch.tanh(draw.z), draw).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in gamma.parameters())
