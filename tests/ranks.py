"""Ranks as forked processes that meet at a file."""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

# The bits are promised for the CPU with one thread a rank; processes that tests start inherit both.
os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
torch.set_num_threads(1)
torch.zeros(
    (), requires_grad=True
).backward()  # autograd counts devices at its first call: before tests fake some, or forks fail


def fork_ranks(
    meeting: Path, ranks: int, work: Callable[[int, str], Any], *, check: bool = True, timeout: float = 120
) -> list[Any]:
    """Call ``work(rank, init_method)`` in forked processes that meet at a new file, and return their results by rank.

    A rank that raises gives its exception as its result, if ``check`` is off; otherwise the first of them is raised.
    """
    fork = multiprocessing.get_context("fork")
    processes, pipes = [], []
    for rank in range(ranks):
        ours, theirs = fork.Pipe(duplex=False)
        process = fork.Process(target=_rank, args=(rank, ranks, work, f"file://{meeting}", theirs), daemon=True)
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


def _rank(rank: int, ranks: int, work: Callable[[int, str], Any], init_method: str, pipe: Any) -> None:
    gc.freeze()  # what the parent left behind is not ours to destroy: its threads have not come along
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
