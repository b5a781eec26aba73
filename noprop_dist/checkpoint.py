"""Checkpoints: a folder a step, one safetensors file a block, one for the label space, and manifest.json, written last.

A folder without a manifest, or whose files do not have the SHA-256 sums that it lists, is not whole and is passed over.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from noprop_dist.config import UserError
from noprop_dist.files import write

MANIFEST = "manifest.json"
LABELS = "labels.safetensors"


def block_file(index: int) -> str:
    """The name of block ``index``'s file."""
    return f"block-{index:02d}.safetensors"


def step_folder(root: Path, step: int) -> Path:
    """The folder of the checkpoint after ``step`` steps."""
    return root / f"step-{step:08d}"


def digest(blob: bytes) -> bytes:
    """SHA-256, 32 bytes."""
    return hashlib.sha256(blob).digest()


def commit(folder: Path, facts: Mapping[str, Any], digests: Mapping[str, bytes]) -> None:
    """Declare a checkpoint whole: write its manifest, with ``facts`` (step, card, data) and the files' SHA-256 sums."""
    manifest = {**facts, "sha256": {name: value.hex() for name, value in sorted(digests.items())}}
    write(folder / MANIFEST, json.dumps({**manifest, "own_sha256": own_sum(manifest)}, indent=1).encode())


def own_sum(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of what a manifest says, but for this sum itself, in hexadecimal digits."""
    return digest(json.dumps(manifest, sort_keys=True).encode()).hex()


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose every file is there and has the right sum. Raises UserError naming what is not."""
    remedy = "use another checkpoint or --train.resume never"
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
        own: str = manifest.pop("own_sha256")
        sums: dict[str, str] = manifest["sha256"]
        kinds = {"step": int, "card": dict, "data": dict, "sha256": dict}
        if odd := [name for name, kind in kinds.items() if not isinstance(manifest[name], kind)]:
            raise ValueError(f"its {odd[0]} is {manifest[odd[0]]!r:.40}")
        if not sums:
            raise ValueError("it lists no files")
        if own != own_sum(manifest):
            raise ValueError("its own SHA-256 is another one, it is damaged")
    except OSError as error:
        raise UserError(f"{folder / MANIFEST}: no whole checkpoint here ({error.strerror}); {remedy}") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{folder / MANIFEST}: not a manifest ({error}); {remedy}") from None
    for name, expected in sums.items():
        try:
            if Path(name).name != name or "\0" in name:
                raise UserError(f"{folder / MANIFEST}: lists {name!r}, which is no file name; {remedy}")
            found = digest((folder / name).read_bytes()).hex()
        except OSError as error:
            raise UserError(f"{folder / name}: cannot read ({error.strerror}); {remedy}") from None
        if found != expected:
            raise UserError(f"{folder / name}: its SHA-256 is not the manifest's, the file is damaged; {remedy}")
    return manifest


def newest_whole(root: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint under ``root``, if any, and why newer ones were passed over."""
    refused = []
    for folder in sorted(root.glob("step-*"), reverse=True):
        try:
            read_manifest(folder)
        except UserError as error:
            refused.append(str(error))
        else:
            return folder, refused
    return None, refused


def prune(newest: Path, keep: int) -> None:
    """Delete what is older than ``newest``, a whole checkpoint, but for the ``keep`` - 1 finished ones next to it."""
    folders = sorted(newest.parent.glob("step-*"), reverse=True)
    older = folders[folders.index(newest) + 1 :]  # newer ones were passed over at the start: they are not whole
    finished = [folder for folder in older if (folder / MANIFEST).exists()]
    for folder in older:
        if folder not in finished[: keep - 1]:
            (folder / MANIFEST).unlink(missing_ok=True)  # first: half a folder must not look whole
            shutil.rmtree(folder, ignore_errors=True)
