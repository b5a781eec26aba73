"""Evaluate a run, or a gathered model, in one process; prints one JSON object.

    python -m noprop_dist.evaluate RUN_OR_MODEL [--inference.path stochastic] [--inference.samples 5] [--data.root DIR]

With no settings it repeats the run's own accuracy. A run that was cut off is evaluated at its newest whole checkpoint.
"""

from __future__ import annotations

import argparse
import json

from noprop_dist import command
from noprop_dist.cards import read_card
from noprop_dist.config import Card, UserError
from noprop_dist.model import NoPropModel
from noprop_dist.runs import differences
from noprop_dist.trained import load, open_its_data, settle


def main(argv: list[str]) -> None:
    """Print the accuracy of each path and of every block's û."""
    parser = command.Parser("-m noprop_dist.evaluate", __doc__)
    parser.add_argument("folder", help="a run's folder, its model's, a checkpoint's, or a model's name")
    models: list[NoPropModel] = []

    def own_card(arguments: argparse.Namespace) -> Card:
        models.append(load(arguments.folder))
        return models[0].card

    card, _ = read_card(parser, argv, base=own_card)
    model = models[0]
    if changed := differences(model.card.model_dump(mode="json"), card.model_dump(mode="json")):
        raise UserError(f"command line: this model cannot be evaluated with {'; '.join(changed)}; leave those out")
    settle(model, card.parallel)
    scores = model.evaluate(open_its_data(model, card.data.root).test, **card.inference.model_dump())
    accuracy = {"mean": scores.mean, "stochastic": scores.stochastic, "average": scores.average}
    path = card.inference.path
    print(json.dumps({"test_accuracy": accuracy[path], "path": path, "accuracy": accuracy, "blocks": scores.blocks}))


if __name__ == "__main__":
    command.run(main)
