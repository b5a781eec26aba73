"""The training loop: feed -> every rank's own blocks step -> scalars -> evaluation -> checkpoint."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any, cast

import torch

from noprop_dist import files
from noprop_dist.chain import Scores, Segment
from noprop_dist.config import Card
from noprop_dist.data import DataInfo, Pixels
from noprop_dist.learner import Learner
from noprop_dist.method.discrete import Discrete
from noprop_dist.metrics import RunLog
from noprop_dist.model import NoPropModel, fresh_block, fresh_labels
from noprop_dist.nets.block import Block
from noprop_dist.nets.labels import LabelSpace, nearest
from noprop_dist.nets.precision import autocast, lay_out
from noprop_dist.parallel.feed import Batch, Feed
from noprop_dist.parallel.placement import Placement
from noprop_dist.parallel.relay import relay
from noprop_dist.parallel.world import World
from noprop_dist.runs import RunFolder, total_steps
from noprop_dist.saving import Saver
from noprop_dist.seeding import derive


class Trainer:
    """Trains this rank's blocks (and, on the coordinator, the label space), in step with the other ranks.

    Everything random in a step is seeded by (run.seed, block, step), so neither the number of ranks nor a resume changes a
    block's path.
    """

    def __init__(self, card: Card, info: DataInfo, world: World, placement: Placement, feed: Feed, folder: RunFolder) -> None:
        self.card, self.info, self.world, self.placement = card, info, world, placement
        self.feed, self.folder = feed, folder
        self.total = total_steps(card, info.train_size)
        self.eval_every = card.train.eval_every or max(1, info.train_size // card.data.batch_size)
        self.method = Discrete(card.method, card.model.blocks)
        self.pixels = Pixels(card.data, info)
        self.blocks = {
            index: Learner(fresh_block(card, info, index, world.device), card.optim, self.total)
            for index in placement.ranges[world.rank]
        }
        self.labels = Learner(fresh_labels(card, info, world.device), card.optim, self.total)
        self.embedding = cast(LabelSpace, self.labels.module).embedding
        self.saver = Saver(world, placement, folder.checkpoints, card.train.keep_checkpoints)

    def run(self, start: int, checkpoint: Path | None) -> tuple[dict[str, Any], NoPropModel | None]:
        """Train from step ``start`` to the end. Returns the summary and, on the coordinator, the gathered model."""
        card, world = self.card, self.world
        world.step = start
        if checkpoint:
            self.saver.restore(checkpoint, self.blocks, self.labels)
        with contextlib.closing(RunLog(card, world, self.placement, self.folder.tensorboard, start, self.total)) as log:
            batches = self.feed.train(start, self.total)
            scores = self._evaluate(log) if start == self.total else None
            for step in range(start, self.total):
                with log.training():
                    self._step(step, next(batches), log)
                log.step(world.step)
                last = world.step == self.total
                if last or world.step % self.eval_every == 0:
                    scores = self._evaluate(log)
                if last or (card.train.checkpoint_every and world.step % card.train.checkpoint_every == 0):
                    checkpoint = self.saver.save(card, self.info, self.blocks, self.labels)
            model = self.saver.gather(card, self.info, self.blocks, self.labels)
            summary = log.summary(scores)
        if model is not None:
            model.save(self.folder.model)
            if start == self.total and self.folder.summary.exists():  # a finished run's figures stand
                return json.loads(files.read(self.folder.summary)), model
            parts = {"checkpoint": checkpoint, "tensorboard": self.folder.tensorboard, "model": self.folder.model}
            summary["files"] = {name: str(path) for name, path in parts.items()}
            files.write(self.folder.summary, json.dumps(summary, indent=1).encode())
        return summary, model

    def _step(self, step: int, batch: Batch, log: RunLog) -> None:
        card, seed = self.card, self.card.run.seed
        torch.manual_seed(derive(seed, "augment", step))
        x = lay_out(card.train, self.pixels.normalise(self.pixels.augment(batch.images)))
        u = self.embedding[batch.labels]
        for index, learner in self.blocks.items():
            torch.manual_seed(derive(seed, "block", index, step))
            block = cast(Block, learner.module).train()
            z = self.method.training_input(index + 1, u)
            with autocast(card.train, self.world.device):
                features = block.encode(x)
                estimate = block.denoise(z, features, self.embedding)
            loss = self.method.loss(index + 1, estimate, u)
            learner.update(loss, step)
            log.add(index, loss.detach(), nearest(estimate.detach(), self.embedding) == batch.labels)
            if card.debug.enabled:
                log.debug(index, learner.gradient_norm(), {"x": x, "features": features, "z": z, "û": estimate})
        if self.world.is_coordinator:
            torch.manual_seed(derive(seed, "labels", step))
            logits = self.labels.module(self.method.final_latent(u))
            self.labels.update(torch.nn.functional.cross_entropy(logits, batch.labels), step)
        self.world.step = step + 1

    def _evaluate(self, log: RunLog) -> Scores | None:
        blocks = {index: cast(Block, learner.inference) for index, learner in self.blocks.items()}
        segment = Segment(self.card, blocks, self.embedding, self.pixels)
        labels = cast(LabelSpace, self.labels.inference)
        scores = relay(self.world, self.placement, segment, labels, self.feed.test())
        if scores is not None:
            log.scores(scores)
        return scores
