"""SIGTERM and SIGINT as a wish: the run finishes its step, saves and leaves. A second signal ends the process at once."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator

SIGNALS = (signal.SIGTERM, signal.SIGINT)
ECHO = 1.0  # seconds: sent to all processes of a job, a signal reaches a rank once more from torchrun


class Interruption:
    """Whether someone wants the run to stop. ``reason``: who, empty for nobody."""

    def __init__(self) -> None:
        self.reason = ""

    def ask(self, reason: str) -> None:
        """Wish for it; the first reason stands."""
        self.reason = self.reason or reason

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Take signals as wishes, but those that this process ignores. In another thread than the main one: none.

        A thread reads them, for the main one may wait in a library that knows no signals.
        """
        taken = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        if threading.current_thread() is not threading.main_thread() or not taken:
            yield
            return
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        before = {number: signal.signal(number, lambda *_: None) for number in taken}
        wakeup = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
        listener = threading.Thread(target=self._listen, args=[ours], daemon=True)
        listener.start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(wakeup)
            for number, handler in before.items():
                signal.signal(number, handler or signal.SIG_DFL)
            theirs.shutdown(socket.SHUT_RDWR)  # not close alone: a forked worker that still lives would keep it open
            listener.join()
            theirs.close()
            ours.close()

    def _listen(self, pipe: socket.socket) -> None:
        first = 0.0
        while received := pipe.recv(1):
            number, now = received[0], time.monotonic()
            if number not in SIGNALS:
                continue
            if not first:
                first = now
                self.ask(signal.Signals(number).name)
            elif now - first > ECHO:
                print("a second signal: stops at once; the newest checkpoint stands", file=sys.stderr, flush=True)
                os._exit(128 + number)
