"""How every picture of the program looks, and how it becomes a file. matplotlib is imported here alone, and only when one is
drawn: that takes a second."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from noprop_dist.files import write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's, which colour-blind readers tell apart."""
SEQUENTIAL = "cividis"
"""The colour map of quantities: alike to all eyes, and in grey."""
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "0.9",
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.6,
    "image.cmap": SEQUENTIAL,
    "svg.hashsalt": "noprop_dist",  # the same picture, the same bytes
}


def draw(width: float, height: float, paint: Callable[[Any], None], *, arrange: bool = True) -> Figure:
    """A figure of so many inches that ``paint`` fills, in the program's style; without ``arrange`` it places them itself."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), dpi=150, layout="constrained" if arrange else None)
        FigureCanvasAgg(figure)  # no pyplot: it keeps figures, and may ask for a screen
        paint(figure)
        if arrange:  # once, for it takes longer than drawing
            figure.draw_without_rendering()
            figure.set_layout_engine("none")
    return figure


def shades(count: int) -> list[Any]:
    """So many colours from first to last, of SEQUENTIAL but its palest."""
    from matplotlib import colormaps

    return [colormaps[SEQUENTIAL](0.9 * index / max(1, count - 1)) for index in range(count)]


def render(figure: Figure, kind: str = "png") -> bytes:
    """The bytes of a PNG or SVG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, metadata={"Date": None} if kind == "svg" else None)
    return buffer.getvalue()


def pixels(figure: Figure, dpi: int) -> NDArray[np.uint8]:
    """The picture as it stands, (H, W, 3)."""
    figure.set_dpi(dpi)
    canvas = figure.canvas
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()  # type: ignore[attr-defined]


def save(figure: Figure, path: Path) -> None:
    """Write a picture of the kind that its name ends in. Raises UserError on a disk's refusal."""
    write(path, render(figure, path.suffix[1:]))


def shorten(name: str, most: int = 12) -> str:
    """A class name that fits beside an axis: of a long one its beginning and its end."""
    return name if len(name) <= most else f"{name[: most - 5]}…{name[-4:]}"
