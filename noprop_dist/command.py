"""What the commands share: reading arguments, and a user's mistake as one line and exit code 2."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import NoReturn

from noprop_dist.config import UserError
from noprop_dist.parallel.traffic import PeerError
from noprop_dist.parallel.world import Stopped


def run(main: Callable[[list[str]], None]) -> NoReturn:
    """Call ``main`` with the arguments and exit: 0; 2 for a user's mistake; 1 when another rank failed; 130 for Ctrl-C."""
    rank = os.environ.get("RANK", "0")
    try:
        main(sys.argv[1:])
    except UserError as error:
        # every local rank finds a mistake in the card, one of them says so; what only one rank finds names that rank
        if os.environ.get("LOCAL_RANK", "0") == "0" or str(error).startswith("rank "):
            for line in str(error).splitlines():
                print(f"error: {line}", file=sys.stderr)
        _leave(2)
    except Stopped:
        _leave(2)
    except PeerError as error:
        print(f"error: {error}", file=sys.stderr)
        _leave(1)
    except KeyboardInterrupt:
        print(f"rank {rank}: interrupted; the newest checkpoint stands", file=sys.stderr)
        _leave(130)
    sys.exit(0)


def _leave(code: int) -> NoReturn:
    """Exit without the goodbyes of process groups whose other side may be gone: those can hang."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
