"""The rivals compute what they claim to: the same blocks, the same gradients, the same batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from noprop_dist.benchmark.contenders import Backpropagated, Bare, Part
from noprop_dist.benchmark.watch import PeakTensors
from noprop_dist.data import open_data
from noprop_dist.files import pack, unpack
from noprop_dist.launcher import resolve
from noprop_dist.model import fresh_block, fresh_labels

STEPS = 3


def backprop(card: Any) -> Any:
    return card.model_copy(update={"method": card.method.model_copy(update={"name": "backprop"})})


def train(way: str, card: Any, folder: Path, pieces: int = 1, rank: int = 0, ranks: int = 1, meeting: str = "") -> bytes:
    made = Backpropagated(card, way, pieces, rank, ranks, meeting, folder, lambda: None)
    steps = made.steps()
    for _ in range(STEPS):
        next(steps)
    return pack(made._part.state_dict())


def learned(blob: bytes) -> dict[str, torch.Tensor]:
    """Without batch norm's running statistics, which a recomputed pass counts twice, and which ranks have of their own."""
    return {name: value for name, value in unpack(blob).items() if "running" not in name and "num_batches" not in name}


def test_the_chain_is_that_of_the_backprop_baseline(small_card):
    card, info = backprop(small_card()), open_data(small_card().data).info
    card = resolve(card, info)
    part = Part(card, info, range(4), torch.device("cpu")).eval()
    network, labels = fresh_block(card, info, 0, torch.device("cpu")).eval(), fresh_labels(card, info, torch.device("cpu"))
    x, z = torch.randn(5, *info.shape), torch.randn(5, 10)
    expected = labels(network.denoise(z, network.encode(x), labels.embedding))
    assert torch.allclose(part(z, x), expected, atol=1e-6)
    halves = [Part(card, info, owned, torch.device("cpu")).eval() for owned in (range(1), range(1, 4))]
    assert torch.allclose(halves[1](halves[0](z, x), x), expected, atol=1e-6)


def test_checkpointed_activations_give_the_same_bytes(small_card, tmp_path):
    plain, again = (learned(train(way, small_card(), tmp_path)) for way in ("whole", "recompute"))
    assert plain and all(plain[name].equal(again[name]) for name in plain)


@pytest.mark.parametrize("way", ["accumulate", "gpipe", "1f1b"])
def test_microbatches_and_stages_give_the_gradient_of_the_whole_batch(small_card, tmp_path, on_ranks, way, monkeypatch):
    """Without dropout and batch norm, which see a microbatch at a time."""
    monkeypatch.setattr("noprop_dist.nets.block.nn.BatchNorm1d", lambda size: torch.nn.Identity())
    card = small_card(model={"dropout": 0.0}, optim={"name": "sgd", "lr": 0.1})
    whole = learned(train("whole", card, tmp_path))
    if way == "accumulate":
        parts = [train(way, card, tmp_path, 4)]
    else:
        parts = on_ranks(2, lambda rank, meeting: train(way, card, tmp_path, 4, rank, 2, meeting))
    trained = {
        name: value for part in parts for name, value in learned(part).items()
    }  # of the heads the last is the trained one
    fresh = Part(resolve(backprop(card), open_data(card.data).info), open_data(card.data).info, range(4), torch.device("cpu"))
    assert trained.keys() == whole.keys()
    for name, value in fresh.state_dict().items():
        assert torch.allclose(trained[name], whole[name], atol=1e-5), name
        assert name == "labels.embedding" or not value.equal(whole[name]), f"{name} has not learned"


def test_data_parallel_ranks_stay_one_model(small_card, tmp_path, on_ranks):
    first, second = on_ranks(2, lambda rank, meeting: train("ddp", small_card(), tmp_path, 1, rank, 2, meeting))
    ours, theirs = learned(first), learned(second)
    assert all(ours[name].equal(theirs[name]) for name in ours)
    assert first != second, "each rank has its own half of the batch"


def test_a_bare_loop_trains_the_blocks_that_its_rank_would_own(small_card):
    made = Bare(small_card(), 1, 2)
    before = {index: block.state_dict()["fuse.0.weight"].clone() for index, block in made._blocks.items()}
    next(made.steps())
    assert list(before) == [2, 3]
    assert not any(before[index].equal(block.state_dict()["fuse.0.weight"]) for index, block in made._blocks.items())


def test_tensors_alive_are_counted_once_and_forgotten():
    with PeakTensors() as tensors:
        kept = torch.zeros(250)
        view, lost = kept[:100], torch.ones(1000)
        del lost
        assert tensors.peak == 5000
        tensors.restart()
        assert tensors.peak == 1000
        weight = torch.zeros(250, requires_grad=True)
        product = (weight * view.repeat(3)[:250]).exp()
        product.sum().backward()
        assert weight.grad is not None and tensors.peak >= 4 * (250 + 250 + 300 + 250 + 250)


def test_the_peak_of_a_blocks_step_is_what_the_dry_run_says(small_card):
    """Weights, gradients, optimizer and activations, within a quarter."""
    from noprop_dist.nets.cost import block_cost
    from noprop_dist.timing import block_step

    card, info = (
        small_card(model={"backbone": "mlp", "dropout": 0.0}, data={"batch_size": 128}),
        open_data(small_card().data).info,
    )
    cost = block_cost(card, info.shape, 10)
    with PeakTensors() as tensors:
        step = block_step(card, info, torch.device("cpu"))
        step()
        tensors.restart()
        step()
    assert tensors.peak == pytest.approx(cost.state + cost.gradients + cost.activations, rel=0.25)
