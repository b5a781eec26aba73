"""Pictures of runs and models, as a user asks for them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image

from noprop_dist import Card, NoPropModel, train
from noprop_dist.config import UserError
from noprop_dist.data import describe
from noprop_dist.plot import main
from noprop_dist.plotting import default_folder, scalars
from noprop_dist.report import figures
from noprop_dist.report.denoising import denoising, film
from noprop_dist.report.drawing import pixels, render
from noprop_dist.trained import find
from noprop_dist.trainer import Trainer
from noprop_dist.viewing import Course

ALWAYS = {"denoising", "denoising-mean", "paths", "confusion", "schedule"}


def drawn(folder: Path) -> set[str]:
    """The names of the pictures there, after a look into each."""
    for path in folder.iterdir():
        if path.suffix == ".svg":
            assert ElementTree.parse(path).getroot().tag.endswith("svg")
        else:
            with Image.open(path) as picture:
                picture.load()
                assert picture.format == path.suffix[1:].upper()
                assert np.asarray(picture.convert("L")).std() > 3, f"{path} is empty"
        assert path.stat().st_size < 300_000, path
    names = {path.stem for path in folder.glob("*.png")}
    assert names == {path.stem for path in folder.glob("*.svg")}
    return names


def test_a_run_is_drawn_with_all_that_there_is(small_card, capsys):
    card = small_card(model={"blocks": 3, "embedding": "prototype"}, inference={"batch_size": 360})
    train(card)
    run = card.run.dir / "run"
    capsys.readouterr()
    main([str(run)])
    said = capsys.readouterr().out.splitlines()
    assert drawn(run / "figures") == ALWAYS | {"curves", "timeline", "embeddings", "prototypes"}
    assert {Path(line) for line in said} == set((run / "figures").iterdir()), "and nothing was left out"
    with Image.open(run / "figures/denoising.gif") as gif:
        assert gif.n_frames == 4 and gif.info["loop"] == 0, "noise, then z after each block"


def test_a_model_whose_data_are_not_there_says_so_and_draws_the_rest(small_card, tmp_path, capsys, monkeypatch):
    images, labels = np.random.default_rng(0).integers(0, 256, (60, 8, 8), np.uint8), np.arange(60) % 3
    np.savez(tmp_path / "own.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    card = small_card(data={"name": "npz", "root": str(tmp_path / "own.npz")}, model={"blocks": 2, "embedding": "learned"})
    train(card)
    shutil.copytree(card.run.dir / "run/model", tmp_path / "alone")
    (tmp_path / "own.npz").rename(tmp_path / "elsewhere.npz")
    capsys.readouterr()
    main([str(tmp_path / "alone")])
    said = capsys.readouterr().out
    assert drawn(tmp_path / "alone/figures") == {"schedule", "embeddings"}
    missing = r"left out: denoising, denoising-mean, paths, confusion, denoising.gif: no test images (data.root:"
    assert missing in said and "give --data.root" in said
    assert "left out: curves: a model alone does not know how it was trained" in said
    main([str(tmp_path / "alone"), "--data.root", str(tmp_path / "elsewhere.npz"), "--out", str(tmp_path / "out")])
    assert drawn(tmp_path / "out") == ALWAYS | {"embeddings"}
    monkeypatch.setattr("os.access", lambda *_: False)
    assert default_folder(str(tmp_path / "alone"), find(tmp_path / "alone")) == Path("figures/alone"), (
        "the folder cannot be written to"
    )


def test_a_shipped_model_is_drawn_beside_the_user_not_where_it_lies(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(["digits"])
    assert drawn(tmp_path / "figures/digits") == ALWAYS
    assert "left out: embeddings: one-hot ones are fixed" in capsys.readouterr().out


def test_a_baseline_is_drawn_as_far_as_it_goes(small_card, capsys):
    card = small_card(method={"name": "cnn"}, model={"blocks": 1})
    train(card)
    main([str(card.run.dir / "run")])
    assert drawn(card.run.dir / "run/figures") == {"curves", "confusion", "timeline"}
    assert "denoising.gif: cnn is trained end to end" in capsys.readouterr().out


def test_the_curves_of_a_run_that_was_cut_off_and_went_on_have_each_step_once(small_card, monkeypatch):
    settings = {"steps": 6, "eval_every": 1, "log_every": 1, "checkpoint_every": 3}
    card = small_card(train=settings)
    step = Trainer._step

    def cut(self: Trainer, number: int, *args: object) -> None:
        if number == 5:
            raise InterruptedError
        step(self, number, *args)

    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(Trainer, "_step", cut)
        train(card)
    folder = card.run.dir / "run/tensorboard"
    before = scalars(folder)
    assert sorted(before["test accuracy/mean"]) == [1, 2, 3, 4, 5]
    summary = train(small_card(train=settings | {"eval_every": 2})).summary
    tags = scalars(folder)
    assert len(list(folder.glob("events*"))) == 2
    assert list(tags["block-01/loss"]) == [1, 2, 3, 4, 5, 6]
    for tag in ("block-01/test accuracy", "test accuracy/mean"):
        assert list(tags[tag]) == [1, 2, 3, 4, 6], "the evaluation of step 5 was beyond the checkpoint, and is not this run's"
    assert list(tags["test accuracy/mean"].values()) == pytest.approx([point["mean"] for point in summary["curve"]])


def test_what_cannot_be_drawn_with_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"optim\.lr: .* leave those out"):
        main(["digits", "--optim.lr", "0.5"])
    with pytest.raises(UserError, match="no such folder"):
        main([str(tmp_path / "nowhere")])
    assert not list(tmp_path.iterdir())


def course(classes: int, steps: int, images: int, channels: int, prototypes: bool = False) -> Course:
    torch.manual_seed(0)
    told = torch.rand(2, images, steps + 1, classes).mul(5).softmax(dim=-1)
    pictures = torch.randint(0, 256, (2, images, steps + 1, channels, 9, 9), dtype=torch.uint8) if prototypes else None
    return Course(
        images=torch.randint(0, 256, (images, channels, 9, 9), dtype=torch.uint8),
        labels=torch.arange(images) % classes,
        steps=tuple(map(str, range(steps))),
        z=torch.randn(2, images, steps + 1, 12),
        pictures=pictures,
        told=told,
        said=told[:, :, 1:],
        answer=told[:, :, -1],
    )


@pytest.mark.parametrize(
    ("classes", "steps", "images", "channels", "prototypes"),
    [(2, 1, 1, 1, False), (100, 20, 3, 3, False), (10, 4, 2, 3, True), (3, 0, 2, 1, False)],
)
def test_any_shape_of_course_is_drawn_whole(classes, steps, images, channels, prototypes):
    """Nothing sticks out of the picture: its margin stays white."""
    names = [f"class with a rather long name {index}" for index in range(classes)]
    seen = course(classes, steps, images, channels, prototypes)
    for path in ("mean", "stochastic"):
        picture = pixels(denoising(seen, names, path), 60)
        margin = np.concatenate([picture[:2].reshape(-1, 3), picture[-2:].reshape(-1, 3), picture[:, -2:].reshape(-1, 3)])
        assert (margin == 255).all()
    if steps:
        assert len(film(seen, names, most=2)) < 1_000_000
        assert render(figures.paths(seen, torch.randn(classes, 12), names))


def test_confusion_counts_are_those_of_the_predictions(monkeypatch):
    shown: dict[str, Any] = {}

    def table(ax: Any, values: Any, names: list[str], *_: float) -> Any:
        shown.update(values=values, names=names)
        return ax.imshow(values)

    monkeypatch.setattr(figures, "_table", table)
    named = torch.tensor([[0, 0, 0, 0, 1, 2], [0, 0, 0, 1, 1, 1]])
    title = figures.confusion(named, ["a", "b", "c"]).axes[0].get_title()
    np.testing.assert_allclose(shown["values"], [[0.75, 0.25, 0], [0, 1, 0], [0, 1, 0]])
    assert "4 of 6 right (66.67%)" in title and "a as b 1×" in title and "c as b 1×" in title
    monkeypatch.setattr(figures, "MOST_CLASSES", 4)
    figures.confusion(torch.tensor([[5, 1, 7, 7], [6, 1, 9, 9]]), [str(index) for index in range(10)])
    assert set(shown["names"]) <= {"5", "6", "7", "9"} and {"7", "9"} <= set(shown["names"]), "those most often confused"


def test_a_learned_schedule_is_drawn_against_its_start():
    card = Card.model_validate({"method": {"name": "ct", "schedule": "learned"}})
    model = NoPropModel(card, describe(card.data))
    with torch.no_grad():
        model.blocks[0].gamma.ends += 1.0
    gamma = model.view(None).gamma
    levels, ratios = figures.schedule(card, gamma, NoPropModel(card, model.info).view(None).gamma).axes
    start, now = (line.get_ydata() for line in ratios.get_lines())
    np.testing.assert_allclose(np.log(now) - np.log(start), -1.0, atol=1e-4)
    assert [text.get_text() for text in levels.get_legend().get_texts()] == ["at its start", "learned"]
