"""Train several cards, each with several seeds, and set their figures side by side.

    python -m noprop_dist.compare CARD CARD ... [--seeds 0 1 2] [--ranks N] [--out DIR] [--section.name value]...

Settings stand above every card. Started again, the same command goes on where it stopped and trains nothing anew.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from noprop_dist import command
from noprop_dist.cards import read_card
from noprop_dist.comparison import compare, plan
from noprop_dist.config import Card, UserError


def main(argv: list[str]) -> None:
    """Check all cards and settings, train, and write the table and the curves."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        raise UserError("compare: it starts ranks itself; start it plainly, as python -m noprop_dist.compare ... --ranks N")
    if any(word.startswith(("--run.", "--train.resume")) for word in argv):
        raise UserError(
            "command line: compare names and resumes its runs itself; use --out DIR and --seeds in place of --run.*"
        )
    arguments = _read(argv, 0)[1]
    paths: list[Path] = arguments.cards
    if twice := [str(path) for number, path in enumerate(paths) if path in paths[:number]]:
        raise UserError(f"command line: {twice[0]} is given twice; leave one out")
    cards = {path: _read(argv, number)[0] for number, path in enumerate(paths)}
    if not compare(plan(cards, arguments.seeds, arguments.ranks, arguments.out), arguments.out):
        raise SystemExit(1)


def _read(argv: list[str], number: int) -> tuple[Card, argparse.Namespace]:
    """Card ``number`` of the command line, with its settings."""
    parser = command.Parser("-m noprop_dist.compare", __doc__)
    parser.add_argument("cards", nargs="+", type=Path, help="YAML cards")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="a run of every card for each of them (default: 0)")
    parser.add_argument("--ranks", type=int, default=1, help="ranks of a run, at most; a card with fewer blocks gets fewer")
    parser.add_argument("--out", type=Path, default=Path("comparison"), help="folder of runs, table.md, table.json, curves.png")
    return read_card(parser, argv, base=lambda arguments: Path(arguments.cards[number]))


if __name__ == "__main__":
    command.run(main)
