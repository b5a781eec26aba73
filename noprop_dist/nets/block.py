"""A denoising block (figure 5): ``encode`` looks at the image, ``denoise`` at z (and time); they meet only there."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn

from noprop_dist.config import Card
from noprop_dist.method.schedule import LearnedSchedule
from noprop_dist.nets.backbones import image_path
from noprop_dist.nets.labels import embedding_size
from noprop_dist.nets.precision import full

TIME_FEATURES = 64


class Block(nn.Module):
    """One denoising block: image path, label path (with a residual in DT's), and the layers that fuse them.

    Args:
        card: the whole card: backbone, embedding, and the method, which decides three things. Blocks of DT have batch norm
            and no time (figure 5); those of CT and FM have time and no batch norm; FM's last layer weights the rows of W
            without a softmax, since a velocity is no mixture of embeddings.
        shape: (C, H, W) of the images.
        classes: m.
        interval: of time, which a learned schedule covers.
    """

    gamma: LearnedSchedule | None
    """CT: the block's own learned schedule."""

    def __init__(
        self, card: Card, shape: tuple[int, int, int], classes: int, interval: tuple[float, float] = (0.0, 1.0)
    ) -> None:
        super().__init__()
        model = card.model
        self._timed, self._mixes = card.method.name in ("ct", "fm", "adjoint"), card.method.name not in ("fm", "adjoint")
        backbone, features, width = image_path(model, shape)
        self.image = nn.Sequential(backbone, *self._linear(features, width, relu=False))
        size = embedding_size(model, shape, classes)
        if model.embedding != "one-hot" and size == math.prod(shape):  # z is an image
            path, features, _ = image_path(model, shape)
            self.label = nn.Sequential(nn.Unflatten(1, shape), path, *self._linear(features, width))
        else:
            self.label = nn.Sequential(*self._linear(size, width))
        if self._timed:
            self.time = nn.Sequential(nn.Linear(TIME_FEATURES, width), nn.ReLU())
        else:
            self.residual = nn.Sequential(*self._linear(width, width), *self._linear(width, width, relu=False))
        paths = 3 if self._timed else 2
        self.fuse = nn.Sequential(
            *self._linear(paths * width, width), *self._linear(width, width // 2), nn.Linear(width // 2, classes)
        )
        self.gamma = LearnedSchedule(card.method, *interval) if card.method.schedule == "learned" else None

    def encode(self, x: Tensor) -> Tensor:
        """Features (B, width) of images (B, C, H, W); does not see z."""
        return cast(Tensor, self.image(x))

    def denoise(self, z: Tensor, features: Tensor, embedding: Tensor, time: Tensor | None = None) -> Tensor:
        """û = softmax(logits)·W (FM: the velocity logits·W), float32 (B, d).

        From z (B, d), features (B, width), W = embedding (m, d) and, for CT and FM, time (B,) in [0, 1], or (1,) for all.
        """
        label = self.label(z)
        if self._timed:
            assert time is not None
            paths = [features, label, self.time(positional(time)).expand_as(features)]
        else:
            paths = [features, label + self.residual(label)]
        logits = self.fuse(torch.cat(paths, dim=1))
        with full(logits.device):
            weights = logits.float()
            return cast(Tensor, (weights.softmax(dim=1) if self._mixes else weights) @ embedding)

    def _linear(self, inputs: int, outputs: int, *, relu: bool = True) -> list[nn.Module]:
        norm = [] if self._timed else [nn.BatchNorm1d(outputs)]
        return [nn.Linear(inputs, outputs), *norm, *([nn.ReLU()] if relu else [])]


def positional(time: Tensor) -> Tensor:
    """The positional embedding of times (B,) in [0, 1], counted in thousandths: sines and cosines, (B, 64)."""
    half = TIME_FEATURES // 2
    frequencies = torch.exp(torch.arange(half, device=time.device) * (-math.log(10_000) / half))
    angles = 1000 * time[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)
