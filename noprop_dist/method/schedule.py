"""Noise schedules: the signal level ᾱ, which rises from noise (time 0) to label (time 1), and SNR = ᾱ/(1−ᾱ) = exp(−γ)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from noprop_dist.config import MethodCard, UserError

HIDDEN = 32
"""Features of a learned schedule's hidden layer."""


class Schedule:
    """A fixed schedule between ᾱ_min and ᾱ_max: cosine ᾱ = sin²(πs/2), linear ᾱ = s, sigmoid (−γ linear in s).

    In discrete time the curve over s = t/T is clipped to the two ends; in continuous time, where a flat piece would be time
    that teaches nothing, [0, 1] is the part of the curve that lies between them.
    """

    def __init__(self, card: MethodCard) -> None:
        self._name, self._low, self._high = card.schedule, card.alpha_min, card.alpha_max

    def levels(self, blocks: int) -> Tensor:
        """ᾱ_t for t = 0…T; float64 (T+1,)."""
        s = torch.arange(blocks + 1, dtype=torch.float64) / blocks
        if self._name == "cosine":
            s = torch.sin(math.pi / 2 * s).square()
        if self._name == "sigmoid":
            return torch.sigmoid(-self.gamma(s))
        return s.clamp(self._low, self._high)

    def gamma(self, time: Tensor) -> Tensor:
        """γ = −ln SNR at times in [0, 1]; falls with time."""
        low, high = self._low, self._high
        if self._name == "cosine":  # ᾱ = sin²θ, so SNR = tan²θ
            first, last = math.asin(math.sqrt(low)), math.asin(math.sqrt(high))
            return -2 * torch.log(torch.tan(first + (last - first) * time))
        if self._name == "linear":
            return -torch.logit(low + (high - low) * time)
        return gamma_of(low) + (gamma_of(high) - gamma_of(low)) * time


def gamma_of(alpha_bar: float) -> float:
    """γ = −ln(ᾱ/(1−ᾱ)) of one signal level."""
    return -math.log(alpha_bar / (1 - alpha_bar))


class LearnedSchedule(nn.Module):
    """Appendix B: γ(t) = γ_0 + (γ_1−γ_0)·(1−γ̄(t)), γ̄ a two-layer net of positive weights, normalised to γ̄ = 0…1.

    Covers one block's interval of time [start, end]; beyond it γ goes on in a straight line from ᾱ_min to ᾱ_max, on which the
    ends of the intervals lie. The ends are trained only where the interval is all of [0, 1], for then no other
    block relies on them.

    Args:
        card: ᾱ_min and ᾱ_max, where γ_1 and γ_0 start.
        start, end: the block's interval.
    """

    def __init__(self, card: MethodCard, start: float, end: float) -> None:
        super().__init__()
        self._start, self._end = start, end
        self._line = gamma_of(card.alpha_min), gamma_of(card.alpha_max)
        ends = torch.tensor([self._straight(end), self._straight(start)])  # γ_0, γ_1
        self.trains_ends = (start, end) == (0.0, 1.0)
        if self.trains_ends:
            self.ends = nn.Parameter(ends)
        else:
            self.register_buffer("ends", ends)
        # softplus makes them positive; small inner weights start γ̄ close to a straight line
        self.inner = nn.Parameter(torch.randn(HIDDEN) * 0.1)
        self.shift = nn.Parameter(torch.randn(HIDDEN))
        self.outer = nn.Parameter(torch.randn(HIDDEN) * 0.1)

    def forward(self, time: Tensor) -> Tensor:
        """γ at times in [0, 1], any shape."""
        time = time.to(self.ends)
        share = (time - self._start) / (self._end - self._start)
        gamma = self.ends[0] + (self.ends[1] - self.ends[0]) * (1 - self.normalised(share))
        if self.trains_ends:
            return gamma
        inside = (share > -1e-5) & (share < 1 + 1e-5)  # the ends, rounded, are its own: γ is the same beyond, its slope is not
        return torch.where(inside, gamma, self._straight(time))

    def normalised(self, share: Tensor) -> Tensor:
        """γ̄ at shares 0…1 of the interval, any shape: rises from 0 to 1."""
        points = torch.cat([share.flatten(), share.new_tensor([0.0, 1.0])])
        hidden = torch.sigmoid(functional.softplus(self.inner) * points[:, None] + self.shift)
        value = hidden @ functional.softplus(self.outer)
        return ((value[:-2] - value[-2]) / (value[-1] - value[-2])).view_as(share)

    def _straight(self, time: Any) -> Any:
        return self._line[0] + (self._line[1] - self._line[0]) * time


def rise(gamma: Callable[[Tensor], Tensor], time: Tensor) -> tuple[Tensor, Tensor]:
    """γ and SNR′ = −γ′·exp(−γ) at times (B,), by autograd through γ; both differentiable in γ's parameters.

    Raises UserError where SNR′ is not positive: a loss weighted by it would be maximised, not minimised.
    """
    with torch.enable_grad():
        time = time.detach().requires_grad_()
        value = gamma(time)
        learns = isinstance(gamma, nn.Module)
        slope = torch.autograd.grad(value.sum(), time, create_graph=learns, retain_graph=learns)[0]
        result = -slope * torch.exp(-value)
    if learns and not (result > 0).all():  # a fixed schedule rises by its formula
        where = time[~(result > 0)][0].item()
        raise UserError(
            f"method.schedule: the learned SNR no longer rises at time {where:.4f}; lower --optim.lr or clip gradients"
        )
    return (value, result) if learns else (value.detach(), result.detach())


def snr(alpha_bar: Tensor) -> Tensor:
    """Signal-to-noise ratio ᾱ/(1−ᾱ), elementwise."""
    return alpha_bar / (1 - alpha_bar)


def posterior(alpha_bar: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Coefficients a_t, b_t, c_t of z_t = a_t·û + b_t·z_{t-1} + √c_t·ε (eqs 3-5).

    Takes ᾱ (T+1,); returns three (T+1,) tensors whose entry 0 is unused (nan).
    """
    before, now = alpha_bar[:-1], alpha_bar[1:]
    alpha = before / now  # α_{t-1}
    a = now.sqrt() * (1 - alpha) / (1 - before)
    b = alpha.sqrt() * (1 - now) / (1 - before)
    c = (1 - now) * (1 - alpha) / (1 - before)
    unused = alpha_bar.new_full((1,), math.nan)
    return torch.cat([unused, a]), torch.cat([unused, b]), torch.cat([unused, c])
