"""The label space as the blocks know it: the coordinator's values, a fixed number of steps old on any number of ranks.

Every ``lag`` steps the coordinator sends what it has then; the blocks use it from ``lag`` steps later on, for ``lag`` steps. So
in step s a block sees the label space as it was before step lag·(⌊s/lag⌋ − 1), and at its very start before that.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor

from noprop_dist.nets.labels import LabelSpace
from noprop_dist.parallel.traffic import Pending
from noprop_dist.parallel.world import World

NOW, NEXT = "published.now", "published.next"


class Publication:
    """Values of a label space on their way to all ranks.

    Args:
        labels: the label space as it starts; its values matter on the coordinator only.
        travels: names of the parameters that blocks rely on and that change; none for fixed embeddings: then nothing is sent.
        lag: steps.
    """

    def __init__(self, world: World, labels: LabelSpace, travels: tuple[str, ...], lag: int) -> None:
        self.space = copy.deepcopy(labels).requires_grad_(False)
        """What the blocks of this rank see."""
        self._world, self._lag, self._travels = world, lag, travels
        self._next = Pending(self._flat(labels))

    @property
    def values(self) -> Tensor:
        """What the blocks see, as :func:`fill` takes it."""
        return self._flat(self.space)

    def begin(self) -> None:
        """Give all ranks the coordinator's values, at the start of a run."""
        if self._travels:
            self._take(self._send(self._flat(self.space)).wait())
            self._next = self._send(self._next.wait())

    def advance(self, labels: LabelSpace) -> None:
        """Called before each step, with the owner's own label space (any of that shape on other ranks)."""
        if self._travels and self._world.step % self._lag == 0:
            self._take(self._next.wait())
            self._next = self._send(self._flat(labels))

    def newest(self, labels: LabelSpace) -> Tensor:
        """The coordinator's embedding (m, d) as it is now, on every rank: for evaluation."""
        embedding = labels.embedding.detach()
        if "embedding" not in self._travels:
            return embedding
        return self._send(embedding.cpu().clone()).wait().to(embedding.device)  # other ranks receive into the copy

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps: the values in use and those under way."""
        return {NOW: self._flat(self.space), NEXT: self._next.wait()} if self._travels else {}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take back what :meth:`state` gave. Raises KeyError where it is missing."""
        if self._travels:
            self._take(tensors[NOW])
            self._next = Pending(tensors[NEXT])

    def _send(self, values: Tensor) -> Pending:
        return self._world.wires["labels"].broadcast(values, self._world.step)

    def _flat(self, labels: LabelSpace) -> Tensor:
        parts = [labels.get_parameter(name).detach().flatten() for name in self._travels]
        return torch.cat(parts).cpu() if parts else torch.empty(0)

    def _take(self, values: Tensor) -> None:
        fill(self.space, self._travels, values)


@torch.no_grad()
def fill(labels: LabelSpace, names: tuple[str, ...], values: Tensor) -> None:
    """Set parameters of a label space to values, one after the other in a flat tensor."""
    parameters = [labels.get_parameter(name) for name in names]
    for parameter, part in zip(parameters, torch.split(values, [p.numel() for p in parameters]), strict=True):
        cast(Tensor, parameter).copy_(part.view_as(parameter))
