"""From uint8 pixels to what a network sees: random crops and flips, then normalisation, on the images' own device."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import v2

from noprop_dist.config import DataCard
from noprop_dist.data.info import DataInfo

Augment = Literal["none", "crop", "crop-flip"]
_AUTO: dict[str, Augment] = {
    "cifar10": "crop-flip",
    "cifar100": "crop-flip",
    "imagefolder": "crop-flip",
    "svhn": "crop",
}


def resolve_augment(card: DataCard) -> Augment:
    """``card.augment`` with "auto" replaced by what suits the data set (a mirrored digit is no digit)."""
    return _AUTO.get(card.name, "none") if card.augment == "auto" else card.augment


class Pixels:
    """The way of a batch of images into a network. Holds no state: the same numbers on every rank."""

    def __init__(self, card: DataCard, info: DataInfo) -> None:
        crop, flip = RandomCropEach(max(1, min(info.shape[1:]) // 8)), RandomFlipEach()
        steps = {"none": [v2.Identity()], "crop": [crop], "crop-flip": [crop, flip]}
        self._augment = v2.Compose(steps[resolve_augment(card)])
        self._info = info
        self._normalise = v2.Compose(
            [
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(list(info.mean), list(info.std)),
            ]
        )

    def augment(self, images: Tensor) -> Tensor:
        """Randomly moved and mirrored images, uint8 (B, C, H, W) as given; each image has its own draw.

        Draws from torch's global generator of the images' device. Seed that before: then the result
        is a pure function of the seed.
        """
        result: Tensor = self._augment(images)
        return result

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 (B, C, H, W) -> float32 (x/255 - mean) / std, per channel."""
        result: Tensor = self._normalise(images)
        return result

    def pictures(self, values: Tensor) -> Tensor:
        """The way back, of normalised pixels float32 (…, C·H·W): uint8 (…, C, H, W), cut off at black and white."""
        mean, std = (values.new_tensor(each)[:, None, None] for each in (self._info.mean, self._info.std))
        return ((values.view(*values.shape[:-1], *self._info.shape) * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)


# torchvision's own RandomCrop and RandomHorizontalFlip draw once for a whole batch.


class RandomCropEach(v2.Transform):  # type: ignore[misc]
    """Pad (B, C, H, W) images with ``padding`` zeros all around and cut a random (H, W) window out of each."""

    def __init__(self, padding: int) -> None:
        super().__init__()
        self.padding = padding

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        images: Tensor = flat_inputs[0]
        top, left = torch.randint(2 * self.padding + 1, (2, len(images)), device=images.device)
        return {"top": top, "left": left}

    def transform(self, inpt: Tensor, params: dict[str, Any]) -> Tensor:
        height, width = inpt.shape[-2:]
        windows = F.pad(inpt, (self.padding,) * 4).unfold(2, height, 1).unfold(3, width, 1)  # a view: B C top left H W
        return windows[torch.arange(len(inpt), device=inpt.device), :, params["top"], params["left"]]


class RandomFlipEach(v2.Transform):  # type: ignore[misc]
    """Mirror each of (B, C, H, W) images left to right with probability 1/2."""

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        images: Tensor = flat_inputs[0]
        return {"mirrored": torch.rand(len(images), device=images.device) < 0.5}

    def transform(self, inpt: Tensor, params: dict[str, Any]) -> Tensor:
        return torch.where(params["mirrored"][:, None, None, None], inpt.flip(-1), inpt)
