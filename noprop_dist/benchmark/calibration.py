"""The times that planning needs, measured in fresh processes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from torch.nn.functional import cross_entropy

from noprop_dist.benchmark.contenders import Backpropagated, Bare, Contender
from noprop_dist.benchmark.contest import change, microbatches
from noprop_dist.benchmark.runner import Job, Peers, measure
from noprop_dist.config import Card
from noprop_dist.data import open_data
from noprop_dist.launcher import resolve
from noprop_dist.nets.cost import block_cost
from noprop_dist.nets.labels import embedding_size
from noprop_dist.parallel import rivals
from noprop_dist.parallel.feed import message_size
from noprop_dist.planning import Calibration, Network, Task, pipeline_step
from noprop_dist.timing import block_step, seconds

BLOCKS = 4  # that are timed in turn: a single one's weights would stay in a CPU's cache
WARMUP, SUMS = 3, 8  # steps of DDP, and as many without its sums
PIECES = 2  # microbatches of a pipeline of two


def task_of(card: Card) -> Task:
    """What a card's step is made of. ``card``: of data that are at hand."""
    info = open_data(card.data).info
    card, classes = resolve(card, info), len(info.classes)
    message = message_size(card.data.batch_size, info.shape) if card.parallel.feed == "stream" else 8
    cost = block_cost(card, info.shape, classes)
    return Task(card.model.blocks, cost, card.data.batch_size, message, 4 * embedding_size(card.model, info.shape, classes))


def calibrate(card: Card, processes: int, log: Path) -> Calibration:
    """Measure in so many processes at once, means over them. ``card``: of data that are at hand."""
    found: list[Calibration] = measure(Job(card, "bare", processes), _times, log)
    mean = found[0]
    for name in ("prepare", "block", "optimizer"):
        mean = replace(mean, **{name: sum(getattr(each, name) for each in found) / processes})
    mean = replace(mean, chain={size: sum(each.chain[size] for each in found) / processes for size in mean.chain})
    if torch.cuda.is_available() and card.parallel.device != "cpu":
        return mean
    threads = card.parallel.threads or 1
    few = change(card, model={"blocks": min(BLOCKS, card.model.blocks)}, parallel={"threads": threads})
    added, nothing = measure(Job(few, "ddp", 2), _sums, log)[0]
    mean = replace(mean, byte=max(0.0, added) / task_of(few).parameters, message=nothing / 2)
    if few.model.blocks < 2 or PIECES not in microbatches(card.data.batch_size, 2):
        return mean
    beside = measure(Job(few, "bare", 2), _times, log)[0]  # as fast as the two stages are
    plain = pipeline_step(task_of(few), replace(beside, message=mean.message), 2, Network(1e15, 0.0), [1.0, 1.0], PIECES)
    return replace(mean, slot=max(0.0, measure(Job(few, "1f1b", 2, PIECES), _step, log)[0] - plain) / (PIECES + 1))


def _times(make: Callable[[], Contender], peers: Peers) -> Calibration:
    bare = cast(Bare, make())
    card, info, device = bare.card, bare.info, bare.device
    batches = bare.batches()
    peers.meet()
    prepare = seconds(lambda: next(batches), device)
    _, x, y = next(batches)
    blocks = min(BLOCKS, card.model.blocks)
    block = seconds(block_step(card, info, device, blocks), device, within=2.0) / blocks
    chain, size = {}, len(y)
    part, optimizer = bare.chain(blocks)
    z = torch.randn(size, part.labels.embedding.shape[1], device=device)

    def step(size: int) -> None:
        """Whole, for a pass alone would find its gradients' memory in the cache."""
        optimizer.zero_grad(set_to_none=True)
        cross_entropy(part(z[:size], x[:size]), y[:size]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    while size > 1:
        chain[size] = seconds(lambda size=size: step(size), device) / blocks  # type: ignore[misc]
        size //= 2
    update = seconds(optimizer.step, device) / blocks
    return Calibration(prepare, block, {size: whole - update for size, whole in chain.items()}, update, 0.0, 0.0)


def _sums(make: Callable[[], Contender], peers: Peers) -> tuple[float, float]:
    """Seconds that summing gradients adds to a step of DDP, and those of a sum of next to nothing."""
    ddp = cast(Backpropagated, make())
    steps, tiny = ddp.steps(), rivals.tiny_sum(ddp.device)
    for _ in range(WARMUP):
        next(steps)
        tiny()
    added = []
    for _ in range(SUMS):
        whole = _timed(lambda: next(steps), peers)
        with ddp.unsynchronised():
            added.append(whole - _timed(lambda: next(steps), peers))
    return statistics.median(added), statistics.median(_timed(tiny, peers) for _ in range(SUMS))


def _step(make: Callable[[], Contender], peers: Peers) -> float:
    """Seconds of a step."""
    steps = make().steps()
    times = [_timed(lambda: next(steps), peers) for _ in range(WARMUP + SUMS)]
    return statistics.median(times[WARMUP:])


def _timed(step: Callable[[], object], peers: Peers) -> float:
    """Seconds, all ranks beginning at once."""
    peers.meet()
    begin = time.perf_counter()
    step()
    return time.perf_counter() - begin
