"""What tests of the launchers share: a small run, its undisturbed end, and a look at how far a run is."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from noprop_dist import Card, train

ROOT = Path(__file__).parent.parent
LAUNCH, CARD = ROOT / "launch", str(ROOT / "configs/digits/dt.yaml")
STEPS = 400
SETTINGS = {
    "data": {"batch_size": 16},
    "model": {"blocks": 2},
    "train": {"steps": STEPS, "checkpoint_every": 25, "eval_every": STEPS, "pictures": False},
    "parallel": {"timeout": 10},
}
ARGUMENTS = [
    word
    for section, values in SETTINGS.items()
    for name, value in values.items()
    for word in (f"--{section}.{name}", str(value))
]


def environment(**variables: object) -> dict[str, str]:
    """This process's, with this Python's commands first, and ``variables``."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return os.environ | {"PATH": path} | {name: str(value) for name, value in variables.items()}


def checkpoints(run: Path) -> list[Path]:
    """The whole checkpoints of a run's folder, oldest first."""
    return sorted(manifest.parent for manifest in run.glob("checkpoints/step-*/manifest.json"))


def block_files(run: Path) -> dict[str, bytes]:
    """The last step's files."""
    found = {path.name: path.read_bytes() for path in run.glob(f"checkpoints/step-{STEPS:08d}/*.safetensors")}
    assert len(found) == 3, f"no end in {run}: {sorted(run.rglob('*'))}"
    return found


@functools.cache
def undisturbed() -> dict[str, bytes]:
    """The last step's files of the same run on one rank, in one go."""
    with tempfile.TemporaryDirectory() as folder:
        train(Card.model_validate({**SETTINGS, "run": {"dir": folder, "name": "whole"}}))
        return block_files(Path(folder) / "whole")


def wait_until(
    happened: Callable[[], Any], what: str | Path, seconds: float = 600, process: subprocess.Popen[str] | None = None
) -> Any:
    """Watch for something, and return it. Raises AssertionError if it does not come, or once ``process`` has ended: with
    ``what``, or with what that file says."""
    end = time.monotonic() + seconds
    while not (found := happened()):
        if time.monotonic() > end or (process and process.poll() is not None):
            raise AssertionError(f"waited in vain: {what.read_text() if isinstance(what, Path) else what}")
        time.sleep(0.02)
    return found
