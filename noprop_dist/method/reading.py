"""What a latent z and an estimate û tell of the class, apart from any head."""

from __future__ import annotations

import torch
from torch import Tensor

from noprop_dist.method.base import Level


def class_posterior(z: Tensor, embedding: Tensor, level: Level) -> Tensor:
    """What z alone tells: p(c|z) (…, m) of latents (…, d), all rows u_c of W = ``embedding`` (m, d) being equally likely.

    By Bayes from z ~ N(signal·u_c, variance·I) [derived]: softmax over c of −‖z − signal·u_c‖²/(2·variance), with √ᾱ and 1−ᾱ
    for DT and CT (eqs 3 and 9), t and (1−t)²+σ² for FM (eqs 10-13). Exact for z that were noised so, as a stochastic chain's
    are meant to be; the mean path's z have less noise, and tell more than this grants them.
    """
    z, embedding = z.double(), embedding.double()
    signal, variance = level.signal, max(level.variance, 1e-12)
    # ‖z‖² is the same for all c
    return ((signal * z @ embedding.T - signal**2 / 2 * embedding.square().sum(dim=1)) / variance).softmax(dim=-1).float()


def mixture(estimate: Tensor, embedding: Tensor, steps: int = 500) -> Tensor:
    """The class weights w (…, m), each from 0 on and 1 in all, with the least ‖w·W − û‖² for estimates (…, d) and W (m, d).

    A block of DT or CT answers û = w·W itself (figure 5), and the û that any loss asks for is a mixture, E[u_y|z, x] [derived].
    By projected gradients with momentum (FISTA); where rows of W are independent there is one w, else one of several.
    """
    target, embedding = estimate.double(), embedding.double()
    direction = torch.ones(len(embedding), 1, dtype=torch.float64, device=embedding.device)
    for _ in range(20):  # towards the steepest direction
        direction = embedding @ (embedding.T @ direction)
        direction = direction / direction.norm().clamp(min=1e-12)
    steepest = max(1.05 * float((embedding @ (embedding.T @ direction)).norm()), 1e-12)
    weights = ahead = torch.full((*target.shape[:-1], len(embedding)), 1 / len(embedding)).to(target)
    momentum = 1.0
    for _ in range(steps):
        before = weights
        weights = _to_simplex(ahead - (ahead @ embedding - target) @ embedding.T / steepest)
        faster = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        ahead, momentum = weights + (momentum - 1) / faster * (weights - before), faster
        if weights.allclose(before, rtol=0, atol=1e-6):
            break
    return weights.float()


def _to_simplex(points: Tensor) -> Tensor:
    """The nearest (…, m) whose parts are at least 0 and sum to 1."""
    falling = points.sort(dim=-1, descending=True).values
    count = torch.arange(1, points.shape[-1] + 1).to(points)
    shift = (falling.cumsum(dim=-1) - 1) / count
    last = (falling > shift).sum(dim=-1, keepdim=True).clamp(min=1) - 1  # of what is not a number there is none
    return (points - shift.gather(-1, last)).clamp(min=0)
