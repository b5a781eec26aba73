"""The times that planning needs, measured in fresh processes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from torch.nn.functional import cross_entropy

from noprop_dist.benchmark.contenders import Backpropagated, Bare, Contender
from noprop_dist.benchmark.runner import Job, Peers, measure
from noprop_dist.config import Card
from noprop_dist.data import open_data
from noprop_dist.launcher import resolve
from noprop_dist.nets.cost import block_cost
from noprop_dist.nets.labels import embedding_size
from noprop_dist.parallel import rivals
from noprop_dist.parallel.feed import message_size
from noprop_dist.planning import Calibration, Task
from noprop_dist.timing import block_step, seconds

BLOCKS = 4  # that are timed in turn: a single one's weights would stay in a CPU's cache
PROBE = 16_000_000  # bytes of an all-reduce: about what the blocks of a small network have


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
    whole, nothing = measure(Job(card, "ddp", 2), _sums, log)[0]
    return replace(mean, byte=max(0.0, whole - nothing) / PROBE, message=nothing / 2)


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

    def pass_through(size: int) -> None:
        cross_entropy(part(z[:size], x[:size]), y[:size]).backward()  # type: ignore[no-untyped-call]

    while size > 1:
        chain[size] = seconds(lambda size=size: pass_through(size), device) / blocks  # type: ignore[misc]
        size //= 2
    return Calibration(prepare, block, chain, seconds(optimizer.step, device) / blocks, 0.0, 0.0)


def _sums(make: Callable[[], Contender], peers: Peers) -> tuple[float, float]:
    device = cast(Backpropagated, make()).device
    peers.meet()
    times = []
    for size in (PROBE, 4):
        step, calls = rivals.all_reduce(device, size), 12
        for _ in range(3):
            step()
        times.append(_timed(step, calls))
        peers.meet()
    return times[0], times[1]


def _timed(step: Callable[[], None], calls: int) -> float:
    """Mean seconds: all ranks have to call it equally often."""
    begin = time.perf_counter()
    for _ in range(calls):
        step()
    return (time.perf_counter() - begin) / calls
