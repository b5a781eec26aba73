"""Files: safetensors bytes, and writing so that a file is there whole or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
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
        raise UserError(f"{path}: cannot write ({error.strerror}); free space or choose another --run.dir") from None


def read(path: Path) -> bytes:
    """A file's bytes. Raises UserError where it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot read ({error.strerror}); name a folder that holds this file") from None
