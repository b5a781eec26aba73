"""The curves of a comparison as a picture: test accuracy against epochs and against seconds of training."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from noprop_dist.report.drawing import COLOURS, draw, save

STYLES = [(colour, dashes) for dashes, colour in product(("-", "--", ":", "-."), COLOURS)]


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
