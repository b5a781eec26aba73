"""A picture of anyone's as a model wants it: any size and any mode of pixels.

>>> model.predict(read_picture(path, model.info)[None])  # int64 (1,)
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from noprop_dist.config import UserError
from noprop_dist.data.info import DataInfo

INKS = {"mnist": 20, "digits": 8, "kmnist": None, "fashion-mnist": None}
"""Data sets of bright things on a dark ground; where their ink was brought to one size, the side in pixels of its box."""
FAINT = 32
"""Grey levels between ground and ink below which nothing seems to be drawn."""


def read_picture(path: Path | str, info: DataInfo, *, as_is: bool = False) -> Tensor:
    """The picture in a file as uint8 (C, H, W), see :func:`to_pixels`. Raises UserError where it is none."""
    return to_pixels(open_picture(Path(path), max(info.shape[1:])), info, as_is=as_is)


def open_picture(path: Path, side: int = 0) -> Image.Image:
    """The (first) picture in a file, upright. A JPEG much larger than ``side`` pixels is decoded at a fraction of its size.

    Raises UserError where there is none, or it is damaged.
    """
    try:
        with Image.open(path) as file:
            if side:
                file.draft(None, (4 * side, 4 * side))
            return ImageOps.exif_transpose(file)  # reads the pixels
    except Image.DecompressionBombError:
        raise UserError(f"{path}: too many pixels ({Image.MAX_IMAGE_PIXELS:,} are allowed twice); scale it down") from None
    except Exception as error:  # Pillow raises a dozen kinds for a broken file
        why = getattr(error, "strerror", None) or str(error).split(" <")[0] or type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            why = "empty file" if path.stat().st_size == 0 else "not in a format of pictures"
        why = " ".join(why.replace(repr(str(path)), "it").split())
        raise UserError(f"{path}: not a readable picture ({why}); replace or remove it") from None


def to_pixels(picture: Image.Image, info: DataInfo, *, as_is: bool = False) -> Tensor:
    """A picture as the model of these data wants it: uint8 (C, H, W).

    Transparency is laid on white (light drawings: on black), deep colours are brought to 8 bits, grey is made from colours or
    the other way round. Then it is scaled to cover H×W and cut around its centre, as image folders are for training.

    Unless ``as_is``, what was drawn as for paper is made like these data: for MNIST and its kin, a picture with a bright border
    is inverted; for mnist and digits, the ink is also scaled to the size that it has there and centred, for mnist by
    its centre of mass. A picture of H×W pixels with a dark border is left as it is.
    """
    channels, height, width = info.shape
    picture = to_eight_bits(picture).convert("L" if channels == 1 else "RGB")
    if info.name in INKS and channels == 1 and not as_is:
        picture = _as_ink(picture, INKS[info.name], height, width, by_mass=info.name == "mnist")
    picture = cover(picture, height, width)
    return torch.from_numpy(np.array(picture).reshape(height, width, channels)).permute(2, 0, 1).contiguous()


def cover(picture: Image.Image, height: int, width: int) -> Image.Image:
    """Scaled so that it covers height×width, and cut around its centre."""
    if max(picture.size) > 8 * min(picture.size):  # most of a long strip would be scaled up to be thrown away
        side = 8 * min(picture.size)
        picture = F.center_crop(picture, [min(picture.height, side), min(picture.width, side)])
    ratio = max(height / picture.height, width / picture.width)
    size = [max(height, int(picture.height * ratio)), max(width, int(picture.width * ratio))]
    result: Image.Image = F.center_crop(F.resize(picture, size), [height, width])
    return result


def to_eight_bits(picture: Image.Image) -> Image.Image:
    """Grey or RGB of 8 bits a channel, opaque."""
    if picture.has_transparency_data:
        layer = picture.convert("RGBA")
        grey, alpha = (np.asarray(layer.convert("L"), np.float64), np.asarray(layer.getchannel("A"), np.float64))
        light = alpha.sum() > 0 and (grey * alpha).sum() / alpha.sum() > 127
        hidden = (alpha < 128).mean() > 0.25  # else the ground is that of the picture itself
        ground = Image.new("RGBA", layer.size, "black" if light and hidden else "white")
        return Image.alpha_composite(ground, layer).convert("RGB")
    if picture.mode.startswith(("I", "F")):
        return Image.fromarray(_squeezed(np.asarray(picture, np.float64), picture.mode))
    return picture if picture.mode == "L" else picture.convert("RGB")


def _squeezed(values: NDArray[np.float64], mode: str) -> NDArray[np.uint8]:
    """Integers of 16 bits and floats of 0 to 1 by their known range, others by the one that they have."""
    values = np.nan_to_num(values)
    low, high = float(values.min()), float(values.max())
    if low < 0 or high > 65535:
        low, high = low, max(high, low + 1)
    elif mode == "F" and high <= 1:
        low, high = 0.0, 1.0
    else:
        low, high = 0.0, 255.0 if high <= 255 and not mode.startswith("I;16") else 65535.0
    return np.rint((values - low) * (255 / (high - low))).astype(np.uint8)


def _as_ink(picture: Image.Image, box: int | None, height: int, width: int, *, by_mass: bool) -> Image.Image:
    pixels = np.asarray(picture, np.float64)
    ground = float(np.median(np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])))
    if ground <= 127 and picture.size == (width, height):
        return picture
    if ground > 127:
        pixels, ground = 255 - pixels, 255 - ground
    peak = float(pixels.max())
    if box is None or peak - ground < FAINT:
        return Image.fromarray(pixels.astype(np.uint8))
    ink = np.clip((pixels - ground) / (peak - ground), 0, 1)
    rows, columns = (np.flatnonzero((ink > 0.3).any(axis=axis)) for axis in (1, 0))
    drawn = Image.fromarray(np.rint(255 * ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]).astype(np.uint8))
    ratio = box / max(drawn.size)
    drawn = drawn.resize([max(1, round(side * ratio)) for side in drawn.size], Image.Resampling.BOX)
    centre = (drawn.width / 2, drawn.height / 2)
    if by_mass:
        weights = np.asarray(drawn, np.float64)
        places = np.indices(weights.shape) + 0.5
        centre = tuple((places[axis] * weights).sum() / weights.sum() for axis in (1, 0))
    frame = Image.new("L", (width, height))
    frame.paste(drawn, (round(width / 2 - centre[0]), round(height / 2 - centre[1])))
    return frame
