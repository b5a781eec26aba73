"""Where a run starts, goes on, or refuses to: nothing that was trained is lost."""

from __future__ import annotations

import json
import logging
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from noprop_dist import UserError, train
from noprop_dist.report.console import set_up_logging, size
from noprop_dist.runs import claim_folder
from noprop_dist.trainer import Trainer


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


def test_a_run_cut_off_in_its_first_checkpoint_starts_anew_a_damaged_only_one_is_an_error(small_card):
    card = small_card(train={"checkpoint_every": 0})
    train(card)
    (only,) = checkpoints(card)
    expected = {path.name: path.read_bytes() for path in only.iterdir()}
    (only / "block-00.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"no whole checkpoint to resume from; .*block-00\.safetensors"):
        train(card)
    (only / "manifest.json").unlink()
    train(card)
    assert {path.name: path.read_bytes() for path in only.iterdir()} == expected


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


def test_going_back_to_an_older_checkpoint_needs_a_new_name(small_card):
    card = small_card()
    train(card)
    with pytest.raises(UserError, match=r"holds newer checkpoints .* give another --run\.name"):
        train(small_card(train={"resume": str(checkpoints(card)[0])}))


def test_an_optimizers_state_is_not_read_by_another(small_card):
    train(small_card(optim={"name": "sgd"}))
    path = str(checkpoints(small_card())[-1])
    with pytest.raises(UserError, match=r"optim\.name: sgd there, adamw here"):
        train(small_card(run={"name": "other"}, train={"resume": path}))


def test_other_data_do_not_continue_a_run(small_card, tmp_path):
    rng = np.random.default_rng(0)
    for name, count in (("a", 40), ("b", 50)):
        arrays = {"x_train": rng.integers(0, 256, (count, 8, 8), np.uint8), "y_train": np.arange(count) % 3}
        np.savez(tmp_path / f"{name}.npz", **arrays, x_test=arrays["x_train"], y_test=arrays["y_train"])
    train(small_card(data={"name": "npz", "root": str(tmp_path / "a.npz")}))
    with pytest.raises(UserError, match="trained on other data"):
        train(small_card(data={"name": "npz", "root": str(tmp_path / "b.npz")}, train={"steps": 9}))


def test_a_longer_run_with_a_falling_learning_rate_says_that_it_differs(small_card, capsys):
    train(small_card(optim={"schedule": "cosine"}))
    train(small_card(optim={"schedule": "cosine"}, train={"steps": 8}))
    assert "the cosine learning rate now spans 8 steps, it was laid out for 6" in capsys.readouterr().err


def test_a_cut_off_run_with_a_falling_learning_rate_goes_on_exactly(small_card, monkeypatch):
    settings = {"optim": {"schedule": "one-cycle", "ema": 0.9}}
    train(small_card(**settings, run={"name": "whole"}))
    step = Trainer._step

    def cut(self, number, *args):
        if number == 4:
            raise InterruptedError
        step(self, number, *args)

    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(Trainer, "_step", cut)
        train(small_card(**settings))
    train(small_card(**settings))
    whole, cut_off = (checkpoints(small_card(run={"name": name}))[-1] for name in ("whole", "run"))
    for path in whole.glob("*.safetensors"):
        assert path.read_bytes() == (cut_off / path.name).read_bytes(), path.name


def test_a_folder_for_runs_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "gone" / "disk")
    with pytest.raises(UserError, match="link: cannot create a folder there"):
        claim_folder(tmp_path / "link")


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
