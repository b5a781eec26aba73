"""Train blocks as independent units of work on Ray actors: nobody waits for anybody, and who is lost costs its own steps alone.

    python launch/ray_fleet.py [CARD.yaml] --workers 4 [--gpus] [--address auto] [--section.name value]...

Each worker takes the block that is furthest behind, trains it for train.checkpoint_every steps, hands it back and takes the
next. A lost worker's block goes on from its last file, on any other worker; workers join whenever the cluster has room. The
files at the end are those of a run on one rank, byte for byte. Started again with the same --run.name it goes on where it
stopped; torchrun and launch/ray_train.py can take such a run over, and the other way round.
"""

from __future__ import annotations

import argparse

from cluster import add_arguments, check_card, joined, refuse_fleeting, require, settle, share

from noprop_dist import command
from noprop_dist.cards import read_card
from noprop_dist.config import LOCAL_METHODS, Card, UserError
from noprop_dist.launcher import train
from noprop_dist.report.console import print_summary, set_up_logging


def main(argv: list[str]) -> None:
    """Check the card and the cluster, train all blocks, then score the chain here and print the run's end table."""
    parser = command.Parser("launch/ray_fleet.py", __doc__)
    add_arguments(parser, "worker")
    parser.add_argument(
        "--workers", type=int, default=2, help="how many at a time, at most; one is enough to begin (default: 2)"
    )
    card, arguments = read_card(parser, argv)
    check(card, arguments)
    refuse_fleeting(card.run.dir, "run.dir")
    card = settle(card, arguments)
    set_up_logging(0)
    with joined(arguments.address):
        require(1, "worker", share(arguments), wait=arguments.wait)
        from fleet import Fleet  # here, for it imports Ray

        done = Fleet(card, arguments.workers, share(arguments), arguments.max_failures).run()
    if not done:
        raise SystemExit(card.run.stop_exit_code)
    here = card.parallel.model_copy(update={"device": "auto"})
    result = train(card.model_copy(update={"parallel": here}))
    if result.stopped:
        raise SystemExit(card.run.stop_exit_code)
    print_summary(result.summary)


def check(card: Card, arguments: argparse.Namespace) -> None:
    """Raise UserError for what a fleet cannot do."""
    if card.method.name not in LOCAL_METHODS:
        raise UserError(f"method.name: {card.method.name} has no blocks that learn alone; use python -m noprop_dist.train")
    if card.method.schedule == "learned" and card.model.blocks == 1:
        raise UserError(
            "method.schedule: one block's learned schedule trains the label space too; use python -m noprop_dist.train"
        )
    if card.parallel.feed != "stream":
        raise UserError("parallel.feed: a fleet fetches batches, resident would do nothing; leave it out")
    if card.parallel.balance != "even":
        raise UserError("parallel.balance: a fleet's fast workers take more blocks by themselves; leave it out")
    if card.debug.enabled:
        raise UserError("debug.enabled: a fleet's workers do not debug; use python -m noprop_dist.train --debug")
    if arguments.storage:
        raise UserError("--storage: a fleet's files lie in --run.dir on the driver's node; leave it out")
    if arguments.workers < 1:
        raise UserError(f"--workers: {arguments.workers} train nothing; use at least 1")
    if not (card.train.resume == "auto"):
        raise UserError("train.resume: a fleet goes on with --run.name by itself; leave it out")
    check_card(card, 1, arguments)


if __name__ == "__main__":
    command.run(main)
