"""Runs, checkpoints and models that are damaged, another's, or in the way: given to train, evaluate or compare."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from noprop_dist import compare, evaluate
from noprop_dist.checkpoint import digest, own_sum
from noprop_dist.command import answer
from noprop_dist.config import UserError
from noprop_dist.train import main as train
from noprop_dist.trained import load

SETTINGS = "--data.name npz --data.root a.npz --data.batch_size 8 --model.blocks 2 --train.steps 2 --train.checkpoint_every 1"
SETTINGS += " --train.pictures false"
RUN = Path("runs/mine")
NEWEST = RUN / "checkpoints/step-00000002"
MANIFEST, BLOCK, LABELS = NEWEST / "manifest.json", NEWEST / "block-01.safetensors", NEWEST / "labels.safetensors"
MODEL, CONFIG = RUN / "model/model.safetensors", RUN / "model/config.json"


def write_data(path: str, side: int = 8, classes: int = 3, train: int = 24) -> None:
    images, labels = np.zeros((train, side, side), np.uint8), np.arange(train) % classes
    np.savez(path, x_train=images, y_train=labels, x_test=images, y_test=labels)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    with contextlib.chdir(folder):
        write_data("a.npz")
        assert answer(train, [*SETTINGS.split(), "--run.name", "mine"]) == 0
    return folder


@pytest.fixture
def here(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The current folder holds a copy of the run and its data."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)


def put(path: Path, blob: bytes) -> Callable[[], object]:
    return lambda: path.write_bytes(blob)


def cut(path: Path) -> Callable[[], object]:
    return lambda: path.write_bytes(path.read_bytes()[:-3])


def flip(path: Path) -> Callable[[], object]:
    return lambda: path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1]))


def folder_for(path: Path) -> Callable[[], object]:
    def swap() -> None:
        path.unlink(missing_ok=True)
        path.mkdir(parents=True)

    return swap


def change(path: Path, *where: str, to: Any) -> Callable[[], object]:
    """One value of a JSON file, by someone who knows how."""

    def write() -> None:
        whole = part = json.loads(path.read_text())
        for name in where[:-1]:
            part = part[name]
        part[where[-1]] = to
        if whole.pop("own_sha256", None):
            whole["own_sha256"] = own_sum(whole)
        path.write_text(json.dumps(whole))

    return write


def of_another_network(path: Path, *, vouched: bool) -> Callable[[], object]:
    """As a user's own class, edited since, would leave it; ``vouched``: the manifest has the file's sum."""

    def write() -> None:
        tensors = load_file(path)
        name = max(name for name in tensors if name.endswith("weight") and "optimizer" not in name)
        save_file(tensors | {name: tensors[name][:1].clone()}, path)
        if vouched:
            change(MANIFEST, "sha256", path.name, to=digest(path.read_bytes()).hex())()

    return write


DEEP = b"[" * 100_000
MODELS = {
    "no folder": (lambda: shutil.rmtree(RUN), ("runs/mine: no such folder",)),
    "a file": (lambda: (shutil.rmtree(RUN), RUN.write_text("")), ("runs/mine: no such folder",)),
    "nothing in it": (lambda: (shutil.rmtree(RUN), RUN.mkdir()), ("neither a model nor a checkpoint",)),
    "weights cut": (cut(MODEL), (str(MODEL), "not a whole safetensors file")),
    "weights empty": (put(MODEL, b""), (str(MODEL), "not a whole safetensors file")),
    "weights missing": (MODEL.unlink, (str(MODEL), "No such file")),
    "weights a folder": (folder_for(MODEL), (str(MODEL), "Is a directory")),
    "weights of another model": (of_another_network(MODEL, vouched=False), (str(MODEL), "weights of another model")),
    "config of another model": (change(CONFIG, "card", "model", "blocks", to=3), (str(MODEL), "weights of another model")),
    "config text": (put(CONFIG, b"hello"), (str(CONFIG), "damaged")),
    "config of bytes": (put(CONFIG, b"\xff\xfe\0"), (str(CONFIG), "damaged")),
    "config a list": (put(CONFIG, b"[]"), (str(CONFIG), "no JSON object")),
    "config without end": (put(CONFIG, DEEP), (str(CONFIG), "damaged")),
    "config empty": (put(CONFIG, b"{}"), (str(CONFIG), "'card'")),
    "config of another version": (change(CONFIG, "card", "new", to={}), (str(CONFIG), "new", "not permitted")),
    "config with nonsense": (change(CONFIG, "card", "optim", "lr", to="x"), (str(CONFIG), "optim.lr", "number")),
    "images without pixels": (change(CONFIG, "data", "shape", to=[1, 0, 8]), (str(CONFIG), "shape.1", "greater than 0")),
    "images of terabytes": (change(CONFIG, "data", "shape", to=[1, 10**7, 10**7]), (str(CONFIG), "memory")),
    "a class that is not here": (change(CONFIG, "card", "model", "backbone", to="gone:Net"), ("model.backbone", "gone")),
}


@pytest.mark.parametrize(("spoil", "words"), MODELS.values(), ids=MODELS)
def test_a_model_that_cannot_be_evaluated(told, here, spoil, words):
    spoil()
    told(words, evaluate.main, RUN)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ("required: folder",)),
        ([RUN, "--inference.pth", "x"], ("inference.pth", "did you mean inference.path?")),
        ([RUN, "--inference.blocks", "9"], ("inference.blocks", "9", "model.blocks 2")),
        ([RUN, "--optim.lr", "3"], ("cannot be evaluated with optim.lr", "3.0 here")),
        ([RUN, "--data.root", "gone.npz"], ("data.root", "gone.npz does not exist")),
        ([RUN, "--data.root", "larger.npz"], ("data.root", "(1, 9, 9)", "(1, 8, 8)")),
        ([RUN, "--data.root", "more.npz"], ("data.root", "('0', '1', '2', '3')", "('0', '1', '2')")),
    ],
)
def test_a_model_evaluated_in_the_wrong_way(told, here, arguments, words):
    write_data("larger.npz", side=9)
    write_data("more.npz", classes=4)
    told(words, evaluate.main, *arguments)


CHECKPOINTS = {
    "flipped bit": (flip(BLOCK), (str(BLOCK), "SHA-256")),
    "cut": (cut(BLOCK), (str(BLOCK), "SHA-256")),
    "missing": (BLOCK.unlink, (str(BLOCK), "cannot read")),
    "a folder for a file": (folder_for(BLOCK), (str(BLOCK), "cannot read")),
    "no manifest": (MANIFEST.unlink, (str(MANIFEST), "no whole checkpoint")),
    "manifest text": (put(MANIFEST, b"hello"), (str(MANIFEST), "not a manifest")),
    "manifest without end": (put(MANIFEST, DEEP), (str(MANIFEST), "not a manifest")),
    "manifest without files": (change(MANIFEST, "sha256", to={}), (str(MANIFEST), "lists no files")),
    "step of words": (change(MANIFEST, "step", to="2"), (str(MANIFEST), "its step is '2'")),
    "step without end": (change(MANIFEST, "step", to=float("inf")), (str(MANIFEST), "its step is inf")),
    "a card of another kind": (change(MANIFEST, "card", to=[]), (str(MANIFEST), "its card is []")),
    "a way out": (change(MANIFEST, "sha256", "../../../../a.npz", to="00"), (str(MANIFEST), "../../../../a.npz")),
    "an absolute way out": (change(MANIFEST, "sha256", "/etc/hostname", to="00"), (str(MANIFEST), "/etc/hostname")),
    "another version's card": (change(MANIFEST, "card", "new", to={}), (str(NEWEST), "another version", "new")),
    "another version's data": (change(MANIFEST, "data", "shape", to=[8, 8]), (str(NEWEST), "another version", "shape")),
    "a block unlisted": (
        lambda: (BLOCK.unlink(), change(MANIFEST, "sha256", to={LABELS.name: digest(LABELS.read_bytes()).hex()})()),
        (str(NEWEST), BLOCK.name, "No such file"),
    ),
    "a block of another network": (of_another_network(BLOCK, vouched=True), (str(BLOCK), "weights of another model")),
    "labels of another network": (of_another_network(LABELS, vouched=True), (str(LABELS), "weights of another model")),
}


@pytest.mark.parametrize(("spoil", "words"), CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_a_checkpoint_that_cannot_be_gone_on_from(told, here, spoil, words):
    spoil()
    told(words, train, *SETTINGS.split(), "--run.name", "other", "--train.resume", NEWEST)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--train.resume", RUN], ("no whole checkpoint here",)),
        (["--train.resume", "a.npz"], ("train.resume", "no folder a.npz")),
        (["--train.resume", NEWEST, "--model.blocks", "3"], ("model.blocks: 2 there, 3 here",)),
        (["--train.resume", NEWEST, "--optim.name", "sgd"], ("optim.name: adamw there, sgd here",)),
        (["--train.resume", NEWEST, "--train.steps", "1"], ("of step 2, beyond this run's 1 steps",)),
        (["--train.resume", NEWEST, "--data.root", "more.npz"], ("trained on other data",)),
        (["--run.name", "mine", "--optim.lr", "3"], ("optim.lr: 0.001 there, 3.0 here", "--run.name")),
        (["--run.name", "mine", "--train.resume", "never"], ("would overwrite",)),
    ],
)
def test_a_run_gone_on_with_in_the_wrong_way(told, here, arguments, words):
    write_data("more.npz", train=30)
    told(words, train, *SETTINGS.split(), *arguments)


WAYS = {
    "run.dir is a file": (lambda: (shutil.rmtree("runs"), Path("runs").write_text("")), ("runs: is a file",)),
    "the run is a file": (lambda: (shutil.rmtree(RUN), RUN.write_text("")), ("runs/mine: is a file", "--run.name")),
    "no room for checkpoints": (
        lambda: (shutil.rmtree(RUN / "checkpoints"), (RUN / "checkpoints").write_text("")),
        ("runs/mine/checkpoints: is a file",),
    ),
    "no room for the model": (lambda: (shutil.rmtree(RUN / "model"), (RUN / "model").write_text("")), ("runs/mine/model",)),
    "no room for the card": (folder_for(RUN / "card.yaml"), ("runs/mine/card.yaml: is a folder",)),
    "no room for the history": (folder_for(RUN / "history.json"), ("runs/mine/history.json: is a folder",)),
    "history damaged": (put(RUN / "history.json", b"[{"), ("history.json: damaged", "delete it")),
    "history of another kind": (put(RUN / "history.json", b'["a"]'), ("history.json: damaged", "delete it")),
    "summary damaged": (put(RUN / "summary.json", b"{"), ("summary.json: damaged", "delete it")),
    "summary of another kind": (put(RUN / "summary.json", b"[1]"), ("summary.json: damaged", "delete it")),
}


@pytest.mark.parametrize(("spoil", "words"), WAYS.values(), ids=WAYS)
def test_a_run_with_something_in_its_way(told, here, spoil, words):
    spoil()
    told(words, train, *SETTINGS.split(), "--run.name", "mine")


@pytest.mark.parametrize("name", [[], ["--run.name", "mine"]])
def test_a_place_for_runs_that_cannot_be_written(told, here, name):
    told(("/proc/none", "No such file"), train, *SETTINGS.split(), "--run.dir", "/proc/none", *name)


def test_a_comparison_with_something_in_its_way(told, here):
    Path("a").mkdir()
    Path("a/card.yaml").write_text("")
    Path("file").write_text("")
    Path("out/table.md").mkdir(parents=True)
    Path("runs/file").write_text("")
    old = Path("old/runs/a-card-0")
    shutil.copytree(RUN, old)
    (old / "summary.json").write_text("{")
    older = Path("older/runs/a-card-0")
    shutil.copytree(RUN, older)
    (older / "card.yaml").unlink()
    for out, words in {
        "file": ("file: is a file", "--out"),
        "file/below": ("file", "Not a directory"),
        "out": ("out/table.md: is a folder", "--out"),
        "/proc/none": ("/proc/none", "No such file"),
        "old": (f"{old}/summary.json: damaged",),
        "older": (f"{older}/card.yaml", "cannot read"),
    }.items():
        told(words, compare.main, "a/card.yaml", *SETTINGS.split(), "--out", out)


def test_from_python_too_it_is_an_error_that_says_so(here):
    CONFIG.write_text("{}")
    with pytest.raises(UserError, match=r"config\.json: not a model's config"):
        load(RUN)
