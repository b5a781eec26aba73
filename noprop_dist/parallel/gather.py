"""Blocks to the coordinator, and back: for the gathered model, and for checkpoints where ranks share no disk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from noprop_dist.parallel.placement import COORDINATOR, Placement
from noprop_dist.parallel.traffic import Wire
from noprop_dist.parallel.world import World


def collect(world: World, placement: Placement, mine: Mapping[int, bytes], ranks: set[int]) -> Iterator[tuple[int, bytes]]:
    """Send the serialised blocks of ``ranks`` to the coordinator; it yields them as (index, bytes), one at a time.

    Every rank calls it with its own blocks; the coordinator's own and those of other ranks do not move.
    """
    wire = world.wires["weights"]
    for rank in sorted(ranks - {COORDINATOR}):
        for index in placement.ranges[rank]:
            if world.rank == rank:
                _send(wire, mine[index], COORDINATOR, world.step)
            elif world.rank == COORDINATOR:
                yield index, _receive(wire, rank, world.step)


def deliver(world: World, placement: Placement, blobs: Mapping[int, bytes], ranks: set[int]) -> dict[int, bytes]:
    """The way back: the coordinator sends each of ``ranks`` its blocks. Returns the blocks that this rank received."""
    wire, received = world.wires["weights"], {}
    for rank in sorted(ranks - {COORDINATOR}):
        for index in placement.ranges[rank]:
            if world.rank == COORDINATOR:
                _send(wire, blobs[index], rank, world.step)
            elif world.rank == rank:
                received[index] = _receive(wire, COORDINATOR, world.step)
    return received


def _send(wire: Wire, blob: bytes, target: int, step: int) -> None:
    wire.send(torch.tensor([len(blob)]), target, step).wait()
    wire.send(torch.frombuffer(bytearray(blob), dtype=torch.uint8), target, step).wait()


def _receive(wire: Wire, source: int, step: int) -> bytes:
    size = int(wire.receive(torch.empty(1, dtype=torch.int64), source, step).wait())
    message: Tensor = wire.receive(torch.empty(size, dtype=torch.uint8), source, step).wait()
    return message.numpy().tobytes()
