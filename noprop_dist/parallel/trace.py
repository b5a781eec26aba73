"""What all ranks did when, brought to the coordinator, on one clock."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from noprop_dist.parallel.scalars import gather_rows
from noprop_dist.parallel.spans import BINS, SHARES, WHATS, Span, Spans
from noprop_dist.parallel.traffic import CARRIED
from noprop_dist.parallel.world import World

ROUNDS = 4
_KINDS = ("", *CARRIED)
_HEAD = 3  # numbers


@dataclass(frozen=True)
class Record:
    """What :class:`Spans` has of a rank, in seconds of that rank's clock."""

    rank: int
    spans: list[Span]
    origin: float
    width: float
    horizon: float
    overview: list[list[float]]
    offset: float = 0.0
    """Of the rank's clock against the coordinator's, seconds; 0 where they may be one clock, as processes of a host have."""
    accuracy: float = 0.0
    """By how much the offset may be wrong, seconds: half of what lies between its bounds. It was found when the record was
    gathered; a clock that runs 1e-5 too fast was off by another 36 ms an hour before."""


def own_record(rank: int, spans: Spans) -> Record:
    """This rank's, as it stands."""
    return Record(rank, spans.kept, spans.origin, spans.width, spans.horizon, spans.overview)


def gather_trace(world: World) -> list[Record]:
    """Every rank's record, in their order, on the coordinator; nothing elsewhere. Every rank calls it, once a run."""
    clocks = _compare_clocks(world)
    mine = _encode(own_record(world.rank, world.traffic.spans))
    rows = gather_rows(world, mine, world.exchange("trace", len(mine))).wait()
    return [_decode(rank, row, *clock) for rank, (row, clock) in enumerate(zip(rows, clocks, strict=False))]


def _compare_clocks(world: World) -> list[tuple[float, float]]:
    """Offset and accuracy of each rank's clock, on the coordinator; without meaning elsewhere.

    A word of the coordinator's with its time cannot arrive before it was sent, nor can the answer: each bounds the offset, one
    from above, the other from below. The tightest bounds of some rounds stand.
    """
    low, high = [-math.inf] * world.size, [math.inf] * world.size
    for number in range(ROUNDS):
        asked = world.publish(f"clock {number}", time.perf_counter)
        arrived = time.perf_counter()
        answers = world.exchange(f"clock {number}", [arrived - asked, time.perf_counter()])
        now = time.perf_counter()
        high = [min(bound, above) for bound, (above, _) in zip(high, answers, strict=True)]
        low = [max(bound, answered - now) for bound, (_, answered) in zip(low, answers, strict=True)]
    both = zip(low, high, strict=True)
    return [(0.0 if below <= 0 <= above else (below + above) / 2, (above - below) / 2) for below, above in both]


def _encode(record: Record) -> Tensor:
    """As numbers (float64): three, the overview, then six a span."""
    numbers = [record.origin, record.width, record.horizon, *(value for row in record.overview for value in row)]
    for what, kind, *rest in record.spans:
        numbers += [WHATS.index(what), _KINDS.index(kind), *rest]
    return torch.tensor(numbers, dtype=torch.float64)


def _decode(rank: int, row: Tensor, offset: float, accuracy: float) -> Record:
    origin, width, horizon = row[:_HEAD].tolist()
    body = _HEAD + len(SHARES) * BINS
    spans = [
        Span(WHATS[int(what)], _KINDS[int(kind)], int(step), begin, end, int(size))
        for what, kind, step, begin, end, size in row[body:].view(-1, len(Span._fields)).tolist()
    ]
    overview = row[_HEAD:body].view(len(SHARES), BINS).tolist()
    return Record(rank, spans, origin, width, horizon, overview, offset, accuracy)
