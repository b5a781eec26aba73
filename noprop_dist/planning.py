"""What a card would do on ranks that are not at hand, predicted from a block's step on this device.

The model, for N ranks, T blocks, a batch of B, and P bytes of parameters in all; n_r is how many blocks rank r owns:

- layer-parallel NoProp: max over r of (prepare(B) + n_r·block(B)), or the batch's way to the others if that takes longer: it is
  sent ahead, by a binomial tree, ⌈log₂ N⌉ times over the coordinator's link.
- DDP: prepare(B/N) + T·(chain(B/N) + optimizer) + what of the ring's 2·(N−1)/N·P bytes and 2·(N−1) latencies is not hidden
  behind the backward pass (two thirds of chain). On CPUs the work of summing and copying them is hidden behind nothing.
- 1F1B: max over r of (prepare(B) + (m + N − 1)·(n_r·chain(B/m) + slot) + n_r·optimizer) + 2·(N−1) messages, for the best m
  microbatches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from noprop_dist.nets.cost import BlockCost
from noprop_dist.parallel.placement import place

FORWARD = 1 / 3
"""Share of the forward pass in the two."""
METHODS = ("layer-parallel NoProp", "DDP backprop", "1F1B backprop")


@dataclass(frozen=True)
class Calibration:
    """Seconds on one rank of this kind."""

    prepare: float
    """Normalising a batch of B."""
    block: float
    """A NoProp block's step, of a batch of B."""
    chain: Mapping[int, float]
    """Forward and backward pass of a block in a chain, by the size of the (micro-)batch; B and halves of it."""
    optimizer: float
    """A block's optimizer step in the chain."""
    byte: float
    """What a byte of an all-reduce costs a CPU; 0 for GPUs."""
    message: float
    """What a message costs, however short."""
    slot: float = 0.0
    """What a pipeline's stage costs beside its passes, a microbatch."""


class Network(NamedTuple):
    """Between any two ranks: bytes per second, seconds."""

    bandwidth: float
    latency: float


class Prediction(NamedTuple):
    """Of one way to train."""

    samples_per_second: float
    sent: int
    """Bytes a step, of all ranks."""
    memory: int
    """Bytes of tensors on the rank that has most."""
    idle: float
    """Share of the time in which a rank has nothing to compute, mean over ranks."""


@dataclass(frozen=True)
class Task:
    """What is to be trained: ``blocks`` of ``cost`` each in batches of ``batch``; ``message``: bytes of a streamed batch;
    ``latent``: of one image's z."""

    blocks: int
    cost: BlockCost
    batch: int
    message: int
    latent: int

    @property
    def parameters(self) -> int:
        """Bytes of all blocks' parameters."""
        return 4 * self.cost.parameters * self.blocks


def predict(method: str, task: Task, times: Calibration, ranks: int, network: Network, speeds: Sequence[float]) -> Prediction:
    """One of METHODS on ``ranks`` ranks; ``speeds``: of each, 1 for this device's. Raises UserError for too many ranks."""
    model = dict(zip(METHODS, (_layers, _ddp, _1f1b), strict=True))[method]
    return model(task, times, ranks, network, speeds)


def crossover(slow: Callable[[float], float], fast: Callable[[float], float]) -> float | None:
    """The bandwidth (bytes/s) below which ``slow`` gives more samples/s than ``fast``; 0: at none, None: at any."""
    low, high = 1.0, 1e15
    if slow(high) >= fast(high):
        return None
    if slow(low) <= fast(low):
        return 0.0
    while high / low > 1.01:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if slow(middle) > fast(middle) else (low, middle)
    return math.sqrt(low * high)


def _layers(task: Task, times: Calibration, ranks: int, network: Network, speeds: Sequence[float]) -> Prediction:
    owned = _owned(task, ranks, speeds)
    busy = [(times.prepare + count * times.block) / speed for count, speed in zip(owned, speeds, strict=True)]
    copies = math.ceil(math.log2(ranks))
    step = max(*busy, copies * (task.message / network.bandwidth + network.latency + times.message), 0.0)
    memory = max(owned) * task.cost.state + task.cost.gradients + task.cost.activations
    return Prediction(task.batch / step, (ranks - 1) * task.message, memory, 1 - sum(busy) / ranks / step)


def _ddp(task: Task, times: Calibration, ranks: int, network: Network, speeds: Sequence[float]) -> Prediction:
    share = times.prepare / ranks + task.blocks * (_chain(times, task.batch / ranks) + times.optimizer)
    busy = [share / speed for speed in speeds]
    exposed = 0.0
    if ranks > 1:
        sent = 2 * (ranks - 1) / ranks * task.parameters
        wire = sent / network.bandwidth + 2 * (ranks - 1) * (network.latency + times.message)
        exposed = max(sent * times.byte, wire - (1 - FORWARD) * task.blocks * _chain(times, task.batch / ranks) / min(speeds))
    step = max(busy) + max(0.0, exposed)
    memory = task.blocks * (task.cost.state + task.cost.gradients + task.cost.activations // ranks)
    return Prediction(task.batch / step, 2 * (ranks - 1) * task.parameters, memory, 1 - sum(busy) / ranks / step)


def _1f1b(task: Task, times: Calibration, ranks: int, network: Network, speeds: Sequence[float]) -> Prediction:
    owned = _owned(task, ranks, speeds)

    def with_pieces(pieces: int) -> Prediction:
        piece = _chain(times, task.batch / pieces)
        stages = zip(owned, speeds, strict=True)
        busy = [(times.prepare + count * (pieces * piece + times.optimizer)) / speed for count, speed in stages]
        step = pipeline_step(task, times, ranks, network, speeds, pieces)
        kept = min(pieces, ranks) * task.cost.activations // pieces
        memory = max(owned) * (task.cost.state + task.cost.gradients + kept)
        return Prediction(task.batch / step, 2 * (ranks - 1) * task.batch * task.latent, memory, 1 - sum(busy) / ranks / step)

    sizes = [pieces for pieces in range(ranks, task.batch // 2 + 1) if task.batch % pieces == 0] or [ranks]
    return max((with_pieces(pieces) for pieces in sizes), key=lambda found: found.samples_per_second)


def pipeline_step(task: Task, times: Calibration, ranks: int, network: Network, speeds: Sequence[float], pieces: int) -> float:
    """Seconds of a step of 1F1B, of a batch in so many microbatches."""
    passes = _chain(times, task.batch / pieces)
    travel = task.batch // pieces * task.latent / network.bandwidth + network.latency + times.message
    stages = zip(_owned(task, ranks, speeds), speeds, strict=True)
    slots = pieces + ranks - 1
    work = [
        (times.prepare + count * (slots * passes + times.optimizer) + slots * times.slot) / speed for count, speed in stages
    ]
    return max(work) + 2 * (ranks - 1) * travel


def _owned(task: Task, ranks: int, speeds: Sequence[float]) -> list[int]:
    return [len(blocks) for blocks in place([1.0] * task.blocks, ranks, speeds).ranges]


def _chain(times: Calibration, size: float) -> float:
    """Between measured sizes in a straight line; below the smallest, as long as that."""
    sizes = sorted(times.chain)
    if size <= sizes[0]:
        return times.chain[sizes[0]]
    low = max(each for each in sizes if each <= size)
    high = min((each for each in sizes if each >= size), default=low)
    share = (size - low) / (high - low) if high > low else 0.0
    return times.chain[low] + share * (times.chain[high] - times.chain[low])
