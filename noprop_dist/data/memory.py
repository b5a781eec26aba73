"""Data sets held in memory: scikit-learn's digits and .npz files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from noprop_dist.config import UserError
from noprop_dist.data.info import DataInfo, DataSet, moments

Arrays = tuple[Tensor, Tensor]
KEYS = ("x_train", "y_train", "x_test", "y_test")


class MemorySplit:
    """A :class:`Split` over images uint8 (N, C, H, W) and labels int64 (N,)."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self._images, self._labels = images, labels

    def __len__(self) -> int:
        return len(self._images)

    @property
    def labels(self) -> Tensor:
        return self._labels

    def batches(self, indices: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        for rows in indices:
            yield self._images[rows], self._labels[rows]

    def load(self) -> tuple[Tensor, Tensor]:
        return self._images, self._labels


def in_memory(name: str, classes: Sequence[str], train: Arrays, test: Arrays) -> DataSet:
    """A data set of two (images uint8 (N, C, H, W), labels int64 (N,)) pairs."""
    _, channels, height, width = train[0].shape
    mean, std = moments(torch.split(train[0], 1024))
    info = DataInfo(name, (channels, height, width), tuple(classes), len(train[0]), len(test[0]), mean, std)
    return DataSet(info, MemorySplit(*train), MemorySplit(*test))


def channels_first(images: Any) -> Tensor:
    """uint8 NHW, NHWC or NCHW images (NumPy or torch; 1 or 3 channels) as a contiguous (N, C, H, W) tensor.

    A shape that reads both ways, such as (N, 3, 32, 3), is taken as NHWC, the habit of .npz files.
    Raises ValueError for any other shape.
    """
    tensor = torch.as_tensor(images)
    if tensor.ndim == 3:
        tensor = tensor[:, None]
    elif tensor.ndim == 4 and tensor.shape[-1] in (1, 3):
        tensor = tensor.permute(0, 3, 1, 2)
    elif tensor.ndim != 4 or tensor.shape[1] not in (1, 3):
        raise ValueError(f"shape {tuple(tensor.shape)} is neither NHW nor NHWC nor NCHW with 1 or 3 channels")
    return tensor.contiguous()


def open_digits() -> DataSet:
    """scikit-learn's 1797 handwritten digits, 8x8, values 0..16 spread over 0..255; a fixed split of 1437 and 360."""
    from sklearn.datasets import load_digits  # here, for it takes a second to import
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    pixels = torch.as_tensor(np.rint(digits.images * (255 / 16)).astype(np.uint8))[:, None]
    labels = torch.as_tensor(digits.target.astype(np.int64))
    rows = train_test_split(np.arange(len(labels)), test_size=0.2, random_state=0, stratify=digits.target)
    train, test = ((pixels[half], labels[half]) for half in map(torch.as_tensor, rows))
    return in_memory("digits", [str(name) for name in digits.target_names], train, test)


def open_npz(path: Path) -> DataSet:
    """An .npz file with x_train, y_train, x_test, y_test (see :func:`channels_first`). Raises :class:`UserError`."""
    arrays = _read_npz(path)
    for half in ("train", "test"):
        _check_images(f"{path}: x_{half}", arrays[f"x_{half}"])
        _check_labels(path, half, arrays)
    train_shape, test_shape = arrays["x_train"].shape[1:], arrays["x_test"].shape[1:]
    if train_shape != test_shape:
        raise UserError(f"{path}: x_train has images of shape {train_shape} but x_test of {test_shape}; give both the same")
    seen, highest, highest_test = np.unique(arrays["y_train"]), arrays["y_train"].max(), arrays["y_test"].max()
    if len(seen) < 2:
        raise UserError(f"{path}: y_train has only the class {seen[0]}; give at least two classes")
    if highest >= len(arrays["y_train"]):  # ids rather than class numbers would build a giant network
        raise UserError(
            f"{path}: y_train goes up to {highest} with only {len(arrays['y_train'])} images;"
            " number the classes 0, 1, 2 and so on"
        )
    if highest_test > highest:
        raise UserError(
            f"{path}: y_test has the label {highest_test}, beyond y_train's highest, {highest};"
            " drop those images or add some like them to the training half"
        )
    train, test = (
        (channels_first(arrays[f"x_{half}"]), torch.as_tensor(arrays[f"y_{half}"].astype(np.int64)))
        for half in ("train", "test")
    )
    return in_memory("npz", [str(label) for label in range(int(highest) + 1)], train, test)


def _read_npz(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    advice = "write one with numpy.savez(path, x_train=..., y_train=..., x_test=..., y_test=...)"
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise UserError(f"data.root: {path} {what}; name an .npz file with --data.root")
    try:
        archive = np.load(path, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise ValueError("a single array")
    except Exception as error:  # numpy and zipfile raise a dozen kinds for a damaged file
        why = f" ({error.strerror})" if isinstance(error, OSError) and error.strerror else ""
        raise UserError(f"{path}: not a readable .npz file{why}; {advice}") from None
    arrays = {}
    with archive:
        if missing := [key for key in KEYS if key not in archive]:
            raise UserError(f"{path}: {', '.join(missing)} missing; {advice}")
        for key in KEYS:
            try:
                arrays[key] = archive[key]
            except Exception as error:
                if "allow_pickle" in str(error):
                    raise UserError(f"{path}: {key} is an array of Python objects; store plain numbers") from None
                raise UserError(f"{path}: {key} is damaged; write the file again") from None
            if not isinstance(arrays[key], np.ndarray):  # a member that is no .npy comes back as bytes
                raise UserError(f"{path}: {key} is not an array; {advice}")
    return arrays


def _check_images(place: str, images: np.ndarray[Any, Any]) -> None:
    if images.dtype != np.uint8:
        recipe = "x.astype('uint8')"
        if images.dtype.kind == "f":
            recipe = "(x * 255).round().astype('uint8') if x is 0..1"
        elif images.size and images.dtype.kind in "iu" and images.max() > 255:
            recipe = "(x >> 8).astype('uint8') if x is 0..65535"
        raise UserError(f"{place} has dtype {images.dtype}, not uint8; convert it, e.g. {recipe}")
    if images.ndim not in (3, 4) or (images.ndim == 4 and not {images.shape[1], images.shape[3]} & {1, 3}):
        raise UserError(f"{place} has shape {images.shape}; make it NHW, NHWC or NCHW with 1 or 3 channels")
    if not images.size:
        raise UserError(f"{place} is empty, of shape {images.shape}; give at least one image")


def _check_labels(path: Path, half: str, arrays: dict[str, np.ndarray[Any, Any]]) -> None:
    images, labels, place = arrays[f"x_{half}"], arrays[f"y_{half}"], f"{path}: y_{half}"
    if labels.dtype.kind not in "iu":
        raise UserError(f"{place} has dtype {labels.dtype}; store class numbers as integers, e.g. y.astype('int64')")
    if labels.ndim != 1:
        recipe = "y.argmax(1)" if labels.ndim == 2 and labels.shape[1] > 1 else "y.ravel()"
        raise UserError(f"{place} has shape {labels.shape}; give one class number an image, e.g. {recipe}")
    if len(labels) != len(images):
        raise UserError(f"{place} has {len(labels)} labels for {len(images)} images; give one label an image")
    if labels.min() < 0:
        raise UserError(f"{place} has the negative label {labels.min()}; number the classes 0, 1, 2 and so on")
