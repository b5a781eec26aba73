"""Who owns which time: [0, 1] cut into one interval a block (CT and FM over ranks)."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist

import torch
from torch import Tensor

from noprop_dist.config import MethodCard
from noprop_dist.method.schedule import Schedule

NOISE_LEVELS = NormalDist(-1.2, 1.2)
"""EDM's distribution of ln(noise/signal), which DiffusionBlocks cuts into equal shares."""


class Intervals:
    """K intervals 0 = τ_0 < τ_1 < … < τ_K = 1; block k (from 0) owns [τ_k, τ_{k+1}]. ``ends`` are the τ."""

    def __init__(self, card: MethodCard, blocks: int) -> None:
        self.blocks, self.ends = blocks, cuts(card, blocks)
        self._overlap = card.overlap

    def width(self, index: int) -> float:
        """τ_{k+1} − τ_k."""
        return self.ends[index + 1] - self.ends[index]

    def draw(self, index: int, like: Tensor) -> tuple[Tensor, float]:
        """Times (B,) for a block to train on, uniform over its interval and the overlap's share of its neighbours', from
        torch's global generator on the device of ``like`` (B, …); and the width that they are drawn from."""
        low, high = self.ends[index], self.ends[index + 1]
        if index > 0:
            low -= self._overlap * self.width(index - 1)
        if index + 1 < self.blocks:
            high += self._overlap * self.width(index + 1)
        return low + (high - low) * torch.rand(len(like), device=like.device), high - low

    def grid(self, index: int, steps: int) -> tuple[Tensor, int]:
        """The block's share of ``steps`` equal steps, at least one: its times, float64 (n+1,), and the steps before it."""
        shares = [max(1, round(steps * self.width(block))) for block in range(index + 1)]
        start, end = self.ends[index : index + 2]
        return torch.linspace(start, end, shares[-1] + 1, dtype=torch.float64), sum(shares[:-1])


def cuts(card: MethodCard, blocks: int) -> list[float]:
    """The ends τ_0 … τ_K of K intervals."""
    if card.partition == "uniform":
        return [index / blocks for index in range(blocks + 1)]

    def mass(time: float) -> float:
        """The share of noise levels above that of a time: rises with time."""
        return 1 - NOISE_LEVELS.cdf(log_noise(card, time))

    first, last = mass(0.0), mass(1.0)
    inner = [_solve(mass, first + (last - first) * index / blocks) for index in range(1, blocks)]
    return [0.0, *inner, 1.0]


def log_noise(card: MethodCard, time: float) -> float:
    """ln(noise/signal) at a time: −½·ln SNR for CT, ln((1−t)/t) for FM."""
    if card.name == "fm":
        time = min(max(time, 1e-9), 1 - 1e-9)
        return math.log((1 - time) / time)
    schedule = card.model_copy(update={"schedule": "sigmoid"}) if card.schedule == "learned" else card
    return float(Schedule(schedule).gamma(torch.tensor(time, dtype=torch.float64))) / 2


def _solve(rising: Callable[[float], float], value: float) -> float:
    """Where in [0, 1] a rising function takes a value, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < value else (low, middle)
    return low
