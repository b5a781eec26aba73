import math

import pytest
import torch
from torch import nn

from noprop_dist.config import MethodCard, OptimCard
from noprop_dist.files import pack, unpack
from noprop_dist.learner import Learner, inference_state, learning_rate, update
from noprop_dist.method.schedule import LearnedSchedule

LR = 0.4


def rates(total=100, **settings):
    return [learning_rate(OptimCard(lr=LR, **settings), step, total) for step in range(total)]


def test_a_constant_rate_is_constant():
    assert rates() == [LR] * 100


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_warm_up_climbs_by_equal_steps_to_the_peak(schedule):
    climb = rates(schedule=schedule, warmup_steps=4)
    assert climb[:5] == pytest.approx([LR / 4, LR / 2, 3 * LR / 4, LR, LR])
    assert max(climb) == pytest.approx(LR)


def test_cosine_falls_from_the_peak_to_nearly_zero():
    fall = rates(schedule="cosine")
    assert fall[0] == LR
    assert fall[50] == pytest.approx(LR / 2)
    assert fall[25] == pytest.approx(LR * (1 + math.cos(math.pi / 4)) / 2)
    assert fall == sorted(fall, reverse=True)
    assert 0 <= fall[-1] < LR / 1000


def test_one_cycle_rises_for_30_percent_of_the_steps_and_ends_at_a_ten_thousandth():
    cycle = rates(schedule="one-cycle")
    assert cycle[0] == pytest.approx(LR / 25)
    assert cycle.index(max(cycle)) == 30
    assert cycle[30] == pytest.approx(LR)
    assert cycle[:31] == sorted(cycle[:31])
    assert cycle[30:] == sorted(cycle[30:], reverse=True)
    assert cycle[-1] == pytest.approx(LR / 1e4)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "one-cycle"])
@pytest.mark.parametrize("total", [1, 2, 3, 7])
def test_rates_of_very_short_runs_are_sane(schedule, total):
    assert all(0 < rate <= LR for rate in rates(total, schedule=schedule))


def make(seed=0, channels_last=False):
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)
    )
    return net.to(memory_format=torch.channels_last) if channels_last else net


def train(learner, steps, scale=1.0):
    """Steps whose data are a pure function of the step."""
    for step in steps:
        x = torch.randn(8, 2, 6, 6, generator=torch.Generator().manual_seed(step))
        if next(learner.module.parameters()).is_contiguous(memory_format=torch.channels_last):
            x = x.to(memory_format=torch.channels_last)
        update(scale * learner.module(x).square().sum(), step, learner)


def test_a_learned_schedule_does_not_decay():
    module = nn.Sequential(nn.Linear(2, 2), LearnedSchedule(MethodCard(name="ct", schedule="learned"), 0.0, 1.0))
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    learner = Learner(module, OptimCard(lr=0.1, weight_decay=0.5), 1)
    update(sum(0.0 * parameter.sum() for parameter in module.parameters()), 0, learner)
    changed = {name for name, parameter in module.named_parameters() if not parameter.equal(before[name])}
    assert changed == {"0.weight", "0.bias"}


OPTIMIZERS = [{"name": "adamw"}, {"name": "adam"}, {"name": "sgd"}, {"name": "sgd", "momentum": 0}]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("ema", [0.0, 0.9])
@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_a_saved_and_loaded_learner_continues_bit_for_bit(optim, ema, channels_last):
    card = OptimCard(lr=1e-2, schedule="cosine", ema=ema, **optim)
    through, fresh = (Learner(make(seed, channels_last), card, 6) for seed in (0, 1))
    train(through, range(3))
    fresh.load(unpack(pack(through.state())))
    assert pack(fresh.state()) == pack(through.state())
    train(through, range(3, 6))
    train(fresh, range(3, 6))
    assert pack(fresh.state()) == pack(through.state())
    assert pack(fresh.inference.state_dict()) == pack(through.inference.state_dict())


@pytest.mark.parametrize("optim", OPTIMIZERS[:3])
def test_the_optimizers_memory_is_part_of_what_is_saved(optim):
    """Else the test above would be true of nothing."""
    through, forgetful = (Learner(make(), OptimCard(lr=1e-2, **optim), 6) for _ in range(2))
    train(through, range(3))
    forgetful.load({name: value for name, value in through.state().items() if not name.startswith("optimizer.")})
    train(through, range(3, 6))
    train(forgetful, range(3, 6))
    assert not torch.equal(through.module[0].weight, forgetful.module[0].weight)


def test_a_loaded_state_is_a_copy():
    first, second = (Learner(make(seed), OptimCard(lr=1e-2), 6) for seed in (0, 1))
    train(first, range(2))
    before = pack(first.state())
    second.load(first.state())
    train(second, range(2, 4))
    assert pack(first.state()) == before


def test_a_state_of_other_shapes_is_refused():
    with pytest.raises(RuntimeError, match="size mismatch"):
        Learner(nn.Linear(2, 3), OptimCard(), 1).load(Learner(nn.Linear(2, 4), OptimCard(), 1).state())


@pytest.mark.parametrize("clip", [0.5, 0.01])
def test_clipping_bounds_the_gradient_norm(clip):
    free, clipped = Learner(make(), OptimCard(), 3), Learner(make(), OptimCard(clip_norm=clip), 3)
    seen, step = [], clipped.optimizer.step

    def watched():
        seen.append(math.sqrt(sum(float(p.grad.double().square().sum()) for p in clipped.module.parameters())))
        step()

    clipped.optimizer.step = watched
    for learner in (free, clipped):
        train(learner, range(1), scale=100)
    (by_hand,) = seen
    assert all(p.grad is None for p in clipped.module.parameters()), "it lives no longer than the step"
    assert by_hand == pytest.approx(clip, rel=1e-3)
    assert clipped.gradient_norm() == pytest.approx(by_hand, rel=1e-5)
    assert free.gradient_norm() > 10


def test_a_small_gradient_is_not_clipped():
    free, clipped = (Learner(make(), OptimCard(name="sgd", clip_norm=clip), 3) for clip in (0, 1e6))
    for learner in (free, clipped):
        train(learner, range(2))
    assert pack(free.state()) == pack(clipped.state())


def test_the_moving_average_is_the_one_computed_by_hand():
    decay = 0.8
    learner = Learner(make(), OptimCard(lr=1e-2, ema=decay), 5)
    expected = {name: p.detach().clone() for name, p in learner.module.named_parameters()}
    for step in range(5):
        train(learner, [step])
        for name, parameter in learner.module.named_parameters():
            expected[name] = decay * expected[name] + (1 - decay) * parameter.detach()
    for name, average in learner.inference.named_parameters():
        torch.testing.assert_close(average, expected[name])
        assert not average.requires_grad
    for name, buffer in learner.inference.named_buffers():
        assert buffer.equal(learner.module.get_buffer(name)), f"{name} is the module's own statistic"
    assert not torch.equal(learner.inference[0].weight, learner.module[0].weight)


def test_the_moving_average_does_not_change_training():
    plain, averaged = (Learner(make(), OptimCard(lr=1e-2, ema=ema), 4) for ema in (0.0, 0.9))
    for learner in (plain, averaged):
        train(learner, range(4))
    assert pack(plain.module.state_dict()) == pack(averaged.module.state_dict())
    assert plain.inference is plain.module


@pytest.mark.parametrize("ema", [0.0, 0.5])
def test_a_saved_state_names_the_weights_to_predict_with(ema):
    learner = Learner(make(), OptimCard(lr=1e-2, ema=ema), 3)
    train(learner, range(3))
    assert pack(inference_state(learner.state())) == pack(learner.inference.state_dict())


def test_each_step_has_the_rate_of_its_schedule():
    learner = Learner(nn.Linear(1, 1, bias=False), OptimCard(name="sgd", momentum=0, weight_decay=0, lr=LR, warmup_steps=4), 9)
    for step in (0, 2, 7, 1):  # by number, not by how many there were
        before = learner.module.weight.item()
        update(learner.module.weight.sum(), step, learner)
        assert before - learner.module.weight.item() == pytest.approx(LR * min(1, (step + 1) / 4), rel=1e-5)


def spoil(learner, step, value):
    """A step whose loss and gradient are ``value``, and whose forward pass has spoilt the module's statistics."""
    x = torch.full((8, 2, 6, 6), value)
    update(learner.module(x).sum(), step, learner)


@pytest.mark.parametrize("optim", [*OPTIMIZERS, {"ema": 0.5}])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_update_that_is_not_finite_leaves_everything_as_it_was(optim, value):
    """Also the optimizer's own memory, be it the first step or a later one."""
    hurt, spared = (Learner(make(), OptimCard(lr=1e-2, **optim), 6) for _ in range(2))
    spoil(hurt, 0, value)
    train(hurt, range(1, 3))
    train(spared, range(1, 3))
    spoil(hurt, 3, value)
    train(hurt, range(4, 6))
    train(spared, range(4, 6))
    assert pack(hurt.module.state_dict()) == pack(spared.module.state_dict())
    assert all(parameter.isfinite().all() for parameter in hurt.module.parameters())
    assert hurt.skips.tolist() == [2, 0]


def test_a_large_finite_loss_with_an_infinite_gradient_is_skipped_too():
    learner = Learner(nn.Linear(1, 1, bias=False), OptimCard(), 1)
    before = learner.module.weight.item()
    weight = learner.module.weight
    update((weight - weight.detach()).abs().sum().sqrt(), 0, learner)  # 0, of infinite slope
    assert learner.module.weight.item() == before and learner.skips.tolist() == [1, 1]


def test_after_so_many_bad_steps_in_a_row_it_stays_as_it_is_also_over_a_resume():
    learner, other = (Learner(make(), OptimCard(), 20, max_bad_steps=3) for _ in range(2))
    for step in (0, 1, 3, 4, 5):
        if step == 3:
            train(learner, [2])
        spoil(learner, step, math.nan)
    assert learner.skips.tolist() == [5, 3]
    before = pack(learner.module.state_dict())
    train(learner, range(6, 8))
    other.load(unpack(pack(learner.state())))
    train(other, range(8, 10))
    assert pack(learner.module.state_dict()) == before == pack(other.module.state_dict())
    assert other.skips.tolist() == [9, 7]
