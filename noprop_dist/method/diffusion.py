"""NoProp-CT: continuous time (eq 9, algorithm 2), one block for all of it or one for each interval."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from noprop_dist.config import InferenceCard, MethodCard
from noprop_dist.method.base import Denoise, Denoising, Draw, Gamma, HeadLoss, Level, Noise, gaussian_prior_loss
from noprop_dist.method.intervals import Intervals
from noprop_dist.method.schedule import LearnedSchedule, Schedule, posterior, rise
from noprop_dist.method.solve import Walk, integrate


class Diffusion(Denoising):
    """NoProp-CT for K blocks: see :class:`~noprop_dist.method.base.Method`. A block reads z_t and t and answers with û."""

    def __init__(self, card: MethodCard, inference: InferenceCard, blocks: int) -> None:
        self._card, self._inference = card, inference
        self._schedule = Schedule(card)
        self.intervals = Intervals(card, blocks)

    def draw(self, index: int, u: Tensor, seen: Tensor, gamma: Gamma | None = None) -> Draw:
        """t ~ U in the block's interval, z_t ~ q(z_t|y); the loss is η/2·SNR′(t)·‖û−u‖², its share of eq 9's integral."""
        time, width = self.intervals.draw(index, u)
        level, slope = rise(gamma or self._schedule.gamma, time)
        z = _noised(seen, level[:, None])
        weight = self._card.eta / 2 * width * slope if self._card.loss_weight == "snr" else torch.ones_like(slope)
        return Draw(z, time, u, weight)

    @torch.no_grad()
    def level(self, time: float, gamma: Gamma | None = None) -> Level:
        """√ᾱ_t, 1−ᾱ_t."""
        value = (gamma or self._schedule.gamma)(torch.tensor(time))
        return Level(float(torch.sigmoid(-value).sqrt()), float(torch.sigmoid(value)))

    def extra_loss(
        self, output: Tensor, draw: Draw, u: Tensor, head_loss: HeadLoss, gamma: Gamma | None = None
    ) -> Tensor | float:
        """Where a learned schedule trains its end points: cross-entropy on z_1 and the KL at 0, the terms of eq 9 that hold
        them apart. Else nothing: those terms do not touch a block."""
        if not isinstance(gamma, LearnedSchedule) or not gamma.trains_ends:
            return 0.0
        return head_loss(_noised(u, gamma.ends[0])) + gaussian_prior_loss(u, torch.sigmoid(-gamma.ends[1]))

    def final_latent(self, u: Tensor, gamma: Gamma | None = None) -> Tensor:
        """z_1 ~ q(z_1|y)."""
        return _noised(u, self._end(1.0, gamma))

    def prior_loss(self, u: Tensor, gamma: Gamma | None = None) -> Tensor:
        """KL(q(z_0|y) ‖ N(0, I))."""
        return gaussian_prior_loss(u, torch.sigmoid(-self._end(0.0, gamma)))

    @torch.no_grad()
    def _end(self, time: float, gamma: Gamma | None) -> Tensor:
        """γ at time 0 or 1: the card's, but where a learned schedule trains its ends."""
        moved = isinstance(gamma, LearnedSchedule) and gamma.trains_ends
        return (gamma if gamma and moved else self._schedule.gamma)(torch.tensor(time))

    def advance(
        self, index: int, denoise: Denoise, paths: Tensor, noise: Noise, last: int, gamma: Gamma | None = None
    ) -> tuple[Tensor, Tensor]:
        """Every path over the block's interval: ancestral steps (eqs 3-5) of the SDE, or its probability-flow ODE."""
        walk, gamma = Walk(denoise, self.estimate), gamma or self._schedule.gamma
        grid, first = self.intervals.grid(index, self._inference.steps)
        if self._inference.solver in ("auto", "sde"):
            z = _ancestral(walk, gamma, paths[:-1], grid, noise, first)
        else:
            z = integrate(lambda time, z: _flow(walk, gamma, time, z), paths[:-1], grid, self._inference)
        return walk.finish(paths, z, self.intervals, index, last)


def _noised(u: Tensor, gamma: Tensor) -> Tensor:
    """z_t ~ q(z_t|y) = N(√ᾱ_t·u, (1−ᾱ_t)I), drawn from torch's global generator."""
    return torch.sigmoid(-gamma).sqrt() * u + torch.sigmoid(gamma).sqrt() * torch.randn_like(u)


def _ancestral(walk: Walk, gamma: Gamma, z: Tensor, grid: Tensor, noise: Noise, first: int) -> Tensor:
    levels = torch.sigmoid(-gamma(grid).detach().cpu().double())  # float32 would round neighbouring levels together
    a, b, c = posterior(levels)
    for step in range(1, len(grid)):
        z = a[step] * walk(grid[step - 1], z) + b[step] * z
        if len(z) > 1:
            z[1:] += c[step].sqrt() * noise(first + step)
    return z


def _flow(walk: Walk, gamma: Gamma, time: Tensor, z: Tensor) -> Tensor:
    """dz/dt = −γ′/2·(√ᾱ·û − ᾱ·z), what carries every z_t = √ᾱ·u + √(1−ᾱ)·ε along with its ε kept."""
    level, slope = _with_slope(gamma, time.to(z).reshape(1))  # of a scalar, torch would make the slope a float64
    alpha_bar = torch.sigmoid(-level)
    return (-slope / 2 * (alpha_bar.sqrt() * walk(time, z) - alpha_bar * z)).to(z.dtype)


def _with_slope(gamma: Gamma, time: Tensor) -> tuple[Tensor, Tensor]:
    """γ and γ′ at a time (1,)."""
    if torch.compiler.is_exporting():  # what is exported can be differentiated forwards alone, which takes ten times as long
        return cast(tuple[Tensor, Tensor], torch.func.jvp(gamma, (time,), (torch.ones_like(time),)))
    with torch.enable_grad():
        at = time.detach().requires_grad_()
        level = gamma(at)
        return level.detach(), torch.autograd.grad(level, at)[0]
