"""Pictures of what a model does, from plain arrays: denoising, confusion, paths, embeddings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from noprop_dist.report.drawing import COLOURS, SEQUENTIAL, draw

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN = 10
"""Classes in a heat map of beliefs, at most: those most believed in."""
RIGHT, WRONG = COLOURS[2], COLOURS[1]


def denoising(
    images: Tensor, beliefs: Tensor, classes: Sequence[str], steps: Sequence[str], labels: Tensor | None = None
) -> Figure:
    """From noise to a label: beside each picture the probability of every class at every step.

    Args:
        images: uint8 (N, C, H, W).
        beliefs: probabilities (N, K, m).
        classes: their m names.
        steps: names of the K steps; the last one's belief is the answer.
        labels: the right classes (N,), marked where they are known.
    """
    columns = min(2, len(images))
    rows = math.ceil(len(images) / columns)
    tall = max(1.0, 0.17 * min(SHOWN, len(classes)) + 0.45)

    def paint(figure: Any) -> None:
        grid = figure.add_gridspec(rows, 2 * columns, width_ratios=[1.0, 2.6] * columns)
        for number, (image, belief) in enumerate(zip(images, beliefs, strict=True)):
            row, column = divmod(number, columns)
            left, right = (figure.add_subplot(grid[row, 2 * column + side]) for side in (0, 1))
            answer = int(belief[-1].argmax())
            label = None if labels is None else int(labels[number])
            show_picture(left, image)
            colour = "black" if label is None else RIGHT if label == answer else WRONG
            truth = "" if label in (None, answer) else f", is {shorten(classes[label])}"
            left.set_title(f"{shorten(classes[answer])} {float(belief[-1, answer]):.0%}{truth}", color=colour, fontsize=9)
            mesh = show_beliefs(right, belief, classes, steps if row == rows - 1 else (), label)
        figure.colorbar(mesh, ax=figure.axes, label="probability", shrink=min(1.0, 2 / rows + 0.2), pad=0.01)
        figure.supxlabel("what each step believes, from noise (left) to label", fontsize=9)

    return draw(5 * columns, tall * rows + 0.4, paint)


def show_picture(ax: Any, image: Tensor) -> None:
    """A uint8 (C, H, W) picture without axes."""
    pixels = image.permute(1, 2, 0).numpy()
    ax.imshow(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    ax.axis("off")


def show_beliefs(
    ax: Any, belief: Tensor, classes: Sequence[str], steps: Sequence[str], label: int | None = None, scale: float = 1.0
) -> Any:
    """A heat map of probabilities (K, m), classes upwards; a triangle points to the right one."""
    chosen = list(range(len(classes)))
    if len(classes) > SHOWN:
        peaks = belief.max(dim=0).values
        peaks[belief[-1].argmax()] = 2
        if label is not None:
            peaks[label] = 2
        chosen = sorted(peaks.topk(SHOWN).indices.tolist())
    mesh = ax.imshow(belief[:, chosen].T.numpy(), aspect="auto", vmin=0, vmax=1, cmap=SEQUENTIAL, interpolation="nearest")
    ax.grid(False)
    ax.set_yticks(range(len(chosen)), [shorten(classes[index]) for index in chosen], fontsize=7 * scale)
    every = math.ceil(len(steps) / 10) or 1
    ax.set_xticks(range(0, len(steps), every), list(steps)[::every], fontsize=7 * scale)
    if not steps:
        ax.set_xticks([])
    if label is not None:
        ax.get_yticklabels()[chosen.index(label)].set(color=RIGHT, fontweight="bold")
    return mesh


def confusion(counts: Tensor, classes: Sequence[str]) -> Figure:
    """How often pictures of each class (row) were named each class (column), from counts (m, m); the worst mistakes beneath."""
    table = counts.numpy()
    shares = table / np.maximum(1, table.sum(axis=1, keepdims=True))
    small = len(classes) <= 20
    side = 6.0 if small else 8.0

    def paint(figure: Any) -> None:
        ax = figure.subplots()
        mesh = ax.imshow(shares, cmap=SEQUENTIAL, vmin=0, vmax=1, interpolation="nearest")
        ax.grid(False)
        figure.colorbar(mesh, ax=ax, label="share of its class", shrink=0.8)
        every = 1 if small else math.ceil(len(classes) / 25)
        names = [shorten(name) for name in classes[::every]]
        ax.set_xticks(range(0, len(classes), every), names, rotation=90 if max(map(len, names)) > 3 else 0)
        ax.set_yticks(range(0, len(classes), every), names)
        ax.set(xlabel="named", ylabel="is")
        if small:
            for (row, column), count in np.ndenumerate(table):
                if count:
                    dark = shares[row, column] < 0.6
                    ax.text(column, row, count, ha="center", va="center", fontsize=7, color="white" if dark else "black")
        right = int(np.trace(table))
        ax.set_title(f"{right:,} of {int(table.sum()):,} right ({right / max(1, table.sum()):.2%}){_worst(table, classes)}")

    return draw(side, side * 0.92, paint)


def _worst(table: Any, classes: Sequence[str]) -> str:
    wrong = table * (1 - np.eye(len(table), dtype=table.dtype))
    order = np.argsort(-wrong, axis=None, kind="stable")[:3]
    places = [np.unravel_index(place, wrong.shape) for place in order]
    found = [f"{shorten(classes[row])} as {shorten(classes[column])} {wrong[row, column]}×" for row, column in places]
    found = [text for text, (row, column) in zip(found, places, strict=True) if wrong[row, column]]
    return f"\nmost often: {', '.join(found)}" if found else ""


def paths(
    routes: Sequence[Sequence[Any]], labels: Sequence[int], embedding: Any, classes: Sequence[str], kinds: Sequence[str]
) -> Figure:
    """How z travels to its class: paths in the plane, a panel for each kind (mean path, stochastic chain).

    Args:
        routes: for each kind, for each image, its points (K, 2).
        labels: the images' classes.
        embedding: the class embeddings in the same plane (m, 2).
    """

    def paint(figure: Any) -> None:
        axes = figure.subplots(1, len(kinds), sharex=True, sharey=True, squeeze=False)[0]
        for ax, kind, lines in zip(axes, kinds, routes, strict=True):
            for points, label in zip(lines, labels, strict=True):
                colour = COLOURS[label % len(COLOURS)]
                ax.plot(points[:, 0], points[:, 1], "-", color=colour, linewidth=1, alpha=0.6)
                ax.scatter(points[1:-1, 0], points[1:-1, 1], s=7, color=colour, linewidth=0)
                ax.scatter(*points[0], s=16, facecolor="white", edgecolor=colour, zorder=3)
                ax.scatter(*points[-1], s=26, color=colour, marker="s", zorder=3)
            ax.scatter(embedding[:, 0], embedding[:, 1], marker="*", s=70, color="0.35", zorder=2, linewidth=0)
            for index, name in enumerate(classes if len(classes) <= 30 else ()):
                ax.annotate(
                    shorten(name), embedding[index], xytext=(5, 5), textcoords="offset points", fontsize=9, fontweight="bold",
                    color=COLOURS[index % len(COLOURS)],
                )  # fmt: skip
            ax.set_title(kind)
            ax.set_aspect("equal", "datalim")
            ax.set_xlabel("first direction")
        axes[0].set_ylabel("second direction")
        figure.supxlabel("○ start   ● after each step   ■ end   ★ class embeddings W", fontsize=9)

    return draw(5 * len(kinds), 5.2, paint)


def embeddings(plane: Any, distances: Any, classes: Sequence[str]) -> Figure:
    """Class embeddings W: side by side in the plane of t-SNE (m, 2), and their Euclidean distances (m, m)."""

    def paint(figure: Any) -> None:
        left, right = figure.subplots(1, 2)
        left.scatter(plane[:, 0], plane[:, 1], s=22, color=COLOURS[0])
        size = 9 if len(classes) <= 20 else 6
        for point, name in zip(plane, classes, strict=True):
            left.annotate(shorten(name), point, xytext=(3, 3), textcoords="offset points", fontsize=size)
        left.set(title="t-SNE", xticks=[], yticks=[])
        left.margins(0.12)
        mesh = right.imshow(distances, cmap=SEQUENTIAL, vmin=0, interpolation="nearest")
        right.grid(False)
        right.set_title("distance between embeddings")
        every = math.ceil(len(classes) / 25)
        names = [shorten(name) for name in classes[::every]]
        right.set_xticks(range(0, len(classes), every), names, rotation=90 if max(map(len, names)) > 3 else 0, fontsize=7)
        right.set_yticks(range(0, len(classes), every), names, fontsize=7)
        figure.colorbar(mesh, ax=right, shrink=0.8)

    return draw(10, 4.6, paint)


def prototypes(before: Any, after: Any, classes: Sequence[str]) -> Figure:
    """Prototype embeddings as pictures (m, H, W, C), values 0 to 1: the medoids they began as, and what they are now."""
    count = min(len(classes), 20)
    columns = min(count, 10)
    bands = math.ceil(count / columns)

    def paint(figure: Any) -> None:
        axes = figure.subplots(2 * bands, columns, squeeze=False)
        for ax in axes.flat:
            ax.axis("off")
        for index in range(count):
            band, column = divmod(index, columns)
            for row, pictures in enumerate((before, after)):
                ax = axes[2 * band + row, column]
                ax.imshow(pictures[index].squeeze(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
                if row == 0:
                    ax.set_title(shorten(classes[index]), fontsize=9)
        figure.suptitle("above: the medoids that they began as; below: after training", fontsize=9)

    return draw(10, 2.3 * bands + 0.4, paint)


def shorten(name: str, most: int = 12) -> str:
    """A class name that fits beside an axis."""
    return name if len(name) <= most else f"{name[: most - 1]}…"
