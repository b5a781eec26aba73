"""Pictures of what a model does and is: confusion, paths of z, embeddings, prototypes, schedules."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from noprop_dist.config import Card
from noprop_dist.method.base import Level
from noprop_dist.method.intervals import cuts
from noprop_dist.method.schedule import Schedule, posterior, snr
from noprop_dist.report.drawing import COLOURS, SEQUENTIAL, draw, shorten
from noprop_dist.viewing import WATCHED, Course

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_CLASSES = 100
"""Classes in a table or a plane, at most."""


def confusion(named: Tensor, classes: Sequence[str]) -> Figure:
    """How often images of each class (row) were named each class (column); the worst mistakes above.

    ``named``: int64 (2, M), the right classes and the answers. Of more than MOST_CLASSES those most often confused are drawn.
    """
    truth, answers = named
    mistakes = named[:, truth != answers]
    chosen = torch.arange(len(classes))
    if len(classes) > MOST_CLASSES:
        chosen = mistakes.flatten().bincount(minlength=len(classes)).topk(MOST_CLASSES // 2).indices.sort().values
    places = torch.full((len(classes),), -1)
    places[chosen] = torch.arange(len(chosen))
    rows, columns = places[named][:, (places[named] >= 0).all(dim=0)]
    table = (rows * len(chosen) + columns).bincount(minlength=len(chosen) ** 2).view(len(chosen), -1).numpy()
    shares = table / truth.bincount(minlength=len(classes))[chosen].clamp(min=1)[:, None].numpy()
    shown = [classes[index] for index in chosen.tolist()]
    small = len(shown) <= 15
    side = 5.6 if small else 7.0
    right = truth.numel() - mistakes.shape[1]

    def paint(figure: Any) -> None:
        ax = figure.subplots()
        mesh = _table(ax, shares, shown, 0, 1)
        figure.colorbar(mesh, ax=ax, label="share of its class", shrink=0.8)
        ax.set(xlabel="named", ylabel="is")
        for (row, column), count in np.ndenumerate(table) if small else ():
            if count:
                colour = "white" if shares[row, column] < 0.6 else "black"
                ax.text(column, row, count, ha="center", va="center", fontsize=7, color=colour)
        part = f", the {len(shown)} classes most often confused" if len(shown) < len(classes) else ""
        title = f"{right:,} of {truth.numel():,} right ({right / truth.numel():.2%}){part}"
        ax.set_title(f"{title}\n{_worst(mistakes, classes)}".rstrip(), fontsize=9)

    return draw(side, side * 0.9, paint)


def _worst(mistakes: Tensor, classes: Sequence[str]) -> str:
    pairs, counts = torch.unique(mistakes, dim=1, return_counts=True)
    order = counts.argsort(descending=True, stable=True)[:3].tolist()
    found = [" as ".join(shorten(classes[index]) for index in pairs[:, place].tolist()) for place in order]
    texts = [f"{pair} {int(counts[place])}×" for pair, place in zip(found, order, strict=True)]
    return f"most often: {', '.join(texts)}" if texts else ""


def _table(ax: Any, values: Any, names: Sequence[str], low: float, high: float) -> Any:
    """A heat map of classes by classes; of many, some names stand beside it."""
    ax.grid(False)
    mesh = ax.imshow(values, cmap=SEQUENTIAL, vmin=low, vmax=high, interpolation="nearest")
    every = math.ceil(len(names) / 30)
    some = [shorten(name) for name in names[::every]]
    size = 8 if len(names) <= 15 else 6.5
    ax.set_xticks(range(0, len(names), every), some, rotation=90 if max(map(len, some)) > 3 else 0, fontsize=size)
    ax.set_yticks(range(0, len(names), every), some, fontsize=size)
    return mesh


def paths(course: Course, embedding: Tensor, classes: Sequence[str], most: int = 4) -> Figure:
    """How z travels to its class, on the mean path and on a stochastic chain, with the class embeddings W (m, d).

    Shows ``most`` images, of a class each, in the linear projection that puts these classes' embeddings on a circle. (Principal
    components of z would show its noise, and those of W are any two where embeddings are orthogonal.)
    """
    assert course.labels is not None
    first = {label: number for number, label in reversed([*enumerate(course.labels.tolist())])}
    shown = sorted(first)[:most]
    angles = torch.arange(len(shown), dtype=torch.float64) * (2 * math.pi / len(shown)) + math.pi / 4
    circle = torch.stack([angles.cos(), angles.sin()], dim=1)
    to_plane = torch.linalg.pinv(embedding[shown].double()) @ circle
    routes = course.z[:, [first[label] for label in shown]].double() @ to_plane
    titles = {"mean": "mean path: from z = 0", "stochastic": "stochastic chain: from noise"}

    def paint(figure: Any) -> None:
        axes = figure.subplots(1, len(WATCHED))
        for ax, kind, lines in zip(axes, WATCHED, routes, strict=True):
            for points, label, place, colour in zip(lines, shown, embedding[shown].double() @ to_plane, COLOURS, strict=False):
                ax.plot(*points.T, "-", color=colour, linewidth=1.2, alpha=0.8)
                ax.scatter(*points[1:-1].T, s=8, color=colour, linewidth=0)
                ax.scatter(*points[0], s=30, facecolor="white", edgecolor=colour, zorder=3)
                ax.scatter(*points[-1], s=30, color=colour, marker="s", zorder=3)
                ax.scatter(*place, marker="*", s=150, color=colour, zorder=4, edgecolor="white", linewidth=0.6)
                ax.annotate(shorten(classes[label]), place, xytext=(7, 5), textcoords="offset points", fontsize=11,
                            color=colour, fontweight="bold", zorder=5)  # fmt: skip
            ax.set(title=titles[kind], xticks=[], yticks=[])
            ax.set_aspect("equal", "datalim")
            ax.margins(0.12)
        note = "linear projection that puts these W on a circle"
        figure.supxlabel(f"○ start   • after each step   ■ end   ★ class embedding W        {note}", fontsize=9)

    return draw(9, 4.6, paint)


def embeddings(embedding: Tensor, classes: Sequence[str]) -> Figure:
    """Class embeddings W (m, d): side by side in the plane of t-SNE, and their Euclidean distances; of many, the first ones."""
    from sklearn.manifold import TSNE

    shown = list(classes)[:MOST_CLASSES]
    points = embedding[: len(shown)].double()
    distances = torch.cdist(points, points).numpy()
    start = "pca" if min(points.shape) > 2 else "random"
    plane = TSNE(perplexity=min(30.0, (len(shown) - 1) / 3), init=start, random_state=0).fit_transform(points.numpy())

    def paint(figure: Any) -> None:
        left, right = figure.subplots(1, 2)
        left.scatter(*plane.T, s=22, color=COLOURS[0], linewidth=0)
        for point, name in zip(plane, shown, strict=True):
            left.annotate(
                shorten(name), point, xytext=(3, 3), textcoords="offset points", fontsize=9 if len(shown) <= 20 else 6
            )
        left.set(title="t-SNE of W", xticks=[], yticks=[])
        left.grid(False)
        left.margins(0.14)
        off = distances[~np.eye(len(shown), dtype=bool)]
        mesh = _table(right, distances, shown, off.min(), off.max())
        right.set_title(f"distances between rows of W: {off.min():.2f} to {off.max():.2f}", fontsize=9)
        figure.colorbar(mesh, ax=right, shrink=0.8)
        if len(shown) < len(classes):
            figure.suptitle(f"the first {len(shown)} of {len(classes)} classes", fontsize=9)

    return draw(9, 4.2, paint)


def prototypes(before: Tensor | None, after: Tensor, classes: Sequence[str]) -> Figure:
    """Prototype embeddings as pictures, uint8 (m, C, H, W): the medoids that they began as, where known, and what they are."""
    count = min(len(classes), 20)
    columns = min(count, 10)
    bands = math.ceil(count / columns)
    kinds = [("medoid", before), ("now", after)] if before is not None else [("now", after)]

    def paint(figure: Any) -> None:
        axes = figure.subplots(len(kinds) * bands, columns, squeeze=False)
        for ax in axes.flat:
            ax.axis("off")
        for index in range(count):
            band, column = divmod(index, columns)
            for row, (kind, pictures) in enumerate(kinds):
                ax = axes[len(kinds) * band + row, column]
                image = pictures[index].permute(1, 2, 0).numpy()
                ax.imshow(image.squeeze(-1) if image.shape[-1] == 1 else image, cmap="gray", vmin=0, vmax=255,
                          interpolation="nearest")  # fmt: skip
                if row == 0:
                    ax.set_title(shorten(classes[index]), fontsize=8)
                if column == 0:
                    ax.text(-0.12, 0.5, kind, transform=ax.transAxes, rotation=90, va="center", ha="right", fontsize=8)
        if count < len(classes):
            figure.suptitle(f"the first {count} of {len(classes)} classes", fontsize=9)

    return draw(9, (0.86 * len(kinds) + 0.2) * bands + 0.15, paint)


def schedule(card: Card, gamma: Tensor | None, start: Tensor | None) -> Figure:
    """How the signal rises: ᾱ and SNR over time, DT's a, b and √c too.

    ``gamma`` and ``start``: a learned schedule, now and at its start, (2, P) times and γ.
    """
    method, blocks = card.method, card.model.blocks
    discrete = method.name == "dt"
    lines: list[tuple[str, str, Any, Any, Any]] = []  # name, style, times, ᾱ, SNR
    if discrete:
        levels = Schedule(method).levels(blocks)
        lines.append((method.schedule, "-", torch.arange(blocks + 1), levels, snr(levels)))
    elif method.name == "fm":
        times = torch.linspace(0, 0.99, 100)
        level = [Level(float(time), float((1 - time) ** 2 + method.sigma**2)) for time in times]
        signal, variance = torch.tensor(level).T
        lines.append(("flow", "-", times, signal**2, signal**2 / variance))
    elif gamma is None:
        times = torch.linspace(0, 1, 100)
        lines.append((method.schedule, "-", times, *_levels(Schedule(method).gamma(times))))
    else:
        lines += [("at its start", "--", start[0], *_levels(start[1]))] if start is not None else []
        lines.append(("learned", "-", gamma[0], *_levels(gamma[1])))

    def paint(figure: Any) -> None:
        axes = figure.subplots(1, 3 if discrete else 2)
        for number, (name, style, times, alpha_bar, ratio) in enumerate(lines):
            look: dict[str, Any] = {"color": COLOURS[len(lines) - 1 - number], "linestyle": style, "label": name}
            look |= {"marker": "o", "markersize": 3.5} if discrete and blocks <= 30 else {}
            axes[0].plot(times, alpha_bar, **look)
            axes[1].plot(times, ratio.clamp(min=1e-6), **look)
        axes[0].set(title="signal t²" if method.name == "fm" else "signal level ᾱ", ylim=(-0.03, 1.03))
        axes[1].set(title="signal-to-noise ratio", yscale="log")
        if discrete:
            steps = range(1, blocks + 1)
            a, b, c = posterior(levels)
            for (name, values), colour in zip(
                {"a, of û": a, "b, of z": b, "√c, of ε": c.sqrt()}.items(), COLOURS, strict=False
            ):
                axes[2].plot(steps, values[1:], color=colour, marker="o" if blocks <= 30 else "", markersize=3.5, label=name)
            axes[2].set(title="z = a·û + b·z + √c·ε", ylim=(-0.03, 1.03))
            axes[2].legend()
        for ax in axes:
            ax.set_xlabel("t" if discrete else "time")
            for end in cuts(method, blocks)[1:-1] if not discrete else ():
                ax.axvline(end, color="0.75", linewidth=0.8, linestyle=":")
        if len(lines) > 1:
            axes[0].legend()
        if not discrete and blocks > 1:
            figure.supxlabel("dotted: where one block's time ends and the next one's begins", fontsize=8)

    return draw(9, 3.0, paint)


def _levels(gamma: Tensor) -> tuple[Tensor, Tensor]:
    return torch.sigmoid(-gamma), torch.exp(-gamma)
