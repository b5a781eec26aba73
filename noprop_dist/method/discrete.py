"""NoProp-DT: discrete time, one block a step (eqs 3-8, algorithm 1).

Blocks are numbered t = 1…T as in the paper; block t maps (z_{t-1}, x) to û_t, its estimate of the label's embedding u_y.

At inference several chains run side by side as *paths*, a float (1 + S + 1, B, d) tensor:
row 0 is the mean path (z_0 = 0, no noise), rows 1…S are stochastic chains (the paper's), and the last row gathers
the mean of all û along the stochastic chains.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from noprop_dist.config import MethodCard
from noprop_dist.method import schedule


class Discrete:
    """The mathematics of NoProp-DT for T blocks. Pure: holds the schedule, draws nothing by itself."""

    def __init__(self, card: MethodCard, blocks: int) -> None:
        self.blocks = blocks
        self.alpha_bar = schedule.cosine(blocks, card.alpha_min, card.alpha_max)
        self._signal: list[float] = self.alpha_bar.sqrt().tolist()
        self._noise: list[float] = (1 - self.alpha_bar).sqrt().tolist()
        a, b, c = schedule.posterior(self.alpha_bar)
        self._a, self._b, self._sigma = a.tolist(), b.tolist(), c.sqrt().tolist()
        rise = schedule.snr(self.alpha_bar).diff()
        self._weight: list[float] = (
            blocks / 2 * card.eta * rise if card.loss_weight == "snr" else torch.ones_like(rise)
        ).tolist()

    def noised(self, t: int, u: Tensor, noise: Tensor) -> Tensor:
        """z_t ~ q(z_t|y) = N(√ᾱ_t·u, (1−ᾱ_t)I) for embeddings u and standard normal noise, both (B, d)."""
        return self._signal[t] * u + self._noise[t] * noise

    def training_input(self, t: int, u: Tensor) -> Tensor:
        """What block t reads while training: z_{t-1} ~ q(z_{t-1}|y), drawn from torch's global generator; (B, d)."""
        return self.noised(t - 1, u, torch.randn_like(u))

    def final_latent(self, u: Tensor) -> Tensor:
        """What the head reads while training: z_T ~ q(z_T|y), drawn from torch's global generator; (B, d)."""
        return self.noised(self.blocks, u, torch.randn_like(u))

    def loss(self, t: int, estimate: Tensor, u: Tensor) -> Tensor:
        """Block t's term of eq 8, (T/2)·η·(SNR(t)−SNR(t−1))·‖û−u‖², averaged over the batch; scalar."""
        return self._weight[t - 1] * (estimate.float() - u).square().sum(dim=1).mean()

    def start(self, noise: Tensor) -> Tensor:
        """Paths at t = 0 from standard normal noise (S, B, d)."""
        zero = torch.zeros_like(noise[:1])
        return torch.cat([zero, noise, zero])

    def advance(
        self, t: int, denoise: Callable[[Tensor], Tensor], paths: Tensor, noise: Tensor, last: int
    ) -> tuple[Tensor, Tensor]:
        """Step t of every path: z_t = a_t·û + b_t·z_{t-1} + √c_t·ε.

        ``denoise`` maps (1 + S, B, d) latents to estimates of the same shape; noise is (S, B, d). ``last`` is the last block
        used: at an early exit (last < T) its û itself becomes the result, being what the head expects to read.
        Returns the new paths and û on the mean path (B, d).
        """
        z = paths[:-1]
        estimate = denoise(z).float()
        if t == last < self.blocks:
            z = estimate
        else:
            z = self._a[t] * estimate + self._b[t] * z
            z[1:] += self._sigma[t] * noise
        average = paths[-1:] + estimate[1:].mean(dim=0, keepdim=True) / last
        return torch.cat([z, average]), estimate[0]
