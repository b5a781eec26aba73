"""NoProp-FM: flow matching (eqs 10-13, algorithm 3), one block for all of the time or one for each interval."""

from __future__ import annotations

import torch
from torch import Tensor

from noprop_dist.config import InferenceCard, MethodCard
from noprop_dist.method.base import Denoise, Draw, Gamma, HeadLoss, Level, Noise
from noprop_dist.method.intervals import Intervals
from noprop_dist.method.solve import Walk, integrate


class Flow:
    """NoProp-FM for K blocks: see :class:`~noprop_dist.method.base.Method`. A block reads z_t and t and answers v.

    ``anchored``: with learned W, a block's loss also holds −log p̂_out(y|z̃_1).
    """

    def __init__(self, card: MethodCard, inference: InferenceCard, blocks: int, *, anchored: bool) -> None:
        self._card, self._inference, self._anchored = card, inference, anchored
        self.intervals = Intervals(card, blocks)

    def draw(self, index: int, u: Tensor, seen: Tensor, gamma: Gamma | None = None) -> Draw:
        """t ~ U in the block's interval, z_t = t·z_1 + (1−t)·z_0 + σε; the loss is ‖v − (z_1−z_0)‖².

        Where ``seen`` is a wrong label's, z_t lies on the way to it, but the velocity asked for leads from z_0 to u.
        """
        time, _ = self.intervals.draw(index, u)
        z_0 = torch.randn_like(u)
        z = time[:, None] * seen + (1 - time[:, None]) * z_0
        if self._card.sigma:
            z = z + self._card.sigma * torch.randn_like(u)
        return Draw(z, time, u - z_0, 1.0)

    def estimate(self, output: Tensor, z: Tensor, time: Tensor | None) -> Tensor:
        """z̃_1 = z_t + (1−t)·v, where the velocity leads if it stays as it is."""
        assert time is not None
        return z + (1 - (time[:, None] if time.ndim else time)) * output

    def level(self, time: float, gamma: Gamma | None = None) -> Level:
        """t, (1−t)²+σ²."""
        return Level(time, (1 - time) ** 2 + self._card.sigma**2)

    def extra_loss(
        self, output: Tensor, draw: Draw, u: Tensor, head_loss: HeadLoss, gamma: Gamma | None = None
    ) -> Tensor | float:
        """The anchor −log p̂_out(y|z̃_1) (algorithm 3) where W is learned."""
        return head_loss(self.estimate(output.float(), draw.z, draw.time)) if self._anchored else 0.0

    def final_latent(self, u: Tensor, gamma: Gamma | None = None) -> Tensor:
        """z_1 + σε."""
        return u + self._card.sigma * torch.randn_like(u)

    def prior_loss(self, u: Tensor, gamma: Gamma | None = None) -> Tensor:
        """0: z_0 is N(0, I) itself."""
        return u.new_zeros(())

    def advance(
        self, index: int, denoise: Denoise, paths: Tensor, noise: Noise, last: int, gamma: Gamma | None = None
    ) -> tuple[Tensor, Tensor]:
        """Every path along dz/dt = v over the block's interval."""
        walk = Walk(denoise, self.estimate)
        grid, _ = self.intervals.grid(index, self._inference.steps)

        def velocity(time: Tensor, z: Tensor) -> Tensor:
            walk(time, z)
            return walk.output

        z = integrate(velocity, paths[:-1], grid, self._inference)
        return walk.finish(paths, z, self.intervals, index, last)
