"""Fixtures: small cards, and work on several ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ranks import fork_ranks

import noprop_dist
import noprop_dist.train
from noprop_dist import Card
from noprop_dist.launcher import train

noprop_dist.train = train  # the command's module, once imported, stands in the function's place


LAUNCH = Path(__file__).parent / "launch"


@pytest.hookimpl(tryfirst=True)  # xdist's own, which reads the groups, comes after
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """For ``--dist loadgroup``: a file's tests share its fixtures, so they stay together; those that start clusters, which take
    longest, come first, and not two at once; then the notebooks, which would be late else."""
    items.sort(key=lambda item: (LAUNCH not in item.path.parents, item.path.suffix != ".ipynb"))
    for item in items:
        item.add_marker(pytest.mark.xdist_group("launch" if LAUNCH in item.path.parents else str(item.path)))


@pytest.fixture
def small_card(tmp_path: Path) -> Callable[..., Card]:
    """``small_card(section={...}, ...)``: a few steps of four small blocks on digits, with dropout and augmentation on."""

    def make(**sections: dict[str, Any]) -> Card:
        settings: dict[str, dict[str, Any]] = {
            "data": {"batch_size": 32, "augment": "crop"},
            "model": {"blocks": 4},
            "train": {"steps": 6, "log_every": 2, "checkpoint_every": 3, "eval_every": 3, "pictures": False},
            "inference": {"batch_size": 100},
            "parallel": {"timeout": 60, "threads": 1},
            "run": {"dir": str(tmp_path / "runs"), "name": "run"},
        }
        for name, values in sections.items():
            settings[name] = settings.get(name, {}) | values
        return Card.model_validate(settings)

    return make


@pytest.fixture
def on_ranks(tmp_path: Path) -> Callable[..., list[Any]]:
    """``on_ranks(n, work)``: see :func:`fork_ranks`."""
    calls = iter(range(1000))

    def call(ranks: int, work: Callable[[int, str], Any], *, check: bool = True, timeout: float = 120) -> list[Any]:
        return fork_ranks(tmp_path / f"meet-{next(calls)}", ranks, work, check=check, timeout=timeout)

    return call
