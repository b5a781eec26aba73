"""Blocks as units of work of their own: whoever has a block's state, the batches and the label space's values can train it
for any stretch of steps, anywhere, and comes to the same bits. Knows neither ranks nor who asks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, cast

from torch import Tensor

from noprop_dist.config import Card
from noprop_dist.data import DataInfo, DataSet, Pixels, medoids, train_indices
from noprop_dist.files import pack, unpack
from noprop_dist.interruption import Interruption
from noprop_dist.learner import Learner
from noprop_dist.learning import LabelLesson, Local, Means, prepare, travelling
from noprop_dist.model import fresh_block, fresh_labels
from noprop_dist.parallel.publication import Publication, fill
from noprop_dist.parallel.world import World, choose_device, set_threads
from noprop_dist.runs import RunFolder, total_steps
from noprop_dist.saving import commit_checkpoint, load_labels

Pair = tuple[Tensor, Tensor]
"""uint8 images (B, C, H, W) and int64 labels (B,)."""


def training_batches(card: Card, data: DataSet, steps: Iterable[int]) -> Iterator[Pair]:
    """The batches of those steps, as :meth:`~noprop_dist.parallel.feed.Feed.train` sends them."""
    return iter(data.train.batches(_rows(card, data.info, step) for step in steps))


def _rows(card: Card, info: DataInfo, step: int) -> Tensor:
    repeat, batch = card.debug.overfit_batches, card.data.batch_size
    return train_indices(card.run.seed, step, size=info.train_size, batch_size=batch, overfit_batches=repeat)


class Report(NamedTuple):
    """What came of a stretch of work."""

    step: int
    """Up to which the block is trained."""
    loss: float
    """Mean over the stretch."""
    accuracy: float
    """How often û names the right class, mean over the stretch."""
    skipped: int
    """Updates skipped since the block's first step, their loss or gradient not being finite."""
    in_a_row: int
    """The last ones of these."""


class Workbench:
    """Trains blocks, one at a time. Keeps the last one, so that it need not be handed in again."""

    def __init__(self, card: Card, info: DataInfo) -> None:
        self._card, self._info = card, info
        self._device, _ = choose_device(card.parallel, 0, 1)
        self._pixels = Pixels(card.data, info)
        self._seen = fresh_labels(card, info, self._device).requires_grad_(False)
        self._travels = travelling(card, self._seen)
        self._index, self._learner = -1, cast(Learner | None, None)

    def train(
        self,
        index: int,
        state: bytes | None,
        steps: range,
        batches: Iterable[Pair],
        values: Mapping[int, Tensor],
        interruption: Interruption,
    ) -> Report:
        """Train block ``index`` in ``steps``, or up to the step in which ``interruption`` is asked for.

        Args:
            state: what :meth:`state` gave, of the block before the first of the steps; None: it lies here, or is a fresh one.
            batches: one a step.
            values: of the label space, see :meth:`LabelSpaceAlone.values`.
        """
        card, log = self._card, Means()
        set_threads(card.parallel)
        learner = self._block(index, state, steps.start)
        lesson = Local(card, {index: learner}, None, self._seen)
        for step, (images, labels) in zip(steps, batches, strict=False):
            if interruption.reason:
                break
            if self._travels and (step == steps.start or step % card.model.embedding_lag == 0):
                fill(self._seen, self._travels, values[step // card.model.embedding_lag])
            x = prepare(card, self._pixels, step, images.to(self._device))
            lesson.teach(step, x, labels.to(self._device), log)
        loss, accuracy = log.means
        skipped, in_a_row = learner.skips.tolist()
        return Report(learner.steps, loss, accuracy, skipped, in_a_row)

    @property
    def progress(self) -> tuple[int, int]:
        """The block in hand, -1 for none, and the steps that it has done."""
        return self._index, self._learner.steps if self._learner else 0

    def state(self) -> bytes:
        """Of the block that was trained last."""
        assert self._learner is not None
        return pack(self._learner.state())

    def _block(self, index: int, state: bytes | None, step: int) -> Learner:
        if state is None and self._learner and (self._index, self._learner.steps) == (index, step):
            return self._learner
        card, total = self._card, total_steps(self._card, self._info.train_size)
        block = fresh_block(card, self._info, index, self._device)
        learner = Learner(block, card.optim, total, card.train.max_bad_steps)
        if state:
            learner.load(unpack(state))
        assert learner.steps == step, f"block {index} is at step {learner.steps}, not {step}"
        self._index, self._learner = index, learner
        return learner


@dataclass
class LabelSpaceAlone:
    """The label space's own training, which needs labels alone, and its values by step for blocks that come later.

    ``world``: a single rank's, connected. Goes on from ``checkpoint``, where there is one, at ``world.step``.
    """

    card: Card
    data: DataSet
    world: World
    checkpoint: Path | None

    def __post_init__(self) -> None:
        card, info, device = self.card, self.data.info, self.world.device
        prototypes = None
        if card.model.embedding == "prototype" and not self.checkpoint:
            prototypes = medoids(self.data.train, info, Pixels(card.data, info))
        self._space = fresh_labels(card, info, device, prototypes)
        self.learner = Learner(self._space, card.optim, total_steps(card, info.train_size), card.train.max_bad_steps)
        self._travels = travelling(card, self._space)
        self._seen = Publication(self.world, self._space, self._travels, card.model.embedding_lag)
        if self.checkpoint:
            load_labels(self.checkpoint, self.learner, self._seen)
        self._seen.begin()
        self._lesson = LabelLesson(card, self.learner)
        self._values = {self.world.step // card.model.embedding_lag: self._seen.values}

    def values(self, steps: range) -> dict[int, Tensor]:
        """What blocks see in those steps, flat, by step // lag; empty where it never changes."""
        self.advance(steps.stop)
        lag = self.card.model.embedding_lag
        return {number: self._values[number] for number in {step // lag for step in steps}} if self._travels else {}

    def forget(self, step: int) -> None:
        """No block needs what was before that step."""
        self._values = {
            number: kept for number, kept in self._values.items() if number >= step // self.card.model.embedding_lag
        }

    def advance(self, stop: int) -> None:
        """Train up to that step."""
        for step in range(self.world.step, stop):
            self._seen.advance(self._space)
            if self._travels and step % self.card.model.embedding_lag == 0:
                self._values[step // self.card.model.embedding_lag] = self._seen.values
            labels = self.data.train.labels[_rows(self.card, self.data.info, step)]
            self._lesson.teach(step, labels.to(self.world.device))
            self.world.step = step + 1

    def finish(self, folder: RunFolder, blocks: Mapping[int, bytes]) -> Path:
        """Write the checkpoint of the run's end, from all blocks' states."""
        self.advance(total_steps(self.card, self.data.info.train_size))
        labels = pack(self.learner.state() | self._seen.state())
        return commit_checkpoint(folder.checkpoints, self.card, self.data.info, self.world.step, blocks, labels)
