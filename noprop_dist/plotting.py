"""What ``plot`` does: look at a model and at the run that made it, and write the pictures."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from noprop_dist import files
from noprop_dist.chain import PATHS
from noprop_dist.config import Card, UserError
from noprop_dist.data import DataSet, Pixels, medoids
from noprop_dist.model import fresh_schedules
from noprop_dist.report.curves import Line, run_curves
from noprop_dist.report.drawing import render
from noprop_dist.report.gallery import LeftOut, Scene, gallery, make_film
from noprop_dist.report.timeline import timeline
from noprop_dist.runs import RunFolder
from noprop_dist.trained import Trained, open_its_data
from noprop_dist.viewing import as_curve

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def default_folder(name: str, trained: Trained) -> Path:
    """Where the pictures of a model go that was found by this name, if nobody says."""
    home = trained.run.path if trained.run else trained.place
    if not Path(name).is_dir() or not os.access(home, os.W_OK):  # it comes with the program, or from the hub
        return Path("figures") / Path(name).absolute().name
    return RunFolder(home).figures


def draw_all(trained: Trained, out: Path, card: Card) -> Iterator[str]:
    """Write every picture that there can be to ``out``; yields each file's path, and a line for what is left out.

    ``card``: the model's, with the settings of inference and the place of the data that are asked for. Raises UserError on a
    disk's refusal.
    """
    scene = _look(trained, card)
    makers: dict[str, Callable[[], Figure]] = {"curves": lambda: _curves(trained.run)}
    makers |= {name: lambda make=make: make(scene) for name, make in gallery().items()}  # type: ignore[misc]
    makers["timeline"] = lambda: _timeline(trained.run)
    left_out: dict[str, list[str]] = defaultdict(list)
    for name, make in makers.items():
        try:
            figure = make()
        except LeftOut as reason:
            left_out[str(reason)].append(name)
            continue
        for kind in ("png", "svg"):
            path = out / f"{name}.{kind}"
            files.write(path, render(figure, kind))
            yield str(path)
    try:
        path = out / "denoising.gif"
        files.write(path, make_film(scene))
        yield str(path)
    except LeftOut as reason:
        left_out[str(reason)].append("denoising.gif")
    for reason_text, names in left_out.items():
        yield f"left out: {', '.join(names)}: {reason_text}"


def _look(trained: Trained, card: Card) -> Scene:
    """Everything that pictures of the model need, as far as its data are there."""
    model = trained.model
    data: DataSet | None = None
    blind = ""
    try:
        data = open_its_data(model, card.data.root)
    except UserError as error:
        blind = f"no test images ({error}); give --data.root"
    viewing = model.view(data.test if data else None, **card.inference.model_dump())
    prototype = card.model.embedding == "prototype"
    began = medoids(data.train, model.info, Pixels(model.card.data, model.info)) if data and prototype else None
    return Scene(model.card, model.info, viewing, as_curve(card, fresh_schedules(card, model.info)), began, blind)


def _curves(run: RunFolder | None) -> Figure:
    if run is None:
        raise LeftOut("a model alone does not know how it was trained; name its run")
    tags = scalars(run.tensorboard)
    losses, guesses = ({index: tags[tag] for index, tag in _of_blocks(tags, what)} for what in ("loss", "test accuracy"))
    chain = {path: tags[f"test accuracy/{path}"] for path in PATHS if f"test accuracy/{path}" in tags}
    if not chain and run.history.exists():  # a fleet's run, or its event files are gone
        points = [point for point in files.read_json(run.history, list) if PATHS[0] in point]
        chain = {path: {point["step"]: point[path] for point in points} for path in PATHS} if points else {}
    if not chain and not losses:
        raise LeftOut(f"neither {run.tensorboard} nor {run.history} holds any figures yet")
    return run_curves(losses, guesses, chain)


def _of_blocks(tags: Mapping[str, Line], what: str) -> list[tuple[int, str]]:
    found = [tag for tag in tags if tag.startswith("block-") and tag.endswith(f"/{what}")]
    return sorted((int(tag.removeprefix("block-").split("/")[0]), tag) for tag in found)


def scalars(folder: Path) -> dict[str, Line]:
    """All scalars of a run's event files, by tag and step; of a run that was cut off and went on, each step once."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    if not folder.is_dir():
        return {}
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def _timeline(run: RunFolder | None) -> Figure:
    """What each rank did when, from the run's own trace."""
    trace = run.path / "trace.json" if run else None
    if trace is None or not trace.exists():
        raise LeftOut(f"no {trace}" if trace else "a model alone has no ranks; name its run")
    try:
        return timeline(files.read_json(trace))
    except UserError as error:
        raise LeftOut(str(error)) from None
