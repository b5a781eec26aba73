"""A block's passes as CUDA graphs. Without a GPU torch's capture is imitated: it too runs the module a few times with gradients
that mean nothing."""

from __future__ import annotations

import pytest
import torch

from noprop_dist.config import UserError
from noprop_dist.data import Pixels, open_data
from noprop_dist.files import pack
from noprop_dist.learner import Learner
from noprop_dist.learning import Local, Means, prepare
from noprop_dist.model import fresh_block, fresh_labels

METHODS = [{"name": "dt"}, {"name": "ct", "schedule": "learned"}, {"name": "fm"}]


@pytest.fixture
def captures(monkeypatch):
    """What was captured, as (module, pool)."""
    done = []

    def capture(module, samples, *, allow_unused_input, pool):
        assert all(sample.is_leaf for sample in samples)
        for _ in range(3):
            output, _ = module(*samples)
            inputs = [each for each in (*samples, *module.parameters()) if each.requires_grad]
            torch.autograd.grad(output, inputs, torch.full_like(output, torch.nan), allow_unused=allow_unused_input)
        done.append((module, pool))
        return module

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: object())
    return done


def lesson(card):
    info, cpu = open_data(card.data).info, torch.device("cpu")
    blocks = {index: Learner(fresh_block(card, info, index, cpu), card.optim, 10) for index in range(card.units)}
    images, labels = open_data(card.data).train.load()
    local = Local(card, blocks, None, fresh_labels(card, info, cpu).requires_grad_(False))

    def teach(step):
        rows = slice(32 * step, 32 * step + 32)
        local.teach(step, prepare(card, Pixels(card.data, info), step, images[rows]), labels[rows], Means())
        return {index: pack(learner.state()) for index, learner in blocks.items()}

    return teach, blocks


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method["name"])
def test_what_a_block_learns_does_not_depend_on_its_capture(small_card, captures, method):
    plain, _ = lesson(small_card(method=method))
    graphed, blocks = lesson(small_card(method=method, parallel={"cuda_graphs": True}))
    blocks[0].module.eval()  # as after an evaluation
    for step in range(3):
        assert graphed(step) == plain(step)
    assert [module.block for module, _ in captures] == [learner.module for learner in blocks.values()]
    assert len({id(pool) for _, pool in captures}) == 1


def test_a_block_that_cannot_be_captured_is_told_in_one_line(small_card, captures, monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("operation not permitted when stream is capturing\nat line 3")

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", refuse)
    teach, _ = lesson(small_card(parallel={"cuda_graphs": True}))
    with pytest.raises(
        UserError, match=r"^parallel\.cuda_graphs: .*\(operation not permitted when stream is capturing\); .*out$"
    ):
        teach(0)
