"""Train on a Ray cluster: the same cards and code path as under torchrun; Ray Train starts the ranks, and once more where
one fails.

    python launch/ray_train.py [CARD.yaml] --workers 4 [--gpus] [--address auto] [--section.name value]...
    ray job submit --working-dir . -- python launch/ray_train.py CARD.yaml --workers 2:8 --run.dir /shared/runs --run.name mine

--workers 2:8 takes what the cluster has, from 2 to 8, also when nodes come and go; the blocks are placed anew each time.
Started again with the same --run.name, a run goes on where it stopped. Ctrl-C or SIGTERM: it saves and stops.
"""

from __future__ import annotations

import argparse

from cluster import add_arguments, check_card, joined, refuse_fleeting, require, settle, share

from noprop_dist import command
from noprop_dist.cards import read_card
from noprop_dist.report.console import print_summary


def main(argv: list[str]) -> None:
    """Check the card and the cluster, train, and print the run's end table."""
    parser = command.Parser("launch/ray_train.py", __doc__)
    add_arguments(parser, "worker")
    parser.add_argument("--workers", type=workers, default=(1, 1), metavar="N|MIN:MAX", help="how many ranks (default: 1)")
    card, arguments = read_card(parser, argv)
    fewest, most = arguments.workers
    check_card(card, most, arguments)
    if not arguments.storage:
        refuse_fleeting(card.run.dir, "run.dir")
    card = settle(card, arguments)
    with joined(arguments.address):
        require(fewest, "worker", share(arguments), wait=arguments.wait)
        from training import fit  # here, for it imports Ray

        outcome = fit(card, arguments)
    if outcome.stopped:
        raise SystemExit(card.run.stop_exit_code)
    print_summary(outcome.summary)
    print(f"{'in storage':<12} {outcome.storage}")


def workers(text: str) -> tuple[int, int]:
    """``4`` or ``2:8`` as (fewest, most)."""
    fewest, _, most = text.partition(":")
    low, high = int(fewest), int(most or fewest)
    if not 1 <= low <= high:
        raise argparse.ArgumentTypeError(f"{text} is neither a number of workers, such as 4, nor a range, such as 2:8")
    return low, high


if __name__ == "__main__":
    command.run(main)
