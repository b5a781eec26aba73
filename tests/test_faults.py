"""Ranks that die or stall, disks that fill, losses that are not finite: nothing is lost that could be kept."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import play, random_case, undisturbed
from test_promises import last_files, named

from noprop_dist import UserError, learning, train
from noprop_dist.checkpoint import newest_whole
from noprop_dist.files import unpack
from noprop_dist.learner import Learner
from noprop_dist.parallel.traffic import PeerError
from noprop_dist.runs import RunFolder
from noprop_dist.seeding import derive
from noprop_dist.trainer import Trainer

KNOWN: dict[str, dict[str, bytes]] = {}


@pytest.mark.parametrize("number", range(25))
def test_kill_9_anywhere_and_a_restart_end_as_if_nothing_had_been(number, tmp_path, tmp_path_factory):
    case = random_case(number)
    play(case, tmp_path, undisturbed(case.variant, tmp_path_factory.mktemp("whole"), KNOWN))


def fail_in_step(step: int, fault: signal.Signals) -> None:
    usual = Trainer._step

    def stepped(self: Trainer, now: int, *args: Any) -> None:
        if now == step:
            (self.folder.path / "victim").write_text(str(os.getpid()))
            os.kill(os.getpid(), fault)
        usual(self, now, *args)

    Trainer._step = stepped  # type: ignore[method-assign]


@pytest.mark.parametrize("fault", [signal.SIGSTOP, signal.SIGKILL])
def test_a_stalled_or_killed_rank_is_named_and_the_others_blocks_are_saved_and_used(fault, small_card, on_ranks):
    card = small_card(train={"steps": 9, "checkpoint_every": 4, "eval_every": 1}, parallel={"timeout": 3})
    folder = RunFolder(card.run.dir / "run")

    def work(rank: int, init_method: str) -> str:
        if rank == 2:
            fail_in_step(6, fault)
        try:
            train(card, init_method)
        except PeerError as error:
            if rank == 0:
                os.kill(int((folder.path / "victim").read_text()), signal.SIGKILL)
            return str(error)
        return "nothing noticed"

    *messages, victim = on_ranks(3, work, check=False)
    assert isinstance(victim, ChildProcessError)
    for message in messages:
        assert "no sign of life from rank 2 (blocks 2-3), last heard of at step " in message, message
        assert message.endswith(f"its own blocks are saved in {folder.alone}")
    names = sorted(path.name for path in folder.alone.iterdir())
    assert names == ["block-00", "block-01", "trace-rank-0.json", "trace-rank-1.json"]
    waits = [
        event for event in json.loads((folder.alone / names[3]).read_text())["traceEvents"] if event.get("cat") == "waiting"
    ]
    assert waits[-1]["dur"] > 0.2e6, "the wait in vain is told"

    learnt = []
    update = learning.update

    def watched(loss: Any, step: int, learner: Learner) -> None:
        learnt.append(step)
        update(loss, step, learner)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(learning, "update", watched)
        train(card)
    assert learnt.count(4) == 2 + 1, "only the lost rank's blocks and the label space learn that step again"
    assert not folder.alone.exists()
    evaluated = [point["step"] for point in json.loads(folder.summary.read_text())["curve"]]
    assert evaluated == [1, 2, 3, 4, 7, 8, 9], "while some blocks wait for the others, the chain is no step's"
    other = named(card, "undisturbed")
    train(other)
    assert last_files(card) == last_files(other)


def spoil(monkeypatch: pytest.MonkeyPatch, block: int, steps: range) -> None:
    """Have the loss of one block be NaN in some steps."""
    seeds = {derive(0, "block", block, step) for step in steps}
    usual = learning.squared_loss

    def loss(*args: Any) -> torch.Tensor:
        value = usual(*args)
        return value * math.nan if torch.initial_seed() in seeds else value

    monkeypatch.setattr(learning, "squared_loss", loss)


def test_a_bad_update_of_one_block_is_skipped_and_counted_and_the_others_do_not_notice(small_card, monkeypatch, capsys):
    card = small_card(train={"steps": 8})
    train(card)
    spoil(monkeypatch, 2, range(3, 5))
    hurt = named(card, "hurt")
    summary = train(hurt).summary
    same = {name: blob == last_files(hurt)[name] for name, blob in last_files(card).items()}
    assert [name for name, equal in same.items() if not equal] == ["block-02.safetensors"]
    assert [block["skipped_updates"] for block in summary["blocks"]] == [0, 0, 2, 0]
    assert not any(block["given_up"] for block in summary["blocks"])
    assert "step 4: block 2: 1 updates skipped so far" in capsys.readouterr().err


@pytest.mark.parametrize("ranks", [1, 3])
def test_after_max_bad_steps_a_block_stays_as_it_is_and_the_run_says_so(ranks, small_card, on_ranks, monkeypatch, capfd):
    card = small_card(train={"steps": 12, "max_bad_steps": 3})
    spoil(monkeypatch, 2, range(4, 7))
    summary = on_ranks(ranks, lambda rank, init_method: train(card, init_method).summary)[0]
    assert [block["given_up"] for block in summary["blocks"]] == [False, False, True, False]
    assert summary["blocks"][2]["skipped_updates"] == 8
    said = capfd.readouterr().err
    assert said.count("BLOCK 2 IS NO LONGER TRAINED") == 1
    json.loads((card.run.dir / "run/summary.json").read_text(), parse_constant=lambda word: pytest.fail(word))
    shorter = named(card, "shorter", steps=4)
    train(shorter)
    model, before = (learner_weights(each) for each in (card, shorter))
    assert all(model[name].equal(before[name]) for name in before)


def learner_weights(card: Any) -> dict[str, torch.Tensor]:
    tensors = unpack(last_files(card)["block-02.safetensors"])
    return {name: value for name, value in tensors.items() if name.startswith("model.")}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


def remount(disk: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", disk], check=True)


def test_a_full_disk_is_named_the_last_checkpoint_stands_and_with_space_the_run_goes_on(small_card, on_ranks, small_disk):
    card = small_card(run={"dir": str(small_disk)}, train={"steps": 9, "checkpoint_every": 3})
    size = sum(path.stat().st_size for path in small_disk.rglob("*") if path.is_file())
    train(whole := named(card, "whole"))
    one = sum(path.stat().st_size for path in RunFolder(small_disk / "whole").checkpoints.glob("step-00000009/*"))
    used = sum(path.stat().st_size for path in small_disk.rglob("*") if path.is_file()) - size
    remount(small_disk, f"size={used + 2 * one + one // 2}")  # for two checkpoints, not for a third
    first, other = on_ranks(2, lambda rank, init_method: train(card, init_method), check=False)
    full = [error for error in (first, other) if isinstance(error, UserError)]
    assert full, (first, other)
    for error in full:
        assert re.search(r"cannot write \(No space left on device\); free space or name another place", str(error))
    folder = RunFolder(small_disk / "run")
    assert newest_whole(folder.checkpoints)[0] == folder.checkpoints / "step-00000006"
    assert not list(folder.path.rglob("*.partial")), "something half-written stays"
    remount(small_disk, "size=64m")
    on_ranks(2, lambda rank, init_method: train(card, init_method) and None)
    assert last_files(card) == last_files(whole)


def test_a_read_only_folder_is_named_before_ranks_connect(small_card, small_disk):
    remount(small_disk, "ro")
    with pytest.raises(UserError, match=rf"{small_disk}/.*: cannot write \(Read-only file system\)"):
        train(small_card(run={"dir": str(small_disk / "new")}))


def test_auto_falls_back_over_damaged_checkpoints_and_ends_in_the_same_bytes(small_card, capsys):
    card = small_card(train={"steps": 9, "keep_checkpoints": 3})
    train(card)
    whole = last_files(card)
    checkpoints = RunFolder(card.run.dir / "run").checkpoints
    (checkpoints / "step-00000009/block-01.safetensors").unlink()
    cut = checkpoints / "step-00000006/labels.safetensors"
    cut.write_bytes(cut.read_bytes()[:-1])
    capsys.readouterr()
    train(card)
    said = capsys.readouterr().err
    assert "step-00000009/block-01.safetensors: cannot read" in said and "labels.safetensors: its SHA-256 is not" in said
    assert f"resumes {checkpoints}/step-00000003" in said
    assert last_files(card) == whole
