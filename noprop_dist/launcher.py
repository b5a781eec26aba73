"""From a card to a finished run: check everything, meet the other ranks, build, train."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from noprop_dist import files
from noprop_dist.cards import dump_card
from noprop_dist.config import LOCAL_METHODS, Card, UserError
from noprop_dist.data import DataInfo, DataSet, check_classes, describe, open_data, resolve_augment
from noprop_dist.history import History
from noprop_dist.interruption import Interruption
from noprop_dist.learning import travelling
from noprop_dist.model import NoPropModel, fresh_labels
from noprop_dist.nets.backbones import resolve_backbone
from noprop_dist.nets.baselines import liquid_layer
from noprop_dist.nets.build import try_out
from noprop_dist.nets.cost import block_cost
from noprop_dist.parallel.feed import Feed, message_size
from noprop_dist.parallel.placement import COORDINATOR, Placement, place
from noprop_dist.parallel.world import World, rank_and_size, set_threads
from noprop_dist.report.console import log, print_placement, set_up_logging, size
from noprop_dist.runs import LOCAL, Listener, RunFolder, claim_folder, differences, find_start
from noprop_dist.saving import check_weights
from noprop_dist.timing import block_step, seconds
from noprop_dist.trainer import Trainer


@dataclass(frozen=True)
class TrainResult:
    """What a run leaves, on the coordinator; elsewhere {} and None."""

    summary: dict[str, Any]
    """What summary.json holds."""
    model: NoPropModel | None
    """The gathered model."""
    stopped: bool = False
    """On every rank: a signal stopped the run before its end, and all is saved; summary and model are still to come."""


def train(
    card: Card | None = None,
    init_method: str = "env://",
    listener: Listener | None = None,
    interruption: Interruption | None = None,
) -> TrainResult:
    """Train as the card says, on the ranks that torchrun started (on one rank without it).

    While it trains, SIGTERM and SIGINT (Ctrl-C) to any rank stop the run: it ends its step, saves a checkpoint and returns.

    Args:
        card: all settings; default: NoProp-DT on scikit-learn's digits.
        init_method: where ranks meet, as torch.distributed names it (``env://`` or ``file:///a/new/file``).
        listener: told of every evaluation and checkpoint, on every rank (see :data:`~noprop_dist.runs.Listener`).
        interruption: another way to stop the run: ``ask`` it, from any thread.

    Raises:
        UserError: for a mistake in card, data or files, before any process group is formed.
        PeerError: when another rank fails or stalls; the message names it.
    """
    with opened(card or Card(), init_method, listener, interruption) as (trainer, plan):
        summary, model = trainer.run(plan.start, plan.checkpoint)
    return TrainResult(summary, model, trainer.feed.stopped)


@contextlib.contextmanager
def opened(
    card: Card, init_method: str = "env://", listener: Listener | None = None, interruption: Interruption | None = None
) -> Iterator[tuple[Trainer, Plan]]:
    """A run, ready to train: its ranks have met, its data are there. Arguments and errors as for :func:`train`."""
    rank, ranks = rank_and_size()
    set_up_logging(rank)
    check_baseline(card, ranks)
    placement = place([1.0] * card.units, ranks)  # blocks of one card are alike
    threads = set_threads(card.parallel)
    world = World(card.parallel, placement, init_method, interruption)
    plan = agree(card, threads, world)
    card, info = plan.card, plan.info
    if card.parallel.balance == "measured":
        world.placement = placement = _measured(card, info, world)
    world.connect()
    log.info(
        "run %s: %d blocks on %d rank%s (%s, %s, %d thread%s), data %s %s, %d training and %d test images",
        plan.folder.path, card.units, ranks, "s" * (ranks > 1), world.device, world.backend, threads,
        "s" * (threads > 1), info.name, info.shape, info.train_size, info.test_size,
    )  # fmt: skip
    if ranks > 1 and world.device.type == "cuda" and world.backend == "gloo":
        log.info("batches travel through the host's memory: gloo carries them (ranks share a GPU, or the card asks for it)")
    with _global_state(card, world.device), world.interruption.listening():
        feed = Feed(card, info, world, plan.data)
        try:
            yield Trainer(card, info, world, placement, feed, plan.folder, listener), plan
        except UserError as error:
            raise UserError(f"rank {rank}: {error}") from None
    world.close()


def _measured(card: Card, info: DataInfo, world: World) -> Placement:
    """Blocks placed by the time of a step of one, on all ranks at once."""
    with _global_state(card, world.device):
        step = block_step(card, info, world.device)
        world.exchange("ready to measure", True)
        times = world.exchange("block step", seconds(step, world.device))
    placement = place([1.0] * card.units, world.size, [1 / each for each in times])
    shares = (f"{1000 * each:.1f} ms on {placement.name(rank)}" for rank, each in enumerate(times))
    log.info("a block's step takes %s", ", ".join(shares))
    return placement


@dataclass(frozen=True)
class Plan:
    """What all ranks have agreed on. ``data`` is there on the coordinator only."""

    card: Card
    info: DataInfo
    data: DataSet | None
    folder: RunFolder
    checkpoint: Path | None
    start: int


def agree(card: Card, threads: int, world: World) -> Plan:
    """Check what only one rank can check, and tell the others, at the store: before any process group is formed.

    Raises UserError for a mistake in card, data or files.
    """
    opened: list[DataSet] = []

    def open_and_check() -> dict[str, Any]:
        data = open_data(card.data)
        try_out(resolve(card, data.info), data.info.shape, len(data.info.classes))
        if card.model.embedding == "prototype":
            check_classes(data.train, data.info)
        opened.append(data)
        return data.info.to_json()

    info = DataInfo.from_json(world.publish("data", open_and_check, patient=True))
    card = resolve(card, info)
    theirs = world.publish("card", lambda: card.model_dump(mode="json"))
    if other := differences(theirs, card.model_dump(mode="json"), LOCAL):
        raise UserError(f"rank {world.rank}: its card is not rank 0's: {'; '.join(other)}; give all ranks the same card")
    parallel = card.parallel.model_copy(update={"threads": threads})  # a sum's last bit depends on it
    card = card.model_copy(update={"parallel": parallel})
    name, checkpoint, start = world.publish("start", lambda: _begin(card, info))
    card, folder = _with_name(card, name), RunFolder(card.run.dir / name)
    return Plan(card, info, opened[0] if opened else None, folder, Path(checkpoint) if checkpoint else None, start)


def check_baseline(card: Card, ranks: int) -> None:
    if card.method.name not in LOCAL_METHODS and ranks > 1:
        raise UserError(f"method.name: {card.method.name} trains end to end, on one rank, not on {ranks}; start one process")
    if card.method.name == "liquid":
        liquid_layer()


def resolve(card: Card, info: DataInfo) -> Card:
    """The card with every "auto" that decides what is computed replaced by what it means for these data."""
    data = card.data.model_copy(update={"augment": resolve_augment(card.data)})
    model = card.model.model_copy(update={"backbone": resolve_backbone(card.model.backbone, info.shape)})
    return card.model_copy(update={"data": data, "model": model})


def dry_run(card: Card, ranks: int) -> None:
    """Print who would own what, and what it costs. Starts nothing; reads no data that has a known shape."""
    check_baseline(card, ranks)
    info = describe(card.data)
    cost = block_cost(resolve(card, info), info.shape, len(info.classes))
    placement = place([cost.flops] * card.units, ranks)
    values = _travelling_bytes(card, info)
    message = message_size(card.data.batch_size, info.shape) if card.parallel.feed == "stream" else 0
    message += values // card.model.embedding_lag
    rows = [
        {
            "rank": rank,
            "blocks": f"{owned[0]}-{owned[-1]}",
            "parameters": cost.parameters * len(owned),
            "memory": cost.state * len(owned) + cost.gradients + cost.activations,
            "sent": message * (ranks - 1) if rank == COORDINATOR else 0,
            "received": 0 if rank == COORDINATOR else message,
        }
        for rank, owned in enumerate(placement.ranges)
    ]
    notes = [
        f"{info.name} {info.shape}, {len(info.classes)} classes, {info.train_size} training and {info.test_size} test images",
        f"a block: {cost.parameters:,} parameters, {cost.flops / 1e9:.2f} GFLOP a step, {size(cost.state)} weights and "
        f"optimizer, {size(cost.gradients + cost.activations)} gradients and activations (one block's at a time)",
        "memory: tensors of training, without Python, torch and the data",
    ]
    if values:
        notes.append(f"label space: {size(values)} to every other rank each {card.model.embedding_lag} steps")
    if card.parallel.feed == "resident":
        data = sum(message_size(count, info.shape) for count in (info.train_size, info.test_size))
        notes.append(f"resident: {size(data)} to every other rank once, no batches per step")
    print_placement(rows, notes)


def _travelling_bytes(card: Card, info: DataInfo) -> int:
    """Of the label space, each time that it is sent."""
    with torch.random.fork_rng([]):
        labels = fresh_labels(card, info, torch.device("cpu"))
    return sum(labels.get_parameter(name).nbytes for name in travelling(card, labels))


def _with_name(card: Card, name: str) -> Card:
    return card.model_copy(update={"run": card.run.model_copy(update={"name": name})})


def _begin(card: Card, info: DataInfo) -> tuple[str, str | None, int]:
    """Find the run's name, checkpoint and step, and write its card: the coordinator's work."""
    named = RunFolder(card.run.dir / card.run.name) if card.run.name else None
    if named:
        named.check()
    checkpoint, step, notes = find_start(card, info, named.checkpoints if named else None)
    for note in notes:
        log.warning("%s", note)
    if checkpoint:
        check_weights(checkpoint, card, info)
        past = checkpoint.absolute()
        History(RunFolder(past.parents[1]).history, step, past)  # damaged? Better told now than after all have met
        log.info("resumes %s", checkpoint)
    folder = named or RunFolder(claim_folder(card.run.dir))
    files.write(folder.card, dump_card(_with_name(card, folder.path.name)).encode())
    return folder.path.name, (str(checkpoint.absolute()) if checkpoint else None), step


@contextlib.contextmanager
def _global_state(card: Card, device: torch.device) -> Iterator[None]:
    """Lend torch's global switches and generators to the run, and give them back as they were."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    if card.debug.enabled:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.autograd.set_detect_anomaly(card.debug.enabled):
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(deterministic)
