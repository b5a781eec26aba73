"""A picture of anyone's as a model wants it: any size and any mode of pixels.

>>> model.predict(read_picture(path, model.info)[None])  # int64 (1,)
"""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from noprop_dist.config import UserError
from noprop_dist.data.info import DataInfo

warnings.filterwarnings("ignore", module=r"PIL\.")  # of oddities that do no harm, and of sizes, which are checked here

FORMATS = (
    *("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "DIB", "ICO", "ICNS", "TGA"),
    *("PCX", "QOI", "SGI"),
)
"""What is read. Not all that Pillow knows: it hands an EPS, whatever its name, to Ghostscript, which runs it."""
PIXELS = 89_000_000
"""More are refused, for a small file can claim any number of them; Pillow itself warns from here on."""
INKS = {"mnist": 20, "digits": 8, "kmnist": None, "fashion-mnist": None}
"""Data sets of bright things on a dark ground; where their ink was brought to one size, the side in pixels of its box."""
PAGE = 1024
"""Pixels that a drawing's longer side keeps, at least, while its ink is looked for."""
FAINT = 32
"""Grey levels between ground and ink below which nothing seems to be drawn."""


def read_picture(path: Path | str, info: DataInfo, *, as_is: bool = False) -> Tensor:
    """The picture in a file as uint8 (C, H, W), see :func:`to_pixels`. Raises UserError where it is none."""
    side = PAGE if _is_drawing(info, as_is) else 2 * max(info.shape[1:])
    return to_pixels(open_picture(path, side), info, as_is=as_is)


def open_picture(path: Path | str, side: int) -> Image.Image:
    """The (first) picture in a file, upright and opaque, grey or RGB of 8 bits a channel.

    A JPEG much larger than ``side`` pixels is decoded at a fraction of its size: as good, in half the time.
    Raises UserError where there is none, or it is damaged.
    """
    try:
        with opened(path) as picture:
            picture.draft(None, (side, side))
            ImageOps.exif_transpose(picture, in_place=True)  # reads the pixels
            return to_eight_bits(picture)
    except Exception as error:
        raise UserError(unreadable(path, error)) from None


def opened(path: Path | str) -> ImageFile.ImageFile:
    """The picture in a file, of which only the header has been read. Raises what :func:`unreadable` can tell."""
    picture = Image.open(path, formats=_formats())
    if picture.width * picture.height > PIXELS:
        picture.close()
        raise Image.DecompressionBombError
    return picture


def endings() -> set[str]:
    """How the names of pictures end, in small letters."""
    known = _formats()
    return {ending for ending, kind in Image.EXTENSION.items() if kind in known}


def _formats() -> list[str]:
    Image.init()
    return [kind for kind in FORMATS if kind in Image.OPEN]  # AVIF, say, is not in every Pillow


def unreadable(path: Path | str, error: Exception) -> str:
    """What to tell of a picture at which Pillow raised ``error``: OSError, SyntaxError, struct.error, ..."""
    if isinstance(error, Image.DecompressionBombError):
        return f"{path}: more than {PIXELS:,} pixels; replace it by a smaller one"
    if isinstance(error, IsADirectoryError):
        return f"{path}: no picture in this folder; name one that holds some, or a file"
    why = getattr(error, "strerror", None) or str(error).split(" <")[0] or type(error).__name__
    if isinstance(error, UnidentifiedImageError):
        why = "in no known format" if Path(path).stat().st_size else "empty file"
    why = " ".join(why.replace(repr(str(path)), "it").split())
    return f"{path}: not a readable picture ({why}); replace or remove it"


def to_pixels(picture: Image.Image, info: DataInfo, *, as_is: bool = False) -> Tensor:
    """A picture as the model of these data wants it: uint8 (C, H, W), see :func:`fit`.

    Unless ``as_is``, what was drawn as for paper is made like these data: for MNIST and its kin, a picture with a bright border
    is inverted; for mnist and digits, the ink is also scaled to the size that it has there and centred, for mnist by
    its centre of mass. A picture of H×W pixels with a dark border is left as it is.
    """
    if _is_drawing(info, as_is):
        picture = _as_ink(to_eight_bits(picture).convert("L"), info)
    return fit(picture, info.shape)


def fit(picture: Image.Image, shape: tuple[int, int, int]) -> Tensor:
    """Scaled so that it covers H×W and cut around its centre, grey or RGB: uint8 (C, H, W)."""
    channels, height, width = shape
    picture = to_eight_bits(picture).convert("L" if channels == 1 else "RGB")
    if max(picture.size) > 8 * min(picture.size):  # most of a long strip would be scaled up to be thrown away
        side = 8 * min(picture.size)
        picture = F.center_crop(picture, [min(picture.height, side), min(picture.width, side)])
    size = [max(height, picture.height * width // picture.width), max(width, picture.width * height // picture.height)]
    pixels = np.array(F.center_crop(F.resize(picture, size), [height, width]))
    return torch.from_numpy(pixels.reshape(height, width, channels)).permute(2, 0, 1).contiguous()


def to_eight_bits(picture: Image.Image) -> Image.Image:
    """Grey or RGB of 8 bits a channel, opaque: transparency is laid on white, light drawings on black."""
    if picture.has_transparency_data:
        layer = picture.convert("RGBA")
        small = layer.reduce(max(1, max(layer.size) // 256))
        grey, alpha = (np.asarray(channel, np.float64) for channel in (small.convert("L"), small.getchannel("A")))
        light = (grey * alpha).sum() > 127 * alpha.sum()
        hidden = (alpha < 128).mean() > 0.25  # else the ground is that of the picture itself
        ground = Image.new("RGB", layer.size, "black" if light and hidden else "white")
        ground.paste(layer, mask=layer.getchannel("A"))
        return ground
    if picture.mode.startswith(("I", "F")):
        return Image.fromarray(_squeezed(np.array(picture, np.float32), picture.mode))
    return picture if picture.mode in ("L", "RGB") else picture.convert("L" if picture.mode == "1" else "RGB")


def _squeezed(values: NDArray[np.float32], mode: str) -> NDArray[np.uint8]:
    """Integers of 8 and 16 bits and floats of 0 to 1 or 255 by their known range, others by the one that they have, and 0.

    Overwrites ``values``: a large picture's are hundreds of megabytes.
    """
    finite = np.isfinite(values)
    low, high = (float(find(values, where=finite, initial=0)) for find in (np.min, np.max))
    if low >= 0:
        high = float(next((most for most in {"F": (1, 255), "I": (255, 65535)}.get(mode, (65535,)) if high <= most), high))
    np.nan_to_num(values, copy=False, nan=low, posinf=high, neginf=low)
    values -= low
    values *= 255 / max(high - low, 1e-9)
    return np.rint(values, out=values).astype(np.uint8)


def _is_drawing(info: DataInfo, as_is: bool) -> bool:
    return info.name in INKS and info.shape[0] == 1 and not as_is


def _as_ink(picture: Image.Image, info: DataInfo) -> Image.Image:
    """A grey drawing as one of these data, see :func:`to_pixels`."""
    box, (_, height, width) = INKS[info.name], info.shape
    picture = picture.reduce(max(1, max(picture.size) // PAGE))
    pixels = np.asarray(picture, np.float64)
    top, bottom, left, right = (float(np.median(edge)) for edge in (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]))
    bright = top + bottom + left + right > 4 * 127
    if not bright and picture.size == (width, height):
        return picture
    if bright:
        pixels, top, bottom, left, right = 255 - pixels, 255 - top, 255 - bottom, 255 - left, 255 - right
    if box is None:
        return Image.fromarray(pixels.astype(np.uint8))
    down, across = (np.linspace(-0.5, 0.5, side) for side in pixels.shape)  # light falls from one side: a photograph's does
    ground = (top + bottom + left + right) / 4 + (bottom - top) * down[:, None] + (right - left) * across
    ink = (pixels - ground).clip(0)
    if ink.max() < FAINT:
        return Image.new("L", (width, height))
    drawn = _cut_out(ink / ink.max(), box)
    middle = [side / 2 for side in drawn.size]
    if info.name == "mnist":
        mass = np.asarray(drawn, np.float64)
        middle = [float(np.average(np.arange(side) + 0.5, weights=mass.sum(axis))) for axis, side in enumerate(drawn.size)]
    places = [round(side / 2 - at) for side, at in zip((width, height), middle, strict=True)]
    x, y = (min(max(0, at), most) for at, most in zip(places, (width - drawn.width, height - drawn.height), strict=True))
    frame = Image.new("L", (width, height))
    frame.paste(drawn, (x, y))  # nothing is cut off
    return frame


def _cut_out(ink: NDArray[np.float64], box: int) -> Image.Image:
    """What is drawn, without specks of dust, its longer side scaled to ``box`` pixels; ``ink`` (H, W) from 0 to 1."""
    from scipy import ndimage  # type: ignore[import-untyped]  # here, for few need it

    parts, count = ndimage.label(ink > 0.3, np.ones((3, 3)))
    sizes = np.bincount(parts.ravel(), minlength=count + 1)
    sizes[0] = 0
    drawn = (sizes >= sizes.max() / 50)[parts]
    rows, columns = (np.flatnonzero(drawn.any(axis=axis)) for axis in (1, 0))
    whole = Image.fromarray((255 * ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]).astype(np.float32))
    ratio = box / max(whole.size)
    small = np.asarray(whole.resize([max(1, round(side * ratio)) for side in whole.size], Image.Resampling.BOX))
    return Image.fromarray(np.rint(small * (255 / small.max())).astype(np.uint8))
