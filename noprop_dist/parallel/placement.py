"""Which rank owns which blocks: contiguous ranges, balanced by cost, the coordinator lightest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate

from noprop_dist.config import UserError

COORDINATOR = 0
COORDINATOR_COST = 0.01  # in blocks: feeding, the head, writing


@dataclass(frozen=True)
class Placement:
    """``ranges[rank]`` holds the indices (0…T−1) of the blocks that a rank owns."""

    ranges: tuple[range, ...]

    def owner(self, index: int) -> int:
        """The rank that owns block ``index``."""
        return next(rank for rank, owned in enumerate(self.ranges) if index in owned)

    def name(self, rank: int) -> str:
        """E.g. ``rank 2 (blocks 4-6)``."""
        first, last = self.ranges[rank][0], self.ranges[rank][-1]
        return f"rank {rank} (block {first})" if first == last else f"rank {rank} (blocks {first}-{last})"


def place(costs: Sequence[float], ranks: int, speeds: Sequence[float] | None = None) -> Placement:
    """Cut blocks of the given costs (any unit) into ``ranks`` contiguous ranges; ``speeds``: the ranks', in any unit.

    A rank's load is its blocks' cost over its speed. Takes the cut with the least sum of the loads to the eighth power: in
    effect the smallest heaviest load and, among equals, the most even one. Raises UserError with more ranks than blocks.
    """
    blocks = len(costs)
    if ranks < 1:
        raise UserError(f"{ranks} ranks are none; give at least 1")
    if ranks > blocks:
        raise UserError(
            f"{ranks} ranks for {blocks} block{'s' * (blocks > 1)}: every rank owns at least one; "
            f"start at most {blocks} ranks (--nproc_per_node) or raise --model.blocks"
        )
    mean = sum(costs) / blocks
    fastest = max(speeds or [1.0])
    slowness = [fastest / speed for speed in speeds or [1.0] * ranks]
    sums = [0.0, *accumulate(cost / mean for cost in costs)]

    def price(rank: int, start: int, end: int) -> float:
        return ((sums[end] - sums[start] + COORDINATOR_COST * (rank == COORDINATOR)) * slowness[rank]) ** 8

    @cache
    def best(rank: int, start: int) -> tuple[float, tuple[int, ...]]:
        """The least price of giving blocks start…T−1 to the ranks from ``rank`` on, and where their ranges end."""
        later = ranks - 1 - rank
        if not later:
            return price(rank, start, blocks), (blocks,)
        return min(
            (price(rank, start, end) + best(rank + 1, end)[0], (end, *best(rank + 1, end)[1]))
            for end in range(start + 1, blocks - later + 1)
        )

    ends = best(0, 0)[1]
    return Placement(tuple(range(start, end) for start, end in zip((0, *ends), ends, strict=False)))
