"""Where models lie: in a folder, with the program, or on the Hugging Face hub (extra "hub")."""

from __future__ import annotations

import contextlib
import re
import shutil
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from noprop_dist import files
from noprop_dist.config import UserError

FILES = WEIGHTS, CONFIG, README = "model.safetensors", "config.json", "README.md"
"""What a model's folder holds."""
SHIPPED = Path(__file__).parent / "models"
"""Folder of the models that come with the program."""
ID = re.compile(r"(hf://)?([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(\S+))?", re.ASCII)


def shipped() -> list[str]:
    """The names of the models that come with the program."""
    return sorted(folder.name for folder in SHIPPED.iterdir() if (folder / CONFIG).exists()) if SHIPPED.is_dir() else []


def locate(name: Path | str, *, revision: str | None = None, **download: Any) -> Path:
    """The folder that ``name`` means: its own, a shipped model's, or a copy of the hub's ``owner/name`` (``@revision``).

    What may be a slip in a path, because ``owner`` is a folder here, is looked for on the hub with ``hf://`` before it alone.
    ``download``: settings of ``huggingface_hub.hf_hub_download``. Raises UserError where there is none.
    """
    folder, text = Path(name), str(name)
    if folder.is_dir():
        return folder
    if text in shipped():
        return SHIPPED / text
    found = ID.fullmatch(text)
    if found and (found[1] or not folder.parent.exists()):
        return _fetch(text, found[2], {"revision": revision or found[3], **download})
    known = ", ".join(shipped())
    raise UserError(f"{folder}: no such folder; name a run's folder, its model's, one of {known}, or the hub's owner/name")


def publish(
    save: Callable[[Path], None],
    repo_id: str,
    *,
    private: bool | None,
    token: bool | str | None,
    branch: str | None,
    **upload: Any,
) -> str:
    """Put the model folder that ``save`` writes on the hub, as one commit. Returns its URL.

    Where a model card stands there already, ``save`` finds it. ``upload``: settings of ``HfApi.upload_folder``.
    Raises UserError where the hub refuses.
    """
    library = _library(repo_id)
    api = library.HfApi(token=token, library_name="noprop_dist")
    with tempfile.TemporaryDirectory() as there, _told(repo_id):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with contextlib.suppress(library.errors.EntryNotFoundError, library.errors.RevisionNotFoundError):
            shutil.copy(api.hf_hub_download(repo_id, README, revision=branch), there)
        save(Path(there))
        return str(api.upload_folder(repo_id=repo_id, folder_path=there, revision=branch, **upload))


def _fetch(name: str, repo_id: str, settings: dict[str, Any]) -> Path:
    library = _library(name)
    with _told(name):
        folder = Path(library.snapshot_download(repo_id, allow_patterns=[CONFIG], **settings))
        config = folder / CONFIG
        if not config.exists() or not files.read_json(config).keys() >= {"card", "data"}:
            raise UserError(f"{name}: no NoProp model, by its {CONFIG}; name another")  # before gigabytes are fetched
        settings["revision"] = folder.name  # the commit: what comes after it is no part of this model
        library.snapshot_download(repo_id, allow_patterns=[WEIGHTS, README], **settings)
    return folder


def _library(name: str) -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ImportError:
        raise UserError(f"{name}: no folder here; for the hub, pip install 'noprop_dist[hub]'") from None
    return huggingface_hub


@contextlib.contextmanager
def _told(name: str) -> Iterator[None]:
    """What the hub refuses, in a line. The library raises its own errors and those of whichever HTTP client it uses."""
    errors = _library(name).errors
    try:
        yield
    except UserError:
        raise
    except errors.LocalEntryNotFoundError:
        raise UserError(
            f"{name}: no such folder, no copy from the hub is here, and the hub is out of reach; go online"
        ) from None
    except errors.RepositoryNotFoundError:
        what = "no such folder, and no model of the hub's that you may read; mend the name, or hf auth login"
        raise UserError(f"{name}: {what}") from None
    except errors.RevisionNotFoundError:
        raise UserError(f"{name}: the hub has no such revision of it; name a branch, a tag or a commit") from None
    except Exception as error:
        reason = textwrap.shorten(str(error) or type(error).__name__, 200, placeholder=" ...")
        raise UserError(f"{name}: failed at the hub ({reason}); mend the name, or hf auth login") from None
