"""What this rank did when: spans of its own clock, in memory that does not grow, at microseconds a step.

Kept are the first FIRST spans and the last LAST, and an overview of all: how long it did what in each of BINS equal stretches.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple

DOING = ("training", "evaluation", "drawing", "saving")
WHATS = (*DOING, "waiting", "reading", "sending")
"""Reading is waiting for pictures to be read; sending goes on beside all others."""
SHARES = (*DOING, "waiting")
"""What the overview tells apart; reading counts as waiting."""
FIRST, LAST, BINS = 400, 1600, 100


class Span(NamedTuple):
    """From ``begin`` to ``end``, in seconds of this process's ``time.perf_counter``."""

    what: str
    """One of WHATS. Waiting goes off what a rank is doing; on a GPU, training is handing work to it."""
    kind: str
    """Of the message waited for or sent; else empty."""
    step: int
    """That is done, or that the message belongs to; of a message at an evaluation, its batch."""
    begin: float
    end: float
    """Of sending: when this rank first found it complete. It looks whenever it waits or sends, so at least once a step; of a
    message from rank to rank, as at evaluations, it finds out when it waits for it."""
    size: int
    """Bytes sent, to all targets together."""


class Spans:
    """Notes spans."""

    def __init__(self) -> None:
        self.origin = time.perf_counter()
        self.width = 0.05
        """Seconds of a stretch of the overview; doubles when BINS of them are too few."""
        self.overview = [[0.0] * BINS for _ in SHARES]
        """Seconds (SHARES, BINS)."""
        self.horizon = self.origin
        """When the last of those spans ended that are forgotten."""
        self.now = ""
        """What this rank is doing."""
        self._first: list[Span] = []
        self._last: deque[Span] = deque(maxlen=LAST)
        self._open: list[tuple[Callable[[], bool], Span]] = []

    @property
    def kept(self) -> list[Span]:
        """In the order in which they ended. Between the first and the last, some may be forgotten."""
        return [*self._first, *self._last]

    @contextlib.contextmanager
    def during(self, what: str, step: int) -> Iterator[None]:
        """What happens inside, waiting apart, is ``what``, one of DOING."""
        begin, self.now = time.perf_counter(), what
        try:
            yield
        finally:
            self._add(Span(what, "", step, begin, time.perf_counter(), 0))
            self.now = ""

    def waited(self, what: str, kind: str, step: int, begin: float, end: float) -> None:
        """It waited, or read."""
        self._add(Span(what, kind, step, begin, end, 0))
        self._look(end)

    def sends(self, kind: str, step: int, begin: float, size: int, is_completed: Callable[[], bool]) -> None:
        """A message has left; ``is_completed`` tells, without waiting, whether it has arrived."""
        self._look(begin)
        self._open.append((is_completed, Span("sending", kind, step, begin, begin, size)))

    def _look(self, now: float) -> None:
        if not self._open:
            return
        under_way = []
        for is_completed, span in self._open:
            if is_completed():
                self._add(span._replace(end=now))
            else:
                under_way.append((is_completed, span))
        self._open = under_way

    def _add(self, span: Span) -> None:
        if len(self._first) < FIRST:
            self._first.append(span)
        else:
            if len(self._last) == LAST:
                self.horizon = self._last[0].end
            self._last.append(span)
        if span.what in DOING:
            self._sum(span.what, span, 1)
        elif span.what != "sending":
            self._sum("waiting", span, 1)
            if self.now:
                self._sum(self.now, span, -1)

    def _sum(self, share: str, span: Span, sign: int) -> None:
        begin, end = span.begin - self.origin, span.end - self.origin
        while end >= self.width * BINS:
            self.width *= 2
            self.overview = [[sum(row[at : at + 2]) for at in range(0, BINS, 2)] + [0.0] * (BINS // 2) for row in self.overview]
        row, width = self.overview[SHARES.index(share)], self.width
        for number in range(int(begin / width), int(end / width) + 1):
            row[number] += sign * (min(end, (number + 1) * width) - max(begin, number * width))
