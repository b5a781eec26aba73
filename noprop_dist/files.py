"""Files: safetensors bytes, and writing so that a file is there whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor

from noprop_dist.config import UserError


def pack(tensors: Mapping[str, Tensor]) -> bytes:
    """Tensors as safetensors bytes: the same bytes for the same values, whatever their memory format, device or sharing."""
    plain: dict[str, Tensor] = {}
    taken = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        place = tensor.untyped_storage().data_ptr()
        plain[name] = tensor.clone() if place in taken else tensor  # safetensors refuses tied weights
        taken.add(place)
    return save(plain)


def unpack(blob: bytes, place: object = "safetensors bytes") -> dict[str, Tensor]:
    """Tensors of safetensors bytes. Raises UserError naming ``place`` where they are broken."""
    try:
        return load(blob)
    except SafetensorError as error:
        raise UserError(f"{place}: not a whole safetensors file ({error}); use another checkpoint") from None


def shapes(path: Path) -> dict[str, list[int]]:
    """What a safetensors file holds, without reading it all. Raises UserError where it is broken or cannot be read."""
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 - it is no mapping
    except (SafetensorError, OSError) as error:
        what = str(error).removesuffix(f": {path}")
        raise UserError(f"{path}: not a whole safetensors file ({what}); use another checkpoint") from None


def entry(path: Path, name: str) -> Tensor:
    """One tensor of a safetensors file that holds it, without reading it all."""
    with safe_open(path, "pt") as file:
        return file.get_tensor(name)  # type: ignore[no-any-return]


def write(path: Path, blob: bytes) -> None:
    """Write a file so that it is there whole or not at all. Creates its folder. Raises UserError on a disk's refusal."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            file.write(blob)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot write ({error.strerror}); free space or name another place") from None


def check_ways(folders: Iterable[Path], plain: Iterable[Path], remedy: str) -> None:
    """Raises UserError where a file stands in the place of one of the ``folders``, or the other way round, with ``remedy``."""
    for path in folders:
        if path.exists() and not path.is_dir():
            raise UserError(f"{path}: is a file, where a folder belongs; move it away or {remedy}")
    for path in plain:
        if path.is_dir():
            raise UserError(f"{path}: is a folder, where a file belongs; move it away or {remedy}")


def read(path: Path) -> bytes:
    """A file's bytes. Raises UserError where it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot read ({error.strerror}); name a folder that holds this file") from None


def read_json(path: Path, kind: type = dict) -> Any:
    """The object (or, by ``kind``, list) in a JSON file. Raises UserError where it cannot be read or holds none."""
    try:
        value = json.loads(read(path))
        if not isinstance(value, kind):
            raise ValueError(f"no JSON {'object' if kind is dict else kind.__name__}")
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged ({error}); delete it or bring a whole one back") from None
    return value
