"""Fixtures: small cards, and ranks as forked processes that meet at a file."""

from __future__ import annotations

import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import noprop_dist
import noprop_dist.train
from noprop_dist import Card
from noprop_dist.launcher import train

# The bits are promised for the CPU with one thread a rank; processes that tests start inherit both.
os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
torch.set_num_threads(1)
noprop_dist.train = train  # the command's module, once imported, stands in the function's place
torch.zeros(
    (), requires_grad=True
).backward()  # autograd counts devices at its first call: before tests fake some, or forks fail


@pytest.fixture
def small_card(tmp_path: Path) -> Callable[..., Card]:
    """``small_card(section={...}, ...)``: a few steps of four small blocks on digits, with dropout and augmentation on."""

    def make(**sections: dict[str, Any]) -> Card:
        settings: dict[str, dict[str, Any]] = {
            "data": {"batch_size": 32, "augment": "crop"},
            "model": {"blocks": 4},
            "train": {"steps": 6, "log_every": 2, "checkpoint_every": 3, "eval_every": 3},
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
    """``on_ranks(n, work)``: call ``work(rank, init_method)`` in n forked processes and return their results by rank.

    A rank that raises gives its exception as its result, if ``check`` is off; otherwise the test fails with its traceback.
    """
    calls = iter(range(1000))

    def call(ranks: int, work: Callable[[int, str], Any], *, check: bool = True, timeout: float = 120) -> list[Any]:
        fork = multiprocessing.get_context("fork")
        init_method = f"file://{tmp_path}/meet-{next(calls)}"
        processes, pipes = [], []
        for rank in range(ranks):
            ours, theirs = fork.Pipe(duplex=False)
            process = fork.Process(target=_rank, args=(rank, ranks, work, init_method, theirs), daemon=True)
            process.start()
            theirs.close()
            processes.append(process)
            pipes.append(ours)
        results = []
        for rank, (process, pipe) in enumerate(zip(processes, pipes, strict=True)):
            try:
                results.append(pipe.recv() if pipe.poll(timeout) else TimeoutError(f"rank {rank} said nothing"))
            except EOFError:
                process.join()
                results.append(ChildProcessError(f"rank {rank} ended with {process.exitcode}"))
        for process in processes:
            process.kill()
            process.join()
        failures = [result for result in results if isinstance(result, BaseException)]
        if check and failures:
            raise failures[0]
        return results

    return call


def _rank(rank: int, ranks: int, work: Callable[[int, str], Any], init_method: str, pipe: Any) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(ranks)}
    try:
        result = work(rank, init_method)
    except BaseException as error:
        error.add_note(f"on rank {rank}: {''.join(traceback.format_exception(error))}")
        result = error
    try:
        pipe.send(result)
    except Exception as error:
        pipe.send(RuntimeError(f"rank {rank}: {result!r} cannot be sent ({error})"))
    sys.stdout.flush()
    os._exit(0)
