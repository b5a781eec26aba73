"""Figures that a benchmark takes from outside of what it measures: memory of tensors, bytes on the wire."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

COUNTERS = Path("/proc/self/net/dev")
SENT = 8  # the column


class PeakTensors(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the tensors alive at once, of those that are made while it is active.

    On a CPU no allocator tells; the resident set also holds Python, libraries and what malloc keeps. A step is slower with it.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._alive: dict[int, tuple[int, weakref.ref[Any]]] = {}
        self._now = 0
        self.peak = 0
        """Bytes: the most so far, or since :meth:`restart`."""

    def restart(self) -> None:
        """Forget the peak so far."""
        self.peak = self._now

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._note(leaf.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return

        def forget(_: object) -> None:
            self._alive.pop(key)
            self._now -= size

        self._alive[key] = size, weakref.ref(storage, forget)
        self._now += size
        self.peak = max(self.peak, self._now)


def sent_bytes(interface: str) -> int | None:
    """Bytes that have left by a network interface so far, whoever sent them; None where the kernel does not tell."""
    lines = COUNTERS.read_text().splitlines() if COUNTERS.exists() else []
    found = (line.partition(":") for line in lines)
    return next((int(figures.split()[SENT]) for name, _, figures in found if name.strip() == interface), None)
