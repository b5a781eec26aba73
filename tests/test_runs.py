"""Where a run starts, goes on, or refuses to: nothing that was trained is lost."""

from __future__ import annotations

import json
import logging
from concurrent.futures import ThreadPoolExecutor

import pytest

from noprop_dist import UserError, train
from noprop_dist.report.console import set_up_logging, size
from noprop_dist.runs import claim_folder


def checkpoints(card):
    return sorted((card.run.dir / card.run.name / "checkpoints").iterdir())  # nothing else lies there


def test_a_damaged_newest_checkpoint_is_passed_over_and_the_end_is_the_same(small_card, capsys):
    card = small_card(train={"steps": 6, "checkpoint_every": 3})
    train(card)
    old, newest = checkpoints(card)
    expected = {path.name: path.read_bytes() for path in newest.iterdir()}
    damaged = bytearray(expected["block-01.safetensors"])
    damaged[-1] ^= 1
    (newest / "block-01.safetensors").write_bytes(damaged)
    assert train(card).summary["steps"] == 6
    said = capsys.readouterr().err
    assert "block-01.safetensors: its SHA-256 is not the manifest's" in said and f"resumes {old}" in said
    assert {path.name: path.read_bytes() for path in newest.iterdir()} == expected


def test_a_finished_run_started_again_trains_no_step_and_says_the_same(small_card):
    first = train(small_card()).summary
    (small_card().run.dir / "run/model/config.json").unlink()
    assert train(small_card()).summary == first
    assert (small_card().run.dir / "run/model/config.json").exists(), "what is missing is made again"


def test_a_finished_run_can_be_made_longer(small_card):
    train(small_card())
    assert train(small_card(train={"steps": 8})).summary["steps"] == 8


def test_a_checkpoint_beyond_the_end_is_refused(small_card):
    train(small_card())
    with pytest.raises(UserError, match=r"step 6, beyond this run's 4 steps"):
        train(small_card(train={"steps": 4}))


def test_another_card_does_not_continue_a_run_unseen(small_card):
    train(small_card())
    before = {path: path.read_bytes() for path in small_card().run.dir.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"optim\.lr: 0\.001 there, 0\.1 here.*--run\.name"):
        train(small_card(optim={"lr": 0.1}))
    with pytest.raises(UserError, match=r"never would overwrite"):
        train(small_card(train={"resume": "never"}))
    assert {path: path.read_bytes() for path in small_card().run.dir.rglob("*") if path.is_file()} == before


def test_a_named_checkpoint_starts_another_run_even_with_other_settings_but_not_another_model(small_card, capsys):
    source = small_card()
    train(source)
    path = str(checkpoints(source)[-1])
    fork = small_card(run={"name": "fork"}, train={"resume": path, "steps": 8}, optim={"lr": 0.1})
    assert train(fork).summary["steps"] == 8
    assert "optim.lr: 0.001 there, 0.1 here" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"model\.blocks: 4 there, 3 here"):
        train(small_card(run={"name": "third"}, train={"resume": path}, model={"blocks": 3}))
    assert not (source.run.dir / "third").exists()


def test_only_the_newest_checkpoints_stay(small_card):
    card = small_card(train={"steps": 5, "checkpoint_every": 1, "keep_checkpoints": 2})
    train(card)
    assert [path.name for path in checkpoints(card)] == ["step-00000004", "step-00000005"]


def test_runs_that_begin_in_the_same_second_have_folders_of_their_own(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(lambda _: claim_folder(tmp_path / "runs"), range(8)))
    assert len(set(folders)) == 8


def test_the_manifest_holds_step_card_and_sums(small_card):
    card = small_card()
    train(card)
    manifest = json.loads((checkpoints(card)[-1] / "manifest.json").read_text())
    assert manifest["step"] == 6 and manifest["card"]["optim"]["lr"] == card.optim.lr
    assert len(manifest["sha256"]) == card.model.blocks + 1


def test_other_ranks_only_warn_and_say_who_they_are(capsys):
    log = logging.getLogger("noprop_dist")
    for rank in (0, 3):
        set_up_logging(rank)
        log.info("hello")
        log.warning("careful")
    assert capsys.readouterr().err == "hello\ncareful\nrank 3: careful\n"


@pytest.mark.parametrize(("count", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (1.5e9, "1.5 GB"), (2e12, "2.0 TB")])
def test_bytes_are_written_for_a_reader(count, text):
    assert size(count) == text
