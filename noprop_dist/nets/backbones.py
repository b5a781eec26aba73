"""Image paths: what a block sees of the image.

A backbone is an nn.Module class called with (shape, dropout), where shape is an image's (C, H, W); it maps float images
(B, C, H, W) to float32 features (B, F). It serves z as well, where embeddings have the image's size. Optional class attributes:
``width``, the features of the block's own layers (default 256), and ``smallest``, the least pixels a side.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision import models

from noprop_dist.config import ModelCard, UserError
from noprop_dist.nets.own import explained, load_class


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


def _conv(inputs: int, outputs: int, *, pool: bool, dropout: float, padding: int = 0, stride: int = 1) -> list[nn.Module]:
    """Convolution, ReLU, dropout. After the pooling, ReLU has the same values and gradients as before it, a quarter of them."""
    convolution = nn.Conv2d(inputs, outputs, 3, stride, padding)
    return [convolution, *([nn.MaxPool2d(2)] if pool else []), nn.ReLU(), Dropout(dropout)]


class FlattenLast(nn.Module):
    """(B, C, H, W) to (B, H·W·C): of channels_last tensors a view, where nn.Flatten's order would take a copy, and lead the way
    back through two memory formats at once: a tenth of a small block's step."""

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1).flatten(1)


class PaperCNN(nn.Sequential):
    """Figure 5's image path: unpadded 3×3 convolutions 32-64-128, pooled after the first and third."""

    smallest = 14

    def __init__(self, shape: tuple[int, int, int], dropout: float) -> None:
        super().__init__(
            *_conv(shape[0], 32, pool=True, dropout=dropout),
            *_conv(32, 64, pool=False, dropout=dropout),
            *_conv(64, 128, pool=True, dropout=dropout),
            nn.Flatten(),
        )


class SmallCNN(nn.Sequential):
    """For tiny images such as 8×8 digits: padded 3×3 convolutions 32-64, one pooling."""

    width = 128
    smallest = 2

    def __init__(self, shape: tuple[int, int, int], dropout: float) -> None:
        super().__init__(
            *_conv(shape[0], 32, pool=False, dropout=dropout, padding=1),
            *_conv(32, 64, pool=True, dropout=dropout, padding=1),
            nn.Flatten(),
        )


class StridedCNN(nn.Sequential):
    """About the paper's parameters at a seventh of its work, for slow devices: padded 3×3 convolutions 32-48 of stride 2."""

    smallest = 4

    def __init__(self, shape: tuple[int, int, int], dropout: float) -> None:
        super().__init__(
            *_conv(shape[0], 32, pool=False, dropout=dropout, padding=1, stride=2),
            *_conv(32, 48, pool=False, dropout=dropout, padding=1, stride=2),
            FlattenLast(),
        )


class MLP(nn.Sequential):
    """No convolution: the pixels in a row, then two hidden layers of 512."""

    def __init__(self, shape: tuple[int, int, int], dropout: float) -> None:
        super().__init__(
            *(nn.Flatten(), nn.Linear(math.prod(shape), 512), nn.ReLU(), Dropout(dropout)),
            *(nn.Linear(512, 512), nn.ReLU(), Dropout(dropout)),
        )


class ResNet18(nn.Module):
    """torchvision's ResNet up to its pooled features, with dropout on them. Images of up to 64 pixels a side get the stem usual
    for CIFAR, one 3×3 convolution and no pooling: ImageNet's would leave 1/32 of each side."""

    plan = "resnet18"

    def __init__(self, shape: tuple[int, int, int], dropout: float) -> None:
        super().__init__()
        self.net = models.get_model(self.plan, weights=None)
        small = min(shape[1:]) <= 64
        size, stride, padding = (3, 1, 1) if small else (7, 2, 3)
        self.net.conv1 = nn.Conv2d(shape[0], 64, size, stride, padding, bias=False)
        nn.init.kaiming_normal_(self.net.conv1.weight, mode="fan_out", nonlinearity="relu")  # as all its others
        if small:
            self.net.maxpool = nn.Identity()
        self.net.fc = Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.net(x))


class ResNet34(ResNet18):
    """The same, 34 layers deep."""

    plan = "resnet34"


class ResNet50(ResNet18):
    """The same, 50 layers deep, by bottlenecks: 2048 features."""

    plan = "resnet50"


class TinyViT(nn.Module):
    """A vision transformer, DeiT's tiny one at half its depth: 6 layers, 3 heads, 192 features, the mean over patches.

    Patches are an eighth of the shorter side, from 2 to 16 pixels: 4 for 28×28 and 32×32. Sides that they do not divide are
    padded with 0, the mean colour.
    """

    def __init__(self, shape: tuple[int, int, int], dropout: float) -> None:
        super().__init__()
        channels, *sides = shape
        patch = min(16, max(2, math.ceil(min(sides) / 8)))
        height, width = (-side % patch for side in sides)
        self.pad = nn.ZeroPad2d((0, width, 0, height))
        self.patches = nn.Conv2d(channels, 192, patch, patch)
        count = math.prod(math.ceil(side / patch) for side in sides)
        self.positions = nn.Parameter(nn.init.normal_(torch.empty(count, 192), std=0.02))
        layer = functools.partial(
            nn.TransformerEncoderLayer, 192, 3, 4 * 192, dropout, "gelu", batch_first=True, norm_first=True
        )
        # nn.TransformerEncoder would start all of them with the same weights
        self.layers = nn.Sequential(*(layer() for _ in range(6)), nn.LayerNorm(192))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(self.pad(x)).flatten(2).transpose(1, 2) + self.positions
        return cast(Tensor, self.layers(tokens)).mean(dim=1)


BACKBONES: dict[str, type[nn.Module]] = {
    "paper-cnn": PaperCNN,
    "small-cnn": SmallCNN,
    "strided-cnn": StridedCNN,
    "mlp": MLP,
    "resnet18": ResNet18,
    "resnet34": ResNet34,
    "resnet50": ResNet50,
    "vit-tiny": TinyViT,
}
"""By name; the names are config.BACKBONE_NAMES."""
WIDTH = 256
"""Features of a block's paths, where its backbone does not say otherwise (figure 5's)."""


def resolve_backbone(name: str, shape: tuple[int, int, int]) -> str:
    """The backbone's name, "auto" resolved. Raises UserError where images (C, H, W) are too small for it or, for a user's own
    class, where it does not do what a backbone has to."""
    name, kind = _choose(name, shape)
    if name not in BACKBONES:
        _features(name, kind, shape, 0.0)
    return name


def image_path(card: ModelCard, shape: tuple[int, int, int]) -> tuple[nn.Module, int, int]:
    """A fresh backbone for images (C, H, W), how many features it gives, and the width: the card's, else what it asks for.

    Raises UserError as :func:`resolve_backbone` does.
    """
    name, kind = _choose(card.backbone, shape)
    features = _features(name, kind, shape, card.dropout)
    width: int = getattr(kind, "width", WIDTH) if card.width is None else card.width
    return kind(shape, card.dropout), features, width


def _choose(name: str, shape: tuple[int, int, int]) -> tuple[str, Callable[..., nn.Module]]:
    side = min(shape[1:])
    if name == "auto":
        name = "paper-cnn" if side >= PaperCNN.smallest else "small-cnn"
    kind: Callable[..., nn.Module] = BACKBONES.get(name) or load_class(name)
    smallest = getattr(kind, "smallest", 1)
    if side < smallest:
        raise UserError(
            f"model.backbone: {name} needs images of at least {smallest} pixels a side, these have {side};"
            f" use {'small-cnn' if side >= SmallCNN.smallest else 'mlp'}"
        )
    return name, kind


@functools.cache  # once for all blocks: a ResNet's forward pass is no trifle
def _features(name: str, kind: Callable[..., nn.Module], shape: tuple[int, int, int], dropout: float) -> int:
    """F, tried out on zeros with a backbone of its own, so that neither random numbers nor statistics move."""
    with torch.random.fork_rng([]):
        with explained(name, f"calling it with ({shape}, {dropout})", "a backbone is made from (shape, dropout)"):
            backbone = kind(shape, dropout).eval()
        device = next((parameter.device for parameter in backbone.parameters()), None)
        x = torch.zeros(2, *shape, device=device)
        with explained(name, f"its forward of {tuple(x.shape)}", "it has to take images (B, C, H, W)"), torch.no_grad():
            features = backbone(x)
    if not (isinstance(features, Tensor) and (features.ndim, len(features), features.dtype) == (2, 2, x.dtype)):
        found = f"{features.dtype} {tuple(features.shape)}" if isinstance(features, Tensor) else type(features).__name__
        raise UserError(
            f"model.backbone: {name}: its forward of {tuple(x.shape)} gives {found}, not features {x.dtype} (2, F); mend that"
        )
    return features.shape[1]
