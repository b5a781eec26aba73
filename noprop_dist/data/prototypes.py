"""Starting values of prototype embeddings: each class's medoid image."""

from __future__ import annotations

import torch
from torch import Tensor

from noprop_dist.config import UserError
from noprop_dist.data.augment import Pixels
from noprop_dist.data.info import DataInfo, Split

TILE = 2**24
"""Numbers held at once of each kind: normalised pixels, and distances of some images to all of their class."""


def medoids(split: Split, info: DataInfo, pixels: Pixels) -> Tensor:
    """Of every class the image with the smallest median Euclidean distance to the others of its class: float32 (m, C·H·W),
    normalised and flattened.

    The median of an even number of distances is the lower of the two in the middle; among equals the first image wins. Beyond
    the split this holds one class as uint8 and some six tiles of float32 (64 MB each): 0.6 GB for 50,000 images of 3×32×32 in a
    single class. Time grows with the square of a class's size.
    """
    images, labels = split.load()
    found = []
    for label in range(len(info.classes)):
        members = images[labels == label]
        found.append(members[_medoid(members, pixels)])
    return pixels.normalise(torch.stack(found)).flatten(1)


def check_classes(split: Split, info: DataInfo) -> None:
    """Raises UserError naming a class without images, which can have no medoid."""
    missing = set(range(len(info.classes))) - set(split.labels.tolist())
    if missing:
        name = info.classes[min(missing)]
        raise UserError(f"model.embedding: prototype needs images of each class, {name} has none; use learned or one-hot")


def _medoid(images: Tensor, pixels: Pixels) -> int:
    """Which of uint8 images (N, C, H, W) it is."""
    pixels_each = images[0].numel()
    columns = max(1, TILE // pixels_each)
    rows = max(1, min(columns, TILE // len(images)))
    medians = []
    for first in range(0, len(images), rows):
        some = pixels.normalise(images[first : first + rows]).flatten(1)
        # By matrix products: normalised pixels are centred, so that float32 loses little when two large numbers nearly cancel.
        parts = [torch.cdist(some, pixels.normalise(others).flatten(1)) for others in torch.split(images, columns)]
        distances = torch.cat(parts, dim=1)
        distances.diagonal(first).fill_(torch.nan)  # an image is none of the others
        medians.append(distances.nanmedian(dim=1).values)
    return int(torch.cat(medians).argmin())
