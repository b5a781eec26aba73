"""Nothing that is read can run code, and downloads are what they should be."""

from __future__ import annotations

import ast
import contextlib
import http.server
import os
import pickle
import re
import shutil
import tarfile
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision import datasets

import noprop_dist
from noprop_dist import Card, compare, evaluate, train
from noprop_dist.command import answer
from noprop_dist.train import main

HOUSE = Path(noprop_dist.__file__).parent
SOURCES = sorted([*HOUSE.rglob("*.py"), *(HOUSE.parent / "launch").rglob("*.py")])
MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
CALLS = {
    "torch.load",
    "torch.save",
    "yaml.unsafe_load",
    "yaml.full_load",
    "yaml.Loader",
    "yaml.UnsafeLoader",
    "yaml.FullLoader",
}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_no_source_pickles(path):
    """No pickle module, no call that may unpickle, no collective that sends Python objects."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert not {alias.name.split(".")[0] for alias in node.names} & MODULES, f"line {node.lineno}"
        elif isinstance(node, ast.ImportFrom):
            assert (node.module or "").split(".")[0] not in MODULES, f"line {node.lineno}"
            assert not {f"{node.module}.{alias.name}" for alias in node.names} & CALLS, f"line {node.lineno}"
        elif isinstance(node, ast.Attribute):
            assert ast.unparse(node) not in CALLS, f"line {node.lineno}"
            assert not re.search("(gather|broadcast|scatter|send|recv)_object", node.attr), f"line {node.lineno}"
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("np.load", "numpy.load"):
            words = {word.arg: ast.unparse(word.value) for word in node.keywords}
            assert words.get("allow_pickle") == "False", f"line {node.lineno}"
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("eval", "exec"):
            raise AssertionError(f"line {node.lineno}")


class Bomb:
    """Makes a folder when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[..., None], tuple[str]]:
        return os.mkdir, ("went-off",)


@pytest.fixture
def unharmed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, where at the end of the test no bomb may have gone off."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    assert not (tmp_path / "went-off").exists()


def test_the_bomb_is_a_live_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickle.dumps(Bomb()))
    assert (tmp_path / "went-off").exists()


def in_cifar(root: Path) -> None:
    for kind in (datasets.CIFAR10, datasets.CIFAR100):
        (root / kind.base_folder).mkdir()
        for name, _ in [*kind.train_list, *kind.test_list, (kind.meta["filename"], "")]:
            (root / kind.base_folder / name).write_bytes(pickle.dumps(Bomb()))


def in_mnist(root: Path) -> None:
    """Where old versions of torchvision kept tensors."""
    for name in ("training.pt", "test.pt"):
        path = root / "MNIST" / "processed" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(Bomb(), path)


def in_an_array(root: Path) -> None:
    images, labels = np.zeros((4, 8, 8), np.uint8), np.array([Bomb()] * 4, dtype=object)
    np.savez(root / "bomb.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)


def instead_of(*names: str) -> Callable[[Path], None]:
    def write(root: Path) -> None:
        for name in names:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(pickle.dumps(Bomb()))

    return write


BOMBS = {
    "a card": (lambda root: (root / "card.yaml").write_text("run: !!python/object/apply:os.mkdir [went-off]"), "card.yaml"),
    "a pickled card": (instead_of("card.yaml"), "card.yaml"),
    "an array": (in_an_array, "--data.name npz --data.root bomb.npz"),
    "an archive": (instead_of("bomb.npz"), "--data.name npz --data.root bomb.npz"),
    "MNIST": (in_mnist, "--data.name mnist --data.root ."),
    "CIFAR-10": (in_cifar, "--data.name cifar10 --data.root ."),
    "CIFAR-100": (in_cifar, "--data.name cifar100 --data.root ."),
    "SVHN": (instead_of("train_32x32.mat", "test_32x32.mat"), "--data.name svhn --data.root ."),
    "a picture": (
        instead_of(*(f"{half}/{label}/0.png" for half in ("train", "test") for label in "ab")),
        "--data.name imagefolder --data.root .",
    ),
}


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **settings: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr("urllib.request.urlopen", fail)


@pytest.mark.parametrize(("plant", "arguments"), BOMBS.values(), ids=BOMBS)
def test_what_training_reads_is_never_unpickled(unharmed, no_network, capsys, plant, arguments):
    plant(unharmed)
    assert answer(main, arguments.split()) == 2
    assert capsys.readouterr().err.startswith("error: ")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    train(Card(model={"blocks": 1}, train={"steps": 1}, run={"dir": folder / "runs", "name": "mine"}))
    return folder


READ = ["model/model.safetensors", "model/config.json", "history.json", "summary.json", "card.yaml"]
READ += [f"checkpoints/step-00000001/{name}" for name in ("manifest.json", "block-00.safetensors", "labels.safetensors")]


@pytest.mark.parametrize("name", READ)
def test_what_a_run_left_is_never_unpickled(unharmed, trained, capsys, name):
    shutil.copytree(trained / "runs", unharmed / "runs")
    shutil.copytree(trained / "runs/mine", unharmed / "out/runs/a-card-0")
    (unharmed / "a").mkdir()
    settings = ["--model.blocks", "1", "--train.steps", "1"]
    (unharmed / "a/card.yaml").write_text("")
    for run in ("runs/mine", "out/runs/a-card-0"):
        (unharmed / run / name).write_bytes(pickle.dumps(Bomb()))
    codes = [
        answer(evaluate.main, ["runs/mine"]),
        answer(evaluate.main, ["runs/mine/checkpoints/step-00000001"]),
        answer(main, [*settings, "--run.name", "mine"]),
        answer(compare.main, ["a/card.yaml", "--out", "out", *settings]) if name in ("summary.json", "card.yaml") else 2,
    ]
    assert 2 in codes and set(codes) <= {0, 2}, codes


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address at which the files of a folder can be fetched."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "kmnist", "cifar10", "cifar100", "svhn"])
def test_a_download_that_was_tampered_with_is_refused_and_not_kept(unharmed, tmp_path_factory, monkeypatch, capsys, name):
    site = tmp_path_factory.mktemp("site")
    kinds = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "kmnist": "KMNIST", "svhn": "SVHN"}
    kind = getattr(datasets, kinds.get(name, name.upper()))
    in_cifar(site)
    with served(site) as address:
        if name.startswith("cifar"):
            with tarfile.open(site / kind.filename, "w:gz") as archive:
                archive.add(site / kind.base_folder, kind.base_folder)
            monkeypatch.setattr(kind, "url", address + kind.filename)
        elif name == "svhn":
            (site / "train_32x32.mat").write_bytes(b"other pictures")
            split = {half: [address + entry[0].rpartition("/")[2], *entry[1:]] for half, entry in kind.split_list.items()}
            monkeypatch.setattr(kind, "split_list", split)
        else:
            (site / "train-images-idx3-ubyte.gz").write_bytes(b"other pictures")
            monkeypatch.setattr(kind, "mirrors", [address])
        assert answer(main, ["--data.name", name, "--data.root", "data"]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "%" not in line and line]  # torchvision's own bar
    assert len(lines) == 1, lines
    assert lines[0].startswith(f"error: {name}: not in data, and not fetched either (") and "wrong MD5 sum" in lines[0]
    assert not list(unharmed.iterdir()), "something of it was kept"
