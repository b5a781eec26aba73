"""A run's folder RUN = <run.dir>/<run.name>, and whether a run begins or continues there."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from noprop_dist import checkpoint
from noprop_dist.config import Card, UserError

FREE = {
    "train.epochs",
    "train.steps",
    "train.log_every",
    "train.eval_every",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.resume",
    "data.root",
    "data.workers",
    "run.dir",
    "run.name",
    "parallel",
    "inference",
    "debug.enabled",
}
"""Settings and sections that may change at a resume: they decide how long, where and by whom, not what is computed."""
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
    def model(self) -> Path:
        """Folder of the gathered model."""
        return self.path / "model"

    @property
    def tensorboard(self) -> Path:
        """Folder of the event files."""
        return self.path / "tensorboard"

    @property
    def card(self) -> Path:
        """The resolved card."""
        return self.path / "card.yaml"

    @property
    def summary(self) -> Path:
        """The end table as JSON."""
        return self.path / "summary.json"


def claim_folder(runs: Path) -> Path:
    """Create a folder in ``runs`` named by a time stamp (UTC) that no other run has. Raises UserError on a disk's refusal."""
    stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    for number in itertools.count(1):
        folder = runs / (stamp if number == 1 else f"{stamp}-{number}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue
        except OSError as error:
            raise UserError(f"{folder}: cannot create ({error.strerror}); choose another --run.dir") from None
    raise AssertionError


def total_steps(card: Card, train_size: int) -> int:
    """The length of a run in steps; the last batch of the last epoch runs into the next one."""
    return card.train.steps or -(-card.train.epochs * train_size // card.data.batch_size)


def find_start(card: Card, checkpoints: Path | None, total: int) -> tuple[Path | None, int, list[str]]:
    """Where a run starts: the checkpoint to load (None: from scratch), its step, and what the user should know.

    ``checkpoints`` is the run's own folder of them, None for a new run; ``total`` its length in steps. Raises UserError where
    ``train.resume`` cannot be done without loss.
    """
    if card.train.resume not in ("auto", "never"):
        found, notes = Path(card.train.resume), list[str]()
    elif checkpoints is None or not checkpoints.exists():
        return None, 0, []
    elif card.train.resume == "never":
        raise UserError(
            f"{checkpoints}: holds an earlier run's checkpoints, which --train.resume never would overwrite; "
            "give another --run.name or delete that folder"
        )
    else:
        newest, notes = checkpoint.newest_whole(checkpoints)
        if newest is None and notes:
            raise UserError(f"{checkpoints}: no whole checkpoint to resume from; {notes[0]}")
        if newest is None:
            return None, 0, []
        found = newest
    manifest = checkpoint.read_manifest(found)
    changed = differences(manifest["card"], card.model_dump(mode="json"))
    structural = [line for line in changed if line.split(".")[0] in ("model", "data") or line.startswith("method.name")]
    if changed and (card.train.resume == "auto" or structural):
        raise UserError(
            f"{found}: was trained with another card ({'; '.join(structural or changed)}); "
            "give those settings, or another --run.name to start anew"
        )
    if manifest["step"] > total:
        raise UserError(
            f"{found}: is of step {manifest['step']}, beyond this run's {total} steps; raise --train.epochs or --train.steps"
        )
    notes += [f"continues {found} with other settings: {line}" for line in changed]
    return found, manifest["step"], notes


def differences(old: Mapping[str, Any], new: Mapping[str, Any], free: Set[str] = FREE) -> list[str]:
    """Settings outside ``free`` in which two dumped cards differ, e.g. ``optim.lr: 0.001 there, 0.01 here``."""
    return [
        f"{section}.{name}: {old.get(section, {}).get(name)} there, {value} here"
        for section, values in new.items()
        for name, value in values.items()
        if old.get(section, {}).get(name) != value and not {section, f"{section}.{name}"} & free
    ]
