import errno
import json
import os
import random

import pytest
import torch

from noprop_dist.checkpoint import MANIFEST, block_file, commit, digest, newest_whole, prune, read_manifest, step_folder
from noprop_dist.config import UserError
from noprop_dist.files import pack, read, unpack, write


def tree(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_written_file_reads_back_and_its_folder_is_made(tmp_path):
    path = tmp_path / "new" / "folder" / "file"
    write(path, b"first")
    write(path, b"second")
    assert read(path) == b"second"
    assert tree(tmp_path) == ["new", "new/folder", "new/folder/file"], "nothing else is left behind"


def test_tied_weights_are_packed_as_if_they_were_not():
    first = torch.nn.Linear(3, 3)
    second = torch.nn.Linear(3, 3)
    second.weight = first.weight
    both = torch.nn.ModuleList([first, second])
    loaded = unpack(pack(both.state_dict()))
    assert loaded["0.weight"].equal(first.weight) and loaded["1.weight"].equal(first.weight)
    apart = {name: tensor.clone() for name, tensor in both.state_dict().items()}
    assert pack(both.state_dict()) == pack(apart)


def test_a_full_disk_leaves_the_old_file_whole_and_no_new_one(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write(path, b"old")

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"file: cannot write \(No space left on device\)"):
        write(path, b"new")
    assert path.read_bytes() == b"old"
    assert tree(tmp_path) == ["file"]


@pytest.mark.parametrize(
    "target", ["a-file/inside", "a-file/deep/inside", "a-folder", "x" * 300, "/proc/noprop/x", "/dev/null/x"]
)
def test_a_place_that_cannot_be_written_is_a_users_mistake(tmp_path, target):
    (tmp_path / "a-file").write_bytes(b"here first")
    (tmp_path / "a-folder").mkdir()
    before = tree(tmp_path)
    with pytest.raises(UserError) as caught:
        write(tmp_path / target, b"blob")
    assert target in str(caught.value)
    assert "\n" not in str(caught.value)
    assert tree(tmp_path) == before


def test_a_file_that_is_not_there_is_a_users_mistake(tmp_path):
    with pytest.raises(UserError, match="nothing: cannot read"):
        read(tmp_path / "nothing")


def test_tensors_come_back_as_they_were():
    tensors = {
        "a": torch.randn(3, 4),
        "half": torch.randn(5).bfloat16(),
        "n": torch.tensor(7),
        "none": torch.empty(0, 2),
    }
    back = unpack(pack(tensors))
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype
        assert back[name].equal(tensor)


def test_bytes_do_not_depend_on_memory_format():
    weight = torch.randn(8, 3, 3, 3)
    last = weight.to(memory_format=torch.channels_last)
    assert not last.is_contiguous()
    assert pack({"w": last}) == pack({"w": weight}) == pack({"w": torch.nn.Parameter(last)})
    assert pack({"w": weight.transpose(0, 1)}) != pack({"w": weight})


@pytest.mark.parametrize("damage", [lambda blob: blob[:-1], lambda blob: b"", lambda blob: b"\xff" * 40])
def test_broken_tensor_files_are_named(damage):
    with pytest.raises(UserError, match=r"^some/file: not a whole safetensors file"):
        unpack(damage(pack({"w": torch.ones(3)})), "some/file")


def save(root, step):
    """A checkpoint of two files."""
    folder = step_folder(root, step)
    blobs = {block_file(index): pack({"w": torch.full((4,), float(step + index))}) for index in range(2)}
    for name, blob in blobs.items():
        write(folder / name, blob)
    commit(
        folder, {"step": step, "card": {"run": {"seed": 1}}, "data": {}}, {name: digest(blob) for name, blob in blobs.items()}
    )
    return folder


def test_the_manifest_tells_the_step_the_card_and_every_files_sum(tmp_path):
    manifest = read_manifest(save(tmp_path, 12))
    assert manifest["step"] == 12
    assert manifest["card"] == {"run": {"seed": 1}}
    assert list(manifest["sha256"]) == ["block-00.safetensors", "block-01.safetensors"]


def test_the_newest_whole_checkpoint_is_the_one_of_most_steps(tmp_path):
    for step in (100, 20, 9):
        save(tmp_path, step)
    assert newest_whole(tmp_path) == (step_folder(tmp_path, 100), [])


def test_where_there_is_no_checkpoint_none_is_found(tmp_path):
    assert newest_whole(tmp_path / "nothing") == (None, [])
    assert newest_whole(tmp_path) == (None, [])


def flip(path, place=-1):
    blob = bytearray(path.read_bytes())
    blob[place] ^= 1
    path.write_bytes(blob)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-3])


def change_manifest(folder, **values):
    """By someone who knows how."""
    manifest = json.loads((folder / MANIFEST).read_text()) | values
    sums = {name: bytes.fromhex(value) for name, value in manifest.pop("sha256").items()}
    del manifest["own_sha256"]
    commit(folder, manifest, sums)


DAMAGES = {
    "missing manifest": (lambda folder: (folder / MANIFEST).unlink(), (MANIFEST, "no whole checkpoint")),
    "flipped byte": (lambda folder: flip(folder / block_file(1)), (block_file(1), "SHA-256")),
    "flipped first byte": (lambda folder: flip(folder / block_file(0), 0), (block_file(0), "SHA-256")),
    "truncated file": (lambda folder: truncate(folder / block_file(0)), (block_file(0), "SHA-256")),
    "missing file": (lambda folder: (folder / block_file(1)).unlink(), (block_file(1), "cannot read")),
    "truncated manifest": (lambda folder: truncate(folder / MANIFEST), (MANIFEST, "not a manifest")),
    "manifest of another kind": (lambda folder: (folder / MANIFEST).write_text("[]"), (MANIFEST, "not a manifest")),
    "manifest in no encoding": (lambda folder: (folder / MANIFEST).write_bytes(b"\xff"), (MANIFEST, "not a manifest")),
    "no step": (lambda folder: change_manifest(folder, step=None), (MANIFEST, "not a manifest")),
    "path out": (lambda folder: change_manifest(folder, sha256={"../x": "00"}), (MANIFEST, "'../x'")),
    "absolute path": (lambda folder: change_manifest(folder, sha256={"/etc/hostname": "00"}), (MANIFEST, "hostname")),
}


@pytest.mark.parametrize(("damage", "words"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_with_the_reason(tmp_path, damage, words):
    older, newer = save(tmp_path, 1), save(tmp_path, 2)
    damage(newer)
    found, reasons = newest_whole(tmp_path)
    assert found == older
    assert len(reasons) == 1
    assert all(word in reasons[0] for word in (newer.name, *words)), reasons
    assert "\n" not in reasons[0]
    damage(older)
    assert newest_whole(tmp_path)[0] is None


def test_a_checkpoint_cut_at_any_byte_or_with_any_bit_flipped_is_not_whole(tmp_path):
    folder = save(tmp_path, 1)
    dice = random.Random(0)
    for path in sorted(folder.iterdir()):
        blob = path.read_bytes()
        for place in range(len(blob)):
            flipped = blob[:place] + bytes([blob[place] ^ 1 << dice.randrange(8)]) + blob[place + 1 :]
            for damaged in (blob[:place], flipped):
                path.write_bytes(damaged)
                with pytest.raises(UserError, match=path.name):
                    read_manifest(folder)
        path.write_bytes(blob)
    assert read_manifest(folder)["step"] == 1


def test_a_manifest_cannot_vouch_for_a_file_outside_its_folder(tmp_path):
    folder = save(tmp_path, 1)
    (tmp_path / "x").write_bytes(b"outside")
    change_manifest(folder, sha256={"../x": digest(b"outside").hex()})
    with pytest.raises(UserError, match=r"'\.\./x'"):
        read_manifest(folder)


def test_pruning_keeps_the_newest_finished_checkpoints(tmp_path):
    for step in (1, 2, 3, 4, 5, 6):
        save(tmp_path, step)
    for unfinished in (3, 5):
        (step_folder(tmp_path, unfinished) / MANIFEST).unlink()
    prune(step_folder(tmp_path, 6), 2)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-00000004", "step-00000006"]
    assert newest_whole(tmp_path)[0] == step_folder(tmp_path, 6)


@pytest.mark.parametrize("damage", [lambda folder: (folder / MANIFEST).unlink(), lambda folder: flip(folder / block_file(0))])
def test_a_damaged_newer_checkpoint_never_costs_the_last_good_one(tmp_path, damage):
    """The run fell back to an older one, and now saves after it."""
    for step in (1, 2, 3):
        save(tmp_path, step)
    damage(step_folder(tmp_path, 3))
    prune(step_folder(tmp_path, 2), 1)
    assert newest_whole(tmp_path)[0] == step_folder(tmp_path, 2)
    assert not step_folder(tmp_path, 1).exists()


@pytest.mark.parametrize("steps", [(1,), (1, 2)])
def test_pruning_fewer_than_asked_for_deletes_nothing(tmp_path, steps):
    for step in steps:
        save(tmp_path, step)
    (tmp_path / "notes.txt").write_text("mine")
    before = tree(tmp_path)
    prune(step_folder(tmp_path, steps[-1]), 2)
    assert tree(tmp_path) == before
