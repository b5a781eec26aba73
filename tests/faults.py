"""Scripted faults: kill -9 of a rank at a named point of its program, then a restart; the end must be the undisturbed run's.

``python tests/faults.py --cases 100`` is the soak: that many random cases, one after the other.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ranks import fork_ranks

from noprop_dist import Card, checkpoint, files, saving, train, trainer
from noprop_dist.parallel import heartbeat
from noprop_dist.parallel.traffic import PeerError

POINTS: dict[str, tuple[Any, str, int]] = {
    "step": (trainer.Trainer, "_step", 14),
    "evaluation": (trainer.Trainer, "_score", 4),
    "save": (saving.Saver, "save", 4),
    "block or label file": (saving, "write", 8),
    "manifest": (checkpoint, "commit", 4),
    "half a file on disk": (files.os, "fsync", 8),
    "rotation": (checkpoint, "prune", 4),
    "gather": (saving.Saver, "gather", 1),
}
"""What a rank can be killed in, and how often that is called, about."""
VARIANTS: dict[str, dict[str, Any]] = {
    "dt": {},
    "resident": {"parallel": {"feed": "resident"}},
    "learned": {"model": {"embedding": "learned", "embedding_lag": 4}, "optim": {"ema": 0.9, "schedule": "one-cycle"}},
    "ct": {"method": {"name": "ct", "schedule": "learned"}, "inference": {"steps": 8}},
    "fm": {"method": {"name": "fm"}, "inference": {"steps": 8}, "model": {"embedding": "prototype"}},
}
STEPS = 14


@dataclass(frozen=True)
class Case:
    """One fault. ``ranks``: before and after it; ``apart``: ranks share no disk."""

    variant: str
    ranks: tuple[int, int]
    victim: int
    point: str
    occurrence: int
    apart: bool
    """Each rank has a folder of its own."""


def random_case(number: int) -> Case:
    """The same case for the same number, anywhere."""
    dice = random.Random(number)
    before = dice.choice([1, 2, 2, 3, 4])
    point = dice.choice(["step", "step", *POINTS])
    variant, after = dice.choice(list(VARIANTS)), dice.choice([1, 2, 3, 4])
    victim = 0 if point in ("manifest", "rotation") else dice.randrange(before)  # the coordinator's work
    return Case(variant, (before, after), victim, point, dice.randrange(POINTS[point][2]), dice.random() < 0.3)


def make_card(variant: str, folder: Path) -> Card:
    """Few steps of four small blocks on digits, saved and evaluated in between."""
    settings: dict[str, dict[str, Any]] = {
        "data": {"batch_size": 16, "augment": "crop"},
        "model": {"blocks": 4, "backbone": "mlp"},
        "train": {"steps": STEPS, "log_every": 2, "checkpoint_every": 4, "eval_every": 6, "pictures": False},
        "inference": {"batch_size": 180},
        "parallel": {"timeout": 30, "threads": 1},
        "run": {"dir": str(folder), "name": "run"},
    }
    for section, values in VARIANTS[variant].items():
        settings[section] = settings.get(section, {}) | values
    return Card.model_validate(settings)


def die_at(point: str, occurrence: int) -> None:
    """Have this process kill -9 itself when it comes to ``point`` for the so many-th time (from 0)."""
    owner, name, _ = POINTS[point]
    usual, calls = getattr(owner, name), iter(range(1_000_000))

    def call(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == occurrence:
            os.kill(os.getpid(), signal.SIGKILL)
        return usual(*args, **kwargs)

    setattr(owner, name, call)


def end_files(folder: Path) -> dict[str, bytes]:
    """The last checkpoint's files, the manifest's facts left out."""
    found = {path.name: path.read_bytes() for path in checkpoint.step_folder(folder / "run/checkpoints", STEPS).glob("*.safe*")}
    assert len(found) == 5, f"no end in {folder}"
    return found


def undisturbed(variant: str, folder: Path, known: dict[str, dict[str, bytes]]) -> dict[str, bytes]:
    """What a run of one rank ends in, trained once."""
    if variant not in known:
        fork_ranks(folder / "meet-whole", 1, lambda rank, meet: train(make_card(variant, folder / "whole"), meet) and None)
        known[variant] = end_files(folder / "whole")
    return known[variant]


def play(case: Case, folder: Path, expected: dict[str, bytes]) -> str:
    """Train, kill, train again. Returns what came of the fault. Raises AssertionError where the end is another one."""

    def start(fault: bool) -> Callable[[int, str], None]:
        def work(rank: int, meet: str) -> None:
            heartbeat.BEAT = 0.2
            if fault and rank == case.victim:
                die_at(case.point, case.occurrence)
            train(make_card(case.variant, folder / f"disk-{rank if case.apart else 0}"), meet)

        return work

    results = fork_ranks(folder / "meet-1", case.ranks[0], start(True), check=False)
    killed = isinstance(results[case.victim], ChildProcessError)
    for rank, result in enumerate(results):
        if rank != case.victim:
            assert isinstance(result, PeerError if killed else type(None)), f"rank {rank}: {result!r}"
    saved = len(list(folder.glob("disk-*/run/alone/*/*/manifest.json")))
    fork_ranks(folder / "meet-2", case.ranks[1], start(False))
    assert end_files(folder / "disk-0") == expected, "another end than the undisturbed run's"
    assert not list(folder.glob("disk-0/run/**/.*")), "something half-written stays"
    return f"killed, {saved} blocks saved by the others" if killed else "never came to that point"


def main() -> int:
    """Play random cases; exit code 1 if one fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=100)
    parser.add_argument("--first", type=int, default=1000, help="number of the first case")
    arguments = parser.parse_args()
    outcomes: Counter[str] = Counter()
    known: dict[str, dict[str, bytes]] = {}
    for number in range(arguments.first, arguments.first + arguments.cases):
        case = random_case(number)
        folder = Path(tempfile.mkdtemp())
        try:
            outcome = play(case, folder, undisturbed(case.variant, folder, known))
        except Exception:
            traceback.print_exc()
            outcome = "FAILED"
        outcomes[outcome.split(",")[0]] += 1
        print(f"case {number}: {case}: {outcome}", flush=True)
        shutil.rmtree(folder)
    print(dict(outcomes))
    return 1 if outcomes["FAILED"] else 0


if __name__ == "__main__":
    sys.exit(main())
