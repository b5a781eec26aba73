"""What a user sees while a run trains: on a terminal a live board, elsewhere a line now and then.

The board costs training next to nothing: it is plain text, drawn between steps, and takes at most a share COST of the time. A
thread draws it only where no step has ended for a second: while steps go on, one that waits for a core with Python's lock in
its hands would stop them. The cursor stays visible, so whatever ends the process leaves a terminal that can be used.
"""

from __future__ import annotations

import contextlib
import math
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import IO, Any, TextIO

from rich.console import Console
from rich.file_proxy import FileProxy
from rich.live import Live
from rich.text import Text

from noprop_dist.report.lanes import Lane, clock, span, table

LEAST, MOST = 0.25, 1.0  # seconds between two drawings
COST = 1 / 300
MINUTE = 60.0  # seconds between two lines where there is no terminal
BAR = 8  # characters at least
STOPPING = "stopping"


class Screen:
    """Progress from step ``start`` to ``total``; to be entered.

    Args:
        lanes: the ranks; none: progress alone.
        doing: what is under way, e.g. evaluation; empty: as before; STOPPING: someone has asked for it.
    """

    def __init__(self, start: int, total: int, lanes: Sequence[Lane] = (), doing: Callable[[], str] = str) -> None:
        self._console = Console(highlight=False)
        self._is_live = self._console.is_interactive and self._console.file.isatty()  # NO_COLOR's opposite makes no terminal
        self._start, self._step, self._total, self._doing = start, start, total, doing
        self._lanes, self._rate, self._verdict = list(lanes), math.nan, "no evaluation yet"
        self._phase, self._begin, self._spoke = "training", time.monotonic(), time.monotonic()
        self._made: tuple[Any, list[tuple[str, str]]] = (None, [])
        self._drawn: Any = None
        self._last = self._due = 0.0
        self._drawing, self._closing = threading.Lock(), threading.Event()

    def __enter__(self) -> Screen:
        if self._is_live:
            # where errors go elsewhere, they do not disturb the board
            self._live = Live("", console=self._console, auto_refresh=False, redirect_stderr=sys.stderr.isatty())
            self._live.start()
            self._console.show_cursor()
            self._draw()
            _standing.append(self.height)
            self._thread = threading.Thread(target=self._keep_drawing, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Leave the board as it is now; after a failure, below whatever other ranks have written over it."""
        if not self._is_live:
            return
        self._closing.set()
        self._thread.join()
        _standing.clear()
        self._phase, self._doing = "finished" if self._step >= self._total else "stopped", str
        if kind:
            self._step_aside()
        self._draw()
        self._live.stop()

    @property
    def height(self) -> int:
        """Lines of the board; 0: there is none."""
        return (len(self._lines) + 1 + bool(self._lanes)) * self._is_live

    @property
    def place(self) -> list[Any]:
        """Host, terminal and height: what :func:`beside` needs."""
        return [socket.gethostname(), _terminal(sys.stdout), self.height]

    def update(self, step: int) -> None:
        """So many steps are done."""
        self._step = step
        if self._is_live and time.monotonic() >= self._due:
            self._refresh()

    def show(self, step: int, lanes: Sequence[Lane], rate: float) -> None:
        """Figures of the log interval up to ``step``; ``rate``: samples a second."""
        self._lanes, self._rate = list(lanes), rate
        if not self._is_live and time.monotonic() - self._spoke >= MINUTE:
            losses, hits = (
                span(list(chain.from_iterable(getattr(lane, name) for lane in lanes)), form)
                for name, form in (("losses", ".4g"), ("hits", ".1%"))
            )
            self.say(f"step {step}/{self._total}  loss {losses}  û {hits}  {rate:,.0f}/s  {self._left} left")

    def judge(self, step: int, verdict: str) -> None:
        """An evaluation after so many steps."""
        self._verdict = f"test, step {step:,}: {verdict}"
        self.say(f"step {step}/{self._total}  test: {verdict}")

    def say(self, line: str) -> None:
        """A line that stays."""
        self._spoke = time.monotonic()
        self._console.print(line, markup=False, soft_wrap=True)

    def _keep_drawing(self) -> None:
        while not self._closing.wait(MOST):
            if time.monotonic() >= max(self._due, self._last + MOST):
                self._refresh()

    def _refresh(self) -> None:
        """Draw the board, if something has changed and nobody is at it."""
        if not self._drawing.acquire(blocking=False):
            return
        try:
            begin = time.thread_time()
            state = self._step, self._lanes, self._verdict, self._doing(), int(self._elapsed), self._console.size
            if STOPPING == self._doing() != self._phase:
                self._step_aside()
            if state != self._drawn:
                self._draw()
            self._drawn, self._last = state, time.monotonic()
            self._due = self._last + max(LEAST, (time.thread_time() - begin) / COST)
        finally:
            self._drawing.release()

    def _step_aside(self) -> None:
        """What torchrun or other ranks say of a stop or a failure goes through the board: draw it anew below."""
        self._console.file.write("\n" * self.height)

    def _draw(self) -> None:
        width = self._console.width
        self._phase = self._doing() or self._phase
        lines = [self._progress(width), *(Text(line, style) for line, style in self._lines)]
        if self._lanes:
            lines.append(Text(self._verdict, "bold"))
        for line in lines:
            line.truncate(width, overflow="ellipsis")
        self._live.update(Text("\n", no_wrap=True).join(lines), refresh=True)

    @property
    def _lines(self) -> list[tuple[str, str]]:
        """The table, made anew where something has changed."""
        lanes, (width, height) = self._lanes, self._console.size
        made_of, lines = self._made
        if made_of != (id(lanes), width, height):
            lines = table(lanes, width, max(2, height - 4)) if lanes else []
            self._made = (id(lanes), width, height), lines
        return lines

    def _progress(self, width: int) -> Text:
        done = self._step / max(1, self._total)
        count, share, spent, left = f"{self._step:,}/{self._total:,}", f"{done:.0%}", clock(self._elapsed), f"{self._left} left"
        rate = "" if math.isnan(self._rate) else f"{self._rate:,.0f}/s"
        for figures in ((count, share, spent, left, rate), (count, share, spent, left), (count, spent, left), (count, left)):
            after = "  ".join(filter(None, figures))
            if (room := width - len(f"{self._phase:<10}  {after}")) >= BAR:
                break
        full = int(max(0, room) * done)
        return Text.assemble(f"{self._phase:<10} ", ("━" * full, "cyan"), ("─" * (room - full), "dim"), f" {after}")

    @property
    def _elapsed(self) -> float:
        return time.monotonic() - self._begin

    @property
    def _left(self) -> str:
        """Time, if all goes on as it has since the start, evaluations included."""
        done = self._step - self._start
        return clock(self._elapsed * (self._total - self._step) / done) if done else "-:--"


class Above:
    """A stderr for a rank on whose terminal another one's board stands, ``height`` lines high. Whole lines come out above the
    board, which is drawn again within a second."""

    def __init__(self, stream: IO[str], height: int) -> None:
        self._stream, self._height, self._rest = stream, height, ""

    def write(self, text: str) -> int:
        """As a file's."""
        lines, end, self._rest = (self._rest + text).rpartition("\n")
        if end:
            up, down = f"\r\x1b[{self._height - 1}A\x1b[J", "\n" * (self._height - 1)
            self._stream.write(f"{up}{lines}\n{down}")
            self._stream.flush()
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


_standing: list[int] = []
"""Height of the board that stands in this process, if one does."""


def _leave_the_board() -> None:
    """A process that is forked off, as those that read pictures are, must not wait for locks of the board's thread."""
    if _standing:
        for name in ("stdout", "stderr"):
            if isinstance(now := getattr(sys, name), FileProxy):
                setattr(sys, name, Above(now.rich_proxied_file, _standing[0]))


os.register_at_fork(after_in_child=_leave_the_board)


@contextlib.contextmanager
def beside(place: Sequence[Any], gone: type[BaseException]) -> Iterator[None]:
    """On another rank: keep clear of the board at ``place``, if it is on this rank's terminal.

    Also of what this rank still has to say when it fails; but not after ``gone``, for then the board may be too.
    """
    *where, height = place
    before = sys.stderr
    if height and where == [socket.gethostname(), _terminal(before)]:
        sys.stderr = Above(before, height)
    try:
        yield
    except BaseException as error:
        if isinstance(error, gone):
            sys.stderr = before
        raise
    sys.stderr = before


def _terminal(stream: TextIO) -> str:
    """The name of the terminal behind a stream; empty: none."""
    try:
        return os.ttyname(stream.fileno())
    except (AttributeError, OSError, ValueError):  # what stands in for a file, as under Ray Tune; no terminal; no file
        return ""
