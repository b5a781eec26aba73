"""NoProp-FM against slow transcriptions of the paper's equations."""

import math

import pytest
import torch

from noprop_dist.config import InferenceCard, MethodCard
from noprop_dist.method.base import squared_loss
from noprop_dist.method.flow import Flow


def method(blocks=1, solver="auto", steps=50, anchored=False, **settings):
    return Flow(MethodCard(name="fm", **settings), InferenceCard(solver=solver, steps=steps), blocks, anchored=anchored)


@pytest.mark.parametrize("sigma", [0.0, 0.3])
def test_with_one_block_draw_and_loss_are_algorithm_3s(sigma):
    """z_t = t·z_1 + (1−t)·z_0 + σε and ‖v − (z_1−z_0)‖², drawn in the same order and written out."""
    torch.manual_seed(0)
    u, output = torch.randn(6, 3), torch.randn(6, 3)
    torch.manual_seed(7)
    draw = method(sigma=sigma).draw(0, u, u)
    torch.manual_seed(7)
    t, z_0 = torch.rand(6), torch.randn(6, 3)
    noise = torch.randn(6, 3) if sigma else torch.zeros(6, 3)
    total = 0.0
    for row in range(6):
        for column in range(3):
            z_1 = u[row, column]
            expected = t[row] * z_1 + (1 - t[row]) * z_0[row, column] + sigma * noise[row, column]
            assert draw.z[row, column].item() == pytest.approx(expected.item(), abs=1e-6)
            total += (output[row, column] - (z_1 - z_0[row, column])).item() ** 2
    assert squared_loss(output, draw).item() == pytest.approx(total / 6, rel=1e-5)
    assert draw.time.equal(t)


def test_block_k_draws_from_its_own_interval():
    draw = method(4).draw(2, torch.zeros(1000, 1), torch.zeros(1000, 1))
    assert 0.5 <= draw.time.min() < 0.51
    assert 0.74 < draw.time.max() <= 0.75


def test_with_a_wrong_label_z_lies_on_the_way_to_it_but_the_velocity_leads_to_the_right_one():
    torch.manual_seed(0)
    u, wrong = torch.zeros(5000, 1), torch.full((5000, 1), 5.0)
    torch.manual_seed(7)
    right = method().draw(0, u, u)
    torch.manual_seed(7)
    misled = method().draw(0, u, wrong)
    torch.testing.assert_close(misled.z - right.z, 5 * right.time[:, None])
    assert misled.target.equal(right.target)


def test_the_estimate_is_where_the_velocity_leads():
    z, v = torch.randn(3, 4, 2), torch.randn(3, 4, 2)
    torch.testing.assert_close(method().estimate(v, z, torch.tensor(0.25)), z + 0.75 * v)
    times = torch.tensor([0.0, 0.5, 1.0, 0.25])
    expected = torch.stack([z[0, row] + (1 - times[row]) * v[0, row] for row in range(4)])
    torch.testing.assert_close(method().estimate(v[0], z[0], times), expected)


def test_with_learned_embeddings_the_loss_is_anchored_at_the_estimate():
    u, output = torch.randn(6, 3), torch.randn(6, 3)
    for anchored in (True, False):
        flow = method(anchored=anchored)
        draw = flow.draw(0, u, u)
        expected = (draw.z + (1 - draw.time[:, None]) * output).square().sum() if anchored else 0.0
        assert float(flow.extra_loss(output, draw, u, lambda z: z.square().sum())) == pytest.approx(float(expected))


def test_there_is_no_prior_loss_for_z_0_is_the_prior_itself():
    assert method().prior_loss(torch.randn(4, 2)) == 0


@pytest.mark.parametrize("blocks", [1, 4])
@pytest.mark.parametrize(
    ("solver", "error"), [("euler", 1e-5), ("midpoint", 1e-4), ("heun", 0.1), ("rk4", 0.05), ("dopri5", 0.05)]
)
def test_a_perfect_network_carries_z_to_the_label(blocks, solver, error):
    """v = (u − z)/(1 − t), the velocity of the straight way from wherever z is."""
    torch.manual_seed(0)
    u, noise = torch.tensor([3.0, -2.0]), torch.randn(1, 1000, 2)
    paths = torch.cat([torch.zeros(1, 1000, 2), noise, torch.zeros(1, 1000, 2)])
    flow = method(blocks, solver)
    for index in range(blocks):
        paths, estimate = flow.advance(
            index, lambda z, time: (u - z) / (1 - time).clamp(min=1e-3), paths, lambda number: noise, blocks
        )
        torch.testing.assert_close(estimate, u.expand(1000, 2), atol=error, rtol=0)
    torch.testing.assert_close(paths[:2], u.expand(2, 1000, 2), atol=error, rtol=0)


def test_the_stochastic_chains_keep_their_noise_until_the_velocity_takes_it_away():
    """v = u − z_0 with z_0 known: halfway, z is halfway between."""
    u, z_0 = torch.tensor([3.0, -2.0]), torch.randn(1, 10, 2)
    velocity = torch.cat([u.expand(1, 10, 2), u - z_0])
    paths = torch.cat([torch.zeros(1, 10, 2), z_0, torch.zeros(1, 10, 2)])
    half, _ = method(2, "euler").advance(0, lambda z, time: velocity, paths, lambda number: z_0, 2)
    torch.testing.assert_close(half[1], (u + z_0[0]) / 2)
    torch.testing.assert_close(half[0], (u / 2).expand(10, 2))


def test_the_head_reads_the_label_itself_and_sigma():
    torch.manual_seed(0)
    u = torch.ones(20_000, 1)
    assert method().final_latent(u).equal(u)
    assert (method(sigma=0.5).final_latent(u) - u).std().item() == pytest.approx(0.5, abs=4 * 0.5 / math.sqrt(40_000))
