"""A run's folder RUN, ``<run.dir>/<run.name>``, and whether a run begins or continues there."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from noprop_dist import checkpoint, files
from noprop_dist.cards import explain
from noprop_dist.config import Card, UserError
from noprop_dist.data import DataInfo

FREE = {
    "train.epochs",
    "train.steps",
    "train.log_every",
    "train.eval_every",
    "train.checkpoint_every",
    "train.pictures",
    "train.keep_checkpoints",
    "train.resume",
    "data.root",
    "data.workers",
    "run.dir",
    "run.name",
    "run.stop_exit_code",
    "parallel",
    "inference",
    "debug.enabled",
}
"""Settings and sections that may change at a resume: they decide how long, where and by whom, not what a step computes (but
for the length, which a cosine or one-cycle learning rate depends on; then the user is told)."""
PICTURED = 10
"""As many pictures of a kind as TensorBoard shows."""
LOCAL = {"data.root", "data.workers", "run.dir", "parallel.device", "parallel.threads"}
"""Settings that may differ between the ranks of a run."""


@dataclass(frozen=True)
class RunFolder:
    """Where the parts of a run lie."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def alone(self) -> Path:
        """Folder of blocks that were saved alone, a checkpoint of a single block each: when a rank was lost, and by a fleet."""
        return self.path / "alone"

    @property
    def model(self) -> Path:
        """Folder of the gathered model."""
        return self.path / "model"

    @property
    def tensorboard(self) -> Path:
        """Folder of the event files."""
        return self.path / "tensorboard"

    @property
    def pictures(self) -> Path:
        """Folder of the event files with pictures."""
        return self.tensorboard / "pictures"

    @property
    def figures(self) -> Path:
        """Folder of the pictures that are drawn of it."""
        return self.path / "figures"

    @property
    def card(self) -> Path:
        """The resolved card."""
        return self.path / "card.yaml"

    @property
    def history(self) -> Path:
        """Accuracies and seconds along the way."""
        return self.path / "history.json"

    @property
    def fleet(self) -> Path:
        """Who trained what, where a fleet did."""
        return self.path / "fleet.jsonl"

    @property
    def summary(self) -> Path:
        """The end table as JSON."""
        return self.path / "summary.json"

    @property
    def trace(self) -> Path:
        """What every rank did when, since this start: for Perfetto, and for a picture."""
        return self.path / "trace.json"

    def check(self) -> None:
        """Raises UserError where something is in the way of a part, which a run may meet only at its end."""
        folders = (self.path.parent, self.path, self.checkpoints, self.model, self.tensorboard)
        files.check_ways(folders, (self.card, self.history, self.summary, self.trace), "give another --run.name or --run.dir")
        if self.summary.exists():
            files.read_json(self.summary)


@dataclass(frozen=True)
class Progress:
    """How far a run has come."""

    step: int
    folder: RunFolder
    """The run's; the coordinator has it, other ranks where they share a disk."""
    checkpoint: Path | None
    """The newest one, if this is the moment when it has just been written, or the end of the run."""
    figures: Mapping[str, float]
    """On the coordinator what history.json has of this step, and where known test_accuracy and the blocks' mean loss."""


Listener = Callable[[Progress], None]
"""Called on every rank, in the same order: after each evaluation, each checkpoint, and once all is written at the end."""


def claim_folder(runs: Path) -> Path:
    """Create a folder in ``runs`` named by a time stamp (UTC) that no other run has. Raises UserError on a disk's refusal."""
    stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    try:
        runs.mkdir(parents=True, exist_ok=True)
        for number in itertools.count(1):
            folder = runs / (stamp if number == 1 else f"{stamp}-{number}")
            with contextlib.suppress(FileExistsError):
                folder.mkdir()
                return folder
    except OSError as error:
        raise UserError(f"{runs}: cannot create a folder there ({error.strerror}); choose another --run.dir") from None
    raise AssertionError


def total_steps(card: Card, train_size: int) -> int:
    """The length of a run in steps; the last batch of the last epoch runs into the next one."""
    return card.train.steps or -(-card.train.epochs * train_size // card.data.batch_size)


def evaluates(card: Card, train_size: int, step: int) -> bool:
    """Whether an evaluation follows ``step`` steps: every so many, else where they complete an epoch."""
    if card.train.eval_every:
        return step % card.train.eval_every == 0
    return step * card.data.batch_size // train_size > (step - 1) * card.data.batch_size // train_size


def pictured(card: Card, train_size: int, step: int) -> bool:
    """Whether the evaluation after ``step`` steps is drawn: of a run's PICTURED at most, evenly chosen, and the last."""

    def evaluations(steps: int) -> int:
        return steps // card.train.eval_every if card.train.eval_every else steps * card.data.batch_size // train_size

    total = total_steps(card, train_size)
    every = max(1, -(-evaluations(total) // PICTURED))
    return card.train.pictures and (step == total or evaluations(step) % every == 0)


def find_start(card: Card, info: DataInfo, checkpoints: Path | None) -> tuple[Path | None, int, list[str]]:
    """Where a run starts: the checkpoint to load (None: from scratch), its step, and what the user should know.

    ``checkpoints`` is the run's own folder of them, None for a new run. Raises UserError where ``train.resume`` cannot be done
    without loss.
    """
    own = checkpoint.newest_whole(checkpoints)[0] if checkpoints else None
    if card.train.resume not in ("auto", "never"):
        found, notes = Path(card.train.resume), list[str]()
        if own and checkpoint.read_manifest(own)["card"].get("train", {}).get("resume") == card.train.resume:
            found = own  # the same command, started again
        elif not found.is_dir():
            raise UserError(f"train.resume: no folder {found}; give auto, never, or a checkpoint's folder")
    elif checkpoints is None or not checkpoints.exists():
        return None, 0, []
    elif card.train.resume == "never":
        raise UserError(
            f"{checkpoints}: holds an earlier run's checkpoints, which --train.resume never would overwrite; "
            "give another --run.name or delete that folder"
        )
    else:
        newest, notes = checkpoint.newest_whole(checkpoints)
        if newest is None and any(checkpoints.glob(f"step-*/{checkpoint.MANIFEST}")):
            raise UserError(f"{checkpoints}: no whole checkpoint to resume from; {notes[0]}")
        if newest is None:  # at most one that was never finished
            return None, 0, notes
        found = newest
    manifest = checkpoint.read_manifest(found)
    then, data = trained_as(found, manifest)
    if data != info:
        raise UserError(f"{found}: was trained on other data than these; mend --data.root or give another --run.name")
    if found != own and checkpoints and any(folder.name > found.name for folder in checkpoints.glob("step-*")):
        raise UserError(f"{checkpoints}: holds newer checkpoints than {found}; give another --run.name to branch off there")
    changed = differences(manifest["card"], card.model_dump(mode="json"))
    structural = [line for line in changed if line.startswith(("model.", "data.", "method.name", "optim.name"))]
    if changed and (card.train.resume == "auto" or structural):
        raise UserError(
            f"{found}: was trained with another card ({'; '.join(structural or changed)}); "
            "give those settings, or another --run.name to start anew"
        )
    total = total_steps(card, info.train_size)
    if manifest["step"] > total:
        raise UserError(
            f"{found}: is of step {manifest['step']}, beyond this run's {total} steps; raise --train.epochs or --train.steps"
        )
    notes += [f"continues {found} with other settings: {line}" for line in changed]
    if card.optim.schedule != "constant" and (before := total_steps(then, info.train_size)) != total:
        notes.append(f"the {card.optim.schedule} learning rate now spans {total} steps, it was laid out for {before}")
    return found, manifest["step"], notes


def trained_as(folder: Path, manifest: Mapping[str, Any]) -> tuple[Card, DataInfo]:
    """The card and the data of a checkpoint, from its manifest. Raises UserError where this version cannot read them."""
    try:
        return Card.model_validate(manifest["card"]), DataInfo.from_json(manifest["data"])
    except ValidationError as error:
        reason = explain(error)
        raise UserError(f"{folder}: written by another version ({reason}); train anew, under another --run.name") from None


def differences(old: Mapping[str, Any], new: Mapping[str, Any], free: Set[str] = FREE) -> list[str]:
    """Settings outside ``free`` in which two dumped cards differ, e.g. ``optim.lr: 0.001 there, 0.01 here``."""
    return [
        f"{section}.{name}: {old.get(section, {}).get(name)} there, {value} here"
        for section, values in new.items()
        for name, value in values.items()
        if old.get(section, {}).get(name) != value and not {section, f"{section}.{name}"} & free
    ]
