"""Where a run starts, goes on, or refuses to: nothing that was trained is lost."""

from __future__ import annotations

import json
import logging
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from noprop_dist import UserError, train
from noprop_dist.checkpoint import commit, digest
from noprop_dist.data import open_data
from noprop_dist.data.memory import MemorySplit
from noprop_dist.files import pack, unpack
from noprop_dist.learner import STEPS
from noprop_dist.report.console import set_up_logging, size
from noprop_dist.runs import claim_folder, evaluates, total_steps
from noprop_dist.trained import load
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


def test_a_run_that_branched_off_and_was_cut_off_goes_on_where_it_was(small_card, capsys):
    source = small_card()
    train(source)
    path = str(checkpoints(source)[0])

    def fork(name, steps):
        return small_card(run={"name": name}, train={"resume": path, "steps": steps}, optim={"lr": 0.1})

    for steps in (7, 8):
        train(fork("parts", steps))
    assert f"resumes {checkpoints(fork('parts', 8))[-2]}" in capsys.readouterr().err
    train(fork("whole", 8))
    parts, whole = (
        {file.name: file.read_bytes() for file in checkpoints(fork(name, 8))[-1].glob("*.safetensors")}
        for name in ("parts", "whole")
    )
    assert parts == whole


def test_a_block_beyond_the_end_is_refused(small_card):
    card = small_card()
    train(card)
    last = checkpoints(card)[-1]
    tensors = unpack((last / "block-02.safetensors").read_bytes())
    blob = pack(tensors | {STEPS: tensors[STEPS] + 1})  # as of a run that was stopped while a block waited for the others
    (last / "block-02.safetensors").write_bytes(blob)
    manifest = json.loads((last / "manifest.json").read_text())
    digests = {name: bytes.fromhex(value) for name, value in manifest.pop("sha256").items()} | {
        "block-02.safetensors": digest(blob)
    }
    commit(last, {name: manifest[name] for name in ("step", "card", "data")}, digests)
    with pytest.raises(UserError, match=r"block-02\.safetensors: has done \d+ steps, beyond this run's \d+; raise"):
        train(card)


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


def train_and_cut_off(card, at, monkeypatch):
    """Train until an exception in step ``at``."""
    step = Trainer._step

    def cut(self, number, *args):
        if number == at:
            raise InterruptedError
        step(self, number, *args)

    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(Trainer, "_step", cut)
        train(card)


def test_a_cut_off_run_with_a_falling_learning_rate_goes_on_exactly(small_card, monkeypatch):
    settings = {"optim": {"schedule": "one-cycle", "ema": 0.9}}
    train(small_card(**settings, run={"name": "whole"}))
    train_and_cut_off(small_card(**settings), 4, monkeypatch)
    train(small_card(**settings))
    whole, cut_off = (checkpoints(small_card(run={"name": name}))[-1] for name in ("whole", "run"))
    for path in whole.glob("*.safetensors"):
        assert path.read_bytes() == (cut_off / path.name).read_bytes(), path.name


def test_the_curve_and_the_seconds_go_on_over_a_resume_and_drop_what_was_beyond_the_checkpoint(small_card, monkeypatch):
    """Cut off after the evaluation of step 5, resumed from the checkpoint of step 3."""
    settings = {"steps": 6, "eval_every": 1, "checkpoint_every": 3}
    whole = train(small_card(train=settings, run={"name": "whole"})).summary
    history = small_card().run.dir / "run/history.json"
    train_and_cut_off(small_card(train=settings), 5, monkeypatch)
    before = json.loads(history.read_text())
    assert [point["step"] for point in before] == [1, 2, 3, 4, 5]
    before[2]["seconds"] += 1000  # as if the first three steps had been long
    history.write_text(json.dumps([*before, before[4] | {"step": 7}]))
    summary = train(small_card(train=settings)).summary
    curve = summary["curve"]
    assert [point["step"] for point in curve] == [1, 2, 3, 4, 5, 6]
    assert all(point.items() <= noted.items() for point, noted in zip(curve[:3], before, strict=False))
    assert curve[3]["seconds"] != before[3]["seconds"]
    accuracies = ("step", "epoch", "mean", "stochastic", "average")
    assert [[point[name] for name in accuracies] for point in curve] == [
        [point[name] for name in accuracies] for point in whole["curve"]
    ]
    assert curve[-1]["epoch"] == 6 * 32 / 1437 and curve[-1]["mean"] == summary["accuracy"]["mean"]
    seconds = [point["seconds"] for point in curve]
    assert seconds[2:] == sorted(seconds[2:]) and summary["seconds"] >= seconds[-1] > 1000
    assert 0 < whole["seconds"] < 1000
    assert summary["samples_per_second"] == pytest.approx(6 * 32 / summary["seconds"]), "of all starts together"


def test_a_run_that_branches_off_brings_its_past(small_card):
    train(small_card())
    fork = small_card(run={"name": "fork"}, train={"resume": str(checkpoints(small_card())[0]), "steps": 8, "eval_every": 4})
    assert [point["step"] for point in train(fork).summary["curve"]] == [3, 4, 8]


def test_the_training_accuracy_is_that_of_the_first_training_images_as_they_are(small_card, monkeypatch):
    monkeypatch.setattr("noprop_dist.parallel.feed.SAMPLE", 250)
    card = small_card(inference={"path": "average"})
    result = train(card)
    data = open_data(card.data)
    images, labels = data.train.load()
    assert result.summary["train_accuracy"] == result.model.evaluate(MemorySplit(images[:250], labels[:250])).average


def test_parameters_are_those_of_a_block_and_of_all_with_the_label_space(small_card):
    result = train(small_card(model={"embedding": "learned", "embedding_dim": 7}))
    block, total = result.summary["parameters"]["block"], result.summary["parameters"]["total"]
    assert block == sum(parameter.numel() for parameter in result.model.blocks[3].parameters())
    assert total == 4 * block + 10 * 7 + (7 + 1) * 10, "W and the head"


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


@pytest.mark.parametrize(
    "settings",
    [
        {"method": {"name": "ct", "schedule": "learned"}, "model": {"blocks": 1}, "inference": {"steps": 6}},
        {"method": {"name": "ct", "schedule": "learned"}, "model": {"blocks": 3}, "inference": {"steps": 6, "solver": "heun"}},
        {"method": {"name": "fm"}, "model": {"blocks": 2, "embedding": "learned"}, "inference": {"steps": 6}},
        {"model": {"blocks": 2, "embedding": "prototype", "embedding_lag": 2, "head": "mlp"}},
    ],
)
def test_checkpoint_and_model_of_every_method_repeat_the_runs_accuracy(settings, small_card):
    card = small_card(**settings, optim={"ema": 0.5})
    summary = train(card).summary
    for folder in (card.run.dir / "run", card.run.dir / "run/model", card.run.dir / "run/checkpoints/step-00000006"):
        scores = load(folder).evaluate(open_data(card.data).test)
        assert {path: getattr(scores, path) for path in ("mean", "stochastic", "average")} == summary["accuracy"], folder


def test_prototypes_of_a_class_without_images_are_refused_before_anything_is_written(small_card, tmp_path):
    images, labels = np.zeros((40, 8, 8), np.uint8), np.arange(40) % 2 * 2
    np.savez(tmp_path / "two-of-three.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    card = small_card(data={"name": "npz", "root": str(tmp_path / "two-of-three.npz")}, model={"embedding": "prototype"})
    with pytest.raises(UserError, match=r"^model.embedding: prototype needs images of each class, 1 has none"):
        train(card)
    assert not card.run.dir.exists()


@pytest.mark.parametrize("batch", [2, 7, 100, 128, 1000])
def test_unset_evaluations_are_one_an_epoch_the_last_at_the_end(small_card, batch):
    card = small_card(data={"batch_size": batch}, train={"epochs": 5, "steps": None, "eval_every": 0})
    total = total_steps(card, 1000)
    due = [step for step in range(1, total + 1) if evaluates(card, 1000, step)]
    assert due == [-(-1000 * epoch // batch) for epoch in range(1, 6)] and due[-1] == total
