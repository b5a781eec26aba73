import math
from itertools import pairwise

import pytest
import torch

from noprop_dist.config import MethodCard, UserError
from noprop_dist.method.intervals import Intervals, cuts
from noprop_dist.method.schedule import LearnedSchedule, Schedule, gamma_of, posterior, rise, snr

NAMES = ["cosine", "linear", "sigmoid"]
CLIPS = [(1e-3, 0.99), (1e-4, 0.9999), (1e-6, 0.99999)]
SCHEDULES = [(name, blocks, *clip) for name in NAMES for blocks in (1, 2, 3, 10) for clip in CLIPS]
CURVES = {
    "cosine": lambda s, low, high: math.sin(math.pi / 2 * s) ** 2,
    "linear": lambda s, low, high: s,
    "sigmoid": lambda s, low, high: 1 / (1 + math.exp(math.log(1 / low - 1) * (1 - s) + math.log(1 / high - 1) * s)),
}


def schedule(name="cosine", low=1e-3, high=0.99):
    return Schedule(MethodCard(schedule=name, alpha_min=low, alpha_max=high))


@pytest.mark.parametrize(("name", "blocks", "low", "high"), SCHEDULES)
def test_signal_rises_along_its_curve_between_its_clips(name, blocks, low, high):
    levels = schedule(name, low, high).levels(blocks)
    assert levels.dtype == torch.float64
    assert levels[0].item() == pytest.approx(low, rel=1e-12)
    assert levels[-1].item() == pytest.approx(high, rel=1e-12)
    for t in range(1, blocks):
        assert levels[t].item() == pytest.approx(CURVES[name](t / blocks, low, high), abs=1e-12)
    assert all(before < now for before, now in pairwise(levels.tolist()))


def test_the_cosine_curve_may_start_at_no_signal_at_all():
    assert schedule("cosine", 0.0, 0.99).levels(10)[0] == 0


@pytest.mark.parametrize(("name", "blocks", "low", "high"), SCHEDULES)
def test_a_perfect_estimate_keeps_z_on_its_training_distribution(name, blocks, low, high):
    """The two identities: q(z_{t-1}|y) and û = u_y give q(z_t|y)."""
    levels = schedule(name, low, high).levels(blocks)
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


def test_snr_is_signal_over_noise():
    assert snr(torch.tensor([0.0, 0.5, 0.75])).tolist() == [0.0, 1.0, 3.0]


@pytest.mark.parametrize("name", NAMES)
def test_in_continuous_time_the_curve_between_the_clips_fills_the_time(name):
    low, high = 0.02, 0.97
    times = torch.linspace(0, 1, 101, dtype=torch.float64)
    alpha_bar = torch.sigmoid(-schedule(name, low, high).gamma(times))
    assert alpha_bar[[0, -1]].tolist() == pytest.approx([low, high])
    assert (alpha_bar.diff() > 0).all()
    # and it is that curve: its inverse is a straight line in time
    inverse = {
        "cosine": lambda level: torch.asin(level.sqrt()),
        "linear": lambda level: level,
        "sigmoid": torch.logit,
    }[name](alpha_bar)
    torch.testing.assert_close(inverse.diff(), inverse.diff()[0].expand(100), rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_the_slope_of_the_snr_is_that_of_a_difference_quotient_and_positive(name):
    gamma = schedule(name).gamma
    times = torch.linspace(0.001, 0.999, 500, dtype=torch.float64)
    level, slope = rise(gamma, times)
    torch.testing.assert_close(level, gamma(times))
    ahead, behind = torch.exp(-gamma(times + 1e-6)), torch.exp(-gamma(times - 1e-6))
    torch.testing.assert_close(slope, (ahead - behind) / 2e-6, rtol=1e-5, atol=0)
    assert (slope > 0).all()


def learned(start=0.0, end=1.0):
    torch.manual_seed(3)
    return LearnedSchedule(MethodCard(name="ct", schedule="learned", alpha_min=1e-3, alpha_max=0.99), start, end)


def test_a_learned_schedule_follows_appendix_b_written_out():
    module = learned()
    gamma_0, gamma_1 = gamma_of(0.99), gamma_of(1e-3)

    def net(t):
        total = 0.0
        for inner, shift, outer in zip(module.inner.tolist(), module.shift.tolist(), module.outer.tolist(), strict=True):
            positive_inner, positive_outer = math.log1p(math.exp(inner)), math.log1p(math.exp(outer))
            total += positive_outer / (1 + math.exp(-(positive_inner * t + shift)))
        return total

    for t in (0.0, 0.2, 0.5, 0.9, 1.0):
        normalised = (net(t) - net(0)) / (net(1) - net(0))
        expected = gamma_0 + (gamma_1 - gamma_0) * (1 - normalised)
        assert module(torch.tensor([t])).item() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(("start", "end"), [(0.0, 1.0), (0.25, 0.5)])
def test_a_learned_schedule_stays_monotone_over_1000_random_updates(start, end):
    module = learned(start, end)
    before = [parameter.detach().clone() for parameter in module.parameters()]
    times = torch.linspace(start, end, 64)
    for _ in range(1000):
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                parameter += 0.03 * torch.randn_like(parameter) * (name != "ends")
                if name == "ends":
                    parameter += 0.01 * torch.randn_like(parameter)
        level, slope = rise(module, times)
        assert (slope > 0).all()
        assert (level.diff() < 0).all()
    assert all(not a.isclose(b).all() for a, b in zip(before, module.parameters(), strict=True)), "it did move"


def test_only_a_schedule_of_all_the_time_trains_its_ends():
    assert learned().trains_ends
    part = learned(0.25, 0.5)
    assert not part.trains_ends
    assert "ends" not in dict(part.named_parameters())
    line = schedule("sigmoid").gamma
    ends = torch.tensor([0.25, 0.5])
    torch.testing.assert_close(part(ends), line(ends), rtol=1e-5, atol=1e-5)
    beyond = torch.tensor([0.1, 0.2, 0.6, 0.9])
    torch.testing.assert_close(part(beyond), line(beyond), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("partition", "blocks"), [("uniform", 3), ("uniform", 10), ("equal-mass", 4)])
def test_up_to_its_very_ends_the_slope_of_a_learned_schedule_is_its_own(partition, blocks):
    """Rounded ends must not fall on the straight line beyond: solvers evaluate there."""
    settings = card(schedule="learned", partition=partition)
    ends = cuts(settings, blocks)
    for start, end in pairwise(ends):
        torch.manual_seed(3)
        module = LearnedSchedule(settings, start, end)
        with torch.no_grad():
            module.inner += 3
        inset = 1e-3 * (end - start)
        for at, inside in ((start, start + inset), (end, end - inset)):
            slope, expected = (rise(module, torch.tensor([time], dtype=torch.float64))[1].item() for time in (at, inside))
            assert slope == pytest.approx(expected, rel=0.1), f"at {at} of [{start}, {end}]"


def test_a_schedule_that_does_not_rise_is_refused():
    module = learned()
    with torch.no_grad():
        module.ends.copy_(module.ends.flip(0))
    with pytest.raises(UserError, match=r"method\.schedule: the learned SNR no longer rises at time 0\.[45]"):
        rise(module, torch.tensor([0.45]))


def card(name="ct", **settings):
    return MethodCard(name=name, **settings)


def test_uniform_intervals_are_equally_long():
    assert cuts(card(), 4) == [0, 0.25, 0.5, 0.75, 1]


@pytest.mark.parametrize("settings", [{"schedule": name} for name in [*NAMES, "learned"]] + [{"name": "fm"}])
def test_equal_mass_intervals_hold_equal_shares_of_the_noise_levels(settings):
    settings = card(partition="equal-mass", **settings)
    ends = cuts(settings, 4)
    assert (ends[0], ends[-1]) == (0, 1)

    def noise_over_signal(time):
        if settings.name == "fm":
            return (1 - time) / time
        name = settings.schedule.replace("learned", "sigmoid")
        return math.exp(schedule(name).gamma(torch.tensor(time, dtype=torch.float64)).item() / 2)

    inner = [0.5 * (1 + math.erf((math.log(noise_over_signal(t)) + 1.2) / 1.2 / math.sqrt(2))) for t in ends[1:-1]]
    first, last = 1 - inner[0], inner[-1]
    shares = [-step for step in torch.tensor(inner).diff().tolist()]
    assert shares[0] == pytest.approx(shares[1], rel=1e-4)
    if settings.name == "fm":  # which reaches all levels
        assert [first, last, *shares] == pytest.approx([0.25] * 4, rel=1e-4)


def test_a_block_draws_its_times_from_its_interval_and_its_share_of_the_neighbours():
    torch.manual_seed(0)
    rows = torch.empty(5000, 2)
    for index, low, high in ((0, 0.0, 0.3), (1, 0.2, 0.55), (3, 0.7, 1.0)):
        times, width = Intervals(card(overlap=0.2), 4).draw(index, rows)
        assert width == pytest.approx(high - low)
        assert low <= times.min() < low + 0.01
        assert high - 0.01 < times.max() <= high
        assert times.mean().item() == pytest.approx((low + high) / 2, abs=0.01)


def test_steps_are_shared_by_the_length_of_the_intervals():
    grid, first = Intervals(card(), 4).grid(2, 20)
    assert grid.tolist() == pytest.approx([0.5, 0.55, 0.6, 0.65, 0.7, 0.75])
    assert first == 10
    assert len(Intervals(card(), 4).grid(0, 1)[0]) == 2, "every block steps at least once"
