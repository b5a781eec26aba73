"""Runs one contender in fresh processes, and takes its figures."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import torch

from noprop_dist.benchmark.contenders import Backpropagated, Bare, Contender, Racer, Trained, Way
from noprop_dist.benchmark.watch import PeakTensors, sent_bytes
from noprop_dist.benchmark.wire import CABLE, cables, enter
from noprop_dist.config import Card, UserError
from noprop_dist.parallel.world import keep_to_this_host


@dataclass(frozen=True)
class Peers:
    """The processes of a measurement, seen from one of them; nothing of what is measured goes this way."""

    barrier: Any
    number: Any

    def meet(self) -> None:
        """Wait for all."""
        self.barrier.wait()

    def hear(self, number: float | None) -> float:
        """What the one that has a number says. All call it."""
        if number is not None:
            self.number.value = number
        self.meet()
        return float(self.number.value)


@dataclass(frozen=True)
class Job:
    """One contender, on ``ranks`` processes. ``trained`` and ``bare`` train by the card's method, the others by backprop.

    ``alone``: only the last of the ``ranks`` runs, which has most blocks (bare).
    """

    card: Card
    kind: Literal["trained", "bare"] | Way
    ranks: int = 1
    microbatches: int = 1
    alone: bool = False
    link: float | None = None
    """Bytes a second that each process can send; None: over the loopback, as fast as that is."""

    @property
    def processes(self) -> int:
        """How many run."""
        return 1 if self.alone else self.ranks


class Figures(NamedTuple):
    """What one rank tells of a measurement. Of ``steps`` steps after the warm-up:"""

    seconds: float
    busy: float
    """Share of the time in which its main thread was computing: CPU time over wall time."""
    waited: float | None
    """Share of the time in which it waited for batches, where it is the trainer."""
    sent: int | None
    """Bytes that have left by its network interface, as the kernel counts them: the loopback's are those of all ranks."""


@dataclass(frozen=True)
class Speed:
    """Ask for the figures of ``steps`` steps after ``warmup`` ones; each rank gives :class:`Figures`."""

    warmup: int
    steps: int

    def __call__(self, make: Callable[[], Contender], peers: Peers) -> Figures:
        contender = make()
        steps = contender.steps()
        for _ in range(self.warmup):
            next(steps)
        finish = _finish(contender)
        traffic, interface = getattr(contender, "traffic", None), os.environ.get("GLOO_SOCKET_IFNAME", "")

        def waited() -> float:
            return sum(traffic.waited.values()) if traffic else 0.0

        finish()
        peers.meet()
        begin, busy, idle, sent = time.perf_counter(), time.thread_time(), waited(), sent_bytes(interface)
        for _ in range(self.steps):
            next(steps)
        finish()
        seconds, busy, idle = time.perf_counter() - begin, time.thread_time() - busy, waited() - idle
        peers.meet()
        after = sent_bytes(interface)
        return Figures(
            seconds, busy / seconds, idle / seconds if traffic else None, after - sent if after and sent is not None else None
        )


@dataclass(frozen=True)
class Memory:
    """Ask for the most bytes that a rank's tensors take at once in a step: the CUDA allocator's, else those alive."""

    def __call__(self, make: Callable[[], Contender], peers: Peers) -> int:
        with PeakTensors() as tensors:
            contender = make()
            steps = contender.steps()
            next(steps)  # from here on there are optimizer states
            tensors.restart()
            if contender.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            for _ in range(2):
                next(steps)
            peers.meet()
        return torch.cuda.max_memory_allocated() if contender.device.type == "cuda" else tensors.peak


@dataclass(frozen=True)
class Race:
    """Ask for the way to a test accuracy: [(steps, seconds of training, accuracy)], looked at every so many steps."""

    target: float
    every: int
    most: int
    """Steps after which it gives up."""

    def __call__(self, make: Callable[[], Contender], peers: Peers) -> list[tuple[int, float, float]]:
        contender, course, seconds = cast(Racer, make()), [], 0.0
        steps, finish = contender.steps(), _finish(contender)
        for done in range(self.every, self.most + 1, self.every):
            peers.meet()
            begin = time.perf_counter()
            for _ in range(self.every):
                next(steps)
            finish()
            peers.meet()
            seconds += time.perf_counter() - begin
            found = peers.hear(contender.accuracy())
            course.append((done, seconds, found))
            if found >= self.target:
                break
        return course


def _finish(contender: Contender) -> Callable[[], None]:
    """To be called before a look at the clock: lets a GPU finish what is under way."""
    return torch.cuda.synchronize if contender.device.type == "cuda" else lambda: None


Question = Callable[[Callable[[], Contender], Peers], Any]
"""Asked in every process of a measurement, with what makes the contender there; its answer travels back."""


def measure(job: Job, question: Question, log: Path) -> list[Any]:
    """Every rank's answer. What they print goes to ``log``.

    Raises UserError where a rank fails, with the last line that it said.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["noprop_dist.benchmark.runner"])
    log.parent.mkdir(parents=True, exist_ok=True)
    wires = cables(job.processes, job.link) if job.link else contextlib.nullcontext()
    with tempfile.TemporaryDirectory(prefix="noprop-bench-") as folder, wires as hosts:
        peers = Peers(context.Barrier(job.processes), context.Value("d", 0.0))
        ranks = []
        for rank in range(job.processes):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(
                target=_rank, args=(job, question, rank, Path(folder), peers, theirs, log, hosts and hosts[rank])
            )
            process.start()
            theirs.close()
            ranks.append((process, ours))
        try:
            return _answers([pipe for _, pipe in ranks], log)
        finally:
            for process, _ in ranks:
                process.kill()
                process.join()


def _answers(pipes: list[Connection], log: Path) -> list[Any]:
    """By rank, once all have come; the first that fails ends it, for the others may wait for that one."""
    answers: dict[Any, Any] = {}
    while waiting := [pipe for pipe in pipes if pipe not in answers]:
        for pipe in wait(waiting):
            assert isinstance(pipe, Connection)
            try:
                found, answers[pipe] = pipe.recv()
            except EOFError:
                found, answers[pipe] = False, "was ended"
            if not found:
                raise UserError(f"bench: rank {pipes.index(pipe)} {answers[pipe]}; see {log}")
    return [answers[pipe] for pipe in pipes]


def _rank(
    job: Job, question: Question, rank: int, folder: Path, peers: Peers, pipe: Connection, log: Path, host: str | None
) -> None:
    with open(log, "a") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    if host:
        os.environ |= {"GLOO_SOCKET_IFNAME": CABLE, "NCCL_SOCKET_IFNAME": CABLE}
        enter(host)
    keep_to_this_host()
    if job.kind != "bare":
        size = str(job.ranks)
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": size, "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": size}
    meeting = f"file://{folder / 'meeting'}"

    def make() -> Contender:
        if job.kind == "trained":
            own = job.card.run.model_copy(update={"dir": folder, "name": "run"})
            return Trained(job.card.model_copy(update={"run": own}), meeting)
        if job.kind == "bare":
            return Bare(job.card, job.ranks - 1 if job.alone else rank, job.ranks)
        return Backpropagated(job.card, job.kind, job.microbatches, rank, job.ranks, meeting, folder, peers.meet)

    try:
        pipe.send((True, question(make, peers)))
        peers.meet()  # nobody leaves while another still needs it
    except BaseException as error:
        traceback.print_exc()
        pipe.send((False, f"failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
