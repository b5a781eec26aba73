"""The run card: all sections together, and what must hold between them.

The settings themselves are in sections.py; how cards are read and written: cards.py.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import model_validator

from noprop_dist.sections import (
    BACKBONE_NAMES,
    DataCard,
    DebugCard,
    InferenceCard,
    MethodCard,
    ModelCard,
    OptimCard,
    ParallelCard,
    RunCard,
    Section,
    TrainCard,
    UserError,
)

__all__ = [
    "BACKBONE_NAMES",
    "LOCAL_METHODS",
    "Card",
    "DataCard",
    "InferenceCard",
    "MethodCard",
    "ModelCard",
    "OptimCard",
    "ParallelCard",
    "TrainCard",
    "UserError",
    "default_root",
]

LOCAL_METHODS = ("dt", "ct", "fm")
"""Methods whose blocks learn alone, and so can be spread over ranks; the others are baselines on one."""
BELONGS = {
    **dict.fromkeys(
        ("method.eta", "method.loss_weight", "method.schedule", "method.alpha_min", "method.alpha_max"), ("dt", "ct")
    ),
    **dict.fromkeys(("method.partition", "method.overlap"), ("ct", "fm")),
    **dict.fromkeys(("inference.solver", "inference.steps", "inference.tolerance"), ("ct", "fm")),
    **dict.fromkeys(("method.label_noise", "model.embedding_lag", "inference.blocks"), LOCAL_METHODS),
    **dict.fromkeys(("parallel.balance", "parallel.cuda_graphs"), LOCAL_METHODS),
    "method.sigma": ("fm",),
    "method.ode_steps": ("adjoint",),
}
"""Settings that only some methods know; elsewhere they would do nothing, so they are refused."""
NEEDS = {
    "method.eta": ("method.loss_weight", ("snr",)),
    "model.embedding_dim": ("model.embedding", ("learned",)),
    "model.head_sigma": ("model.head", ("radial",)),
    "optim.momentum": ("optim.name", ("sgd",)),
    "optim.warmup_steps": ("optim.schedule", ("constant", "cosine")),
    "data.image_size": ("data.name", ("imagefolder",)),
    "data.workers": ("data.name", ("imagefolder",)),
    "inference.tolerance": ("inference.solver", ("dopri5",)),
}
"""Settings that do something only beside certain values of another one; else they are refused too."""
_ONE = {"model": {"blocks": 1}}
DEFAULTS: dict[str, dict[str, dict[str, Any]]] = {
    "ct": _ONE | {"method": {"eta": 1.0}},
    "fm": _ONE | {"method": {"label_noise": 0.0}},
    **dict.fromkeys(("cnn", "adjoint", "liquid"), _ONE),
}
"""Where a method's defaults are not the fields' own: the paper's single block and η; label noise as docs/results.md has it."""


class Card(Section):
    """All settings of a run. ``Card()`` trains NoProp-DT with 10 blocks on scikit-learn's digits."""

    data: DataCard = DataCard()
    method: MethodCard = MethodCard()
    model: ModelCard = ModelCard()
    optim: OptimCard = OptimCard()
    train: TrainCard = TrainCard()
    parallel: ParallelCard = ParallelCard()
    inference: InferenceCard = InferenceCard()
    run: RunCard = RunCard()
    debug: DebugCard = DebugCard()

    @property
    def units(self) -> int:
        """What is placed on ranks: blocks, or the one network of a baseline."""
        return self.model.blocks if self.method.name in LOCAL_METHODS else 1

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_method(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        given = {
            section: part.model_dump(exclude_unset=True) if isinstance(part, Section) else part
            for section, part in values.items()
        }
        name = given["method"].get("name") if isinstance(given.get("method"), dict) else None
        for section, settings in (DEFAULTS.get(name, {}) if isinstance(name, str) else {}).items():
            part = given.get(section, {})
            given[section] = settings | part if isinstance(part, dict) else part
        return given

    @model_validator(mode="after")
    def _consistent(self) -> Card:
        if found := [*_strangers(self), *_contradictions(self)]:
            raise ValueError("\n".join(found))
        return self


def _strangers(card: Card) -> Iterator[str]:
    """Settings that would do nothing."""
    for setting, methods in BELONGS.items():
        if card.method.name not in methods and _is_set(card, setting):
            yield f"{setting}: belongs to {', '.join(methods)}, not to {card.method.name}; leave it out"
    for setting, (other, values) in NEEDS.items():
        if _value(card, other) not in values and _is_set(card, setting):
            yield f"{setting}: does nothing with {other} {_value(card, other)}, only with {', '.join(values)}; leave it out"


def _value(card: Card, setting: str) -> Any:
    section, name = setting.split(".")
    return getattr(getattr(card, section), name)


def _is_set(card: Card, setting: str) -> bool:
    """Whether it is another than by default."""
    section, name = setting.split(".")
    default = type(getattr(card, section)).model_fields[name].default
    return bool(_value(card, setting) != DEFAULTS.get(card.method.name, {}).get(section, {}).get(name, default))


def _contradictions(card: Card) -> Iterator[str]:
    method, blocks = card.method, card.model.blocks
    name, low, high = method.name, method.alpha_min, method.alpha_max
    if card.data.name == "digits" and card.data.root:
        yield f"data.root: digits are scikit-learn's own, {card.data.root} would not be read; name the data with --data.name"
    if low >= high:
        yield f"method.alpha_min: {low} is not below method.alpha_max {high}; lower it"
    if (card.inference.blocks or 0) > blocks:
        yield f"inference.blocks: {card.inference.blocks} is more than model.blocks {blocks}; lower it"
    if name not in (*LOCAL_METHODS, "backprop") and blocks > 1:
        yield f"model.blocks: {name} is one network, not {blocks} blocks; leave it out"
    if name == "dt" and method.schedule == "learned":
        yield "method.schedule: learned needs continuous time; use it with --method.name ct"
    if method.schedule == "learned" and method.loss_weight != "snr":
        yield "method.loss_weight: uniform lets a learned schedule cheat, by easy times; use snr, or a fixed method.schedule"
    if low == 0 and (name == "ct" or method.schedule == "sigmoid"):
        yield "method.alpha_min: 0 has no finite log SNR, which this schedule needs; use more"
    if method.overlap > 0 and blocks == 1:
        yield "method.overlap: one block has no neighbour; raise --model.blocks or leave it out"
    if method.partition != "uniform" and blocks == 1:
        yield "method.partition: one block has all of the time, nothing is cut; raise --model.blocks or leave it out"
    if (
        card.model.embedding == "one-hot"
        and not (method.schedule == "learned" and blocks == 1)
        and _is_set(card, "model.embedding_lag")
    ):
        yield "model.embedding_lag: one-hot embeddings never change, so nothing is sent; leave it out"
    if name == "fm" and (card.model.embedding, card.inference.readout) == ("one-hot", "auto") and card.model.head != "linear":
        yield f"model.head: fm names the nearest embedding, {card.model.head} would not be read; add --inference.readout head"
    if name == "fm" and card.inference.solver == "sde":
        yield "inference.solver: flow matching has an ODE only; use euler, midpoint, heun, rk4 or dopri5"
    if name == "dt" and method.schedule in ("cosine", "linear") and blocks > 1:
        first, last = 1 / blocks, (blocks - 1) / blocks
        if method.schedule == "cosine":
            first, last = (math.sin(math.pi / 2 * s) ** 2 for s in (first, last))
        flat = f"would flatten the schedule of {blocks} blocks"
        if first <= low < high:
            yield f"method.alpha_min: {low} {flat}; use less than {first:.2g}"
        if low < high <= last:
            yield f"method.alpha_max: {high} {flat}; use more than {last:.6g}"


def default_root() -> Path:
    """Where data lies when ``data.root`` is unset."""
    return Path(os.environ.get("NOPROP_DATA") or "data")
