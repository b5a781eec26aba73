"""NoProp-DT: discrete time, one block a step (eqs 3-8, algorithm 1). Block t maps (z_{t-1}, x) to û_t, its estimate of u_y."""

from __future__ import annotations

import torch
from torch import Tensor

from noprop_dist.config import MethodCard
from noprop_dist.method.base import Denoise, Denoising, Draw, Gamma, HeadLoss, Level, Noise, gaussian_prior_loss, over_chains
from noprop_dist.method.schedule import Schedule, posterior, snr


class Discrete(Denoising):
    """NoProp-DT for T blocks: see :class:`~noprop_dist.method.base.Method`."""

    def __init__(self, card: MethodCard, blocks: int) -> None:
        self.blocks = blocks
        self.alpha_bar = Schedule(card).levels(blocks)
        self._signal: list[float] = self.alpha_bar.sqrt().tolist()
        self._noise: list[float] = (1 - self.alpha_bar).sqrt().tolist()
        a, b, c = posterior(self.alpha_bar)
        self._a, self._b, self._sigma = a.tolist(), b.tolist(), c.sqrt().tolist()
        rise = snr(self.alpha_bar).diff()
        self._weight: list[float] = (
            blocks / 2 * card.eta * rise if card.loss_weight == "snr" else torch.ones_like(rise)
        ).tolist()

    def noised(self, t: int, u: Tensor, noise: Tensor) -> Tensor:
        """z_t ~ q(z_t|y) = N(√ᾱ_t·u, (1−ᾱ_t)I) for embeddings u and standard normal noise, both (B, d)."""
        return self._signal[t] * u + self._noise[t] * noise

    def draw(self, index: int, u: Tensor, seen: Tensor, gamma: Gamma | None = None) -> Draw:
        """Block t = index + 1 reads z_{t-1}; its term of eq 8 is (T/2)·η·(SNR(t)−SNR(t−1))·‖û−u‖²."""
        return Draw(self.noised(index, seen, torch.randn_like(seen)), None, u, self._weight[index])

    def level(self, time: float, gamma: Gamma | None = None) -> Level:
        """√ᾱ_t, 1−ᾱ_t."""
        alpha_bar = float(self.alpha_bar[round(time * self.blocks)])
        return Level(alpha_bar**0.5, 1 - alpha_bar)

    def extra_loss(
        self, output: Tensor, draw: Draw, u: Tensor, head_loss: HeadLoss, gamma: Gamma | None = None
    ) -> Tensor | float:
        """Nothing: cross-entropy and KL of eq 8 do not touch a block."""
        return 0.0

    def final_latent(self, u: Tensor, gamma: Gamma | None = None) -> Tensor:
        """z_T ~ q(z_T|y)."""
        return self.noised(self.blocks, u, torch.randn_like(u))

    def prior_loss(self, u: Tensor, gamma: Gamma | None = None) -> Tensor:
        """KL(q(z_0|y) ‖ N(0, I))."""
        return gaussian_prior_loss(u, self.alpha_bar[0])

    def advance(
        self, index: int, denoise: Denoise, paths: Tensor, noise: Noise, last: int, gamma: Gamma | None = None
    ) -> tuple[Tensor, Tensor]:
        """Step t of every path: z_t = a_t·û + b_t·z_{t-1} + √c_t·ε (no ε on the mean path)."""
        t, z = index + 1, paths[:-1]
        estimate = denoise(z, None).float()
        if t == last < self.blocks:
            z = estimate
        else:
            z = self._a[t] * estimate + self._b[t] * z
            if len(z) > 1:
                z[1:] += self._sigma[t] * noise(t)
        average = paths[-1:] + over_chains(estimate) / last
        return torch.cat([z, average]), estimate[0]
