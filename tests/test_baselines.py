"""Baselines as whole runs: they learn, repeat, save and resume like NoProp's."""

import sys

import pytest
import torch

from noprop_dist import NoPropModel, UserError, train
from noprop_dist.data import open_data
from noprop_dist.learner import Learner
from noprop_dist.learning import make_lesson
from noprop_dist.metrics import RunLog
from noprop_dist.model import fresh_block, fresh_labels
from noprop_dist.seeding import derive

NAMES = ("adjoint", "backprop", "cnn", "liquid")


@pytest.fixture
def baseline_card(small_card):
    """``baseline_card(name, section={...})``: a few steps of it."""

    def make(name, **sections):
        model = {"blocks": 2} if name == "backprop" else {"blocks": 1}
        steps = {"ode_steps": 3} if name == "adjoint" else {}
        sections["model"] = model | sections.get("model", {})
        return small_card(method={"name": name} | steps, **sections)

    return make


def files(card):
    folder = card.run.dir / card.run.name / "checkpoints" / f"step-{card.train.steps:08d}"
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


@pytest.mark.parametrize("name", NAMES)
def test_each_learns_the_digits(baseline_card, name):
    lean = {"steps": 120, "eval_every": 0, "checkpoint_every": 0}
    card = baseline_card(name, data={"batch_size": 64, "augment": "none"}, train=lean)
    summary = train(card).summary
    assert summary["accuracy"]["mean"] > 0.9
    assert min(summary["accuracy"].values()) > 0.8, "two blocks of backprop start with a third of z_0's noise in z_T"
    assert summary["blocks"][0]["accuracy"] is None, "a baseline has no û"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", NAMES)
def test_a_run_repeats_resumes_and_loads_to_the_bit(baseline_card, name, precision):
    extra = {
        "model": {"embedding": "learned", "embedding_dim": 6},
        "optim": {"ema": 0.9, "clip_norm": 1.0},
        "inference": {"samples": 2},
    }
    whole = baseline_card(name, **extra, train={"precision": precision})
    summary = train(whole).summary
    for steps in (3, 6):
        parts = baseline_card(name, **extra, train={"precision": precision, "steps": steps}, run={"name": "parts"})
        train(parts)
    assert files(parts) == files(whole)
    assert set(files(whole)) == {"block-00.safetensors", "labels.safetensors"}
    model = NoPropModel.from_pretrained(whole.run.dir / "run" / "model")
    scores = model.evaluate(open_data(whole.data).test)
    assert {path: getattr(scores, path) for path in summary["accuracy"]} == summary["accuracy"]
    other = baseline_card(name, **extra, train={"precision": precision}, run={"name": "other", "seed": 1})
    train(other)
    assert files(other)["block-00.safetensors"] != files(whole)["block-00.safetensors"]


@pytest.mark.parametrize("name", NAMES)
def test_one_loss_moves_the_network_the_head_and_where_z_counts_w(baseline_card, name):
    """One step of plain gradient descent, against the loss written out."""
    card = baseline_card(
        name,
        model={"embedding": "learned", "embedding_dim": 6, "dropout": 0.0},
        optim={"name": "sgd", "momentum": 0.0, "weight_decay": 0.0, "lr": 0.1},
    )
    card = card.model_copy(update={"model": card.model.model_copy(update={"backbone": "small-cnn"})})
    info, cpu = open_data(card.data).info, torch.device("cpu")
    modules = [fresh_block(card, info, 0, cpu), fresh_labels(card, info, cpu)]
    copies = [fresh_block(card, info, 0, cpu).train(), fresh_labels(card, info, cpu)]
    x, y = torch.randn(8, 1, 8, 8), torch.arange(8)

    class Noted(RunLog):
        def __init__(self):
            self.seen = []

        def add(self, indices, losses, hits):
            self.seen.append((indices, losses, hits))

    log = Noted()
    learners = [Learner(module, card.optim, 10) for module in modules]
    make_lesson(card, {0: learners[0]}, learners[1], modules[1], owns_labels=True).teach(3, x, y, log)

    torch.manual_seed(derive(card.run.seed, "block", 0, 3))
    logits = copies[1](copies[0].denoise(torch.randn(8, 6), copies[0].encode(x), copies[1].embedding))
    loss = -logits.log_softmax(dim=1)[torch.arange(8), y].mean()
    loss.backward()
    indices, (logged,), (correct,) = log.seen[0]
    assert (indices, float(logged)) == ([0], pytest.approx(loss.item()))
    assert torch.equal(correct, logits.argmax(dim=1) == y)
    for module, copy in zip(modules, copies, strict=True):
        for (key, moved), before in zip(module.named_parameters(), copy.parameters(), strict=True):
            step = 0 if before.grad is None else -0.1 * before.grad
            torch.testing.assert_close(moved.detach(), (before + step).detach(), msg=key)
    assert (copies[1].embedding.grad is None) is (name in ("cnn", "liquid"))


def test_liquid_without_ncps_is_refused_before_anything_starts(baseline_card, monkeypatch):
    monkeypatch.setitem(sys.modules, "ncps.torch", None)
    monkeypatch.setattr("noprop_dist.launcher.World", None)
    with pytest.raises(UserError, match="ncps"):
        train(baseline_card("liquid"))


def test_steps_of_the_ode_belong_to_adjoint(small_card):
    with pytest.raises(ValueError, match=r"method.ode_steps: belongs to adjoint, not to dt; leave it out"):
        small_card(method={"ode_steps": 20})
    assert small_card(method={"name": "adjoint", "ode_steps": 20}, model={"blocks": 1}).method.ode_steps == 20
