"""What NoProp is measured against: networks with a block's interface that cross-entropy trains end to end.

Each is called with (card, shape (C, H, W), classes m). ``encode`` maps images (B, C, H, W) to features (B, F) and never sees z;
``denoise`` maps z_0 (B, d), those features and W (m, d) to z_T (B, d), which the label space's head reads. Gradients reach W.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from noprop_dist.config import Card, InferenceCard, UserError
from noprop_dist.method.solve import integrate
from noprop_dist.nets.backbones import Dropout, image_path
from noprop_dist.nets.block import Block
from noprop_dist.nets.labels import embedding_size
from noprop_dist.nets.precision import full

LIQUID_UNITS = 128
HEUN = InferenceCard(solver="heun")


class Backprop(nn.Module):
    """NoProp-DT's T blocks one after another: z_t = (1−α_t)·z_{t-1} + α_t·û_t(z_{t-1}, x), α_t = tanh(w_t) (eqs 17-19).

    The paper does not say where w_t starts. Here α_t = 1/(t+1): then z_T is the plain mean of z_0 and all û, and every block is
    equally close to the loss. (α = 0 would give blocks no gradient; a constant α would forget the early ones.)
    """

    gamma = None

    def __init__(self, card: Card, shape: tuple[int, int, int], classes: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(card, shape, classes) for _ in range(card.model.blocks))
        self.w = nn.Parameter(torch.atanh(1 / torch.arange(2.0, len(self.blocks) + 2)))

    def encode(self, x: Tensor) -> Tensor:
        """All blocks' features side by side, (B, T·width)."""
        return torch.cat([cast(Block, block).encode(x) for block in self.blocks], dim=1)

    def denoise(self, z: Tensor, features: Tensor, embedding: Tensor, time: Tensor | None = None) -> Tensor:
        """z_T (B, d) of z_0 = z."""
        parts = features.chunk(len(self.blocks), dim=1)
        for block, alpha, part in zip(self.blocks, torch.tanh(self.w), parts, strict=True):
            z = (1 - alpha) * z + alpha * cast(Block, block).denoise(z, part, embedding)
        return z


class Adjoint(Block):
    """A neural ODE: dz/dt = v(z, x, t) from z(0) = z to z(1), v being a block with time, as FM's.

    Its gradients come from the adjoint ODE, solved backwards, so memory hardly grows with the steps. Both take
    ``method.ode_steps`` equal steps by Heun, in training and inference alike; the image is encoded once. With 10 steps the
    gradients are within 0.3 % of those through the steps themselves, and a higher order gains nothing on a v made of ReLUs.
    The ODE is solved in float32, also under bf16: its many small steps are summed.
    """

    velocity = Block.denoise
    """v (B, d) at z (B, d) and times (B,), or (1,) for all."""

    def __init__(self, card: Card, shape: tuple[int, int, int], classes: int) -> None:
        super().__init__(card, shape, classes)
        self._steps = card.method.ode_steps

    def train(self, mode: bool = True) -> Adjoint:
        """As everywhere, but v has no dropout where z is an image: it must be one and the same function in all calls."""
        super().train(mode)
        self.label.eval()
        return self

    def denoise(self, z: Tensor, features: Tensor, embedding: Tensor, time: Tensor | None = None) -> Tensor:
        """z(1) (B, d) of z(0) = z."""
        features = features.float()

        def velocity(time: Tensor, z: Tensor) -> Tensor:
            return self.velocity(z, features, embedding, time.to(z).reshape(1))

        with full(z.device):
            if not torch.is_grad_enabled():
                return integrate(velocity, z, torch.linspace(0, 1, self._steps + 1, dtype=torch.float64), HEUN)
            from torchdiffeq import odeint_adjoint  # here, see method.solve

            # What v reads beside z and t: no part of the ODE's state, so torchdiffeq gives it no gradient without being told.
            inputs = [features, embedding, *(p for part in (self.label, self.time, self.fuse) for p in part.parameters())]
            times = torch.tensor([0.0, 1.0], device=z.device)  # with all steps' times, z would be kept at each
            options = {"step_size": 1 / self._steps}
            path: Tensor = odeint_adjoint(velocity, z, times, method="heun2", options=options, adjoint_params=inputs)
        return path[-1]


class Plain(nn.Module):
    """What looks at the image alone: ``encode`` does the work, and z, W and the time are not read.

    So ``model.embedding`` decides no more than d, the numbers that the head reads, and how the head starts; ``inference.path``
    and ``samples`` decide nothing.
    """

    gamma = None
    path: nn.Module
    last: nn.Module

    def encode(self, x: Tensor) -> Tensor:
        """Features (B, F) of images (B, C, H, W)."""
        features: Tensor = self.path(x)
        return features

    def denoise(self, z: Tensor, features: Tensor, embedding: Tensor, time: Tensor | None = None) -> Tensor:
        """z_T (B, d), whatever z is."""
        latent: Tensor = self.last(features)
        return latent


class CNN(Plain):
    """A plain image path: the backbone, FC256, batch norm, ReLU, dropout, FC d."""

    def __init__(self, card: Card, shape: tuple[int, int, int], classes: int) -> None:
        super().__init__()
        backbone, features, width = image_path(card.model, shape)
        norm = nn.BatchNorm1d(width)
        self.path = nn.Sequential(backbone, nn.Linear(features, width), norm, nn.ReLU(), Dropout(card.model.dropout))
        self.last = nn.Linear(width, embedding_size(card.model, shape, classes))


class Liquid(Plain):
    """A liquid network (closed-form continuous-time, CfC) of 128 units that reads the image row by row, from the top; FC d.

    ``model.backbone`` and ``dropout`` do nothing here. Raises UserError where ncps is not installed.
    """

    def __init__(self, card: Card, shape: tuple[int, int, int], classes: int) -> None:
        super().__init__()
        channels, _, columns = shape
        self.path = liquid_layer()(channels * columns, LIQUID_UNITS, return_sequences=False)
        self.last = nn.Linear(LIQUID_UNITS, embedding_size(card.model, shape, classes))

    def encode(self, x: Tensor) -> Tensor:
        """The state (B, 128) after the last of H rows of C·W pixels each."""
        state: Tensor = self.path(x.permute(0, 2, 1, 3).flatten(2))[0]
        return state


def liquid_layer() -> Callable[..., nn.Module]:
    """The class CfC of ncps, an extra that most runs do not need. Raises UserError where it is not installed."""
    try:
        from ncps.torch import CfC
    except ImportError:
        raise UserError("method.name: liquid needs ncps; pip install 'noprop_dist[baselines]'") from None
    return cast(Callable[..., nn.Module], CfC)


BASELINES: dict[str, Callable[[Card, tuple[int, int, int], int], nn.Module]] = {
    "backprop": Backprop,
    "cnn": CNN,
    "adjoint": Adjoint,
    "liquid": Liquid,
}
