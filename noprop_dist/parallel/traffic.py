"""Every message between ranks goes through a :class:`Wire`, which counts it by kind and names whoever fails to answer.

A wire is one purpose's own process group, so that messages of different purposes never wait for each other.
``NOPROP_TRACE=1`` prints every message. When this rank waited and sent is noted too, see :mod:`~noprop_dist.parallel.spans`.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from noprop_dist.parallel.spans import Spans

KINDS = ("batches", "labels", "scalars", "latents", "weights", "gradients")
"""What is counted. Nothing ever sends "gradients"; its count is there to be seen at 0."""
CARRIED = ("batches", "labels", "scalars", "latents", "weights")
"""Kinds that have a wire."""


class PeerError(RuntimeError):
    """Another rank did not answer; the message says which rank, which blocks, which step."""


@dataclass
class Traffic:
    """Bytes that this rank has sent, and seconds that it has waited for others or for a batch to be read, by kind."""

    rank: int
    sent: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    waited: dict[str, float] = field(default_factory=lambda: dict.fromkeys(KINDS, 0.0))
    spans: Spans = field(default_factory=Spans)
    trace: bool = field(default_factory=lambda: os.environ.get("NOPROP_TRACE", "") not in ("", "0"))

    @contextlib.contextmanager
    def waiting(self, kind: str, step: int, what: str = "waiting") -> Iterator[None]:
        """Count what happens inside as waiting for a message of that kind; ``what`` may also be reading."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            end = time.perf_counter()
            self.waited[kind] += end - begin
            self.spans.waited(what, kind, step, begin, end)

    def count(self, kind: str, targets: Iterable[int], size: int, step: int) -> None:
        """Note a message of ``size`` bytes that leaves for each of ``targets``."""
        for target in targets:
            self.sent[kind] += size
            if self.trace:
                print(f"trace: step {step} {kind} {self.rank}->{target} {size} bytes", file=sys.stderr, flush=True)


@dataclass
class Pending:
    """A message under way. ``wait`` returns its tensor, on the wire's device, once it is complete."""

    tensor: Tensor
    work: dist.Work | None = None
    finish: Callable[[dist.Work], None] = lambda work: None

    def wait(self) -> Tensor:
        """Raises PeerError when the other side fails or the wire's timeout passes."""
        if self.work is not None:
            self.finish(self.work)
        return self.tensor


class Wire:
    """One kind of message on its own process group (None for a single rank: then messages stay where they are).

    Args:
        timeout: seconds that a wait may last.
        explain: called when a wait fails, with (what was waited for, its source or None): the PeerError to raise.
    """

    def __init__(
        self,
        kind: str,
        traffic: Traffic,
        group: dist.ProcessGroup | None,
        ranks: int,
        device: torch.device,
        timeout: float,
        explain: Callable[[str, int | None], PeerError],
    ) -> None:
        self.kind, self.traffic, self.group, self.ranks, self.device = kind, traffic, group, ranks, device
        self._timeout, self._explain = timeout, explain

    def broadcast(self, tensor: Tensor, step: int) -> Pending:
        """From the coordinator to all; everyone passes a tensor of the same shape. Starts at once, does not wait."""
        tensor = tensor.to(self.device)
        if self.group is None:
            return Pending(tensor)
        targets = range(1, self.ranks) if self.traffic.rank == 0 else ()
        self.traffic.count(self.kind, targets, tensor.nbytes, step)
        source = None if targets else 0

        def start() -> Any:
            return dist.broadcast(tensor, 0, group=self.group, async_op=True)

        return self._start(start, tensor, step, source, tensor.nbytes * len(targets))

    def send(self, tensor: Tensor, target: int, step: int) -> Pending:
        """To one rank. Starts at once, does not wait."""
        tensor = tensor.to(self.device).contiguous()
        self.traffic.count(self.kind, [target], tensor.nbytes, step)
        return self._start(lambda: dist.isend(tensor, target, group=self.group), tensor, step, target, tensor.nbytes)

    def receive(self, tensor: Tensor, source: int, step: int) -> Pending:
        """From one rank, into a tensor of the right shape on the wire's device. Starts at once, does not wait."""
        return self._start(lambda: dist.irecv(tensor, source, group=self.group), tensor, step, source)

    def _start(
        self, start: Callable[[], dist.Work | None], tensor: Tensor, step: int, peer: int | None, leaves: int = 0
    ) -> Pending:
        """``leaves``: bytes that this rank sends."""
        what, begin = f"{self.kind} of step {step}", time.perf_counter()
        try:
            work = start()
        except RuntimeError as error:
            raise self._explain(what, peer) from error
        if leaves and work is not None:
            self.traffic.spans.sends(self.kind, step, begin, leaves, work.is_completed)

        def finish(work: dist.Work) -> None:
            end = time.perf_counter() + self._timeout
            try:
                with self.traffic.waiting(self.kind, step):
                    while tensor.is_cuda and not work.is_completed():  # nccl's own wait would only order streams
                        if time.perf_counter() > end:
                            raise RuntimeError(f"timeout of {self._timeout} s")
                        time.sleep(1e-4)
                    work.wait()
            except RuntimeError as error:
                raise self._explain(what, peer) from error

        return Pending(tensor, work, finish)
