"""What has been trained: a run, a checkpoint, a gathered model, or one that comes with the program."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError
from torch import Tensor

from noprop_dist.cards import explain, load_card, localised
from noprop_dist.checkpoint import LABELS, MANIFEST, block_file, newest_whole, read_manifest
from noprop_dist.config import ParallelCard, UserError
from noprop_dist.data import DataSet, open_data
from noprop_dist.files import read, unpack
from noprop_dist.hub import locate
from noprop_dist.learner import inference_state
from noprop_dist.model import CONFIG, NoPropModel
from noprop_dist.parallel.world import choose_device, set_threads
from noprop_dist.runs import RunFolder, trained_as


@dataclass(frozen=True)
class Trained:
    """A model, and where it was found. ``run``: its run, where there is one."""

    model: NoPropModel
    place: Path
    run: RunFolder | None


def load(name: str | Path) -> NoPropModel:
    """The model that ``name`` means, see :func:`find`."""
    return find(name).model


def find(name: str | Path) -> Trained:
    """The model of a run's, a model's or a checkpoint's folder, of a shipped model's name, or of the hub's ``owner/name``.

    A run's has the run's settings for this machine too, where its data lie for one. Raises UserError where there is none, or it
    is damaged.
    """
    folder = locate(name)
    run = RunFolder(folder)
    for place, home in ((folder, RunFolder(folder.absolute().parent)), (run.model, run)):
        if (place / CONFIG).exists():
            return _at_home(NoPropModel.from_pretrained(place), place, home)
    newest, refused = (folder, []) if (folder / MANIFEST).exists() else newest_whole(run.checkpoints)
    if newest is None:
        reason = refused[0] if refused else "neither a model nor a checkpoint here; name a run's folder or its model's"
        raise UserError(f"{folder}: {reason}")
    manifest = read_manifest(newest)
    card, info = trained_as(newest, manifest)
    blocks = {index: _state(newest / block_file(index)) for index in range(card.units)}
    try:
        model = NoPropModel.from_parts(card, info, blocks, _state(newest / LABELS))
    except UserError as error:
        raise UserError(f"{newest}: {error}") from None
    return _at_home(model, newest, RunFolder(newest.absolute().parents[1]))


def settle(model: NoPropModel, card: ParallelCard | None = None) -> NoPropModel:
    """The model itself, on this machine's device and threads, or on those that ``card`` asks for.

    Raises UserError for a device that is not there.
    """
    card = card or ParallelCard()  # where it was trained says nothing of where it is used
    set_threads(card)
    return model.to(choose_device(card, 0, 1)[0])


def _at_home(model: NoPropModel, place: Path, home: RunFolder) -> Trained:
    if not home.card.exists():
        return Trained(model, place, None)
    try:
        model.card = localised(model.card, load_card(home.card))
    except ValidationError as error:
        raise UserError(f"{home.card}: not of the model in {place} ({explain(error)}); move one of them away") from None
    return Trained(model, place, home)


def open_its_data(model: NoPropModel, root: Path | None = None) -> DataSet:
    """The data that a model was trained on; ``root``: where they lie now, if elsewhere.

    Raises UserError where its images are not such as the model has been trained on.
    """
    card = model.card.data if root is None else model.card.data.model_copy(update={"root": root})
    data = open_data(card)
    for name in ("shape", "classes"):
        there, here = getattr(model.info, name), getattr(data.info, name)
        if there != here:
            raise UserError(f"data.root: {name} {here}, but this model knows {there}; name its own data with --data.root")
    return data


def _state(path: Path) -> dict[str, Tensor]:
    return inference_state(unpack(read(path), path))
