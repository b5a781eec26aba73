"""Checkpoints and the gathered model, across ranks: who writes what, and how it finds its way where no disk is shared."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from noprop_dist import checkpoint
from noprop_dist.config import Card, UserError
from noprop_dist.data import DataInfo
from noprop_dist.files import entry, pack, read, shapes, unpack, write
from noprop_dist.learner import STEPS, Learner
from noprop_dist.model import NoPropModel, fresh_block, fresh_labels
from noprop_dist.parallel.gather import collect, deliver
from noprop_dist.parallel.placement import Placement
from noprop_dist.parallel.publication import Publication
from noprop_dist.parallel.scalars import gather_rows
from noprop_dist.parallel.world import World
from noprop_dist.runs import differences, total_steps, trained_as

MARK = ".run"


class Saver:
    """Saves and restores this rank's learners, together with all other ranks.

    A rank that sees the coordinator's folder writes its own files there; the others' travel to the coordinator.

    Args:
        root: folder of the checkpoints.
        keep: how many of them stay.
    """

    def __init__(self, world: World, placement: Placement, root: Path, keep: int) -> None:
        self._world, self._placement, self._root, self._keep = world, placement, root, keep
        mark, token = root / MARK, secrets.token_hex(16)
        if world.is_coordinator:
            write(mark, token.encode())
        self._apart = self._blind_to(mark, world.publish("token", lambda: token))
        if world.is_coordinator:
            mark.unlink()

    def save(self, card: Card, info: DataInfo, blocks: Mapping[int, Learner], labels: Learner, seen: Publication) -> Path:
        """Write the checkpoint after ``world.step`` steps, rotate old ones away, and return its folder. All ranks call it."""
        folder, world = checkpoint.step_folder(self._root, self._world.step), self._world
        blobs = {index: pack(learner.state()) for index, learner in blocks.items()}
        if world.rank not in self._apart:
            for index, blob in blobs.items():
                write(folder / checkpoint.block_file(index), blob)
        for index, blob in collect(world, self._placement, blobs, self._apart):
            write(folder / checkpoint.block_file(index), blob)
        mine = torch.frombuffer(bytearray(b"".join(map(checkpoint.digest, blobs.values()))), dtype=torch.uint8)
        rows = gather_rows(world, mine, [32 * len(owned) for owned in self._placement.ranges]).wait()
        if world.is_coordinator:
            sums = torch.cat(rows).view(-1, 32)
            digests = {checkpoint.block_file(index): bytes(row.tolist()) for index, row in enumerate(sums)}
            blob = pack(labels.state() | seen.state())
            write(folder / checkpoint.LABELS, blob)
            checkpoint.commit(folder, _facts(world.step, card, info), digests | {checkpoint.LABELS: checkpoint.digest(blob)})
            checkpoint.read_manifest(folder)  # reads all of it again: nothing older goes before this one is known to be whole
            checkpoint.prune(folder, self._keep)
        return folder

    def restore(self, folder: Path, blocks: Mapping[int, Learner], labels: Learner, seen: Publication) -> None:
        """Load a whole checkpoint. Ranks may be other, and more or fewer, than those that wrote it.

        Raises UserError naming the file that does not fit.
        """
        world, manifest = self._world, folder / checkpoint.MANIFEST
        apart = self._blind_to(manifest, world.publish("manifest", lambda: read(manifest).decode()))
        indices = {index for rank in apart for index in self._placement.ranges[rank]}
        sent = {index: read(folder / checkpoint.block_file(index)) for index in indices if world.is_coordinator}
        received = deliver(world, self._placement, sent, apart)
        for index, learner in blocks.items():
            path = folder / checkpoint.block_file(index)
            _load(learner, received[index] if index in received else read(path), path)
        if world.is_coordinator:
            load_labels(folder, labels, seen)

    def _blind_to(self, path: Path, content: str) -> set[int]:
        """Ranks that do not see a file of the coordinator's with this content."""
        sees = self._world.exchange(f"sees {path.name}", path.exists() and read(path).decode() == content)
        return {rank for rank, mine in enumerate(sees) if not mine}

    def gather(self, card: Card, info: DataInfo, blocks: Mapping[int, Learner], labels: Learner) -> NoPropModel | None:
        """The whole model on the coordinator, from every rank's blocks; None elsewhere."""
        mine = {index: pack(learner.inference.state_dict()) for index, learner in blocks.items()}
        theirs = dict(collect(self._world, self._placement, mine, set(range(self._world.size))))
        if not self._world.is_coordinator:
            return None
        parts: dict[int, dict[str, Tensor]] = {index: unpack(blob) for index, blob in (mine | theirs).items()}
        return NoPropModel.from_parts(card, info, parts, labels.inference.state_dict())


def load_labels(folder: Path, labels: Learner, seen: Publication) -> None:
    """The label space and what blocks see of it, from a whole checkpoint. Raises UserError naming the file."""
    path = folder / checkpoint.LABELS
    blob = read(path)
    _load(labels, blob, path)
    _load(seen, blob, path)


def commit_checkpoint(
    root: Path, card: Card, info: DataInfo, step: int, blocks: Mapping[int, bytes], labels: bytes | None = None
) -> Path:
    """Without other ranks: write a checkpoint of packed states. Returns its folder. Raises UserError."""
    folder = checkpoint.step_folder(root, step)
    files = {checkpoint.block_file(index): blob for index, blob in blocks.items()}
    if labels is not None:
        files[checkpoint.LABELS] = labels
    for name, blob in files.items():
        write(folder / name, blob)
    checkpoint.commit(folder, _facts(step, card, info), {name: checkpoint.digest(blob) for name, blob in files.items()})
    checkpoint.read_manifest(folder)  # reads all of it again: nothing older goes before this one is known to be whole
    return folder


def rescue(root: Path, card: Card, info: DataInfo, blocks: Mapping[int, Learner]) -> None:
    """Without the other ranks: save each block alone, as a checkpoint of its own under ``root``. Raises UserError."""
    for index, learner in blocks.items():
        keep_block(root, card, info, index, learner.steps, pack(learner.state()))


def keep_block(root: Path, card: Card, info: DataInfo, index: int, step: int, blob: bytes) -> None:
    """Save what :meth:`Learner.state` gave of one block, packed, in place of an earlier one."""
    checkpoint.prune(commit_checkpoint(_home(root, index), card, info, step, {index: blob}), 1)


def kept_block(root: Path, card: Card, info: DataInfo, index: int) -> tuple[int, Path | None]:
    """The step and the file of a block that was saved alone, in a run of this card; 0 and None where there is none."""
    folder, _ = checkpoint.newest_whole(_home(root, index))
    if not folder:
        return 0, None
    manifest, total = checkpoint.read_manifest(folder), total_steps(card, info.train_size)
    then, data = trained_as(folder, manifest)
    same = data == info and not differences(manifest["card"], card.model_dump(mode="json"))
    same = same and then.train.resume == card.train.resume  # else it may have begun elsewhere
    if not same or total_steps(then, data.train_size) != total or manifest["step"] > total:
        return 0, None
    return manifest["step"], folder / checkpoint.block_file(index)


def recall(root: Path, card: Card, info: DataInfo, blocks: Mapping[int, Learner]) -> list[int]:
    """Take those of ``blocks`` that this run saved alone, further on than they are. Returns their indices.

    Such a block waits until the run has reached its step.
    """
    taken = []
    for index, learner in blocks.items():
        step, path = kept_block(root, card, info, index)
        if path and step > learner.steps:
            _load(learner, read(path), path)
            taken.append(index)
    return taken


def _home(root: Path, index: int) -> Path:
    return root / f"block-{index:02d}"


def _facts(step: int, card: Card, info: DataInfo) -> dict[str, Any]:
    return {"step": step, "card": card.model_dump(mode="json"), "data": info.to_json()}


def check_weights(folder: Path, card: Card, info: DataInfo) -> None:
    """Before anyone waits for anyone: raises UserError naming a file of a checkpoint whose weights are not this card's."""
    cpu, total = torch.device("cpu"), total_steps(card, info.train_size)
    with torch.random.fork_rng([]):
        block, labels = fresh_block(card, info, 0, cpu), fresh_labels(card, info, cpu)
    for name, module in [*((checkpoint.block_file(index), block) for index in range(card.units)), (checkpoint.LABELS, labels)]:
        there = {key.removeprefix("model."): shape for key, shape in shapes(folder / name).items() if key.startswith("model.")}
        here = {key: list(tensor.shape) for key, tensor in module.state_dict().items()}
        if odd := sorted(key for key in there.keys() | here.keys() if there.get(key) != here.get(key)):
            what = f"{odd[0]}: {there.get(odd[0], 'missing')} there, {here.get(odd[0], 'missing')} here"
            raise UserError(f"{folder / name}: weights of another model ({what}); use another checkpoint")
        if (done := int(entry(folder / name, STEPS))) > total:  # it was ahead of the others, see recall
            raise UserError(
                f"{folder / name}: has done {done} steps, beyond this run's {total}; raise --train.epochs or --train.steps"
            )


def _load(learner: Learner | Publication, blob: bytes, path: Path) -> None:
    try:
        learner.load(unpack(blob, path))
    except (RuntimeError, KeyError) as error:
        raise UserError(f"{path}: of another model ({str(error).splitlines()[-1].strip()}); use another checkpoint") from None
