"""A denoising block (figure 5): ``encode`` looks at the image, ``denoise`` at z; they meet only in ``denoise``."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from noprop_dist.config import ModelCard, UserError
from noprop_dist.nets.backbones import BACKBONES


def _linear(inputs: int, outputs: int, *, relu: bool = True) -> list[nn.Module]:
    return [nn.Linear(inputs, outputs), nn.BatchNorm1d(outputs), *([nn.ReLU()] if relu else [])]


class Block(nn.Module):
    """One denoising block: image path, label path with a residual, and the layers that fuse them.

    Args:
        backbone: image path, (B, C, H, W) to (B, width).
        width: features of the image path and of the label path.
        dim: d, size of z and of an embedding.
        classes: m.
    """

    def __init__(self, backbone: nn.Module, width: int, dim: int, classes: int) -> None:
        super().__init__()
        self.image = backbone
        self.label = nn.Sequential(*_linear(dim, width))
        self.residual = nn.Sequential(*_linear(width, width), *_linear(width, width, relu=False))
        self.fuse = nn.Sequential(*_linear(2 * width, width), *_linear(width, width // 2), nn.Linear(width // 2, classes))

    def encode(self, x: Tensor) -> Tensor:
        """Features (B, width) of images (B, C, H, W); does not see z."""
        return cast(Tensor, self.image(x))

    def denoise(self, z: Tensor, features: Tensor, embedding: Tensor) -> Tensor:
        """û = softmax(logits)·W, (B, d), from z (B, d), features (B, width) and W = embedding (m, d)."""
        label = self.label(z)
        logits = self.fuse(torch.cat([features, label + self.residual(label)], dim=1))
        with torch.autocast(logits.device.type, enabled=False):  # û stays in fp32
            return cast(Tensor, logits.float().softmax(dim=1) @ embedding)


def resolve_backbone(card: ModelCard, shape: tuple[int, int, int]) -> str:
    """The backbone's name, "auto" resolved. Raises UserError where the images (C, H, W) are too small for it."""
    side = min(shape[1:])
    name = card.backbone
    if name == "auto":
        name = "paper-cnn" if side >= BACKBONES["paper-cnn"].smallest else "small-cnn"
    if side < BACKBONES[name].smallest:
        raise UserError(
            f"model.backbone: {name} needs images of at least {BACKBONES[name].smallest} pixels a side, "
            f"these have {side}; use small-cnn"
        )
    return name


def build_block(card: ModelCard, shape: tuple[int, int, int], dim: int, classes: int) -> Block:
    """A block for images (C, H, W), with fresh weights from torch's global generator."""
    backbone = BACKBONES[resolve_backbone(card, shape)]
    return Block(backbone(shape, card.dropout), backbone.width, dim, classes)
