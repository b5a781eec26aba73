"""The table of the live board as lines of text: a rank each, in whatever width there is."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from noprop_dist.report.console import size

GAP = "  "
IDLE = 0.8  # a smaller busy share stands out


@dataclass(frozen=True)
class Lane:
    """A rank: its blocks with their losses and the accuracies of their û, and its load. NaN: not known."""

    rank: int
    blocks: range
    losses: Sequence[float]
    hits: Sequence[float]
    busy: float = math.nan
    sent: float = math.nan
    """Bytes in all."""
    per_step: float = math.nan
    """Bytes."""
    device: str = ""
    """Empty where all have the same."""


def table(lanes: Sequence[Lane], width: int, most: int) -> list[tuple[str, str]]:
    """Lines and their rich styles: a head, then a line a lane, ``most`` at most; the last one tells of those left out.

    Figures of each block where there is room, else their range; what still does not fit is left out from the right.
    """
    shown = lanes if len(lanes) <= most else lanes[: most - 1]
    variants = list(_variants(shown))
    columns = next((fitting for fitting in variants if _width(fitting) <= width), variants[-1])
    widths = [max(map(len, column)) for column in columns]
    lines = [GAP.join(cell.rjust(room) for cell, room in zip(row, widths, strict=True)) for row in zip(*columns, strict=True)]
    styles = ["bold", *("yellow" if lane.busy < IDLE else "" for lane in shown)]
    if left := lanes[len(shown) :]:
        busy = span([lane.busy for lane in left], ".0%")
        lines.append(f"{'…':>{widths[0]}}{GAP}{len(left)} more ranks, busy {busy}")
        styles.append("dim")
    return list(zip(lines, styles, strict=True))


def _variants(lanes: Sequence[Lane]) -> Iterable[list[list[str]]]:
    """Columns, head first: all of them, then fewer and fewer."""

    def column(head: str, cell: Callable[[Lane], str]) -> list[str]:
        return [head, *map(cell, lanes)]

    def each(values: Sequence[float], form: str) -> str:
        return " ".join(number(value, form) for value in values) if not all(map(math.isnan, values)) else "-"

    front = [column("rank", lambda lane: str(lane.rank)), column("blocks", lambda lane: names(lane.blocks))]
    losses = [column("loss", lambda lane, show=show: show(lane.losses, ".3g")) for show in (each, span)]  # type: ignore[misc]
    hits = [column("û right", lambda lane, show=show: show(lane.hits, ".1%")) for show in (each, span)]  # type: ignore[misc]
    back = [
        column("busy", lambda lane: number(lane.busy, ".0%")),
        column("sent", lambda lane: _bytes(lane.sent)),
        column("per step", lambda lane: _bytes(lane.per_step)),
    ]
    if any(lane.device for lane in lanes):
        back.append(column("device", lambda lane: lane.device))
    for middle in ([losses[0], hits[0]], [losses[0], hits[1]], [losses[1], hits[1]]):
        yield [*front, *middle, *back]
    while back:
        back.pop()
        yield [*front, losses[1], hits[1], *back]


def _width(columns: Sequence[Sequence[str]]) -> int:
    return sum(max(map(len, column)) for column in columns) + len(GAP) * (len(columns) - 1)


def names(blocks: range) -> str:
    """E.g. ``4-6``."""
    return f"{blocks[0]}-{blocks[-1]}" if len(blocks) > 1 else str(blocks[0])


def number(value: float, form: str) -> str:
    """A dash for NaN."""
    return "-" if math.isnan(value) else format(value, form)


def span(values: Sequence[float], form: str) -> str:
    """From the least to the greatest known value."""
    known = [value for value in values if not math.isnan(value)]
    low, high = (format(bound(known), form) if known else "-" for bound in (min, max))
    return low if low == high else f"{low.rstrip('%')}–{high}"


def _bytes(count: float) -> str:
    return "-" if math.isnan(count) else size(count)


def clock(seconds: float) -> str:
    """E.g. ``3:07`` or ``1:03:07``."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
