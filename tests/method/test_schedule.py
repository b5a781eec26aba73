import math
from itertools import pairwise

import pytest
import torch

from noprop_dist.method.schedule import cosine, posterior, snr

SCHEDULES = [(blocks, *clip) for blocks in (1, 2, 3, 10, 100) for clip in ((0.0, 0.9999), (1e-4, 0.9999), (1e-6, 0.99999))]


@pytest.mark.parametrize(("blocks", "low", "high"), SCHEDULES)
def test_signal_rises_by_sine_squared_between_its_clips(blocks, low, high):
    levels = cosine(blocks, low, high)
    assert levels.dtype == torch.float64
    assert levels[0] == low
    assert levels[-1] == high
    for t in range(1, blocks):
        assert levels[t].item() == pytest.approx(math.sin(math.pi * t / (2 * blocks)) ** 2, abs=1e-15)
    assert all(before < now for before, now in pairwise(levels.tolist()))


@pytest.mark.parametrize(("blocks", "low", "high"), SCHEDULES)
def test_a_perfect_estimate_keeps_z_on_its_training_distribution(blocks, low, high):
    """The two identities: q(z_{t-1}|y) and û = u_y give q(z_t|y)."""
    levels = cosine(blocks, low, high)
    a, b, c = (coefficient[1:] for coefficient in posterior(levels))
    before, now = levels[:-1], levels[1:]
    torch.testing.assert_close(a + b * before.sqrt(), now.sqrt(), rtol=0, atol=1e-12)
    torch.testing.assert_close(b.square() * (1 - before) + c, 1 - now, rtol=0, atol=1e-12)
    assert (c > 0).all()


def test_posterior_of_two_levels_worked_out_by_hand():
    a, b, c = posterior(torch.tensor([0.2, 0.8], dtype=torch.float64))
    assert a[1].item() == pytest.approx(math.sqrt(0.8) * 0.75 / 0.8)
    assert b[1].item() == pytest.approx(math.sqrt(0.25) * 0.2 / 0.8)
    assert c[1].item() == pytest.approx(0.2 * 0.75 / 0.8)
    assert torch.stack([a[0], b[0], c[0]]).isnan().all(), "there is no step into t = 0"


@pytest.mark.parametrize(("blocks", "low", "high"), SCHEDULES)
def test_snr_is_finite_and_rises(blocks, low, high):
    ratios = snr(cosine(blocks, low, high))
    assert ratios.isfinite().all()
    assert (ratios.diff() > 0).all()


def test_snr_is_signal_over_noise():
    assert snr(torch.tensor([0.0, 0.5, 0.75])).tolist() == [0.0, 1.0, 3.0]
