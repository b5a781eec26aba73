"""Curves as pictures: a comparison's test accuracy against epochs and seconds of training, and all that a run measured."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from noprop_dist.chain import PATHS
from noprop_dist.report.drawing import COLOURS, draw, save, shades

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLES = [(colour, dashes) for dashes, colour in product(("-", "--", ":", "-."), COLOURS)]
Line = Mapping[int, float]
"""Values by step."""


def draw_curves(entries: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write a PNG: a line per card (an entry of table.json), the mean of its seeds; a band from the lowest to the highest."""
    save(draw(10, 4.2, lambda figure: _paint(figure, entries)), path)


def _paint(figure: Any, entries: Sequence[Mapping[str, Any]]) -> None:
    axes = figure.subplots(1, 2, sharey=True)
    lowest = []
    for entry, (colour, dashes) in zip(entries, STYLES * len(entries), strict=False):
        points = _points(entry)
        if not points:
            continue
        means = [point["mean"] for point in points]
        lowest.append(statistics.median(means))
        for ax, x in zip(axes, ("epoch", "seconds"), strict=True):
            places = [point[x] for point in points]
            marker = "o" if len(points) < 15 else ""
            ax.plot(
                places, means, color=colour, linestyle=dashes, marker=marker, markersize=4, linewidth=2, label=entry["card"]
            )
            ax.fill_between(
                places,
                [point["low"] for point in points],
                [point["high"] for point in points],
                color=colour,
                alpha=0.18,
                linewidth=0,
            )
    for ax, title in zip(axes, ("epochs", "seconds of training"), strict=True):
        ax.set_xlabel(title)
        ax.set_xlim(left=0)
    axes[0].set_ylabel("test accuracy, %")
    if lowest:  # the first evaluations of a slow start would squeeze all that matters into a corner
        top = min(axes[0].get_ylim()[1], 100.2)
        axes[0].set_ylim(max(axes[0].get_ylim()[0], min(lowest) - (top - min(lowest)) / 2), top)
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)))


def _points(entry: Mapping[str, Any]) -> list[dict[str, float]]:
    """Of every step that all seeds evaluated: epoch, mean seconds, and the mean, lowest and highest accuracy, in %."""
    curves = [{point["step"]: point for point in summary["curve"]} for summary in entry["seeds"].values()]
    points = []
    for step in sorted(set.intersection(*map(set, curves))) if curves else ():
        here = [curve[step] for curve in curves]
        accuracies = [100 * point[entry["path"]] for point in here]
        points.append(
            {
                "epoch": here[0]["epoch"],
                "seconds": statistics.fmean(point["seconds"] for point in here),
                "mean": statistics.fmean(accuracies),
                "low": min(accuracies),
                "high": max(accuracies),
            }
        )
    return points


def run_curves(losses: Mapping[int, Line], guesses: Mapping[int, Line], chain: Mapping[str, Line]) -> Figure:
    """Of a run: each block's loss, the test accuracy of each block's û, and that of the chain by each of PATHS."""
    panels = {"loss of each block": losses, "test accuracy of each block's û, %": guesses}
    panels = {title: lines for title, lines in panels.items() if lines}

    def paint(figure: Any) -> None:
        axes = figure.subplots(1, len(panels) + 1, sharex=True, squeeze=False)[0]
        for ax, (title, lines) in zip(axes, panels.items(), strict=False):
            every = -(-len(lines) // 10)
            for (index, line), shade in zip(lines.items(), shades(len(lines)), strict=True):
                label = str(index) if index % every == 0 else None
                _plot(ax, line, 100 if lines is guesses else 1, color=shade, linewidth=1.2, label=label)
            ax.set_title(title)
        if losses and all(value > 0 for line in losses.values() for value in line.values()):
            axes[0].set_yscale("log")
        for path, colour, dashes in zip(PATHS, COLOURS, ("-", "--", ":"), strict=False):
            _plot(axes[-1], chain.get(path, {}), 100, color=colour, linestyle=dashes, label=path)
        axes[-1].set_title("test accuracy of the chain, %")
        axes[-1].legend()
        for ax in axes:
            ax.set(xlabel="step", xlim=(0, None))
            ax.locator_params(axis="x", nbins=5, integer=True)
        if panels:
            handles, labels = axes[0].get_legend_handles_labels()
            figure.legend(handles, labels, title="block", loc="outside left center", handlelength=1)

    return draw(10, 3.2, paint)


def _plot(ax: Any, line: Line, scale: float, **look: Any) -> None:
    marker = "o" if len(line) < 15 else ""
    ax.plot(sorted(line), [scale * line[step] for step in sorted(line)], marker=marker, markersize=3, **look)
