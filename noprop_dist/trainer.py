"""The training loop: feed -> every rank's own blocks step -> scalars -> evaluation -> checkpoint."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from noprop_dist import files
from noprop_dist.chain import Scores, Segment
from noprop_dist.config import Card
from noprop_dist.data import DataInfo, Pixels, medoids
from noprop_dist.learner import Learner
from noprop_dist.learning import make_lesson, travelling
from noprop_dist.metrics import RunLog
from noprop_dist.model import NoPropModel, fresh_block, fresh_labels
from noprop_dist.nets.baselines import Backprop
from noprop_dist.nets.block import Block
from noprop_dist.nets.labels import LabelSpace
from noprop_dist.nets.precision import lay_out
from noprop_dist.parallel.feed import Batch, Feed
from noprop_dist.parallel.placement import Placement
from noprop_dist.parallel.publication import Publication
from noprop_dist.parallel.relay import relay
from noprop_dist.parallel.world import World
from noprop_dist.runs import RunFolder, evaluates, total_steps
from noprop_dist.saving import Saver
from noprop_dist.seeding import derive


class Trainer:
    """Trains this rank's blocks (and, on the coordinator, the label space), in step with the other ranks."""

    def __init__(self, card: Card, info: DataInfo, world: World, placement: Placement, feed: Feed, folder: RunFolder) -> None:
        self.card, self.info, self.world, self.placement = card, info, world, placement
        self.feed, self.folder = feed, folder
        self.total = total_steps(card, info.train_size)
        self.pixels = Pixels(card.data, info)
        self.blocks = {
            index: Learner(fresh_block(card, info, index, world.device), card.optim, self.total)
            for index in placement.ranges[world.rank]
        }
        self.saver = Saver(world, placement, folder.checkpoints, card.train.keep_checkpoints)

    def run(self, start: int, checkpoint: Path | None) -> tuple[dict[str, Any], NoPropModel | None]:
        """Train from step ``start`` to the end. Returns the summary and, on the coordinator, the gathered model."""
        card, world = self.card, self.world
        world.step = start
        self._prepare_labels(checkpoint)
        with contextlib.closing(RunLog(card, self.info, world, self.placement, self.folder, self.total, checkpoint)) as log:
            batches = self.feed.train(start, self.total)
            scores = self._evaluate(log) if start == self.total else None
            for step in range(start, self.total):
                with log.training():
                    self._step(step, next(batches), log)
                log.step(world.step, self.space.spread)
                last = world.step == self.total
                evaluate = last or evaluates(card, self.info.train_size, world.step)
                save = last or (card.train.checkpoint_every and world.step % card.train.checkpoint_every == 0)
                if evaluate or save:
                    log.pause()
                if evaluate:
                    scores = self._evaluate(log)
                if save:
                    checkpoint = self.saver.save(card, self.info, self.blocks, self.labels, self.seen)
            model = self.saver.gather(card, self.info, self.blocks, self.labels)
            summary = log.summary(scores, self._score(self.feed.sample()))
        if model is not None:
            model.save(self.folder.model)
            if start == self.total and self.folder.summary.exists():  # a finished run's figures stand
                return files.read_json(self.folder.summary), model
            parts = {"checkpoint": checkpoint, "tensorboard": self.folder.tensorboard, "model": self.folder.model}
            network = model.blocks[0]
            block = network.blocks[0] if isinstance(network, Backprop) else network
            sizes = [sum(parameter.numel() for parameter in each.parameters()) for each in (block, model)]
            summary["parameters"] = {"block": sizes[0], "total": sizes[1]}
            summary["files"] = {name: str(path) for name, path in parts.items()}
            files.write(self.folder.summary, json.dumps(summary, indent=1).encode())
        return summary, model

    def _prepare_labels(self, checkpoint: Path | None) -> None:
        """The label space, its learner, and what blocks see of it; then everything as the checkpoint has it."""
        card, world = self.card, self.world
        prototypes = self._prototypes() if card.model.embedding == "prototype" and not checkpoint else None
        self.space = fresh_labels(card, self.info, world.device, prototypes)
        self.labels = Learner(self.space, card.optim, self.total)
        self.seen = Publication(world, self.space, travelling(card, self.space), card.model.embedding_lag)
        if checkpoint:
            self.saver.restore(checkpoint, self.blocks, self.labels, self.seen)
        self.seen.begin()
        self.lesson = make_lesson(card, self.blocks, self.labels, self.seen.space, world.is_coordinator)

    def _prototypes(self) -> Tensor | None:
        """On the coordinator the medoid images; the others wait for as long as it takes."""
        found: list[Tensor] = []

        def find() -> bool:
            if self.feed.training_set:
                found.append(medoids(self.feed.training_set, self.info, self.pixels))
            return True

        self.world.publish("prototypes", find, patient=True)
        return found[0] if found else None

    def _step(self, step: int, batch: Batch, log: RunLog) -> None:
        self.seen.advance(self.space)
        torch.manual_seed(derive(self.card.run.seed, "augment", step))
        x = lay_out(self.card.train, self.pixels.normalise(self.pixels.augment(batch.images)))
        self.lesson.teach(step, x, batch.labels, log)
        self.world.step = step + 1

    def _evaluate(self, log: RunLog) -> Scores | None:
        scores = self._score(self.feed.test())
        if scores is not None:
            log.scores(scores)
        return scores

    def _score(self, batches: Iterator[Batch]) -> Scores | None:
        """The accuracies of the chain as it is now, on the coordinator. Every rank calls it."""
        blocks = {index: cast(Block, learner.inference) for index, learner in self.blocks.items()}
        labels = cast(LabelSpace, self.labels.inference)
        segment = Segment(self.card, blocks, self.seen.newest(labels), self.pixels)
        return relay(self.card, self.world, self.placement, segment, labels, batches)
