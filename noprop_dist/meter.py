"""What a rank's training is like: its blocks' figures and its own, added up, and brought to the coordinator now and then."""

from __future__ import annotations

import contextlib
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from noprop_dist.parallel.placement import Placement
from noprop_dist.parallel.scalars import Rows, gather_rows
from noprop_dist.parallel.world import World

PARTS = ("loss", "train accuracy", "gradient norm")
SKIPS = ("skipped updates", "in a row")
ROWS = len(PARTS) + len(SKIPS)
OWN = 4
"""Figures of a rank beside its blocks', since the run's start: seconds of training, seconds waited in them, bytes sent, and
those that training took."""
FED = ("batches", "labels")
"""Kinds of messages that training itself needs; the coordinator sends them all."""


@dataclass(frozen=True)
class Load:
    """A rank's: the share of a log interval's training in which it did not wait, bytes sent in all, and those a step that
    training took."""

    busy: float
    sent: float
    per_step: float


@dataclass(frozen=True)
class Total:
    """A rank's, of the whole run: samples a second of training, peak memory in bytes, busy share, bytes sent by kind."""

    samples_per_second: float
    peak_memory: int
    busy: float
    sent: dict[str, int]


class Meter:
    """Of this rank, from ``world.step`` on.

    Args:
        skips: of this rank's blocks: :attr:`Learner.skips`.
    """

    def __init__(self, world: World, placement: Placement, skips: Sequence[Tensor]) -> None:
        self._world, self._skips = world, skips
        self._first = placement.ranges[world.rank].start
        self._lengths = [OWN + ROWS * len(owned) for owned in placement.ranges]
        owned = len(placement.ranges[world.rank])
        self._sums = torch.zeros(len(PARTS), owned, dtype=torch.float64, device=world.device)
        self._cells = [row.unbind() for row in self._sums]  # views: making them takes longer than adding
        self._added = [0] * owned  # steps that each block did
        self.running = self.waiting = self._before = 0.0
        """Seconds of training, and of waiting in them."""
        self.fed = 0
        """Bytes that training took."""
        self.steps = 0
        """Of the interval under way."""
        self._totals = torch.zeros(world.size, OWN, dtype=torch.float64)

    @property
    def busy(self) -> float:
        """Share of training that this rank did not wait."""
        return _busy(self.running, self.waiting)

    @property
    def rate(self) -> float:
        """Steps a second in the interval under way."""
        return self.steps / max(self.running - self._before, 1e-9)

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """Count what happens inside as training time (evaluation and saving are left out)."""
        traffic = self._world.traffic
        begin, waited, fed = time.perf_counter(), sum(traffic.waited.values()), sum(traffic.sent[kind] for kind in FED)
        with traffic.spans.during("training", self._world.step):
            yield
        self.running += time.perf_counter() - begin
        self.waiting += sum(traffic.waited.values()) - waited
        self.fed += sum(traffic.sent[kind] for kind in FED) - fed

    def add(self, indices: Sequence[int], losses: Tensor, hits: Tensor) -> None:
        """Of n blocks on one batch the losses (n,) and the hits (n, B) of their û. Does not synchronise with the device."""
        rows = [index - self._first for index in indices]
        sums = [self._cells[part][row] for part in (0, 1) for row in rows]
        torch._foreach_add_(sums, [*losses, *hits.float().mean(dim=1)])
        for row in rows:
            self._added[row] += 1

    def add_norm(self, index: int, norm: float) -> None:
        """A block's gradient norm, once a step."""
        self._sums[2, index - self._first] += norm

    def row(self) -> Tensor:
        """This rank's blocks' figures (ROWS * owned,) of the interval. Waits for the device."""
        skips = torch.stack(list(self._skips), dim=1).cpu()
        return torch.cat([self._sums.cpu() / torch.tensor(self._added), skips]).flatten()

    def send(self, row: Tensor) -> Rows:
        """End the interval: what :meth:`row` gave leaves for the coordinator, with this rank's own figures."""
        own = torch.tensor([self.running, self.waiting, sum(self._world.traffic.sent.values()), self.fed], dtype=torch.float64)
        self._before, self.steps = self.running, 0
        self._sums.zero_()
        self._added = [0] * len(self._added)
        return gather_rows(self._world, torch.cat([own, row]), self._lengths)

    def read(self, rows: Sequence[Tensor], steps: int) -> tuple[Tensor, list[Load]]:
        """Of rows that :meth:`send` gathered: figures of all blocks (ROWS, units), and each rank's load in those ``steps``."""
        totals = torch.stack([row[:OWN] for row in rows])
        moved, self._totals = totals - self._totals, totals
        loads = [
            Load(_busy(running, waiting), sent, fed / steps)
            for (running, waiting, _, fed), sent in zip(moved.tolist(), totals[:, 2].tolist(), strict=True)
        ]
        return torch.cat([row[OWN:].view(ROWS, -1) for row in rows], dim=1), loads

    def totals(self, samples: int) -> list[Total]:
        """Every rank's, on the coordinator; nothing elsewhere. Every rank calls it, with the number of samples trained on."""
        world = self._world
        own = [samples / self.running if samples else 0.0, peak_memory(world.device), self.busy]
        sent = dict(world.traffic.sent)
        if not world.is_coordinator:  # this very row is on its way too
            sent["scalars"] += 8 * (len(own) + len(sent))
        mine = torch.tensor([*own, *sent.values()], dtype=torch.float64)
        rows = [row.tolist() for row in gather_rows(world, mine, [len(mine)] * world.size).wait()]
        return [
            Total(rate, int(peak), busy, dict(zip(sent, map(int, counts), strict=True))) for rate, peak, busy, *counts in rows
        ]


def _busy(running: float, waiting: float) -> float:
    return 1 - waiting / running if running else 1.0


def peak_memory(device: torch.device) -> int:
    """Bytes: the allocator's peak on a GPU; on a CPU the process's peak resident set, Python and torch included."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
