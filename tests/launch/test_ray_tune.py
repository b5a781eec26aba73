"""A search on Ray: the space is checked before anything starts, and the best card trains as it did in its trial."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from ray_tune import main

from noprop_dist import UserError, train
from noprop_dist.cards import load_card

TUNE = [sys.executable, str(Path(__file__).parents[2] / "launch/ray_tune.py")]
SMALL = ["--model.blocks", "1", "--data.batch_size", "200", "--train.epochs", "6", "--parallel.threads", "1"]
SMALL += ["--train.pictures", "false"]


def test_a_search_ends_what_falls_behind_and_leaves_a_table_and_the_best_card(cluster, tmp_path, monkeypatch):
    (tmp_path / "space.yaml").write_text("optim.lr: {choice: [1e-6, 1e-2]}\nmethod.label_noise: {uniform: [0, 0.2]}\n")
    command = [*TUNE, "--address", cluster.address, "--search", "space.yaml", "--trials", "4", *SMALL]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stdout + result.stderr
    entries = json.loads((tmp_path / "search/trials.json").read_text())
    assert [entry["optim.lr"] for entry in sorted(entries, key=lambda entry: entry["trial"])] == [1e-2, 1e-2, 1e-6, 1e-6]
    assert [entry["test_accuracy"] for entry in entries] == sorted((entry["test_accuracy"] for entry in entries), reverse=True)
    assert len({entry["method.label_noise"] for entry in entries}) == 4
    best = entries[0]
    assert (best["optim.lr"], best["state"], best["step"]) == (1e-2, "finished", 44) and best["epoch"] >= 6
    ended = [entry for entry in entries if entry["state"] == "stopped early"]
    assert any(entry["optim.lr"] == 1e-6 and entry["epoch"] < 6 for entry in ended), "else ASHA does nothing"
    with open(tmp_path / "search/trials.csv") as file:
        assert [row["state"] for row in csv.DictReader(file)] == [entry["state"] for entry in entries]
    assert "the test set" in result.stdout and "method.label_noise" in result.stdout
    monkeypatch.chdir(tmp_path)
    card = load_card(tmp_path / "search/best.yaml")
    assert (card.run.name, card.method.label_noise) == (None, best["method.label_noise"])
    assert train(card).summary["test_accuracy"] == best["test_accuracy"]


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"optim.lrr": {"uniform": [0, 1]}}, "space.yaml: unknown setting optim.lrr; did you mean optim.lr?"),
        ({"optim.lr": {"loguniforn": [0.1, 1]}}, "optim.lr: unknown loguniforn; did you mean loguniform?"),
        ({"optim.lr": {"loguniform": [0, 1]}}, "optim.lr: loguniform cannot draw from [0, 1]"),
        ({"optim.lr": {"uniform": [1, 0.1]}}, "optim.lr: uniform cannot draw from [1, 0.1]"),
        ({"optim.lr": {"uniform": [0.1]}}, "optim.lr: uniform cannot draw from [0.1]"),
        ({"optim.lr": {"uniform": ["a", "b"]}}, "optim.lr: uniform cannot draw from ['a', 'b']"),
        ({"data.batch_size": {"randint": [8, 9.5]}}, "data.batch_size: randint cannot draw from [8, 9.5]"),
        ({"optim.lr": {"choice": 3}}, "optim.lr: choice takes a list, not 3"),
        ({"optim.lr": 0.1}, "optim.lr: not one of choice, uniform"),
        ({"optim.lr": None}, "optim.lr: not one of choice, uniform"),
        ({"train.epochs": {"randint": [1, 9]}}, "train.epochs: not to be searched"),
        ({"optim.lr": {"uniform": [-2, -1]}}, "trial 0 (optim.lr -1."),
        ({"method.schedule": {"choice": ["learned"]}}, "method.schedule: learned needs continuous time"),
        ({"model.backbone": {"choice": ["paper-cnn"]}}, "paper-cnn needs images of at least 14 pixels"),
        ([1], "space.yaml: a search space is a mapping such as"),
        ({}, "space.yaml: a search space is a mapping such as"),
    ],
)
def test_a_mistake_in_the_space_is_told_before_anything_starts(space, message, tmp_path, monkeypatch):
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(space))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        main(["--search", "space.yaml"])
    assert re.fullmatch(rf".*{re.escape(message)}.*", str(caught.value)), caught.value
    assert [path.name for path in tmp_path.iterdir()] == ["space.yaml"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--search", "none.yaml"], "none.yaml: cannot read this search space"),
        (["--search", "space.yaml", "--trials", "0"], "--trials and --grace are more than 0"),
        (["--search", "space.yaml", "--run.name", "mine"], "a search names and resumes its runs itself"),
        (["--search", "space.yaml", "--address", "127.0.0.1:1"], "--address 127.0.0.1:1: nothing answers there"),
        ([], "required: --search"),
    ],
)
def test_a_mistake_of_the_command_line_is_told_before_anything_starts(arguments, message, tmp_path, monkeypatch):
    (tmp_path / "space.yaml").write_text("optim.lr: {uniform: [0.1, 1]}")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        main(arguments)
    assert re.fullmatch(rf".*{re.escape(message)}.*", str(caught.value)), caught.value
    assert [path.name for path in tmp_path.iterdir()] == ["space.yaml"]


def test_another_search_does_not_go_on_in_the_same_folder(cluster, tmp_path, monkeypatch):
    (tmp_path / "space.yaml").write_text("optim.lr: {uniform: [0.1, 1]}")
    (tmp_path / "search").mkdir()
    (tmp_path / "search/plan.json").write_text("[]")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="search: holds another search, of other cards; choose another --out"):
        main(["--address", cluster.address, "--search", "space.yaml"])
