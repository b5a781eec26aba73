"""The data sets that torchvision knows how to fetch: MNIST and its kin, CIFAR, SVHN."""

from __future__ import annotations

import contextlib
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torchvision import datasets
from torchvision.datasets.mnist import read_sn3_pascalvincent_tensor

from noprop_dist.config import UserError
from noprop_dist.data.info import DataInfo, DataSet
from noprop_dist.data.memory import Arrays, channels_first, in_memory

LOCK = ".noprop.lock"
_DIGITS = tuple("0123456789")
_CIFAR100 = """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can
    castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin
    elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster
    man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck
    pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk
    skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger
    tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm
"""


@dataclass(frozen=True)
class _Source:
    kind: str
    """Class in torchvision.datasets."""
    places: tuple[str, ...]
    """Where torchvision puts its files: names in the root."""
    shape: tuple[int, int, int]
    classes: tuple[str, ...]
    sizes: tuple[int, int] = (60000, 10000)
    """Images in train and test."""


SOURCES = {
    "mnist": _Source("MNIST", ("MNIST",), (1, 28, 28), _DIGITS),
    "fashion-mnist": _Source("FashionMNIST", ("FashionMNIST",), (1, 28, 28), tuple(datasets.FashionMNIST.classes)),
    "kmnist": _Source("KMNIST", ("KMNIST",), (1, 28, 28), tuple(datasets.KMNIST.classes)),
    "cifar10": _Source(
        "CIFAR10",
        ("cifar-10-batches-py", "cifar-10-python.tar.gz"),
        (3, 32, 32),
        ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
        (50000, 10000),
    ),
    "cifar100": _Source(
        "CIFAR100", ("cifar-100-python", "cifar-100-python.tar.gz"), (3, 32, 32), tuple(_CIFAR100.split()), (50000, 10000)
    ),
    "svhn": _Source("SVHN", ("train_32x32.mat", "test_32x32.mat"), (3, 32, 32), _DIGITS, (73257, 26032)),
}


def describe_vision(name: str) -> DataInfo:
    """What is known without a file: all but the pixels' mean and std, which stand at 0 and 1."""
    source = SOURCES[name]
    channels = source.shape[0]
    return DataInfo(name, source.shape, source.classes, *source.sizes, (0.0,) * channels, (1.0,) * channels)


def open_vision(name: str, root: Path) -> DataSet:
    """Read the data set from ``root``; where it is missing, one process fetches it. Raises :class:`UserError`."""
    source = SOURCES[name]
    if root.is_file():
        raise UserError(f"data.root: {root} is a file; name a folder for {name}, or read an .npz file with --data.name npz")
    try:
        train, test = _read(source, root, download=False)
    except Exception:  # not there, broken, or just being written by another process: look again under the lock
        train, test = _read_or_fetch(name, source, root)
    return in_memory(name, source.classes, train, test)


def _read_or_fetch(name: str, source: _Source, root: Path) -> tuple[Arrays, Arrays]:
    remedy = "put the files there, or set --data.root (or NOPROP_DATA) to a folder that has them"
    missing = [path for path in (root, *root.parents) if not path.exists()]
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / LOCK), _nothing_left_behind(source, root, missing):
            try:
                return _read(source, root, download=False)
            except Exception as error:
                if "not found" not in str(error):  # torchvision's words for "missing", the same for all its data sets
                    place, why = _damaged(source, root), _short(error) if str(error) else "not in its format"
                    raise UserError(f"{name}: damaged files, {place} ({why}); delete it to have it fetched again") from None
            state = "damaged" if any((root / place).exists() for place in source.places) else "not"
            try:
                return _read(source, root, download=True)
            except Exception as error:  # torchvision and urllib raise a dozen kinds
                why = _short(error).replace("File not found or corrupted.", "the download has a wrong MD5 sum")
                raise UserError(f"{name}: {state} in {root}, and not fetched either ({why}); {remedy}") from None
    except OSError as error:
        raise UserError(f"{name}: not in {root}, which cannot be written ({error.strerror}); {remedy}") from None


@contextlib.contextmanager
def _nothing_left_behind(source: _Source, root: Path, new: Sequence[Path]) -> Iterator[None]:
    """Where what follows fails, take away what it has made: half a file, the lock, and the ``new`` folders."""

    def contents() -> set[Path]:
        places = [root / name for name in source.places]
        return {path for place in places for path in (place, *place.rglob("*")) if path.exists()}

    before = contents()
    try:
        yield
    except BaseException:
        for path in [*sorted(contents() - before, reverse=True), root / LOCK, *new]:
            with contextlib.suppress(OSError):
                path.rmdir() if path.is_dir() else path.unlink()
        raise


def _damaged(source: _Source, root: Path) -> Path:
    """The file that cannot be read, where it is one of MNIST's; else the place of all of them."""
    for path in sorted((root / source.kind / "raw").glob("*-ubyte")):
        try:
            read_sn3_pascalvincent_tensor(str(path))
        except Exception:
            return path
    return root / source.places[0]


def _read(source: _Source, root: Path, *, download: bool) -> tuple[Arrays, Arrays]:
    # torchvision unpickles CIFAR's files itself, but only after their MD5 was right.
    kind: Callable[..., Any] = getattr(datasets, source.kind)
    halves = ({"split": "train"}, {"split": "test"}) if source.kind == "SVHN" else ({"train": True}, {"train": False})
    train, test = (kind(root, download=download, **half) for half in halves)
    return _tensors(source, "train", train), _tensors(source, "test", test)


def _tensors(source: _Source, half: str, split: Any) -> Arrays:
    images = channels_first(split.data)
    labels = torch.as_tensor(split.labels if source.kind == "SVHN" else split.targets)
    if images.dtype != torch.uint8 or images.shape[1:] != source.shape or not len(images) == len(labels) > 0:
        raise ValueError(f"{half}: {len(labels)} labels for {images.dtype} images of shape {tuple(images.shape)}")
    if labels.min() < 0 or labels.max() >= len(source.classes):
        raise ValueError(f"{half}: labels {labels.min()} to {labels.max()} for {len(source.classes)} classes")
    if labels.min() == labels.max():
        raise ValueError(f"{half}: only the label {labels.min()}")
    return images, labels.long()


def _short(error: Exception) -> str:
    return textwrap.shorten(str(error) or type(error).__name__, 160, placeholder=" ...")
