"""Image paths: what a block sees of the image. A backbone maps (B, C, H, W) to (B, width) and never sees z."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional


class Dropout(nn.Module):
    """nn.Dropout with a cheaper mask on the CPU: one 64-bit draw decides four elements (p rounded to 1/65536).

    torch draws one 32-bit number an element there, which took a fifth of a block's training step.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.p:
            return x
        if x.device.type != "cpu":
            return functional.dropout(x, self.p)
        draws = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
        # in the memory order of x, be it channels_last or not
        bits = draws.view(torch.int16)[: x.numel()].as_strided(x.shape, x.stride())
        dropped = round(self.p * 65536)
        return x * ((bits >= dropped - 32768).to(x.dtype) * (65536 / (65536 - dropped)))

    def extra_repr(self) -> str:
        return f"p={self.p}"


class Backbone(nn.Sequential):
    """A named image path. ``width`` features come out; images need ``smallest`` pixels a side."""

    width: ClassVar[int]
    smallest: ClassVar[int]

    def __init__(self, shape: tuple[int, int, int], dropout: float) -> None:
        super().__init__(*self.layers(*shape, dropout))

    @classmethod
    def layers(cls, channels: int, height: int, width: int, dropout: float) -> list[nn.Module]:
        """The layers for images (C, H, W)."""
        raise NotImplementedError


def _conv(inputs: int, outputs: int, *, pool: bool, dropout: float, padding: int = 0) -> list[nn.Module]:
    layers: list[nn.Module] = [nn.Conv2d(inputs, outputs, 3, padding=padding), nn.ReLU()]
    return [*layers, *([nn.MaxPool2d(2)] if pool else []), Dropout(dropout)]


class PaperCNN(Backbone):
    """Figure 5's image path: unpadded 3×3 convolutions 32-64-128, pooled after the first and third, to 256 features."""

    width = 256
    smallest = 14

    @classmethod
    def layers(cls, channels: int, height: int, width: int, dropout: float) -> list[nn.Module]:
        """The layers for images (C, H, W)."""
        flat = 128 * math.prod(((side - 2) // 2 - 4) // 2 for side in (height, width))
        return [
            *_conv(channels, 32, pool=True, dropout=dropout),
            *_conv(32, 64, pool=False, dropout=dropout),
            *_conv(64, 128, pool=True, dropout=dropout),
            nn.Flatten(),
            nn.Linear(flat, cls.width),
            nn.BatchNorm1d(cls.width),
        ]


class SmallCNN(Backbone):
    """For tiny images such as 8×8 digits: padded 3×3 convolutions 32-64, one pooling, to 128 features."""

    width = 128
    smallest = 2

    @classmethod
    def layers(cls, channels: int, height: int, width: int, dropout: float) -> list[nn.Module]:
        """The layers for images (C, H, W)."""
        return [
            *_conv(channels, 32, pool=False, dropout=dropout, padding=1),
            *_conv(32, 64, pool=True, dropout=dropout, padding=1),
            nn.Flatten(),
            nn.Linear(64 * (height // 2) * (width // 2), cls.width),
            nn.BatchNorm1d(cls.width),
        ]


BACKBONES: dict[str, type[Backbone]] = {"paper-cnn": PaperCNN, "small-cnn": SmallCNN}
