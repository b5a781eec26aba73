"""What the methods have in common: what a block reads, what it is to answer, and how chains are walked at inference.

Blocks have indices 0…K−1, as everywhere in this program; the paper's block t is index t−1.

At inference several chains run side by side as *paths*, a float (1 + S + 1, B, d) tensor: row 0 is the mean path (z_0 = 0, no
noise), rows 1…S are stochastic chains (the paper's), and the last row gathers the mean of all û along the stochastic chains.
Where the mean path alone is wanted, S = 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

Gamma = Callable[[Tensor], Tensor]
"""γ = −ln SNR at times in [0, 1], any shape."""
Denoise = Callable[[Tensor, Tensor | None], Tensor]
"""A block's output (R, B, d) at latents (R, B, d) and a time (scalar; None for DT)."""
HeadLoss = Callable[[Tensor], Tensor]
Noise = Callable[[int], Tensor]
"""Standard normal noise (S, B, d) of a numbered step; number 0 starts the chains."""


class Draw(NamedTuple):
    """One training example a row: ``z`` (B, d) and ``time`` (B,) (None for DT) go into the block; its output should be
    ``target`` (B, d), each row's squared distance counting ``weight`` times (a number, or (B,))."""

    z: Tensor
    time: Tensor | None
    target: Tensor
    weight: Tensor | float


class Level(NamedTuple):
    """The forward process at one time: z ~ N(signal·u_y, variance·I)."""

    signal: float
    variance: float


class Chain(Protocol):
    """How paths walk through blocks at inference."""

    def advance(
        self, index: int, denoise: Denoise, paths: Tensor, noise: Noise, last: int, gamma: Gamma | None = None
    ) -> tuple[Tensor, Tensor]:
        """Every path through block ``index``; ``last`` is the number of blocks used, ``gamma`` the block's learned schedule.

        At an early exit (last < K) the last block's û itself becomes the result, being what the head expects to read. Returns
        the new paths and the block's û on the mean path (B, d).
        """
        ...

    def estimate(self, output: Tensor, z: Tensor, time: Tensor | None) -> Tensor:
        """û, the estimate of u, from a block's output at (z, time); all (…, d) but the time, which broadcasts."""
        ...


class Method(Chain, Protocol):
    """One way to train blocks alone. Draws from torch's global generator, and holds no state."""

    def draw(self, index: int, u: Tensor, seen: Tensor, gamma: Gamma | None = None) -> Draw:
        """Training examples of block ``index`` for embeddings u (B, d) = W[y].

        ``seen`` (B, d) is what z is made from: u, but for label noise.
        """
        ...

    def extra_loss(
        self, output: Tensor, draw: Draw, u: Tensor, head_loss: HeadLoss, gamma: Gamma | None = None
    ) -> Tensor | float:
        """What a block's loss holds beside the squared distance; scalar. ``head_loss`` is −log p̂_out(y|z) of z (B, d), averaged
        over the batch, the head being a constant of the step."""
        ...

    def level(self, time: float, gamma: Gamma | None = None) -> Level:
        """Of z at a time from 0 to 1; t/T for DT."""
        ...

    def final_latent(self, u: Tensor, gamma: Gamma | None = None) -> Tensor:
        """What the head reads while training: the last z of a perfect chain, (B, d). ``gamma``: the last block's schedule."""
        ...

    def prior_loss(self, u: Tensor, gamma: Gamma | None = None) -> Tensor:
        """KL(q(z_0|y) ‖ N(0, I)), summed over d, averaged over the batch; scalar."""
        ...


class Denoising:
    """Of the methods whose blocks answer with û itself."""

    def estimate(self, output: Tensor, z: Tensor, time: Tensor | None) -> Tensor:
        """The output."""
        return output


def squared_loss(output: Tensor, draw: Draw) -> Tensor:
    """weight·‖output − target‖², summed over d, averaged over the batch; scalar."""
    return (draw.weight * (output.float() - draw.target).square().sum(dim=1)).mean()


def start(noise: Tensor) -> Tensor:
    """Paths before the first block, from standard normal noise (S, B, d)."""
    zero = torch.zeros_like(noise[:1])
    return torch.cat([zero, noise, zero])


def over_chains(rows: Tensor) -> Tensor:
    """The mean (1, B, d) over the stochastic chains of what belongs to all of them, (1 + S, B, d); 0 where S = 0."""
    return rows[1:].mean(dim=0, keepdim=True) if len(rows) > 1 else torch.zeros_like(rows)


def gaussian_prior_loss(u: Tensor, alpha_bar: Tensor) -> Tensor:
    """KL(N(√ᾱ·u, (1−ᾱ)I) ‖ N(0, I)) (eqs 8 and 9), summed over d, averaged over the batch; scalar."""
    return (alpha_bar * (u.square() - 1) - torch.log1p(-alpha_bar)).sum(dim=1).mean() / 2
