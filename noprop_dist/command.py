"""What the commands share: reading arguments, and a user's mistake as one line and exit code 2."""

from __future__ import annotations

import argparse
import gc
import os
import re
import sys
import time
from collections.abc import Callable
from typing import NoReturn

from noprop_dist.cards import COMMAND_LINE
from noprop_dist.config import UserError
from noprop_dist.parallel.traffic import PeerError
from noprop_dist.parallel.world import Stopped

PREFIXES = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}


class Parser(argparse.ArgumentParser):
    """Of the command ``python {what}``: its mistakes are UserErrors, its ``help`` is the module's docstring."""

    def __init__(self, what: str, help: str | None) -> None:
        raw = argparse.RawDescriptionHelpFormatter
        super().__init__(prog=f"python {what}", description=help, formatter_class=raw, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Raises UserError."""
        raise UserError(f"{COMMAND_LINE}: {message}; see --help")


def run(main: Callable[[list[str]], None]) -> NoReturn:
    """Call ``main`` with the arguments and exit: 0; 2 for a user's mistake; 1 when another rank failed; 130 for Ctrl-C."""
    gc.freeze()  # what has been imported stays: to look through it at every collection and at the exit took a second
    if code := answer(main, sys.argv[1:]):
        _leave(code)
    sys.exit(0)


def answer(main: Callable[[list[str]], None], argv: list[str]) -> int:
    """Call ``main`` with ``argv``; the exit code, after telling on stderr what went wrong."""
    rank, local_rank = (os.environ.get(name, "0") for name in ("RANK", "LOCAL_RANK"))
    try:
        main(argv)
    except UserError as error:
        prefix = ""
        if local_rank != "0" and not str(error).startswith("rank "):
            _let_another_speak()  # most likely the first local rank found the same, and its exit ends this one
            prefix = f"rank {rank}: "
        for line in str(error).splitlines():
            print(f"error: {prefix}{line}", file=sys.stderr)
        return 2
    except Stopped:
        _let_another_speak()
        return 2
    except PeerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"rank {rank}: interrupted; the newest checkpoint stands", file=sys.stderr)
        return 130
    return 0


def positive(text: str) -> int:
    """An integer from 1 on, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 on")
    return int(text)


def bandwidth(text: str) -> float:
    """Bytes a second of ``100Mbit``, ``1Gbit`` or ``2GB``, for argparse."""
    if not (found := re.fullmatch(r"([0-9.]+) ?([kMGT]?)(bit|B)(/s|ps)?", text)) or not float(found[1]) > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no bandwidth such as 100Mbit, 1Gbit or 2GB")
    return float(found[1]) * PREFIXES[found[2]] / (8 if found[3] == "bit" else 1)


def _let_another_speak() -> None:
    """Do not exit first: torchrun ends all ranks when one has left, and the one that explains must not be cut off."""
    time.sleep(5)


def _leave(code: int) -> NoReturn:
    """Exit without the goodbyes of process groups whose other side may be gone: those can hang."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
