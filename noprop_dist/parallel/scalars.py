"""A row of numbers from every rank to the coordinator, now and then."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from noprop_dist.parallel.placement import COORDINATOR
from noprop_dist.parallel.traffic import Pending
from noprop_dist.parallel.world import World


@dataclass
class Rows:
    """Rows under way."""

    pending: list[Pending]
    is_coordinator: bool

    def wait(self) -> list[Tensor]:
        """Every rank's row in the order of ranks, on the coordinator; nothing elsewhere."""
        rows = [message.wait() for message in self.pending]
        return rows if self.is_coordinator else []


def gather_rows(world: World, mine: Tensor, lengths: Sequence[int], kind: str = "scalars") -> Rows:
    """Start sending this rank's row (1-d, on the CPU); ``lengths`` are those of all ranks. Nobody waits until ``Rows.wait``.

    ``kind``: of message; rows without numbers are not sent.
    """
    wire, step = world.wires[kind], world.step
    if world.rank != COORDINATOR:
        return Rows([wire.send(mine, COORDINATOR, step)] if len(mine) else [], False)
    empty = [torch.empty(length, dtype=mine.dtype) for length in lengths]
    others = [wire.receive(row, rank, step) if len(row) else Pending(row) for rank, row in enumerate(empty) if rank]
    return Rows([Pending(mine), *others], True)
