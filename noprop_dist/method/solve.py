"""Walking z through a block's interval of time, and what is noted on the way."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from noprop_dist.config import InferenceCard, UserError
from noprop_dist.method.base import Denoise, over_chains
from noprop_dist.method.intervals import Intervals

Velocity = Callable[[Tensor, Tensor], Tensor]
"""dz/dt at a scalar time and z."""
TABLEAUX = {
    "euler": ((), (1.0,)),
    "midpoint": ((), (1 / 2,), (0.0, 1.0)),
    "heun": ((), (1.0,), (1 / 2, 1 / 2)),
    "rk4": ((), (1 / 3,), (-1 / 3, 1.0), (1.0, -1.0, 1.0), (1 / 8, 3 / 8, 3 / 8, 1 / 8)),  # the 3/8 rule
}
"""Runge and Kutta's explicit methods: each stage's shares of the velocities found before it, then those of the step itself.

torchdiffeq has them too, but looks at the times' values on the way, which no exported graph can hold."""


def integrate(velocity: Velocity, z: Tensor, grid: Tensor, card: InferenceCard) -> Tensor:
    """z (any shape) at the grid's end, from dz/dt = velocity(time, z) and z at its start.

    grid: float64 (n+1,) rising times, the steps of a fixed-step solver; dopri5 takes its own between the ends. A NaN velocity
    gives NaN. Raises UserError where dopri5 cannot keep to its tolerance.
    """
    grid = grid.to(z.device)
    if card.solver == "dopri5":
        return _adaptive(velocity, z, grid[[0, -1]], card.tolerance)
    for start, end in pairwise(grid):
        z = step(velocity, z, start, end, "heun" if card.solver == "auto" else card.solver)
    return z


def step(velocity: Velocity, z: Tensor, start: Tensor, end: Tensor, solver: str) -> Tensor:
    """z at the end of one step of a fixed-step solver, from z at its start; float64 scalars."""
    *stages, last = TABLEAUX[solver]
    slopes: list[Tensor] = []

    def moved(shares: tuple[float, ...]) -> Tensor:
        return sum((share * (end - start) * slope for share, slope in zip(shares, slopes, strict=True)), z)

    for shares in stages:
        slopes.append(velocity(start + sum(shares) * (end - start), moved(shares)))
    return moved(last)


def _adaptive(velocity: Velocity, z: Tensor, ends: Tensor, tolerance: float) -> Tensor:
    from torchdiffeq import odeint  # here, for it brings scipy.integrate: half a second at every start

    # without step_t it would step beyond the end, where there is no time, and interpolate
    options = {"step_t": ends}
    try:
        result: Tensor = odeint(velocity, z, ends, method="dopri5", rtol=tolerance, atol=tolerance, options=options)[-1]
    except AssertionError:  # its step has shrunk to nothing
        if not velocity(ends[0], z).isfinite().all():
            return torch.full_like(z, torch.nan)
        advice = "raise it or take another inference.solver"
        raise UserError(f"inference.tolerance: dopri5 cannot keep to {tolerance} with these blocks; {advice}") from None
    return result


class Walk:
    """A block called again and again along its interval: gathers the mean of its û and remembers the last."""

    def __init__(self, denoise: Denoise, estimate: Callable[[Tensor, Tensor, Tensor | None], Tensor]) -> None:
        self._denoise, self._estimate = denoise, estimate
        self.output = self._last = self._sum = torch.zeros(())
        self._calls = 0

    def __call__(self, time: Tensor, z: Tensor) -> Tensor:
        """û (R, B, d) at z (R, B, d) and a scalar time; ``output`` is what the block itself said."""
        time = time.to(z)
        self.output = self._denoise(z, time).float()
        self._last = self._estimate(self.output, z, time)
        self._sum = self._sum + self._last
        self._calls += 1
        return self._last

    def finish(self, paths: Tensor, z: Tensor, intervals: Intervals, index: int, last: int) -> tuple[Tensor, Tensor]:
        """The paths (see method.base) after this block, from its last z, and its last û on the mean path."""
        share = intervals.width(index) / intervals.ends[last]
        average = paths[-1:] + share * over_chains(self._sum) / self._calls
        early = index + 1 == last < intervals.blocks
        return torch.cat([self._last if early else z, average]), self._last[0]
