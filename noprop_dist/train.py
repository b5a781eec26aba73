"""Train NoProp with its blocks spread over ranks.

torchrun --nproc_per_node=4 -m noprop_dist.train [CARD.yaml] [--section.name value]...
python -m noprop_dist.train --dry-run --ranks 4
"""

from __future__ import annotations

from noprop_dist import command
from noprop_dist.cards import read_card
from noprop_dist.config import UserError
from noprop_dist.launcher import dry_run, train
from noprop_dist.parallel.world import rank_and_size
from noprop_dist.report.console import print_summary


def main(argv: list[str]) -> None:
    """Read the card, then train or show what training would be."""
    parser = command.Parser("-m noprop_dist.train", __doc__)
    parser.add_argument("card", nargs="?", help="a YAML card; settings on the command line stand above it")
    parser.add_argument("--dry-run", action="store_true", help="print placement, memory and traffic; start nothing")
    parser.add_argument("--ranks", type=int, help="number of ranks of a dry run")
    card, arguments = read_card(parser, argv)
    if arguments.dry_run:
        dry_run(card, rank_and_size()[1] if arguments.ranks is None else arguments.ranks)
    elif arguments.ranks is not None:
        raise UserError("command line: --ranks goes with --dry-run; start ranks with torchrun --nproc_per_node")
    elif (result := train(card)).stopped:
        raise SystemExit(card.run.stop_exit_code)
    elif result.summary:
        print_summary(result.summary)


if __name__ == "__main__":
    command.run(main)
