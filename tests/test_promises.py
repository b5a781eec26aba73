"""The promises of the house: any number of ranks gives the same bits, and only allowed messages cross."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from noprop_dist import Card, NoPropModel, launcher, train
from noprop_dist.data import open_data
from noprop_dist.files import pack
from noprop_dist.launcher import resolve
from noprop_dist.parallel.feed import message_size
from noprop_dist.viewing import HEADER, IMAGES

DIGITS, TRAIN, TEST = (1, 8, 8), 1437, 360


def run(on_ranks: Callable[..., list[Any]], card: Card, ranks: int, work: Callable[..., Any] | None = None) -> Any:
    """Train on ``ranks`` forked ranks; the coordinator's summary."""

    def one(rank: int, init_method: str) -> Any:
        return train(card, init_method).summary

    return on_ranks(ranks, work or one)[0]


def block_files(folder: Path) -> dict[str, bytes]:
    files = sorted(folder.glob("*.safetensors"))
    assert files, f"no files in {folder}"
    return {path.name: path.read_bytes() for path in files}


def last_files(card: Card) -> dict[str, bytes]:
    return block_files(card.run.dir / str(card.run.name) / "checkpoints" / f"step-{card.train.steps:08d}")


def named(card: Card, name: str, **train_settings: Any) -> Card:
    return card.model_copy(
        update={
            "run": card.run.model_copy(update={"name": name}),
            "train": card.train.model_copy(update=train_settings),
        }
    )


@pytest.mark.parametrize("extra", [{}, {"optim": {"ema": 0.9, "clip_norm": 1.0, "schedule": "one-cycle"}}])
def test_any_number_of_ranks_and_either_feed_end_in_the_same_bytes(small_card, on_ranks, extra):
    alone = small_card(**extra)
    train(alone)
    expected = last_files(alone)
    assert list(expected) == [*(f"block-{index:02d}.safetensors" for index in range(4)), "labels.safetensors"]
    for ranks, feed in ((2, "stream"), (3, "stream"), (4, "stream"), (1, "resident"), (3, "resident")):
        card = small_card(**extra, parallel={"feed": feed}, run={"name": f"{feed}-{ranks}"})
        run(on_ranks, card, ranks)
        assert last_files(card) == expected, f"{feed} feed on {ranks} ranks"


METHODS = {
    "ct": {"method": {"name": "ct", "overlap": 0.1, "label_noise": 0.2}, "inference": {"steps": 8}},
    "ct-learned": {
        "method": {"name": "ct", "schedule": "learned", "partition": "equal-mass"},
        "inference": {"solver": "rk4", "steps": 4},
    },
    "fm": {"method": {"name": "fm", "sigma": 0.1}, "optim": {"name": "adam"}, "inference": {"steps": 8}},
    "fm-learned-embeddings": {
        "method": {"name": "fm"},
        "model": {"embedding": "learned", "embedding_lag": 2},
        "inference": {"steps": 8},
    },
    "dt-learned-embeddings": {"model": {"embedding": "learned", "embedding_lag": 2, "head": "radial"}, "optim": {"ema": 0.5}},
    "dt-prototypes": {"model": {"embedding": "prototype", "embedding_lag": 2, "head": "mlp"}},
}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_ends_in_the_same_bytes_on_any_number_of_ranks_and_over_a_resume(name, small_card, on_ranks):
    settings = {section: dict(values) for section, values in METHODS[name].items()}
    settings["model"] = settings.get("model", {}) | {"blocks": 4}
    alone = small_card(**settings, train={"steps": 9}, run={"name": "alone"})
    one = train(alone)
    for ranks in (2, 4):
        card = named(alone, f"ranks-{ranks}")
        summary = run(on_ranks, card, ranks)
        assert last_files(card) == last_files(alone), f"{ranks} ranks"
        assert summary["accuracy"] == one.summary["accuracy"]
        assert summary["bytes"]["gradients"] == 0
    for steps, ranks in ((5, 4), (7, 2), (9, 1)):  # neither a checkpoint nor a multiple of the lag but the last
        run(on_ranks, named(alone, "parts", steps=steps), ranks)
    assert last_files(named(alone, "parts")) == last_files(alone)


def test_learned_embeddings_travel_as_values_and_every_byte_is_counted(small_card, on_ranks):
    card = small_card(model={"blocks": 4, "embedding": "learned", "embedding_dim": 12, "embedding_lag": 2})
    summary = run(on_ranks, card, 3)
    steps, evaluations, start, embedding = 6, 3, 2, 10 * 12 * 4  # the last evaluation is on training images
    assert summary["bytes"]["labels"] == 2 * embedding * (start + steps // 2 + evaluations)
    fresh = NoPropModel(card, open_data(card.data).info).labels.embedding
    trained = NoPropModel.from_pretrained(card.run.dir / "run" / "model").labels.embedding
    assert not trained.isclose(fresh).all(), "they learn"


def test_a_block_sees_the_label_space_a_fixed_number_of_steps_old(small_card):
    """As it was before step lag·(⌊s/lag⌋ − 1)."""
    from noprop_dist.trainer import Trainer

    own, seen = [], []
    step = Trainer._step

    def watched(self: Trainer, number: int, *args: Any) -> None:
        own.append(self.space.embedding.detach().clone())
        step(self, number, *args)
        seen.append(self.seen.space.embedding.clone())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_step", watched)
        train(small_card(model={"embedding": "learned", "embedding_lag": 3}, train={"steps": 13}))
    assert not own[0].equal(own[1])
    for number in range(13):
        assert seen[number].equal(own[max(0, 3 * (number // 3 - 1))]), number


def test_ten_ranks_with_a_block_each(small_card, on_ranks):
    card = small_card(model={"blocks": 10}, train={"steps": 2})
    summary = run(on_ranks, card, 10)
    assert [block["rank"] for block in summary["blocks"]] == list(range(10))
    other = named(card, "alone")
    train(other)
    assert last_files(card) == last_files(other)


def test_blocks_placed_by_the_measured_speed_of_ranks_end_in_the_same_bytes(small_card, on_ranks):
    """The last rank takes three times as long for a step of the same block."""
    card = small_card(model={"blocks": 8}, parallel={"balance": "measured"})

    def work(rank: int, init_method: str) -> Any:
        measure = launcher.seconds

        def slowed(step: Callable[[], None], device: torch.device) -> float:
            assert measure(step, device, within=0.01) > 0
            return 0.03 if rank == 1 else 0.01

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(launcher, "seconds", slowed)
            return train(card, init_method).summary

    summary = run(on_ranks, card, 2, work)
    assert [block["rank"] for block in summary["blocks"]] == [0] * 6 + [1] * 2
    other = named(card, "alone")
    train(other)
    assert last_files(card) == last_files(other)


def test_bf16_too_is_the_same_on_any_number_of_ranks(small_card, on_ranks):
    card = small_card(train={"precision": "bf16"})
    run(on_ranks, card, 2)
    other = named(card, "alone")
    train(other)
    assert last_files(card) == last_files(other)


def test_a_run_stopped_on_4_ranks_and_resumed_on_2_then_1_ends_in_the_same_bytes(small_card, on_ranks):
    whole = small_card(run={"name": "whole"}, train={"steps": 9})
    train(whole)
    for steps, ranks in ((3, 4), (6, 2), (9, 1)):
        card = small_card(run={"name": "parts"}, train={"steps": steps})
        assert run(on_ranks, card, ranks)["steps"] == steps
    assert last_files(card) == last_files(whole)


def test_a_different_seed_gives_different_blocks(small_card):
    first, second = small_card(), small_card(run={"name": "other", "seed": 1})
    train(first), train(second)
    for name, blob in last_files(first).items():
        assert blob != last_files(second)[name], name


def watch(card: Card, init_method: str) -> tuple[Any, list[tuple[str, int, np.ndarray]], list[int]]:
    """Train, and watch torch.distributed itself, from outside the program's own counter.

    Gives the summary; every call's name, bytes sent and tensor, as it was then; and the sizes of the gathered blocks.
    """
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    calls: list[tuple[str, int, np.ndarray]] = []
    quiet = {"init_process_group", "new_group", "destroy_process_group", "is_nccl_available", "is_initialized"}

    def noted(name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
            for tensor in tensors or [torch.empty(0)]:
                assert not tensor.requires_grad
                sends = name == "isend" or (name == "broadcast" and rank == 0)
                copies = ranks - 1 if name == "broadcast" else 1
                calls.append((name, sends * copies * tensor.nbytes, tensor.numpy().copy()))
            return function(*args, **kwargs)

        return call

    for name in dir(dist):
        function = getattr(dist, name)
        if callable(function) and not isinstance(function, type) and name.islower() and name not in quiet:
            setattr(dist, name, noted(name, function))
    result = train(card, init_method)
    return result.summary, calls, [len(pack(block.state_dict())) for block in result.model.blocks] if result.model else []


@pytest.mark.parametrize("name", METHODS)
def test_what_is_broadcast_is_pixels_and_values_of_the_label_space_never_a_gradient(small_card, on_ranks, name):
    settings = {section: dict(values) for section, values in METHODS[name].items()}
    settings["model"] = settings.get("model", {}) | {"blocks": 4}
    card = small_card(**settings, train={"pictures": True})

    def watched(rank: int, init_method: str) -> Any:
        from noprop_dist.trainer import Trainer

        values: list[np.ndarray] = []
        step, evaluate = Trainer._step, Trainer.evaluate

        def remember(*spaces: nn.Module) -> None:
            values.extend(np.concatenate([p.detach().numpy().flatten() for p in space.parameters()]) for space in spaces)

        def before(self: Trainer, *args: Any) -> None:
            remember(self.space)
            step(self, *args)

        def at(self: Trainer, *args: Any) -> Any:
            remember(self.space, self.labels.inference)
            return evaluate(self, *args)

        Trainer._step, Trainer.evaluate = before, at  # type: ignore[method-assign]
        summary, calls, _ = watch(card, init_method)
        return summary, calls, values

    results = on_ranks(2, watched)
    assert {call for _, calls, _ in results for call, *_ in calls} == {"broadcast", "isend", "irecv"}
    (summary, calls, values), (_, others, _) = results
    assert sum(sent for _, sent, _ in (*calls, *others)) == sum(summary["bytes"].values())
    floats = [message.flatten() for call, _, message in calls if call == "broadcast" and message.dtype != np.uint8]
    learned = card.model.embedding != "one-hot"
    assert sum(message.nbytes for message in floats) == summary["bytes"]["labels"] and bool(floats) == learned
    for message in floats:
        same = [np.array_equal(message, known[: len(message)]) for known in values]  # the embedding alone, or all of it
        assert any(same), "something else than the label space's values"


def test_only_allowed_messages_cross_and_every_byte_is_counted(small_card, on_ranks):
    card = small_card(train={"pictures": True})
    ranks, steps, blocks = 4, 6, 4
    info = open_data(card.data).info
    parameters = {tuple(p.shape) for p in NoPropModel(resolve(card, info), info).blocks.parameters()}
    results = on_ranks(ranks, lambda rank, init_method: watch(card, init_method))
    calls = [call for _, calls, _ in results for call in calls]
    assert {name for name, *_ in calls} == {"broadcast", "isend", "irecv"}

    counted = results[0][0]["bytes"]
    assert counted["gradients"] == counted["labels"] == 0
    assert sum(size for _, size, _ in calls) == sum(counted.values())

    # twice the test set, at last the training set
    passes = [[100] * 3 + [60]] * 2 + [[100] * 14 + [37]]
    evaluated = sum(message_size(batch, DIGITS) for batches in passes for batch in batches)
    trained = (ranks - 1) * steps * message_size(32, DIGITS)
    assert counted["batches"] == trained + (ranks - 1) * evaluated
    assert results[0][0]["bytes_per_step"] == trained / steps
    hops = ranks  # three down the chain, one back to the coordinator
    others = blocks - 1
    seen = 2 * others * 4 * (HEADER + 2 * 2 * IMAGES * 10)  # at both evaluations: z and û of some images, on two paths
    assert counted["latents"] == hops * (2 * TEST + TRAIN) * 10 * 4 * 3 + seen  # float32, three paths
    logs, figures, checkpoints = 3, 5, 2  # loss, accuracy, gradient norm, updates skipped in all and in a row
    own = 4 * (ranks - 1)  # seconds of training and of waiting, bytes sent and those for training
    scalars = 8 * logs * (figures * others + own) + len(passes) * 8 * others + checkpoints * 32 * others
    times = [size for name, size, sent in calls if name == "isend" and sent.dtype == float and sent.size > 400]
    assert len(times) == ranks - 1, "when each rank did what, once"
    assert max(times) <= 8 * (3 + 4 * 100 + 6 * 2000)
    assert counted["scalars"] == scalars + sum(times) + (ranks - 1) * 8 * (3 + 6)

    # each block of other ranks travels once, after the last step, with its length
    assert counted["weights"] == sum(8 + size for size in results[0][2][1:])
    assert not parameters & {tuple(tensor.shape) for *_, tensor in calls if tensor.ndim > 1}, (
        "a message has a parameter's shape"
    )


def test_resident_feed_sends_nothing_per_step(small_card, on_ranks):
    sent = [
        run(on_ranks, small_card(parallel={"feed": "resident"}, train={"steps": steps}, run={"name": f"{steps}"}), 2)["bytes"][
            "batches"
        ]
        for steps in (2, 6)
    ]
    assert sent == [message_size(TRAIN, DIGITS) + message_size(TEST, DIGITS)] * 2


def test_a_broken_block_leaves_all_others_as_they_were(small_card, on_ranks):
    healthy, broken = small_card(run={"name": "healthy"}), small_card(run={"name": "broken"})
    run(on_ranks, healthy, 4)

    def sabotaged(rank: int, init_method: str) -> Any:
        from noprop_dist.trainer import Trainer

        step = Trainer._step

        def zeroing(self: Trainer, number: int, *args: Any) -> None:
            if 2 in self.blocks and number == 3:
                with torch.no_grad():
                    for parameter in self.blocks[2].module.parameters():
                        parameter.zero_()
            step(self, number, *args)

        Trainer._step = zeroing  # type: ignore[method-assign]
        return train(broken, init_method).summary

    run(on_ranks, broken, 4, sabotaged)
    before, after = last_files(healthy), last_files(broken)
    assert {name for name in before if before[name] != after[name]} == {"block-02.safetensors"}


def test_the_gathered_model_repeats_the_relay_exactly(small_card, on_ranks):
    card = small_card(inference={"samples": 3}, train={"precision": "bf16"}, optim={"ema": 0.5})
    summary = run(on_ranks, card, 3)
    folder = card.run.dir / str(card.run.name) / "model"
    scores = NoPropModel.from_pretrained(folder).evaluate(open_data(card.data).test)
    assert {path: getattr(scores, path) for path in ("mean", "stochastic", "average")} == summary["accuracy"]
    assert list(scores.blocks) == [block["accuracy"] for block in summary["blocks"]]


def test_learned_embeddings_find_their_way_between_publications_where_ranks_share_no_disk(small_card, on_ranks, tmp_path):
    settings = {
        "model": {"blocks": 4, "embedding": "learned", "embedding_lag": 4},
        "train": {"steps": 9, "checkpoint_every": 0},
    }
    expected = small_card(**settings, run={"name": "expected"})
    whole = train(expected).summary
    for steps in (3, 6, 9, 9):  # the last start finds a finished run

        def apart(rank: int, init_method: str, steps: int = steps) -> Any:
            card = named(expected, "apart", steps=steps)
            place = {"run": card.run.model_copy(update={"dir": tmp_path / f"disk-{min(rank, 1)}"})}
            return train(card.model_copy(update=place), init_method).summary

        accuracy = run(on_ranks, expected, 3, apart)["accuracy"]
    assert block_files(tmp_path / "disk-0/apart/checkpoints/step-00000009") == last_files(expected)
    assert accuracy == whole["accuracy"]


def test_ranks_that_share_no_disk_save_and_resume_through_the_coordinator(small_card, on_ranks, tmp_path):
    expected = small_card(run={"name": "expected"})
    train(expected)
    for steps in (3, 6):

        def apart(rank: int, init_method: str, steps: int = steps) -> Any:
            card = small_card(run={"name": "apart", "dir": str(tmp_path / f"disk-{min(rank, 1)}")}, train={"steps": steps})
            return train(card, init_method).summary

        run(on_ranks, expected, 3, apart)
    assert block_files(tmp_path / "disk-0/apart/checkpoints/step-00000006") == last_files(expected)
    assert not (tmp_path / "disk-1").exists()
