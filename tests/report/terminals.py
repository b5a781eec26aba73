"""Work on the ranks of a pseudo-terminal, and what is to be seen there."""

from __future__ import annotations

import fcntl
import os
import re
import struct
import sys
import termios
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Work = Callable[[int, str], Any]


class Terminal:
    """``on(work)`` is work whose stdout and stderr are the terminal's; ``text``: what came out, once all have left."""

    def __init__(self, slave: int) -> None:
        self.slave, self.text = slave, ""

    def on(self, work: Work) -> Work:
        def there(rank: int, init_method: str) -> Any:
            for number, name in ((1, "stdout"), (2, "stderr")):
                os.dup2(self.slave, number)
                setattr(sys, name, os.fdopen(number, "w", buffering=1, closefd=False))
            return work(rank, init_method)

        return there

    @property
    def lines(self) -> list[str]:
        """What an endless screen shows."""
        return show(self.text)


@contextmanager
def terminal(columns: int = 100, rows: int = 40) -> Iterator[Terminal]:
    master, slave = os.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    found, pieces = Terminal(slave), list[bytes]()

    def read() -> None:
        try:
            while piece := os.read(master, 1 << 16):
                pieces.append(piece)
        except OSError:  # nobody holds its other end any more
            pass

    reader = threading.Thread(target=read)
    reader.start()
    try:
        yield found
    finally:
        os.close(slave)
        reader.join()
        os.close(master)
        found.text = b"".join(pieces).decode()


def show(text: str) -> list[str]:
    """Of an endless screen: what a stream of characters, line feeds, and the controls that rich uses, leaves there."""
    lines, row, column = [""], 0, 0
    for token in re.findall(r"\x1b\[[?0-9;]*[A-Za-z]|[^\x1b]", text):
        if token == "\r":
            column = 0
        elif token == "\n":
            row += 1
        elif token.endswith("A") and len(token) > 1:
            row = max(0, row - int(token[2:-1] or 1))
        elif token == "\x1b[2K":
            lines[row] = ""
        elif token == "\x1b[J":
            lines[row:] = [lines[row][:column]]
        elif len(token) == 1:
            lines[row] = lines[row][:column].ljust(column) + token + lines[row][column + 1 :]
            column += 1
        else:
            assert re.fullmatch(r"\x1b\[([0-9;]*m|\?25[hl])", token), f"an unknown control: {token!r}"
        lines += [""] * (row + 1 - len(lines))
    return [line.rstrip() for line in lines]
