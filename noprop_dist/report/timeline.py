"""A run's trace as a picture: the whole run, and some of its steps from close by."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise, product
from typing import TYPE_CHECKING, Any, NamedTuple

from noprop_dist.config import UserError
from noprop_dist.report.drawing import COLOURS, draw

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LOOKS = {
    "training": COLOURS[0],
    "evaluation": COLOURS[3],
    "drawing": "0.7",
    "saving": COLOURS[5],
    "reading": COLOURS[1],
    "waiting": COLOURS[4],
    "sending": COLOURS[2],
}
BETWEEN = ("evaluation", "drawing", "saving")
"""What training stops for."""
STEPS = (8, 4, 2)
"""So many are shown from close by: the first number that fits between two evaluations."""
NAMED = 8  # ranks whose blocks are named


class Bar(NamedTuple):
    """Of a rank: one of LOOKS, its step, and when, in microseconds."""

    what: str
    step: int
    begin: float
    end: float


def timeline(trace: Mapping[str, Any]) -> Figure:
    """What every rank did when, from what RUN/trace.json holds: shares of the run's time above, a few steps beneath.

    Raises UserError where the trace has no step that all its ranks trained.
    """
    events = trace.get("traceEvents", [])
    names = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    ranks = sorted(names)
    bars = {rank: _bars(events, rank) for rank in ranks}
    shares = {rank: [(e["ts"], e["args"]) for e in events if e["ph"] == "C" and e["pid"] == rank] for rank in ranks}
    steps, begin, end = _window(bars)
    shown = {rank: [bar for bar in bars[rank] if bar.begin < end and bar.end >= begin] for rank in ranks}
    least = (end - begin) / 1000
    seen = {bar.what for each in shown.values() for bar in each if bar.what == "sending" or bar.end - bar.begin > least}
    seen |= {what for each in shares.values() for _, row in each for what in row if row[what] > 0.01}
    zero = min(ts for each in shares.values() for ts, _ in each)

    def paint(figure: Any) -> None:
        above, below = figure.subplots(2, 1, height_ratios=[0.34 * len(ranks) + 0.4, 0.5 * len(ranks) + 0.4])
        for lane, rank in enumerate(ranks):
            _paint_run(above, lane, shares[rank], zero)
            _paint_steps(below, lane, shown[rank], begin, end)
        first, last = steps
        above.set_title("the whole run: shares of time", loc="left")
        above.plot(((begin + end) / 2 - zero) / 1e6, -0.12, "v", color="black", markersize=5, clip_on=False)
        above.set(xlabel="seconds")
        above.margins(x=0)
        below.set_title(
            f"steps {first}–{last} (at ▼): numbers are steps" if last > first else f"step {first} (at ▼)", loc="left"
        )
        below.set(xlabel="milliseconds", xlim=(0, (end - begin) / 1e3))
        labels = [names[rank].replace(" (", "\n").rstrip(")") if len(ranks) <= NAMED else str(rank) for rank in ranks]
        for ax, middle in ((above, 0.4), (below, 0.3)):
            ax.grid(False)
            ax.set_yticks([lane + middle for lane in range(len(ranks))], labels)
            ax.set_ylim(len(ranks) - 0.1, -0.1)
            ax.tick_params(axis="y", length=0)
            ax.spines["left"].set_visible(False)
        for what in (each for each in LOOKS if each in seen):
            below.barh(
                0, 0, color=LOOKS[what], label="sending (line: batches, until found complete)" if what == "sending" else what
            )
        figure.legend(loc="outside lower center", ncols=len(LOOKS))

    return draw(10, 2.0 + 0.84 * max(1.5, len(ranks)), paint)


def _bars(events: Iterable[Mapping[str, Any]], rank: int) -> list[Bar]:
    """What a rank did, waited for and sent; of a message from rank to rank, when it left (it may have arrived long before the
    rank found out)."""
    bars, open_ends = [], dict[str, Mapping[str, Any]]()
    for event in events:
        if event["pid"] != rank:
            continue
        if event["ph"] == "X":
            bars.append(Bar(event["cat"], event["args"]["step"], event["ts"], event["ts"] + event["dur"]))
        elif event["ph"] == "b":
            open_ends[event["id"]] = event
        elif event["ph"] == "e":
            start = open_ends.pop(event["id"])
            broadcast = start["args"]["kind"] in ("batches", "labels")
            bars.append(Bar("sending", start["args"]["step"], start["ts"], event["ts"] if broadcast else start["ts"]))
    return bars


def _window(bars: Mapping[int, Sequence[Bar]]) -> tuple[tuple[int, int], float, float]:
    """The first and last of some steps in the middle of what all ranks trained, their begin and their end. Where it can be,
    nothing else came between."""
    spans: list[dict[int, tuple[float, float]]] = []
    for each in bars.values():
        mine: dict[int, tuple[float, float]] = {}
        for bar in each:
            if bar.what == "training":
                begin, end = mine.get(bar.step, (bar.begin, bar.end))
                mine[bar.step] = min(begin, bar.begin), max(end, bar.end)
        spans.append(mine)
    steps = sorted(set.intersection(*map(set, spans))) if spans else []
    if not steps:
        raise UserError("trace: no step in it that all its ranks trained; train some steps first")
    other = [bar.begin for each in bars.values() for bar in each if bar.what in BETWEEN]

    def window(first: int, count: int) -> tuple[tuple[int, int], float, float]:
        last = max(step for step in steps if step < first + count)
        return (first, last), min(each[first][0] for each in spans), max(each[last][1] for each in spans)

    def unlike(choice: tuple[int, int]) -> tuple[bool, int, int, float]:
        """How far from what is wanted: in the middle half, little between its steps, many, in the very middle."""
        (first, last), begin, end = window(*choice)
        off = abs((first + last) / 2 - (steps[0] + steps[-1]) / 2)
        between = sum(begin < each < end for each in other)
        return off > (steps[-1] - steps[0]) / 4, between, first - last, off

    return window(*min(product(steps, STEPS), key=unlike))


def _paint_run(ax: Any, lane: int, shares: Sequence[tuple[float, Mapping[str, float]]], zero: float) -> None:
    """Stacked shares of a rank's time, upwards from its lane's foot."""
    if not shares:
        return
    starts = [(ts - zero) / 1e6 for ts, _ in shares]
    width = min((b - a for a, b in pairwise(starts)), default=1.0)
    foot = [lane + 0.8] * len(shares)
    for what in (each for each in LOOKS if each in shares[0][1]):
        heights = [0.8 * row[what] for _, row in shares]
        foot = [low - height for low, height in zip(foot, heights, strict=True)]
        ax.bar(starts, heights, width, foot, align="edge", color=LOOKS[what], linewidth=0)


def _paint_steps(ax: Any, lane: int, bars: Sequence[Bar], begin: float, end: float) -> None:
    """A rank's lane: what it did and waited for; beneath, when it sent what, with a line to when it found it complete."""
    width = end - begin
    for bar in bars:
        at, long = (bar.begin - begin) / 1e3, (bar.end - bar.begin) / 1e3
        if bar.what == "sending":
            ax.broken_barh([(at, long)], (lane + 0.7, 0.04), color=LOOKS["sending"], linewidth=0)
            ax.plot([at, at], [lane + 0.64, lane + 0.8], color=LOOKS["sending"], linewidth=1.6)
            continue
        edge = 0.6 if bar.end - bar.begin > width / 200 else 0.0  # else nothing would be left between the edges
        ax.broken_barh([(at, long)], (lane, 0.6), facecolor=LOOKS[bar.what], edgecolor="white", linewidth=edge)
        left, right = max(bar.begin, begin), min(bar.end, end)
        if bar.what == "training" and right - left > width / 40:
            ax.text(
                (left + right - 2 * begin) / 2e3, lane + 0.31, bar.step, ha="center", va="center", color="white", fontsize=8
            )
