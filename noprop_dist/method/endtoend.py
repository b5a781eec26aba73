"""Baselines: one network carries z_0 to z_T, and cross-entropy at the head trains all of it (eqs 17-19 for the same blocks)."""

from __future__ import annotations

import torch
from torch import Tensor

from noprop_dist.method.base import Denoise, Denoising, Gamma, Noise, over_chains


class EndToEnd(Denoising):
    """The chain of one network whose output is z_T itself: see :class:`~noprop_dist.method.base.Chain`."""

    def advance(
        self, index: int, denoise: Denoise, paths: Tensor, noise: Noise, last: int, gamma: Gamma | None = None
    ) -> tuple[Tensor, Tensor]:
        """Every path from z_0 to z_T; û and the average are z_T itself."""
        z = denoise(paths[:-1], None).float()
        return torch.cat([z, paths[-1:] + over_chains(z)]), z[0]
