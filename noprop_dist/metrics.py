"""What a run measures: scalars from every rank to the coordinator, its TensorBoard and bar, and the summary at the end."""

from __future__ import annotations

import contextlib
import math
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from noprop_dist.chain import PATHS, Scores
from noprop_dist.config import Card
from noprop_dist.data import DataInfo
from noprop_dist.history import History
from noprop_dist.learner import learning_rate
from noprop_dist.parallel.placement import Placement
from noprop_dist.parallel.scalars import Rows, gather_rows
from noprop_dist.parallel.traffic import KINDS
from noprop_dist.parallel.world import World
from noprop_dist.report.board import Board
from noprop_dist.report.console import Bar, log
from noprop_dist.runs import RunFolder, evaluates

PARTS = ("loss", "train accuracy", "gradient norm")
SKIPS = ("skipped updates", "in a row")
ROWS = len(PARTS) + len(SKIPS)
FED = ("batches", "labels")
"""Kinds of messages that training itself needs; the coordinator sends them all."""


class RunLog:
    """Gathers a run's figures, from ``world.step`` on. All ranks have one; the coordinator's shows and keeps them.

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
        self._bar = Bar(world.rank, self._start, total)
        self._first = placement.ranges[world.rank].start
        owned = len(placement.ranges[world.rank])
        self._sums = torch.zeros(len(PARTS), owned, dtype=torch.float64, device=world.device)
        self._cells = [row.unbind() for row in self._sums]  # views: making them takes longer than adding
        self._added = [0] * owned  # steps that each block did
        self._skips = skips
        self._counted = 0
        self._running = self._waiting = self._before = 0.0  # seconds of training, of waiting in them, and up to the last log
        self._fed = 0  # bytes that training took
        self._under_way: tuple[int, dict[str, float], Rows] | None = None
        self._figures = torch.zeros(ROWS, card.units, dtype=torch.float64)  # of the last log interval, all blocks'
        self._figures[0] = torch.nan
        self._told: dict[str, float] = {}
        self._mourned: set[str] = set()

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """Count what happens inside as training time (evaluation and saving are left out)."""
        traffic = self._world.traffic
        begin, waited, fed = time.perf_counter(), sum(traffic.waited.values()), sum(traffic.sent[kind] for kind in FED)
        yield
        self._running += time.perf_counter() - begin
        self._waiting += sum(traffic.waited.values()) - waited
        self._fed += sum(traffic.sent[kind] for kind in FED) - fed

    def pause(self) -> None:
        """Before evaluation or saving: let the device finish the training under way, and note how long it has taken."""
        with self.training():
            if self._world.device.type == "cuda":
                torch.cuda.synchronize(self._world.device)
        self._note()

    def add(self, indices: Sequence[int], losses: Tensor, hits: Tensor) -> None:
        """Of n blocks on one batch the losses (n,) and the hits (n, B) of their û. Does not synchronise with the device."""
        rows = [index - self._first for index in indices]
        sums = [self._cells[part][row] for part in (0, 1) for row in rows]
        torch._foreach_add_(sums, [*losses, *hits.float().mean(dim=1)])
        for row in rows:
            self._added[row] += 1

    def debug(self, index: int, norm: float, tensors: Mapping[str, Tensor]) -> None:
        """With --debug: a block's gradient norm, and on the first step the shapes of what it computed."""
        self._sums[2, index - self._first] += norm
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
        """``done`` steps are complete. Now and then, send this rank's means off and show those sent the time before.

        ``spread`` gives the smallest distance between two class embeddings.
        """
        self._counted += 1
        self._bar.update(done)
        if done % self._card.train.log_every == 0 or done == self._total:
            with self.training():
                self.flush()
                mine = self._rows()  # waits for the device
            lengths = [ROWS * len(owned) for owned in self._placement.ranges]
            now = {
                "learning rate": learning_rate(self._card.optim, done - 1, self._total),
                "samples per second": self._counted * self._card.data.batch_size / max(self._running - self._before, 1e-9),
                "busy share of rank 0": self._busy,
            }
            if self._card.model.embedding != "one-hot":
                now["smallest distance between embeddings"] = spread()
            now |= {f"bytes sent by rank 0/{kind}": count for kind, count in self._world.traffic.sent.items()}
            self._under_way = done, now, gather_rows(self._world, mine, lengths)
            self._before = self._running
            self._sums.zero_()
            self._added = [0] * len(self._added)
            self._counted = 0

    def scores(self, scores: Scores) -> None:
        """Show an evaluation."""
        step = self._world.step
        chain = "  ".join(f"{path} {getattr(scores, path):.2%}" for path in PATHS)
        blocks = f"  û {min(scores.blocks):.2%}-{max(scores.blocks):.2%}" if scores.blocks else ""
        self._bar.say(f"step {step}/{self._total}  test: {chain}{blocks}")
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
        samples = (world.step - self._start) * card.data.batch_size
        traffic = world.traffic
        own = [samples / self._running if samples else 0.0, peak_memory(world.device), self._busy]
        counts = len(own) + len(KINDS)
        # this very row is on its way too
        traffic_after = dict(traffic.sent)
        if not world.is_coordinator:
            traffic_after["scalars"] += 8 * counts
        mine = torch.tensor([*own, *traffic_after.values()], dtype=torch.float64)
        rows = [row.tolist() for row in gather_rows(world, mine, [counts] * world.size).wait()]
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
            "peak_memory_bytes": int(max(row[1] for row in rows)),
            "busy_share": sum(row[2] for row in rows) / world.size,
            "per_rank": [
                {
                    "rank": rank,
                    "blocks": list(self._placement.ranges[rank]),
                    "samples_per_second": row[0],
                    "peak_memory_bytes": int(row[1]),
                    "busy_share": row[2],
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
            "bytes": {kind: int(sum(row[len(own) + number] for row in rows)) for number, kind in enumerate(KINDS)},
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

    def close(self) -> None:
        """Stop the bar, close the event file."""
        self._bar.close()
        if self._board:
            self._board.close()

    @property
    def _busy(self) -> float:
        return 1 - self._waiting / self._running if self._running else 1.0

    @property
    def _so_far(self) -> dict[str, float]:
        """Training over all starts, on the coordinator."""
        here = {"seconds": self._running, "steps": self._world.step - self._start, "bytes": self._fed}
        return {name: value + (self._history.before[name] if self._history else 0) for name, value in here.items()}

    def _note(self, **figures: float) -> None:
        if self._history:
            epoch = self._world.step * self._card.data.batch_size / self._info.train_size
            self._history.note(self._world.step, epoch=epoch, **self._so_far, **figures)

    def flush(self) -> None:
        """Show the scalars under way. They were sent long ago, so hardly anyone waits."""
        if self._under_way is None:
            return
        done, values, rows = self._under_way
        self._under_way = None
        figures = [row.view(ROWS, -1) for row in rows.wait()]
        if self._board is None:
            return
        self._figures = torch.cat(figures, dim=1)
        debug = self._card.debug.enabled
        for part, row in zip((*PARTS, *SKIPS), self._figures.tolist(), strict=True):
            if part in PARTS[:2] or (part == "gradient norm" and debug) or (part == SKIPS[0] and any(row)):
                values |= {_tag(index, part): value for index, value in enumerate(row)}
        self._board.scalars(done, values)
        loss, hits = self._figures[:2].nanmean(dim=1).tolist()
        self._bar.update(done, f"loss {loss:.4g}  û {hits:.1%}  {values['samples per second']:,.0f}/s")
        if debug:
            self._bar.say(f"step {done}: gradient norms {' '.join(f'{norm:.3g}' for norm in self._figures[2].tolist())}")
        self._tell_of_skips(done)

    def _rows(self) -> Tensor:
        """This rank's part of a log line: ROWS figures for each of its blocks."""
        skips = torch.stack(self._skips[:-1], dim=1).cpu()
        return torch.cat([self._sums.cpu() / torch.tensor(self._added), skips]).flatten()

    def _tell_of_skips(self, done: int) -> None:
        names = {f"block {index}": figures for index, figures in enumerate(self._figures[len(PARTS) :].T.tolist())}
        for name, (skipped, in_a_row) in (names | {"the label space": self._skips[-1].tolist()}).items():
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


def peak_memory(device: torch.device) -> int:
    """Bytes: the allocator's peak on a GPU; on a CPU the process's peak resident set, Python and torch included."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _tag(index: int, what: str) -> str:
    return f"block-{index:02d}/{what}"
