"""Signs of life: every second each rank writes a count and its step to the store, so that whoever fails can be named.

The same beat brings a rank's wish to stop the run to the coordinator.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from torch._C._distributed_c10d import Store  # what torch.distributed itself exports

from noprop_dist.interruption import Interruption
from noprop_dist.parallel.placement import COORDINATOR, Placement

BEAT = 1.0  # seconds
T = TypeVar("T")


def within(seconds: float, ask: Callable[[], T]) -> T:
    """``ask()``, or TimeoutError: a store whose host is cut off keeps torch waiting, whatever timeout the store has."""
    answer: Future[T] = Future()

    def wait() -> None:
        try:
            answer.set_result(ask())
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=wait, daemon=True).start()
    return answer.result(seconds)


class Heartbeat:
    """This rank's heartbeat, in a thread of its own, and a look at the others'. ``step`` is what this rank reports."""

    def __init__(self, store: Store, placement: Placement, rank: int, interruption: Interruption) -> None:
        self.step = 0
        self._interruption = interruption
        self._store, self.placement, self._rank = store.clone(), placement, rank  # type: ignore[attr-defined]
        self._stopping = threading.Event()
        self._beat(0)
        threading.Thread(target=self._keep_beating, daemon=True).start()

    def stop(self) -> None:
        """No more beats."""
        self._stopping.set()

    def silent(self) -> set[int]:
        """Ranks that give no sign of life, those included that never came. Takes two and a half beats."""
        before = self._beats()
        threading.Event().wait(2.5 * BEAT)
        after = self._beats()
        return {rank for rank in range(len(self.placement.ranges)) if before.get(rank) == after.get(rank)} - {self._rank}

    def verdict(self) -> str:
        """Whose fault a failed wait is: whoever is silent, else whoever is furthest behind; empty where that is not clear.

        The first rank to notice judges for all: soon after, others are gone too.
        """
        if not self._store.check(["verdict"]):
            silent = self.silent()
            steps = {rank: int(beat.split()[1]) for rank, beat in self._beats().items()}
            behind = {rank for rank, step in steps.items() if step == min(steps.values()) < max(steps.values())}
            verdict = ""
            if silent:
                verdict = f"no sign of life from {self._names(silent, steps)}"
            elif behind - {self._rank}:
                verdict = f"alive but stuck: {self._names(behind - {self._rank}, steps)}"
            self._store.compare_set("verdict", "", verdict)
        return bytes(self._store.get("verdict")).decode()

    def _names(self, ranks: set[int], steps: dict[int, int]) -> str:
        names = (
            self.placement.name(rank) + (f", last heard of at step {steps[rank]}" if rank in steps else ", never heard of")
            for rank in sorted(ranks)
        )
        return "; ".join(names)

    def _beats(self) -> dict[int, str]:
        keys = {rank: f"beat/{rank}" for rank in range(len(self.placement.ranges))}
        return {rank: bytes(self._store.get(key)).decode() for rank, key in keys.items() if self._store.check([key])}

    def _beat(self, number: int) -> None:
        self._store.set(f"beat/{self._rank}", f"{number} {self.step}")

    def _keep_beating(self) -> None:
        number = 0
        while not self._stopping.wait(BEAT):
            number += 1
            try:
                self._beat(number)
                self._pass_wishes_on()
            except RuntimeError:
                return  # the store is gone, and the run with it

    def _pass_wishes_on(self) -> None:
        if self._rank == COORDINATOR:
            if self._store.check(["stop"]):
                self._interruption.ask(bytes(self._store.get("stop")).decode())
        elif self._interruption.reason:
            self._store.set("stop", f"{self._interruption.reason} at rank {self._rank}")
