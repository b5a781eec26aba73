"""What a run measures, kept and shown: TensorBoard, history, the live screen, and the summary at the end."""

from __future__ import annotations

import math
import socket
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from noprop_dist.chain import PATHS, Scores
from noprop_dist.config import Card
from noprop_dist.data import DataInfo
from noprop_dist.history import History
from noprop_dist.learner import learning_rate
from noprop_dist.meter import PARTS, ROWS, SKIPS, Load, Meter
from noprop_dist.parallel.placement import Placement
from noprop_dist.parallel.scalars import Rows
from noprop_dist.parallel.traffic import KINDS, PeerError
from noprop_dist.parallel.world import World
from noprop_dist.report.board import Board
from noprop_dist.report.console import log
from noprop_dist.report.lanes import Lane, span
from noprop_dist.report.screen import STOPPING, Screen, beside
from noprop_dist.runs import RunFolder, evaluates

DELAY = 10
"""Steps after which scalars are shown, or with the next ones: by then all ranks have sent them, so hardly anyone waits."""


class RunLog:
    """Gathers a run's figures, from ``world.step`` on. All ranks have one; the coordinator's shows and keeps them. To be
    entered, so that the screen is left as it should be.

    Args:
        total: length of the run in steps.
        skips: of this rank's blocks, then of its label space: :attr:`Learner.skips`.
        checkpoint: from which the run goes on, None at its beginning.
    """

    def __init__(
        self,
        card: Card,
        info: DataInfo,
        world: World,
        placement: Placement,
        folder: RunFolder,
        total: int,
        checkpoint: Path | None,
        skips: list[Tensor],
    ) -> None:
        self._card, self._info, self._world, self._placement = card, info, world, placement
        self._start, self._total = world.step, total
        self._board = Board(folder.tensorboard, self._start) if world.is_coordinator else None
        self._history = History(folder.history, self._start, checkpoint) if world.is_coordinator else None
        self._meter = Meter(world, placement, skips[:-1])
        self._label_skips = skips[-1]
        self._under_way: tuple[int, int, dict[str, float], Rows] | None = None
        self._figures = torch.zeros(ROWS, card.units, dtype=torch.float64)  # of the last log interval, all blocks'
        self._figures[:2] = torch.nan
        self._told: dict[str, float] = {}
        self._mourned: set[str] = set()
        self._screen: Screen | None = None
        self._stack = ExitStack()

    def __enter__(self) -> RunLog:
        """Put a live board on the coordinator's terminal; other ranks that write there keep clear of it."""
        world = self._world
        places = world.exchange("place", [socket.gethostname(), str(world.device)])
        names = [f"{host} {device}" if len({host for host, _ in places}) > 1 else device for host, device in places]
        self._devices = names if len(set(names)) > 1 else [""] * world.size
        if world.is_coordinator:
            lanes = self._lanes([Load(math.nan, math.nan, math.nan)] * world.size)
            self._screen = self._stack.enter_context(Screen(self._start, self._total, lanes, self._doing))
        place = world.publish("board", lambda: self._screen.place if self._screen else None)
        if not world.is_coordinator:
            self._stack.enter_context(beside(place, PeerError))
        return self

    def _doing(self) -> str:
        return STOPPING if self._world.interruption.reason else self._world.traffic.spans.now

    def __exit__(self, kind: type[BaseException] | None, *about: Any) -> None:
        """Leave the screen as it is, close the event file."""
        self._stack.__exit__(kind, *about)
        if self._board:
            self._board.close()

    def training(self) -> AbstractContextManager[None]:
        """See :meth:`Meter.training`."""
        return self._meter.training()

    def pause(self) -> None:
        """Before evaluation or saving: let the device finish the training under way, and note how long it has taken."""
        with self.training():
            if self._world.device.type == "cuda":
                torch.cuda.synchronize(self._world.device)
        self._note()

    def add(self, indices: Sequence[int], losses: Tensor, hits: Tensor) -> None:
        """See :meth:`Meter.add`."""
        self._meter.add(indices, losses, hits)

    def debug(self, index: int, norm: float, tensors: Mapping[str, Tensor]) -> None:
        """With --debug: a block's gradient norm, and on the first step the shapes of what it computed."""
        self._meter.add_norm(index, norm)
        if self._world.step == self._start:
            shapes = ", ".join(f"{name} {tuple(tensor.shape)} {tensor.dtype}" for name, tensor in tensors.items())
            log.info("block %d: %s", index, shapes)

    def owes_evaluation(self) -> bool:
        """Whether the run begins with an evaluation: one that was cut off, or all that is left of it. Every rank calls it."""

        def missing() -> bool:
            due = self._start > 0 and evaluates(self._card, self._info.train_size, self._start)
            done = {point["step"] for point in self._history.curve} if self._history else set()
            return self._start == self._total or (due and self._start not in done)

        return bool(self._world.publish("evaluation", missing))

    def step(self, done: int, spread: Callable[[], float]) -> None:
        """``done`` steps are complete. Now and then, send this rank's means off, and show those sent before.

        ``spread`` gives the smallest distance between two class embeddings.
        """
        self._meter.steps += 1
        if self._screen:
            self._screen.update(done)
        if self._under_way and done - self._under_way[0] == DELAY:
            with self.training():
                self.flush()
        if done % self._card.train.log_every == 0 or done == self._total:
            with self.training():
                self.flush()
                row = self._meter.row()
            now = {
                "learning rate": learning_rate(self._card.optim, done - 1, self._total),
                "samples per second": self._meter.rate * self._card.data.batch_size,
            }
            if self._card.model.embedding != "one-hot":
                now["smallest distance between embeddings"] = spread()
            now |= {f"bytes sent by rank 0/{kind}": count for kind, count in self._world.traffic.sent.items()}
            steps = self._meter.steps
            self._under_way = done, steps, now, self._meter.send(row)

    def scores(self, scores: Scores) -> None:
        """Show an evaluation."""
        step = self._world.step
        chain = "  ".join(f"{path} {getattr(scores, path):.2%}" for path in PATHS)
        blocks = f"  û {span(scores.blocks, '.2%')}" if scores.blocks else ""
        if self._screen:
            self._screen.judge(step, f"{chain}{blocks}")
        if self._board:
            values = {f"test accuracy/{path}": getattr(scores, path) for path in PATHS}
            values |= {_tag(index, "test accuracy"): value for index, value in enumerate(scores.blocks)}
            self._board.scalars(step, values)
        self._note(**{path: getattr(scores, path) for path in PATHS})

    def summary(self, scores: Scores | None, training: Scores | None) -> dict[str, Any]:
        """All of the end table, from the scores of test and training images, on the coordinator; nothing elsewhere. Every rank
        calls it."""
        self.flush()
        world, card = self._world, self._card
        rows = self._meter.totals((world.step - self._start) * card.data.batch_size)
        if scores is None or training is None or self._history is None:
            return {}
        whole = self._so_far
        accuracy = {path: getattr(scores, path) for path in PATHS}
        used = dict(enumerate(scores.blocks))
        return {
            "test_accuracy": accuracy[card.inference.path],
            "path": card.inference.path,
            "accuracy": accuracy,
            "train_accuracy": getattr(training, card.inference.path),
            "ranks": world.size,
            "steps": world.step,
            "seconds": whole["seconds"],
            "samples_per_second": whole["steps"] * card.data.batch_size / max(whole["seconds"], 1e-9),
            "peak_memory_bytes": max(row.peak_memory for row in rows),
            "busy_share": sum(row.busy for row in rows) / world.size,
            "per_rank": [
                {
                    "rank": rank,
                    "blocks": list(self._placement.ranges[rank]),
                    "samples_per_second": row.samples_per_second,
                    "peak_memory_bytes": row.peak_memory,
                    "busy_share": row.busy,
                }
                for rank, row in enumerate(rows)
            ],
            "blocks": [
                {
                    "index": index,
                    "rank": self._placement.owner(index),
                    "loss": loss if math.isfinite(loss) else None,
                    "accuracy": used.get(index),
                    "skipped_updates": int(skipped),
                    "given_up": self._given_up(in_a_row),
                }
                for index, (loss, _, _, skipped, in_a_row) in enumerate(self._figures.T.tolist())
            ],
            "bytes": {kind: sum(row.sent[kind] for row in rows) for kind in KINDS},
            "bytes_per_step": whole["bytes"] / max(whole["steps"], 1),
            "curve": self._history.curve,
        }

    @property
    def figures(self) -> dict[str, float]:
        """Of this step, on the coordinator; nothing elsewhere."""
        figures = self._history.at(self._world.step) if self._history else {}
        if self._card.inference.path in figures:
            figures["test_accuracy"] = figures[self._card.inference.path]
        if math.isfinite(loss := float(self._figures[0].nanmean())):
            figures["loss"] = loss
        return figures

    @property
    def _so_far(self) -> dict[str, float]:
        """Training over all starts, on the coordinator."""
        here = {"seconds": self._meter.running, "steps": self._world.step - self._start, "bytes": self._meter.fed}
        return {name: value + (self._history.before[name] if self._history else 0) for name, value in here.items()}

    def _note(self, **figures: float) -> None:
        if self._history:
            epoch = self._world.step * self._card.data.batch_size / self._info.train_size
            self._history.note(self._world.step, epoch=epoch, **self._so_far, **figures)

    def flush(self) -> None:
        """Show the scalars under way. They were sent some steps ago, see DELAY."""
        if self._under_way is None:
            return
        done, steps, values, rows = self._under_way
        self._under_way = None
        arrived = rows.wait()
        if self._board is None:
            return
        self._figures, loads = self._meter.read(arrived, steps)
        debug = self._card.debug.enabled
        for part, row in zip((*PARTS, *SKIPS), self._figures.tolist(), strict=True):
            if part in PARTS[:2] or (part == "gradient norm" and debug) or (part == SKIPS[0] and any(row)):
                values |= {_tag(index, part): value for index, value in enumerate(row)}
        values |= {f"busy share of rank {rank}": load.busy for rank, load in enumerate(loads)}
        self._board.scalars(done, values)
        if self._screen:
            self._screen.show(done, self._lanes(loads), values["samples per second"])
        if debug and self._screen:
            self._screen.say(f"step {done}: gradient norms {' '.join(f'{norm:.3g}' for norm in self._figures[2].tolist())}")
        self._tell_of_skips(done)

    def _lanes(self, loads: Sequence[Load]) -> list[Lane]:
        losses, hits = self._figures[:2].tolist()
        ranks = zip(self._placement.ranges, loads, self._devices, strict=True)
        return [
            Lane(
                rank,
                owned,
                losses[owned.start : owned.stop],
                hits[owned.start : owned.stop],
                load.busy,
                load.sent,
                load.per_step,
                device,
            )
            for rank, (owned, load, device) in enumerate(ranks)
        ]

    def _tell_of_skips(self, done: int) -> None:
        names = {f"block {index}": figures for index, figures in enumerate(self._figures[len(PARTS) :].T.tolist())}
        for name, (skipped, in_a_row) in (names | {"the label space": self._label_skips.tolist()}).items():
            if skipped <= self._told.get(name, 0) or name in self._mourned:
                continue
            self._told[name] = skipped
            if self._given_up(in_a_row):
                self._mourned.add(name)
                log.error(
                    "STEP %d: %s IS NO LONGER TRAINED: %d steps in a row had no finite loss or gradient. It stays as it was, "
                    "the others go on. Go back to a checkpoint before it, with a lower --optim.lr or with --optim.clip_norm 1",
                    done, name.upper(), in_a_row,
                )  # fmt: skip
            else:
                log.warning("step %d: %s: %d updates skipped so far: loss or gradient not finite", done, name, skipped)

    def _given_up(self, in_a_row: float) -> bool:
        return 0 < self._card.train.max_bad_steps <= in_a_row


def _tag(index: int, what: str) -> str:
    return f"block-{index:02d}/{what}"
