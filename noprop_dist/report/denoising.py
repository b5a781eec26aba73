"""From noise to a label, as a picture and as a film: what z tells of the class on its way, and what every block says."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from noprop_dist.report.drawing import COLOURS, SEQUENTIAL, draw, pixels, shorten
from noprop_dist.viewing import WATCHED, Course

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN = 10
"""Classes beside a picture, at most: those most believed in."""
STRIP = 5
"""Pictures of z beside an image, where z is one."""
TITLES = {
    "mean": "mean path: from z = 0, without noise",
    "stochastic": "stochastic chain: from noise, as in the paper",
}
RIGHT, WRONG = COLOURS[2], COLOURS[1]
HEARD = 0.05
"""Below that, a film shows no ring."""
FRAME, FIRST, LAST = 450, 1000, 2500
"""Milliseconds that a film's frames stay."""


def denoising(course: Course, classes: Sequence[str], path: str = "mean", most: int = 8) -> Figure:
    """From noise to a label: beside each image heat maps of what z tells of the class at every step, and of what û says.

    Args:
        classes: the m names.
        path: one of WATCHED.
        most: how many images to draw.
    """
    row = WATCHED.index(path)
    count, shown = min(most, len(course.images)), min(SHOWN, len(classes))
    steps, strip = len(course.steps), _strip(course)
    names = 0.12 + 0.066 * max(len(shorten(name)) for name in classes)
    band, left, gap, top, bottom = max(0.62, 0.098 * shown), 0.1, 0.28, 0.62, 0.5
    picture = band * min(2.0, course.images.shape[3] / course.images.shape[2])
    begin = left + (picture + 0.08) * (1 + len(strip)) + names
    width = max(9.0, begin + 1.05 + 1.8 * (2 * steps + 1) / max(1, steps))  # the headings want their room
    high = top + count * (band + gap) + bottom
    wide = (width - begin - 0.85 - 0.2) / (2 * steps + 1)  # a step's, in inches; the end has a column of its own

    def paint(figure: Any) -> None:
        def place(x: float, y: float, w: float, h: float) -> Any:
            return figure.add_axes((x / width, 1 - (y + h) / high, w / width, h / high))

        for number in range(count):
            y = top + gap + number * (band + gap) - 0.05
            chosen = _chosen(course, row, number)
            show_picture(place(left, y, picture, band), course.images[number])
            words, colour = _verdict(course, row, number, classes)
            figure.text(left / width, 1 - (y - 0.05) / high, words, fontsize=8.5, color=colour)
            for place_in_strip, step in enumerate(strip):
                assert course.pictures is not None
                x = left + (picture + 0.08) * (1 + place_in_strip)
                show_picture(place(x, y, picture, band), course.pictures[row, number, step])
            label = None if course.labels is None else int(course.labels[number])
            last = number == count - 1
            told = place(begin, y, wide * (steps + 1), band)
            mesh = _heat(told, course.told[row, number][:, chosen])
            told.set_yticks(range(len(chosen)), [shorten(classes[index]) for index in chosen], fontsize=6.5)
            if label in chosen:
                told.get_yticklabels()[chosen.index(label)].set(color=RIGHT, fontweight="bold")
            _ticks(told, [*course.steps, "end"] if last else [])
            if steps:
                said = place(begin + wide * (steps + 1) + 0.2, y, wide * steps, band)
                _heat(said, course.said[row, number][:, chosen])
                said.set_yticks([])
                _ticks(said, course.steps if last else [])
        discrete = _discrete(course)
        headings = [
            (begin, "what z tells of the class", "given to block" if discrete else "at time"),
            (begin + wide * (steps + 1) + 0.2, "what the block says (û)", "block" if discrete else "at time"),
        ]
        for x, above, below in headings if steps else [(begin, "the answer", "")]:
            figure.text(x / width, 1 - (top - 0.08) / high, above, fontsize=9, fontweight="bold")
            figure.text(x / width, 0.1 / high, below, fontsize=8)
        if strip:
            figure.text((left + picture + 0.08) / width, 1 - (top - 0.08) / high, "z", fontsize=9, fontweight="bold")
            for place_in_strip, step in enumerate(strip):
                x = left + (picture + 0.08) * (1 + place_in_strip) + picture / 2
                figure.text(x / width, 0.36 / high, [*course.steps, "end"][step], fontsize=7, ha="center")
        if steps:
            figure.text(left / width, 1 - 0.24 / high, TITLES[path], fontsize=10)
        colours = place(width - 0.65, top + gap, 0.12, min(2.0, count * (band + gap) - gap))
        figure.colorbar(mesh, cax=colours, label="probability")
        colours.tick_params(labelsize=7)

    return draw(width, high, paint, arrange=False)


def film(course: Course, classes: Sequence[str], path: str = "stochastic", most: int = 6) -> bytes:
    """A GIF of the same, step by step: bars of what z tells of the class, rings for what the block has said that made it."""
    from PIL import Image

    row, count = WATCHED.index(path), min(most, len(course.images))
    names = 0.12 + 0.066 * max(len(shorten(name)) for name in classes)
    columns = min(3 if names < 0.6 else 2, count)
    rows, steps, shown = math.ceil(count / columns), len(course.steps), min(SHOWN, len(classes))
    width, tall = 8.0, 0.11 * shown + 0.22
    high = rows * tall + 0.75
    images = 1 + (course.pictures is not None)
    side = 0.11 * shown if images == 1 else 0.62
    cell = width / columns
    updates: list[Any] = []

    def paint(figure: Any) -> None:
        def place(x: float, y: float, w: float, h: float) -> Any:
            return figure.add_axes((x / width, 1 - (y + h) / high, w / width, h / high))

        title = figure.text(0.1 / width, 1 - 0.27 / high, "", fontsize=11, fontweight="bold")
        figure.text(0.1 / width, 0.1 / high, "bars: what z tells of the class", fontsize=9, color=COLOURS[0])
        if steps:
            figure.text(2.7 / width, 0.1 / high, "○ what the last block said (û)", fontsize=9, color=COLOURS[1])
            figure.text(1 - 0.1 / width, 0.1 / high, TITLES[path], fontsize=9, color="0.4", ha="right")
        discrete = _discrete(course)
        parts: list[Any] = []
        for number in range(count):
            x, y = 0.1 + cell * (number % columns), 0.5 + tall * (number // columns)
            show_picture(place(x, y, side, side), course.images[number])
            latent = None
            if course.pictures is not None:
                latent = show_picture(place(x, y + side + 0.05, side, side), course.pictures[row, number, 0])
            chosen = _chosen(course, row, number)
            ax = place(x + side + names, y, cell - side - names - 0.25, 0.11 * shown)
            bars = ax.barh(range(len(chosen)), [0.0] * len(chosen), color=COLOURS[0], height=0.8)
            (rings,) = ax.plot([], [], "o", color=COLOURS[1], markersize=4.5, markerfacecolor="none", clip_on=False)
            ax.set(xlim=(0, 1), ylim=(len(chosen) - 0.5, -0.5), xticks=[])
            ax.set_yticks(range(len(chosen)), [shorten(classes[index]) for index in chosen], fontsize=7)
            ax.tick_params(length=0)
            if course.labels is not None and int(course.labels[number]) in chosen:
                ax.get_yticklabels()[chosen.index(int(course.labels[number]))].set(color=RIGHT, fontweight="bold")
            ax.grid(False)
            parts.append((chosen, bars, rings, latent))

        def update(step: int) -> None:
            place = [*course.steps, "the end"][step]
            begin = "noise" if path == "stochastic" else "z = 0"
            made = f"after block {course.steps[step - 1]}" if discrete else f"at time {place}"
            title.set_text(f"{begin}, before the first block" if not step else f"z {made}{', the answer' * (step == steps)}")
            for number, (chosen, bars, rings, latent) in enumerate(parts):
                for bar, share in zip(bars, course.told[row, number, step, chosen].tolist(), strict=True):
                    bar.set_width(share)
                if step:
                    said = course.said[row, number, step - 1, chosen]
                    heard = (said > HEARD).nonzero().flatten()
                    rings.set_data(said[heard].tolist(), heard.tolist())
                if latent is not None and course.pictures is not None:
                    latent.set_data(_pixels(course.pictures[row, number, step]))

        updates.append(update)

    figure = draw(width, high, paint, arrange=False)
    frames = []
    for step in range(steps + 1):
        updates[0](step)
        frames.append(Image.fromarray(pixels(figure, 100)))
    palette = frames[-1].quantize(64 if course.images.shape[1] == 1 else 128, Image.Quantize.MAXCOVERAGE)
    frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    buffer = io.BytesIO()
    shown_for = [FIRST, *[FRAME] * (steps - 1), LAST][: len(frames)]
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:], duration=shown_for, loop=0, optimize=True)
    return buffer.getvalue()


def show_picture(ax: Any, image: Tensor) -> Any:
    """A uint8 (C, H, W) picture without axes."""
    ax.axis("off")
    return ax.imshow(_pixels(image), cmap="gray", vmin=0, vmax=255, interpolation="nearest")


def _pixels(image: Tensor) -> Any:
    pixels = image.permute(1, 2, 0).numpy()
    return pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels


def _discrete(course: Course) -> bool:
    return not course.steps or "." not in course.steps[0]


def _strip(course: Course) -> list[int]:
    """Which z to show as pictures."""
    if course.pictures is None:
        return []
    last = len(course.steps)
    return sorted({round(last * place / (STRIP - 1)) for place in range(STRIP)})


def _chosen(course: Course, row: int, number: int) -> list[int]:
    """Classes to show: all, or those most believed in, with the answer and the right one."""
    peaks = torch.cat([course.told[row, number], course.said[row, number]]).max(dim=0).values
    peaks[course.answer[row, number].argmax()] = 2
    if course.labels is not None:
        peaks[course.labels[number]] = 2
    return sorted(peaks.topk(min(SHOWN, len(peaks))).indices.tolist())


def _verdict(course: Course, row: int, number: int, classes: Sequence[str]) -> tuple[str, str]:
    """The model's answer in words, and a colour."""
    share, answer = course.answer[row, number].max(dim=0)
    named = f"{shorten(classes[int(answer)])} {float(share):.0%}"
    if course.labels is None:
        return named, "black"
    label = int(course.labels[number])
    return (named, RIGHT) if label == answer else (f"{named}, is {shorten(classes[label])}", WRONG)


def _heat(ax: Any, beliefs: Tensor) -> Any:
    """Probabilities (K, classes), classes upwards."""
    ax.grid(False)
    return ax.imshow(beliefs.T.numpy(), aspect="auto", vmin=0, vmax=1, cmap=SEQUENTIAL, interpolation="nearest")


def _ticks(ax: Any, names: Sequence[str]) -> None:
    every = math.ceil(len(names) / 11) or 1
    kept = [place for place in range(0, len(names), every) if place < len(names) - 0.7 * every or place == len(names) - 1]
    kept = sorted({*kept, len(names) - 1}) if names and names[-1] == "end" else kept
    ax.set_xticks(kept, [names[place] for place in kept], fontsize=7)
