"""Digits that a reader knows, as people's pictures: on paper, in every mode and format that comes along."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from noprop_dist.data.memory import open_digits

INK, ON = 30, 255


@cache
def digit(number: int) -> Image.Image:
    """The first test image of this digit, white on black, 8×8."""
    images, labels = open_digits().test.load()
    return Image.fromarray(images[labels.tolist().index(number), 0].numpy())


def on_paper(
    drawn: Image.Image, size: tuple[int, int] = (300, 200), side: int = 120, at: tuple[int, int] = (150, 30), paper: int = ON
) -> Image.Image:
    """A drawing, white on black, in dark ink on a grey page: its upper left corner ``at``, ``side`` pixels wide and high."""
    page, ink = Image.new("L", size, paper), Image.new("L", (side, side), INK)
    page.paste(ink, at, drawn.resize((side, side), Image.Resampling.BICUBIC))
    return page


def transparent(ink: int) -> Image.Image:
    """A 3 in ink of this grey, and nothing behind it."""
    page = Image.new("RGBA", (300, 200), (ink, ink, ink, 0))
    page.putalpha(on_paper(digit(3)).point(lambda grey: 255 - grey if grey < 250 else 0))
    return page


def save_deep_png(path: Path, grey: Image.Image) -> None:
    """As a PNG of 16 bits a colour, which Pillow cannot write."""
    rows = np.repeat(np.asarray(grey, ">u2")[..., None] * 257, 3, axis=2)
    pixels = b"".join(b"\0" + row.astype(">u2").tobytes() for row in rows)
    header = struct.pack(">2I5B", *grey.size, 16, 2, 0, 0, 0)
    chunks = {b"IHDR": header, b"IDAT": zlib.compress(pixels), b"IEND": b""}
    parts = [
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks.items()
    ]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


def rotated(path: Path) -> None:
    """As a camera held sideways writes it: the pixels lie, EXIF tells how to stand them up."""
    exif = Image.Exif()
    exif[0x0112] = 6
    on_paper(digit(4)).rotate(90, expand=True).save(path, exif=exif)


def palette(path: Path) -> None:
    """Colour 0 is transparent, and black beneath."""
    page = on_paper(digit(5)).point(lambda grey: 0 if grey > 128 else 1, "L").convert("P")
    page.putpalette([0, 0, 0, 40, 40, 120])
    page.save(path, transparency=0)


def animated(path: Path) -> None:
    frames = [on_paper(digit(number)).convert("RGB") for number in (6, 1, 1)]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=50)


def floats(scale: float, hole: float | None = None) -> Image.Image:
    values = np.asarray(on_paper(digit(2)), np.float32) * np.float32(scale / 255)
    if hole is not None:
        values[0, 0] = hole
    return Image.fromarray(values)


GREY = np.asarray(on_paper(digit(7)))
ODD: dict[str, tuple[int | None, Callable[[Path], object]]] = {
    "dark on nothing.png": (3, lambda path: transparent(20).save(path)),
    "light on nothing.png": (3, lambda path: transparent(240).save(path)),
    "light on nothing.webp": (3, lambda path: transparent(240).save(path, lossless=True)),
    "grey and alpha.png": (3, lambda path: transparent(0).convert("LA").save(path)),
    "palette with a hole.png": (5, palette),
    "palette with a hole.gif": (5, palette),
    "16-bit grey.png": (7, lambda path: Image.fromarray(GREY.astype(np.uint16) * 257).save(path)),
    "16-bit grey, dim.tif": (7, lambda path: Image.fromarray(GREY.astype(np.uint16) * 257).save(path)),
    "32-bit grey.tif": (7, lambda path: Image.fromarray(GREY.astype(np.int32)).save(path)),
    "16-bit colour.png": (7, lambda path: save_deep_png(path, on_paper(digit(7)))),
    "floats to 1.tif": (2, lambda path: floats(1).save(path)),
    "floats to 255.tiff": (2, lambda path: floats(255).save(path)),
    "floats, one not a number.tiff": (2, lambda path: floats(1, np.nan).save(path)),
    "floats, one endless.tiff": (2, lambda path: floats(1, np.inf).save(path)),
    "one bit.png": (8, lambda path: on_paper(digit(8)).convert("1", dither=Image.Dither.NONE).save(path)),
    "CMYK.jpg": (9, lambda path: on_paper(digit(9)).convert("RGB").convert("CMYK").save(path)),
    "CMYK.tif": (9, lambda path: on_paper(digit(9)).convert("RGB").convert("CMYK").save(path)),
    "lying.jpg": (4, rotated),
    "moving.gif": (6, animated),
    "moving.webp": (6, animated),
    "UPPER.PNG": (0, lambda path: on_paper(digit(0)).save(path)),
    "mit Umlaut ä 数 \n zwei Zeilen.png": (0, lambda path: on_paper(digit(0)).save(path)),
    "old.bmp": (0, lambda path: on_paper(digit(0)).save(path)),
    "white on black.png": (1, lambda path: on_paper(digit(1)).point(lambda grey: 255 - grey).save(path)),
    "grey paper.png": (1, lambda path: on_paper(digit(1), paper=180).save(path)),
    "a strip.png": (2, lambda path: on_paper(digit(2), (3000, 40), 34, (2500, 3)).save(path)),
    "a tall strip.png": (2, lambda path: on_paper(digit(2), (40, 3000), 34, (3, 100)).save(path)),
    "8×8.png": (4, lambda path: digit(4).save(path)),
    "huge.png": (6, lambda path: on_paper(digit(6), (8000, 6000), 1500, (6000, 400)).save(path, compress_level=1)),
    "one pixel.png": (None, lambda path: Image.new("RGB", (1, 1), "red").save(path)),
    "two by nothing much.png": (None, lambda path: Image.new("L", (2, 5000), 7).save(path)),
    "Lab.tif": (None, lambda path: Image.new("LAB", (9, 9)).save(path)),
    "blank.png": (None, lambda path: Image.new("RGBA", (50, 50)).save(path)),
}
"""File names: the digit in them, where there is one, and how they come about."""


def claim(path: Path, side: int) -> None:
    """A small PNG that says it is ``side`` pixels wide and high."""
    digit(1).save(path)
    blob = path.read_bytes()
    header = b"IHDR" + struct.pack(">2I", side, side) + blob[24:29]
    path.write_bytes(blob[:12] + header + struct.pack(">I", zlib.crc32(header)) + blob[33:])


def cut_short(path: Path) -> None:
    on_paper(digit(1)).save(path)
    path.write_bytes(path.read_bytes()[:400])


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
BAD: dict[str, tuple[str, Callable[[Path], object]]] = {
    "empty.png": ("empty file", lambda path: path.write_bytes(b"")),
    "text.png": ("in no known format", lambda path: path.write_text("hello\nworld")),
    "cut short.png": ("truncated", cut_short),
    "half a head.jpg": ("in no known format", lambda path: path.write_bytes(b"\xff\xd8")),
    "a loop.png": ("symbolic links", lambda path: path.symlink_to(path)),
    "to nowhere.png": ("No such file", lambda path: path.symlink_to("nowhere")),
    "a gigapixel.png": ("more than 89,000,000 pixels", lambda path: claim(path, 32_000)),
    "a tenth of it.png": ("more than 89,000,000 pixels", lambda path: claim(path, 10_000)),
    "a program.png": ("in no known format", lambda path: path.write_bytes(POSTSCRIPT)),
}
"""Files that are no pictures, and what is to be said of them."""
