"""Draw a run, or a model: PNG and SVG of each picture, and a GIF.

    python -m noprop_dist.plot RUN_OR_MODEL [--data.root DIR] [--inference.samples 5] [--out DIR]

RUN_OR_MODEL as for evaluate. Pictures go to RUN/figures/, of a model without a run to MODEL/figures/, and to ./figures/NAME/
where that folder cannot be written to, comes with the program or from the hub. What cannot be drawn is told, with the reason.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from noprop_dist import command
from noprop_dist.cards import read_card
from noprop_dist.config import Card, UserError
from noprop_dist.plotting import default_folder, draw_all
from noprop_dist.runs import differences
from noprop_dist.trained import Trained, find, settle


def main(argv: list[str]) -> None:
    """Print the files, and what was left out."""
    parser = command.Parser("-m noprop_dist.plot", __doc__)
    parser.add_argument("folder", help="a run's folder, its model's, a checkpoint's, or a model's name")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the pictures go")
    found: list[Trained] = []

    def own_card(arguments: argparse.Namespace) -> Card:
        found.append(find(arguments.folder))
        return found[0].model.card

    card, arguments = read_card(parser, argv, base=own_card)
    trained, model = found[0], found[0].model
    if changed := differences(model.card.model_dump(mode="json"), card.model_dump(mode="json")):
        raise UserError(f"command line: this model cannot be drawn with {'; '.join(changed)}; leave those out")
    settle(model, card.parallel)
    out = arguments.out or default_folder(arguments.folder, trained)
    for line in draw_all(trained, out, card):
        print(line, flush=True)


if __name__ == "__main__":
    command.run(main)
