"""Evaluate a run, or a gathered model, in one process; prints one JSON object.

    python -m noprop_dist.evaluate RUN_OR_MODEL [--inference.path stochastic] [--inference.samples 5] [--data.root DIR]

With no settings it repeats the run's own accuracy. A run that was cut off is evaluated at its newest whole checkpoint.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from torch import Tensor

from noprop_dist import command
from noprop_dist.cards import read_card
from noprop_dist.checkpoint import LABELS, MANIFEST, block_file, newest_whole, read_manifest
from noprop_dist.config import Card, UserError
from noprop_dist.data import DataInfo, Split, open_data
from noprop_dist.files import read, unpack
from noprop_dist.learner import inference_state
from noprop_dist.model import CONFIG, NoPropModel
from noprop_dist.parallel.world import choose_device, set_threads
from noprop_dist.runs import RunFolder, differences, trained_as


def main(argv: list[str]) -> None:
    """Print the accuracy of each path and of every block's û."""
    parser = argparse.ArgumentParser(prog="python -m noprop_dist.evaluate", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("folder", type=Path, help="a run's folder, its model's, or a checkpoint's")
    models: list[NoPropModel] = []

    def own_card(arguments: argparse.Namespace) -> Card:
        models.append(load(arguments.folder))
        return models[0].card

    card, _ = read_card(parser, argv, base=own_card)
    model = models[0]
    if changed := differences(model.card.model_dump(mode="json"), card.model_dump(mode="json")):
        raise UserError(f"command line: this model cannot be evaluated with {'; '.join(changed)}; leave those out")
    set_threads(card.parallel)
    model.to(choose_device(card.parallel, 0, 1)[0])
    scores = model.evaluate(_test_half(card, model.info), **card.inference.model_dump())
    accuracy = {"mean": scores.mean, "stochastic": scores.stochastic, "average": scores.average}
    path = card.inference.path
    print(json.dumps({"test_accuracy": accuracy[path], "path": path, "accuracy": accuracy, "blocks": scores.blocks}))


def load(folder: Path) -> NoPropModel:
    """The model of a run's, a model's or a checkpoint's folder. Raises UserError where there is none."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; name a run's folder or its model's")
    run = RunFolder(folder)
    for place in (folder, run.model):
        if (place / CONFIG).exists():
            return NoPropModel.from_pretrained(place)
    newest, refused = (folder, []) if (folder / MANIFEST).exists() else newest_whole(run.checkpoints)
    if newest is None:
        reason = refused[0] if refused else "neither a model nor a checkpoint here; name a run's folder or its model's"
        raise UserError(f"{folder}: {reason}")
    manifest = read_manifest(newest)
    card, info = trained_as(newest, manifest)
    blocks = {index: _state(newest / block_file(index)) for index in range(card.units)}
    try:
        return NoPropModel.from_parts(card, info, blocks, _state(newest / LABELS))
    except UserError as error:
        raise UserError(f"{newest}: {error}") from None


def _test_half(card: Card, trained: DataInfo) -> Split:
    """Raises UserError where its images are not such as the model has been trained on."""
    data = open_data(card.data)
    for name in ("shape", "classes"):
        there, here = getattr(trained, name), getattr(data.info, name)
        if there != here:
            raise UserError(f"data.root: {name} {here}, but this model knows {there}; name its own data with --data.root")
    return data.test


def _state(path: Path) -> dict[str, Tensor]:
    return inference_state(unpack(read(path), path))


if __name__ == "__main__":
    command.run(main)
