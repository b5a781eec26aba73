"""What can be seen of a chain: a few images on their way from noise to label, and how a whole test set was named."""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from noprop_dist.chain import PATHS, Moment, Segment, Tally, logits
from noprop_dist.config import LOCAL_METHODS, Card
from noprop_dist.method.base import Level
from noprop_dist.method.intervals import Intervals, cuts
from noprop_dist.method.reading import class_posterior, mixture
from noprop_dist.nets.block import Block
from noprop_dist.nets.labels import LabelSpace

WATCHED = ("mean", "stochastic")
"""The paths that are watched: the mean path, and the first stochastic chain."""
MOMENTS = 20
"""Steps of a chain that are kept, at most: evenly chosen ones where there are more."""
IMAGES = 8
"""Images that are watched, at most."""
NUMBERS = 2**22
"""What is kept of them, at most: fewer images where z is large."""
HEADER = 5
"""Of a record's row: time, level then, level at the end of the block."""
POINTS = 33
"""Times of each block at which a learned schedule is kept."""


@dataclass(frozen=True)
class Course:
    """N images on their way from noise to label, in K steps, on the R = 2 paths of WATCHED."""

    images: Tensor
    """uint8 (N, C, H, W)."""
    labels: Tensor | None
    """int64 (N,), where they are known."""
    steps: tuple[str, ...]
    """K names: the block of DT, else the time; none for a baseline, of which only the end is known."""
    z: Tensor
    """(R, N, K+1, d): what each step is given; then the end."""
    pictures: Tensor | None
    """z as pictures, where embeddings are prototypes: uint8 (R, N, K+1, C, H, W)."""
    told: Tensor
    """(R, N, K+1, m): what z alone tells of the class, see class_posterior."""
    said: Tensor
    """(R, N, K, m): the class weights that each step's û is a mixture of."""
    answer: Tensor
    """(R, N, m): the model's own probabilities, read from the last z."""


@dataclass(frozen=True)
class Viewing:
    """All that pictures of a model are made from, on the CPU."""

    embedding: Tensor
    """W (m, d)."""
    gamma: Tensor | None
    """CT: a learned schedule, (2, P): times and γ."""
    course: Course | None
    """Of a few test images; None where there are no data, or z is too large to keep."""
    named: Tensor | None
    """int64 (2, M) of the whole test set: the right classes, and those that the card's path names."""

    @classmethod
    def of(cls, card: Card, labels: LabelSpace, gammas: Tensor, course: Course | None, tally: Tally | None) -> Viewing:
        """From all blocks' :func:`schedules`, one after the other, and what a test set gave, where there is one."""
        named = torch.cat(tally.named, dim=1)[[0, 1 + PATHS.index(card.inference.path)]] if tally else None
        return cls(labels.embedding.detach().cpu(), as_curve(card, gammas), course, named)


def moments(card: Card) -> dict[int, list[float]]:
    """Of the blocks that are watched, the times (0 to 1) of the z that are kept; empty for a baseline."""
    if card.method.name not in LOCAL_METHODS:
        return {}
    used = card.inference.blocks or card.units
    chosen = range(0, used, -(-used // MOMENTS))
    if card.method.name == "dt":
        return {index: [index / card.units] for index in chosen}
    intervals, kept = Intervals(card.method, card.units), {}
    for index in chosen:
        grid = intervals.grid(index, card.inference.steps)[0].tolist()[:-1]
        most = min(len(grid), max(1, MOMENTS // used))
        kept[index] = [grid[number * len(grid) // most] for number in range(most)]
    return kept


def sample(labels: Tensor, count: int) -> Tensor:
    """Of a batch's labels (B,), which images to watch: the first of each class, in the order of classes, then the next ones."""
    order = labels.cpu().argsort(stable=True)
    first = torch.cat([torch.ones(1, dtype=torch.bool), labels.cpu()[order].diff() != 0])
    return torch.cat([order[first], order[~first].sort().values])[:count]


class Witness:
    """Told of every moment (see :class:`~noprop_dist.chain.Segment`), keeps those of a few images of one batch.

    ``record`` is a plain row of numbers, so that it can travel; all records of a chain's segments, in order, make its course.
    """

    def __init__(self, card: Card, segment: Segment, labels: Tensor) -> None:
        self._card, self._segment = card, segment
        self._size: int = segment.embedding.shape[1]
        self._moments, self._ends = moments(card), cuts(card.method, card.units)
        numbers = len(WATCHED) * 2 * max(segment.embedding.shape) * sum(map(len, self._moments.values()))
        self.chosen = sample(labels, min(IMAGES, NUMBERS // max(1, numbers)))
        """Indices of the images in the batch, (N,)."""
        self._kept: dict[tuple[int, int], Tensor] = {}

    def __call__(self, moment: Moment) -> None:
        """Keep it, if it is the first at or after a time that is asked for. Of equal times the last: before it, a solver was
        only trying."""
        slot = bisect.bisect_right(self._moments.get(moment.block, []), moment.time + 1e-6) - 1
        before = self._kept.get((moment.block, slot))
        if slot < 0 or (before is not None and before[0] < moment.time - 1e-6):
            return
        seen = torch.stack([part[: len(WATCHED)][:, self.chosen.to(part.device)] for part in (moment.z, moment.estimate)])
        level, after = (self._segment.level(moment.block, time) for time in (moment.time, self._ends[moment.block + 1]))
        self._kept[moment.block, slot] = torch.cat([torch.tensor([moment.time, *level, *after]), seen.float().flatten().cpu()])

    @property
    def record(self) -> Tensor:
        """What was seen of this segment's blocks, float32 (:meth:`length`,)."""
        unseen = torch.full((self._row,), math.nan)  # dopri5 may step over a time
        slots = ((index, slot) for index in self._segment.blocks for slot in range(len(self._moments.get(index, []))))
        return torch.cat([torch.empty(0), *(self._kept.get(slot, unseen) for slot in slots)])

    def length(self, blocks: Iterable[int]) -> int:
        """Of the record of a segment that holds these ``blocks``."""
        return self._row * sum(len(self._moments.get(index, [])) for index in blocks)

    @torch.no_grad()
    def develop(self, labels: LabelSpace, images: Tensor, truth: Tensor | None, record: Tensor, ends: Tensor) -> Course | None:
        """The course, from the watched batch's images (B, C, H, W), labels (B,) and finished paths (R, B, d), and all segments'
        records, one after the other."""
        if not len(self.chosen):
            return None
        rows = record.view(-1, self._row)
        rows = rows[~rows[:, 0].isnan()]
        seen = rows[:, HEADER:].view(len(rows), 2, len(WATCHED), len(self.chosen), self._size).to(labels.embedding)
        z, estimates = seen.permute(1, 2, 3, 0, 4)
        end = ends[: len(WATCHED)][:, self.chosen.to(ends.device)].to(z)
        z = torch.cat([z, end[:, :, None]], dim=2)
        levels = [Level(*level) for level in (*rows[:, 1:3].tolist(), *rows[-1:, 3:HEADER].tolist())]
        told = [class_posterior(z[:, :, step], labels.embedding, level) for step, level in enumerate(levels)]
        answer = logits(self._card, labels, end).softmax(dim=-1)
        times, blocks = rows[:, 0].tolist(), self._card.method.name == "dt"
        return Course(
            images=images[self.chosen.to(images.device)].cpu(),
            labels=None if truth is None else truth[self.chosen.to(truth.device)].cpu(),
            steps=tuple(str(round(time * self._card.units)) if blocks else f"{time:.2f}" for time in times),
            z=z.cpu(),
            pictures=self._segment.pixels.pictures(z.cpu()) if self._card.model.embedding == "prototype" else None,
            told=torch.stack(told or [answer], dim=2).cpu(),
            said=mixture(estimates, labels.embedding).cpu(),
            answer=answer.cpu(),
        )

    @property
    def _row(self) -> int:
        """Numbers of a moment: HEADER of them, then z and û of the images on each path."""
        return HEADER + 2 * len(WATCHED) * len(self.chosen) * self._size


def schedules(card: Card, blocks: Mapping[int, Block]) -> Tensor:
    """γ of blocks that learn it, at POINTS times of each one's interval, one after the other; empty where it is not learned."""
    ends = cuts(card.method, card.units) if card.method.schedule == "learned" else []
    found = [torch.empty(0)]
    for index, block in blocks.items() if ends else ():
        assert block.gamma is not None
        with torch.no_grad():
            found.append(block.gamma(torch.linspace(ends[index], ends[index + 1], POINTS)).cpu())
    return torch.cat(found)


def as_curve(card: Card, gammas: Tensor) -> Tensor | None:
    """Times and γ, (2, P), from all blocks' :func:`schedules`, one after the other; None where γ is not learned."""
    if not len(gammas):
        return None
    ends = cuts(card.method, card.units)[: len(gammas) // POINTS + 1]
    return torch.stack([torch.cat([torch.linspace(start, end, POINTS) for start, end in pairwise(ends)]), gammas])
