"""A folder of pictures with a sub-folder for each class, decoded while training runs."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Iterator
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder

from noprop_dist.config import DataCard, UserError
from noprop_dist.data.info import DataInfo, DataSet, moments
from noprop_dist.data.picture import fit, open_picture, opened, unreadable
from noprop_dist.interruption import SIGNALS

MODES = {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "YCbCr"}
"""Pillow's kinds of pictures that become RGB without loss or guess; of 16 bits it would clip all but the darkest pixels."""


class FolderSplit:
    """A :class:`Split` that decodes pictures when asked for, in ``workers`` processes (0: in this one)."""

    def __init__(self, folder: ImageFolder, size: int, workers: int) -> None:
        self._pictures, self._size, self._workers = _Pictures(folder), size, workers
        self.labels = torch.tensor(folder.targets)

    def __len__(self) -> int:
        return len(self._pictures)

    def batches(self, indices: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        loader = DataLoader(
            self._pictures,
            batch_sampler=(rows.tolist() for rows in indices),
            num_workers=self._workers,
            collate_fn=_as_it_is,
            generator=torch.Generator(),  # else the loader draws from the global one, which is not its to disturb
            worker_init_fn=_leave_signals_to_the_run,
        )
        for batch in loader:
            if isinstance(batch, str):
                raise UserError(batch)
            yield batch

    def load(self) -> tuple[Tensor, Tensor]:
        images = torch.empty(len(self), 3, self._size, self._size, dtype=torch.uint8)
        labels = torch.empty(len(self), dtype=torch.int64)
        chunks = torch.split(torch.arange(len(self)), 64)
        for rows, (some_images, some_labels) in zip(chunks, self.batches(chunks), strict=True):
            images[rows], labels[rows] = some_images, some_labels
        return images, labels


def open_folder(card: DataCard, root: Path) -> DataSet:
    """``root``/train and ``root``/test (or val), a sub-folder per class. Raises :class:`UserError`."""
    if not root.is_dir():
        raise UserError(f"data.root: {root} is no folder; name the one that holds train/ and test/ with --data.root")
    train_home = root / "train"
    test_home = next((root / name for name in ("test", "val") if (root / name).is_dir()), root / "test")
    for home, names in ((train_home, "train"), (test_home, "test or val")):
        if not home.is_dir():
            raise UserError(f"{root}: no folder {names} in it; make train and test (or val), each with a folder per class")
    train, test = _open_half(train_home, card.image_size), _open_half(test_home, card.image_size)
    if odd := sorted(set(train.classes) ^ set(test.classes)):
        where = ", ".join(f"{name} only in {test_home if name in test.classes else train_home}" for name in odd[:4])
        raise UserError(f"{root}: the class folders differ ({where}{', ...' * (len(odd) > 4)}); give both halves the same ones")
    if len(train.classes) < 2:
        raise UserError(f"{train_home}: only one class folder, {train.classes[0]}; give at least two classes")
    _check_headers(path for half in (train, test) for path, _ in half.samples)
    splits = [FolderSplit(half, card.image_size, card.workers) for half in (train, test)]
    sample = torch.linspace(0, len(train) - 1, min(512, len(train))).round().long()
    mean, std = moments(images for images, _ in splits[0].batches(torch.split(sample, 32)))
    shape = (3, card.image_size, card.image_size)
    return DataSet(DataInfo("imagefolder", shape, tuple(train.classes), len(train), len(test), mean, std), *splits)


def _open_half(path: Path, size: int) -> ImageFolder:
    def decode(file: str) -> Tensor:
        return fit(open_picture(file, 2 * size), (3, size, size))

    try:
        return ImageFolder(path, loader=decode)
    except FileNotFoundError as error:  # no class folder, or one without a picture: torchvision names it, at length
        what = str(error).split(". Supported")[0].rstrip(".")
        raise UserError(f"{path}: {what}; put pictures into a folder for each class, or remove empty ones") from None
    except OSError as error:
        raise UserError(f"{error.filename or path}: {error.strerror}; make it readable") from None


def _check_headers(paths: Iterable[str]) -> None:
    """Raises UserError for pictures that cannot be used: now, not when their turn comes. Takes some 0.05 ms each."""
    with ThreadPool(16) as pool:  # for disks that are far away
        found = [mistake for mistake in pool.imap(_mistake, paths, chunksize=64) if mistake]
    if found:
        raise UserError(found[0] + (f" ({len(found)} pictures are of no use)" if len(found) > 1 else ""))


def _mistake(path: str) -> str | None:
    """What its header tells against a picture; one that is cut short is found when its turn comes."""
    try:
        with opened(path) as picture:
            mode, stored = picture.mode, str(picture.tile)  # Pillow opens 16-bit colours as RGB, and cuts them off
    except Exception as error:
        return unreadable(path, error)
    deep = mode.startswith(("I", "F")) or ";16" in stored
    depth = "more than 8 bits a channel" if deep else f"colours in {mode}"
    return None if mode in MODES and not deep else f"{path}: a picture of {depth}, not 8-bit grey or RGB; convert it"


class _Pictures(Dataset[tuple[Tensor, Tensor]]):
    """Decodes a whole batch at a time, which is how the DataLoader asks where there is a ``__getitems__``."""

    def __init__(self, folder: ImageFolder) -> None:
        self._folder = folder

    def __len__(self) -> int:
        return len(self._folder)

    def __getitems__(self, rows: list[int]) -> tuple[Tensor, Tensor] | str:
        """Images uint8 (B, 3, S, S) and labels int64 (B,); or what is wrong, for a worker can raise nothing without its
        traceback becoming part of the message."""
        images = []
        for row in rows:
            try:
                images.append(self._folder[row][0])
            except UserError as error:
                return str(error)
        return torch.stack(images), torch.tensor([self._folder.targets[row] for row in rows])


def _leave_signals_to_the_run(worker: int) -> None:
    """Ctrl-C and a job's end reach all of its processes; the run finishes its step, so it needs its workers until then."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _as_it_is(batch: Any) -> Any:
    return batch
