"""Walking z through a block's interval of time, and what is noted on the way. Solvers are torchdiffeq's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchdiffeq import odeint

from noprop_dist.config import InferenceCard, UserError
from noprop_dist.method.base import Denoise
from noprop_dist.method.intervals import Intervals

_NAMES = {"auto": "heun2", "heun": "heun2"}


def integrate(velocity: Callable[[Tensor, Tensor], Tensor], z: Tensor, grid: Tensor, card: InferenceCard) -> Tensor:
    """z (any shape) at the grid's end, from dz/dt = velocity(time, z) and z at its start.

    grid: float64 (n+1,) rising times, the steps of a fixed-step solver; dopri5 takes its own between the ends. A NaN velocity
    gives NaN. Raises UserError where dopri5 cannot keep to its tolerance.
    """
    name = _NAMES.get(card.solver, card.solver)
    ends = grid[[0, -1]].to(z.device)  # with the whole grid, odeint would keep z at all of its times
    settings: dict[str, Any]
    if name == "dopri5":  # without step_t it would step beyond the end, where there is no time, and interpolate
        settings = {"rtol": card.tolerance, "atol": card.tolerance, "options": {"step_t": ends}}
    else:
        settings = {"options": {"grid_constructor": lambda function, state, times: grid.to(times)}}
    try:
        result: Tensor = odeint(velocity, z, ends, method=name, **settings)[-1]
    except AssertionError:  # dopri5's step has shrunk to nothing
        if not velocity(ends[0], z).isfinite().all():
            return torch.full_like(z, torch.nan)
        advice = "raise it or take another inference.solver"
        raise UserError(f"inference.tolerance: dopri5 cannot keep to {card.tolerance} with these blocks; {advice}") from None
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
        average = paths[-1:] + share * self._sum[1:].mean(dim=0, keepdim=True) / self._calls
        early = index + 1 == last < intervals.blocks
        return torch.cat([self._last if early else z, average]), self._last[0]
