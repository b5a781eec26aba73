"""A model's folder says what it is, where it goes, and nothing of the machine that it comes from."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard import metadata_load
from PIL import Image

from noprop_dist import Card, NoPropModel, evaluate, train
from noprop_dist.cards import portable
from noprop_dist.command import answer
from noprop_dist.data import DataInfo
from noprop_dist.hub import FILES, SHIPPED
from noprop_dist.modelcard import describe
from noprop_dist.trained import load

INFO = DataInfo("npz", (1, 8, 8), ("a", "b", "c"), 24, 24, (0.1,), (0.3,))


@pytest.fixture
def run(small_card, tmp_path: Path) -> Path:
    """A run on data of its own, in a folder of its own."""
    images, labels = np.random.default_rng(0).integers(0, 256, (24, 8, 8), np.uint8), np.arange(24) % 3
    np.savez(tmp_path / "mine.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    data = {"name": "npz", "root": str(tmp_path / "mine.npz"), "batch_size": 8, "augment": "none"}
    train(small_card(data=data, train={"steps": 4}))
    return tmp_path / "runs/run"


def settings(text: str) -> dict[str, Any]:
    """The settings that a model card shows."""
    return yaml.safe_load(re.search("```yaml\n(.*?)```", text, re.DOTALL)[1])


def test_a_run_leaves_a_card_with_its_figures_that_the_hub_can_read(run):
    summary, text = json.loads((run / "summary.json").read_text()), (run / "model/README.md").read_text()
    values = metadata_load(run / "model/README.md")
    assert (values["library_name"], values["pipeline_tag"]) == ("noprop_dist", "image-classification")
    assert "license" not in values and "# license: yours" in text
    results = ModelCard.load(run / "model/README.md").data.eval_results
    assert [result.metric_value for result in results] == [round(value, 6) for value in summary["accuracy"].values()]
    for share in [
        *summary["accuracy"].values(),
        *(block["accuracy"] for block in summary["blocks"]),
        summary["train_accuracy"],
    ]:
        assert f"{100 * share:.2f}" in text
    for words in (
        "24 test images",
        "4 steps of 8 images",
        "seed 0",
        "1 rank,",
        f"torch {summary['torch']}",
        "`0`, `1`, `2`",
        "## Limits",
    ):
        assert words in text


def test_a_model_says_nothing_of_the_machine_and_a_run_still_knows(run, tmp_path):
    written = [(run / "model" / name).read_text() for name in ("README.md", "config.json")]
    assert not any(word in text for text in written for word in (str(tmp_path), "mine.npz", "runs", "timeout", 'threads":'))
    assert load(run).card.data.root == tmp_path / "mine.npz", "a run's folder keeps what its model must not"
    assert load(run).card.parallel == Card(parallel={"timeout": 60, "threads": 1}).parallel
    assert answer(evaluate.main, [str(run)]) == answer(evaluate.main, [str(run / "model")]) == 0
    shutil.copytree(run / "model", tmp_path / "away")
    assert answer(evaluate.main, [str(tmp_path / "away"), "--data.root", str(tmp_path / "mine.npz")]) == 0
    assert load(tmp_path / "away").card.data.root is None


def test_a_config_of_an_older_version_is_read_and_written_without_its_paths(run, tmp_path):
    config = json.loads((run / "model/config.json").read_text())
    config["card"] = small = load(run).card.model_dump(mode="json")
    assert small["run"]["dir"] == str(tmp_path / "runs")
    (run / "model/config.json").write_text(json.dumps(config))
    NoPropModel.from_pretrained(run / "model").save(tmp_path / "new")
    assert str(tmp_path) not in (tmp_path / "new/config.json").read_text()
    shutil.copytree(run / "model", tmp_path / "old")
    assert load(tmp_path / "old").card.data.root == tmp_path / "mine.npz"


def test_a_card_that_was_changed_by_hand_stays(run, small_card, tmp_path):
    path = run / "model/README.md"
    made = path.read_text()
    path.write_text(made.replace("# license: yours to choose, e.g. mit", "license: mit"))
    longer = load(run).card.model_copy(update={"train": small_card().train.model_copy(update={"steps": 5})})
    train(longer)
    assert "license: mit" in path.read_text() and "5 steps" not in path.read_text()
    NoPropModel.from_pretrained(run / "model").save(tmp_path / "elsewhere")
    assert (tmp_path / "elsewhere/README.md").read_text() == path.read_text(), "it goes where the model goes"
    path.write_text(made)
    train(longer)
    assert "5 steps" in path.read_text(), "one that nobody changed is kept up to date"


def test_without_a_run_a_card_says_only_what_is_known(run, tmp_path):
    load(next((run / "checkpoints").glob("step-*"))).save(tmp_path / "saved")
    text = (tmp_path / "saved/README.md").read_text()
    assert "## Accuracy" not in text and "torch 2" not in text and "rank," not in text and "4 steps" not in text
    assert set(metadata_load(tmp_path / "saved/README.md")) == {"library_name", "pipeline_tag", "tags"}
    assert {path.name for path in (tmp_path / "saved").iterdir()} == set(FILES)


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"method": {"name": "ct"}, "model": {"blocks": 4}, "optim": {"lr": 0.01}, "run": {"seed": 3}},
        {"method": {"name": "fm", "label_noise": 0.2}, "inference": {"solver": "rk4"}, "data": {"name": "svhn"}},
        {"method": {"name": "backprop"}, "train": {"steps": 7, "precision": "bf16"}, "debug": {"overfit_batches": 2}},
    ],
)
def test_the_settings_that_a_card_shows_are_those_of_the_run(sections):
    card = Card.model_validate(sections)
    shown = settings(describe(card, INFO, 1))
    assert portable(Card.model_validate(shown)) == portable(card)
    assert shown["run"]["seed"] == card.run.seed and shown["data"]["name"] == card.data.name


def test_names_from_a_disk_cannot_leave_their_place():
    names = ("a`b", "```\n# Licence\n", "---\nlicense: mit\n---", "<img src=x>", "日本")
    info = DataInfo("imagefolder", (3, 8, 8), names, 10, 10, (0.1,) * 3, (0.3,) * 3)
    text = describe(Card(), info, 1)
    assert "`a'b`, `''' # Licence`, `--- license: mit ---`, `<img src=x>`, `日本`" in text
    assert re.findall("\n# \\w+", text) == ["\n# license", "\n# NoProp"] and set(yaml.safe_load(text.split("---")[1])) == {
        "library_name",
        "pipeline_tag",
        "tags",
    }


def test_a_fleet_is_not_taken_for_one_rank(small_card):
    folder = small_card().run.dir / "run"
    folder.mkdir(parents=True)
    (folder / "fleet.jsonl").write_text("{}\n")
    train(small_card(train={"steps": 1}))
    text = (folder / "model/README.md").read_text()
    assert ", a fleet of workers, torch " in text and "1 rank" not in text


def test_a_class_of_ones_own_is_asked_for():
    assert "own class `mine:Net`" in describe(Card(model={"backbone": "mine:Net"}), INFO, 1)
    assert "own class" not in describe(Card(), INFO, 1)


def test_shipped_models_are_small_and_their_cards_say_what_they_do():
    folders = [folder for folder in SHIPPED.iterdir() if folder.is_dir()]
    assert {folder.name for folder in folders} == {"digits", "mnist"}
    assert sum(path.stat().st_size for path in SHIPPED.rglob("*")) < 8e6
    for folder in folders:
        assert {path.name for path in folder.iterdir()} == set(FILES)
        assert portable(load(folder.name).card) == json.loads((folder / "config.json").read_text())["card"]
    claimed = [result.metric_value for result in ModelCard.load(SHIPPED / "digits/README.md").data.eval_results]
    model = load("digits")
    scores = model.evaluate(evaluate.open_its_data(model).test)
    assert [scores.mean, scores.stochastic, scores.average] == pytest.approx(claimed, abs=0.006), "2 of 360: sums differ by CPU"


def test_what_is_installed_names_a_picture(tmp_path):
    """A wheel as pip builds it, unpacked away from the sources."""
    source = Path(__file__).parents[1]
    shutil.copytree(source / "noprop_dist", tmp_path / "source/noprop_dist", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(source / name, tmp_path / "source")
    build = "from setuptools import build_meta; print(build_meta.build_wheel('..'))"
    made = subprocess.run([sys.executable, "-c", build], cwd=tmp_path / "source", capture_output=True, text=True, check=True)
    with zipfile.ZipFile(tmp_path / made.stdout.splitlines()[-1]) as wheel:
        wheel.extractall(tmp_path / "installed")
    for folder in SHIPPED.iterdir():
        for name in FILES:
            assert (tmp_path / "installed/noprop_dist/models" / folder.name / name).read_bytes() == (folder / name).read_bytes()
    stroke = np.full((28, 28), 255, np.uint8)
    stroke[4:24, 13:15] = 0
    Image.fromarray(stroke).save(tmp_path / "one.png")
    command = [sys.executable, "-m", "noprop_dist.predict", "mnist", "one.png", "--json"]
    said = subprocess.run(
        command, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path / "installed")}, capture_output=True, check=True
    )
    assert json.loads(said.stdout)[0]["class"] == "1"
