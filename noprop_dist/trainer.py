"""The training loop: feed -> every rank's own blocks step -> scalars -> evaluation -> checkpoint."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from noprop_dist import files, tracing
from noprop_dist.chain import Scores, Segment
from noprop_dist.config import Card, UserError
from noprop_dist.data import DataInfo, Pixels, medoids
from noprop_dist.learner import Learner
from noprop_dist.learning import make_lesson, prepare, travelling
from noprop_dist.metrics import RunLog
from noprop_dist.model import NoPropModel, fresh_block, fresh_labels
from noprop_dist.nets.baselines import Backprop
from noprop_dist.nets.block import Block
from noprop_dist.nets.labels import LabelSpace
from noprop_dist.parallel.feed import Batch, Feed
from noprop_dist.parallel.placement import Placement
from noprop_dist.parallel.publication import Publication
from noprop_dist.parallel.relay import relay
from noprop_dist.parallel.trace import gather_trace, own_record
from noprop_dist.parallel.traffic import PeerError
from noprop_dist.parallel.world import World
from noprop_dist.report.board import PictureBoard
from noprop_dist.report.console import log as report
from noprop_dist.runs import Listener, Progress, RunFolder, evaluates, pictured, total_steps
from noprop_dist.saving import Saver, recall, rescue
from noprop_dist.viewing import Viewing


class Trainer:
    """Trains this rank's blocks (and, on the coordinator, the label space), in step with the other ranks."""

    def __init__(
        self,
        card: Card,
        info: DataInfo,
        world: World,
        placement: Placement,
        feed: Feed,
        folder: RunFolder,
        listener: Listener | None = None,
    ) -> None:
        self.card, self.info, self.world, self.placement = card, info, world, placement
        self.feed, self.folder, self.listener = feed, folder, listener
        self.total = total_steps(card, info.train_size)
        self.pixels = Pixels(card.data, info)
        self.blocks = {
            index: Learner(fresh_block(card, info, index, world.device), card.optim, self.total, card.train.max_bad_steps)
            for index in placement.ranges[world.rank]
        }
        self.pictures = PictureBoard(folder.pictures, card, info)
        self.saver = Saver(world, placement, folder.checkpoints, card.train.keep_checkpoints)

    def run(self, start: int, checkpoint: Path | None) -> tuple[dict[str, Any], NoPropModel | None]:
        """Train from step ``start`` to the end. Returns the summary and, on the coordinator, the gathered model.

        Where the run was asked to stop before its end, ``feed.stopped`` is set, everything is saved and there is neither.
        Raises PeerError where another rank fails, after this rank has saved its own blocks.
        """
        self.world.step = start
        try:
            return self._run(start, checkpoint)
        except PeerError as error:
            raise PeerError(f"{error}; {self._rescue(start)}") from error

    def begin(self, checkpoint: Path | None) -> RunLog:
        """Take ``checkpoint``, or a fresh start, as what :meth:`steps` goes on from. The log has a screen once it is
        entered."""
        self._prepare_labels(checkpoint)
        skips = [learner.skips for learner in (*self.blocks.values(), self.labels)]
        return RunLog(self.card, self.info, self.world, self.placement, self.folder, self.total, checkpoint, skips)

    def steps(self, log: RunLog) -> Iterator[int]:
        """Train up to the end, or to where the run is asked to stop; yields the number of steps done after each."""
        world, batches = self.world, self.feed.train(self.world.step, self.total)
        while world.step < self.total and not self.feed.stopped:
            with log.training():
                if (batch := next(batches, None)) is None:
                    return
                self._step(world.step, batch, log)
            log.step(world.step, self.space.spread)
            yield world.step

    def _run(self, start: int, checkpoint: Path | None) -> tuple[dict[str, Any], NoPropModel | None]:
        card, world = self.card, self.world
        with self.begin(checkpoint) as log, contextlib.closing(self.pictures):
            saved = start
            owes = log.owes_evaluation() and start >= self._caught_up
            scores = self.evaluate(log) if owes else None
            for step in self.steps(log):
                last = step == self.total
                evaluate = last or (evaluates(card, self.info.train_size, step) and step >= self._caught_up)
                save = last or (card.train.checkpoint_every and step % card.train.checkpoint_every == 0)
                if evaluate or save:
                    log.pause()
                if save:  # first: an evaluation that is cut off is made up for
                    checkpoint, saved = self._save(), step
                if evaluate:
                    scores = self.evaluate(log)
                if (evaluate or save) and not last:
                    self._tell(log, checkpoint if save else None)
            training, _ = (None, None) if self.feed.stopped else self._score(self.feed.sample())
            if self.feed.stopped:
                log.pause()
                log.flush()
                if saved < world.step:
                    checkpoint, saved = self._save(), world.step
                if saved > start:
                    self._tell(log, checkpoint)
                self._keep_trace(start)
                self._say_goodbye(checkpoint)
                return {}, None
            with world.traffic.spans.during("saving", world.step):
                model = self.saver.gather(card, self.info, self.blocks, self.labels)
            self._keep_trace(start)
            summary = log.summary(scores, training)
        if model is not None:
            finished = start == self.total and self.folder.summary.exists()
            if finished:  # its figures stand
                summary = files.read_json(self.folder.summary)
            else:
                self._complete(summary, model, checkpoint)
            model.describe(summary)
            model.save(self.folder.model)
            if not finished:  # last, for it says that the run is
                files.write(self.folder.summary, json.dumps(summary, indent=1).encode())
        shutil.rmtree(self.folder.alone, ignore_errors=True)
        self._tell(log, checkpoint)
        return summary, model

    def _complete(self, summary: dict[str, Any], model: NoPropModel, checkpoint: Path | None) -> None:
        """Add what the files and the model are, and what made it."""
        parts = {"checkpoint": checkpoint, "tensorboard": self.folder.tensorboard, "model": self.folder.model}
        network = model.blocks[0]
        block = network.blocks[0] if isinstance(network, Backprop) else network
        sizes = [sum(parameter.numel() for parameter in each.parameters()) for each in (block, model)]
        summary["parameters"] = {"block": sizes[0], "total": sizes[1]}
        summary["files"] = {name: str(path) for name, path in parts.items()}
        summary |= {"torch": torch.__version__, "fleet": self.folder.fleet.exists()}

    def _save(self) -> Path:
        with self.world.traffic.spans.during("saving", self.world.step):
            return self.saver.save(self.card, self.info, self.blocks, self.labels, self.seen)

    def _keep_trace(self, start: int) -> None:
        """Write what all ranks did when, if any step was trained since ``start``. Every rank calls it."""
        if self.world.step > start and (records := gather_trace(self.world)):
            tracing.keep(self.folder.trace, records, self.placement)

    def _tell(self, log: RunLog, checkpoint: Path | None) -> None:
        if self.listener:
            self.listener(Progress(self.world.step, self.folder, checkpoint, log.figures))

    def _rescue(self, start: int) -> str:
        """Save what this rank has trained, without the others. Says what became of it."""
        trained = {index: learner for index, learner in self.blocks.items() if learner.steps > start}
        try:
            rescue(self.folder.alone, self.card, self.info, trained)
            mine = own_record(self.world.rank, self.world.traffic.spans)
            tracing.keep(self.folder.alone / f"trace-rank-{self.world.rank}.json", [mine], self.placement)
        except UserError as error:
            return f"could not save its own blocks: {error}"
        return f"its own blocks are saved in {self.folder.alone}" if trained else "its own blocks have learnt nothing since"

    def _say_goodbye(self, checkpoint: Path | None) -> None:
        run, kept = self.folder.path.name, f"saved {checkpoint}" if checkpoint else "nothing was trained yet"
        report.info("stopped by %s after step %d: %s", self.world.interruption.reason, self.world.step, kept)
        report.info("to go on, start it again with --run.name %s", run)

    def _prepare_labels(self, checkpoint: Path | None) -> None:
        """The label space, its learner, and what blocks see of it; then everything as the checkpoint has it."""
        card, world = self.card, self.world
        prototypes = self._prototypes() if card.model.embedding == "prototype" and not checkpoint else None
        self.space = fresh_labels(card, self.info, world.device, prototypes)
        self.labels = Learner(self.space, card.optim, self.total, card.train.max_bad_steps)
        self.seen = Publication(world, self.space, travelling(card, self.space), card.model.embedding_lag)
        if checkpoint:
            self.saver.restore(checkpoint, self.blocks, self.labels, self.seen)
        if card.train.resume != "never" and (taken := recall(self.folder.alone, card, self.info, self.blocks)):
            report.warning("blocks %s go on from where they were when another rank was lost", ", ".join(map(str, taken)))
        steps = [learner.steps for learner in self.blocks.values()]
        self._caught_up = max(world.exchange("steps", max(steps)))  # up to then the chain is no step's
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
        x = prepare(self.card, self.pixels, step, batch.images)
        self.lesson.teach(step, x, batch.labels, log)
        self.world.step = step + 1

    def evaluate(self, log: RunLog) -> Scores | None:
        """The accuracies on the test set, on the coordinator; None where it was cut off. Every rank calls it."""
        view = pictured(self.card, self.info.train_size, self.world.step)
        scores, viewing = self._score(self.feed.test(), view=view)
        if scores is not None:
            log.scores(scores)
        if viewing is not None:
            with self.world.traffic.spans.during("drawing", self.world.step):
                self.pictures.show(self.world.step, viewing, last=self.world.step == self.total)
        return scores

    def _score(self, batches: Iterator[Batch], *, view: bool = False) -> tuple[Scores | None, Viewing | None]:
        """The accuracies of the chain as it is now, as :meth:`evaluate` gives them, and what is to be seen."""
        blocks = {index: cast(Block, learner.inference) for index, learner in self.blocks.items()}
        labels = cast(LabelSpace, self.labels.inference)
        segment = Segment(self.card, blocks, self.seen.newest(labels), self.pixels)
        with self.world.traffic.spans.during("evaluation", self.world.step):
            found = relay(self.card, self.world, self.placement, segment, labels, batches, view=view)
        return (None, None) if found is None or self.feed.stopped else found
