"""Noise schedules: the signal level ᾱ_t, which rises from noise (t = 0) to label (t = T)."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def cosine(blocks: int, alpha_min: float, alpha_max: float) -> Tensor:
    """ᾱ_t = sin²(πt/2T) for t = 0…T, clipped to [alpha_min, alpha_max]; float64 (T+1,)."""
    s = torch.arange(blocks + 1, dtype=torch.float64) / blocks
    return torch.sin(math.pi / 2 * s).square().clamp(alpha_min, alpha_max)


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
    unused = torch.full((1,), math.nan, dtype=alpha_bar.dtype)
    return torch.cat([unused, a]), torch.cat([unused, b]), torch.cat([unused, c])
