"""A user's own backbone: found by its name, and its mistakes told in a line."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from noprop_dist.config import UserError


def load_class(name: str) -> type[nn.Module]:
    """The class that ``package.module:Class`` names, in the current directory or installed. Raises UserError without one."""
    place, _, attribute = name.partition(":")
    here = os.getcwd()
    if not {"", here} & set(sys.path):  # it is there after python -m, but not for a script elsewhere
        sys.path.insert(0, here)
    with explained(name, f"importing {place}", f"mend it, or name a module that is installed or in {here}"):
        module = importlib.import_module(place)
    classes = {each: kind for each, kind in vars(module).items() if isinstance(kind, type) and issubclass(kind, nn.Module)}
    if attribute not in classes:
        found = f"use {' or '.join(classes)}" if classes else "define one"
        raise UserError(f"model.backbone: {place} ({module.__file__}) has no nn.Module class {attribute!r}; {found}")
    return classes[attribute]


@contextlib.contextmanager
def explained(name: str, what: str, remedy: str) -> Iterator[None]:
    """Turn an exception of a user's own class into a UserError of one line. One of our classes' is a bug and stays as it is."""
    try:
        yield
    except Exception as error:
        if ":" not in name:
            raise
        text = " ".join(f"{type(error).__name__}: {error}{_place(error)}".split())
        raise UserError(f"model.backbone: {name}: {what} raised {text}; {remedy}") from error


def _place(error: Exception) -> str:
    """`` (file.py:12)``, the last line of the user's that ran; nothing where none did."""
    others = (*torch.__path__, str(Path(__file__).parents[1]), importlib.__file__, contextlib.__file__, "<frozen")
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(others)]
    return f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
