"""A module with an optimizer of its own: how one block, or the head, learns from its own loss, and what of it is saved."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from noprop_dist.config import OptimCard
from noprop_dist.method.schedule import LearnedSchedule

STEPS, SKIPS = "steps", "skips"


def learning_rate(card: OptimCard, step: int, total: int) -> float:
    """The learning rate of step 0…total−1: a pure function, so there is no scheduler state to save."""
    if card.schedule == "one-cycle":
        peak = max(1, round(0.3 * total))
        if step < peak:
            return _cosine(card.lr / 25, card.lr, step / peak)
        return _cosine(card.lr, card.lr / 1e4, (step - peak) / max(1, total - 1 - peak))
    if step < card.warmup_steps:
        return card.lr * (step + 1) / card.warmup_steps
    if card.schedule == "cosine":
        return _cosine(card.lr, 0.0, (step - card.warmup_steps) / max(1, total - card.warmup_steps))
    return card.lr


def _cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * min(share, 1.0))) / 2


def update(loss: Tensor, step: int, *learners: Learner) -> None:
    """One optimizer step of all that a scalar loss trains. Gradients live no longer than that."""
    loss.backward()  # type: ignore[no-untyped-call]
    for learner in learners:
        learner.apply(step, loss.detach())


class Learner:
    """``module`` and its optimizer; ``inference`` is the module to predict with (its moving average where there is one).

    An update whose loss or gradient is not finite is skipped; after ``max_bad_steps`` of them in a row all later ones are (0:
    never). ``skips``, int64 (2,) on the module's device, counts both: all so far, and those in a row.
    """

    def __init__(self, module: nn.Module, card: OptimCard, total_steps: int, max_bad_steps: int = 0) -> None:
        self.module = module.train()
        self.steps = 0
        """Steps done, skipped ones included."""
        self._card, self._total, self._max_bad_steps = card, total_steps, max_bad_steps
        self._parameters = dict(module.named_parameters())
        self.optimizer = make_optimizer(card, module)
        self.inference = copy.deepcopy(module).requires_grad_(False) if card.ema else module
        self.skips = torch.zeros(2, dtype=torch.int64, device=next(module.parameters()).device)
        self._in_a_row = self.skips[1]
        self._norm = torch.zeros(())
        self._places = [(part, name) for part in module.modules() for name, _ in part.named_buffers(recurse=False)]
        self._before = [buffer.clone() for buffer in self._buffers]

    def apply(self, step: int, loss: Tensor) -> None:
        """One optimizer step along the gradients that are there, then without them; ``loss``: the scalar they come from."""
        self._norm = norm = nn.utils.get_total_norm([p.grad for p in self._parameters.values() if p.grad is not None])
        if self._card.clip_norm:
            nn.utils.clip_grads_with_norm_(self._parameters.values(), self._card.clip_norm, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self._card, step, self._total)
        self._step_unless(self._count(~(loss + norm).isfinite()))
        for parameter in self._parameters.values():  # what zero_grad does, in a fifth of its time
            parameter.grad = None
        if self.inference is not self.module:
            self._average()
        self.steps = step + 1

    def _step_unless(self, skip: Tensor) -> None:
        """The optimizer's step; where it is skipped, what batch norm has noted of it is forgotten too."""
        before, now = self._before, self._buffers
        if skip.is_cuda:  # decided there: nobody waits to know
            self.optimizer.found_inf = skip.float()  # type: ignore[attr-defined]
            self.optimizer.step()
            for old, new in zip(before, now, strict=True):
                old.copy_(new.copy_(torch.where(skip, old, new)))
            return
        if not skip:
            self.optimizer.step()
            before, now = now, before
        if now:
            torch._foreach_copy_(now, before)

    @property
    def _buffers(self) -> list[Tensor]:
        """As they are now: a user's own module may put others in their place. (Walking all modules takes longer.)"""
        return [getattr(part, name) for part, name in self._places]

    def _count(self, bad: Tensor) -> Tensor:
        """Note a step, ``bad`` (bool) or not; whether it is to be skipped."""
        skip = bad | (self._in_a_row >= self._max_bad_steps) if self._max_bad_steps else bad
        self.skips.add_(skip)
        self._in_a_row.mul_(skip)
        return skip

    def gradient_norm(self) -> float:
        """Euclidean norm of the last gradient (after clipping)."""
        norm = float(self._norm)
        return min(norm, self._card.clip_norm) if self._card.clip_norm and math.isfinite(norm) else norm

    @torch.no_grad()
    def _average(self) -> None:
        averages: list[Tensor] = list(self.inference.parameters())
        now: list[Tensor] = list(self._parameters.values())
        torch._foreach_lerp_(averages, now, 1 - self._card.ema)
        for average, buffer in zip(self.inference.buffers(), self.module.buffers(), strict=True):
            average.copy_(buffer)

    def state(self) -> dict[str, Tensor]:
        """Everything to be saved: ``model.*``, ``optimizer.<state>.<parameter>``, and ``ema.*`` where there is one."""
        tensors = {f"model.{name}": value for name, value in self.module.state_dict().items()}
        tensors |= {STEPS: torch.tensor(self.steps), SKIPS: self.skips}
        for name, parameter in self._parameters.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer.{key}.{name}"] = value
        if self.inference is not self.module:
            tensors |= {f"ema.{name}": value for name, value in self.inference.state_dict().items()}
        return tensors

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take back what :meth:`state` gave. Raises RuntimeError, KeyError where names or shapes do not fit."""
        self.module.load_state_dict(_part(tensors, "model."))
        self.steps = int(tensors[STEPS])
        self.skips.copy_(tensors[SKIPS])
        for before, buffer in zip(self._before, self._buffers, strict=True):
            before.copy_(buffer)
        if self.inference is not self.module:
            self.inference.load_state_dict(inference_state(tensors))
        for name, value in _part(tensors, "optimizer.").items():
            key, parameter_name = name.split(".", 1)
            parameter = self._parameters[parameter_name]
            # in the parameter's memory format: the fused optimizers walk both side by side
            like = parameter.detach() if value.shape == parameter.shape else value.to(parameter.device)
            self.optimizer.state[parameter][key] = torch.empty_like(like).copy_(value)


def inference_state(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """From what :meth:`Learner.state` gave, the state dict of the module to predict with."""
    return _part(tensors, "ema.") or _part(tensors, "model.")


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def make_optimizer(card: OptimCard, module: nn.Module) -> torch.optim.Optimizer:
    """Weight decay is for weights: γ's end points and positive weights have no reason to be small."""
    schedules = [part for part in module.modules() if isinstance(part, LearnedSchedule)]
    free = [parameter for schedule in schedules for parameter in schedule.parameters()]
    decayed = [parameter for parameter in module.parameters() if not any(parameter is other for other in free)]
    parameters: list[dict[str, Any]] = [{"params": decayed}, *([{"params": free, "weight_decay": 0.0}] if free else [])]
    if card.name == "sgd":
        sgd = torch.optim.SGD(
            parameters,
            lr=card.lr,
            momentum=card.momentum,
            weight_decay=card.weight_decay,
            nesterov=card.momentum > 0,
            fused=True,
        )
        if card.momentum:  # the optimizer itself would begin with whatever lies in memory where its first step is skipped
            for parameter in module.parameters():
                sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter, requires_grad=False)
        return sgd
    kind = torch.optim.AdamW if card.name == "adamw" else torch.optim.Adam
    return kind(parameters, lr=card.lr, weight_decay=card.weight_decay, fused=True)
