"""The commands as a user types them: real torchrun, real processes."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from noprop_dist import Card, NoPropModel, evaluate
from noprop_dist.cards import load_card
from noprop_dist.data import open_data
from noprop_dist.launcher import dry_run

PYTHON = [sys.executable, "-m"]
TORCHRUN = [*PYTHON, "torch.distributed.run"]
CONFIGS = Path(__file__).parent.parent / "configs"
CARDS = sorted(CONFIGS.glob("[!b]*/*.yaml"))  # not base/, whose cards are parts
SMALL = ["--data.batch_size", "64", "--model.blocks", "4", "--train.steps", "8", "--train.log_every", "4"]
SMALL += ["--train.pictures", "false"]


def run(*command: str, cwd: Path, expect: int = 0, **env: str) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(command, cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, timeout=240)
    assert result.returncode == expect, f"exit {result.returncode}\n{result.stdout}\n{result.stderr}"
    return result


def evaluated(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What evaluate prints, without a process of its own."""
    capsys.readouterr()
    evaluate.main([str(word) for word in arguments])
    return capsys.readouterr().out


def files(folder: Path) -> dict[str, bytes]:
    found = {path.name: path.read_bytes() for path in sorted(folder.glob("checkpoints/step-00000008/*.safetensors"))}
    assert len(found) == 5
    return found


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A run of torchrun with two ranks and no card."""
    cwd = tmp_path_factory.mktemp("trained")
    command = [*TORCHRUN, "--nproc_per_node=2", "-m", "noprop_dist.train", *SMALL, "--run.name", "two"]
    return cwd / "runs/two", run(*command, cwd=cwd, NOPROP_TRACE="1")


def test_a_run_leaves_everything_it_promises(trained):
    folder, result = trained
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["ranks"] == 2 and summary["steps"] == 8
    assert [set(block) for block in summary["blocks"]] == [
        {"index", "rank", "loss", "accuracy", "skipped_updates", "given_up"}
    ] * 4
    assert [block["rank"] for block in summary["blocks"]] == [0, 0, 1, 1]
    assert list(summary["bytes"]) == ["batches", "labels", "scalars", "latents", "weights", "gradients"]
    assert summary["bytes"]["gradients"] == 0 < summary["bytes"]["weights"]
    assert 0 <= summary["test_accuracy"] <= 1 and 0 < summary["busy_share"] <= 1
    assert summary["samples_per_second"] > 0 and summary["peak_memory_bytes"] > 0
    assert 0 <= summary["train_accuracy"] <= 1 and summary["seconds"] > 0
    assert [set(point) for point in summary["curve"]] == [{"step", "epoch", "seconds", "mean", "stochastic", "average"}]
    assert summary["bytes_per_step"] == 8 + 64 * (4 + 8 * 8)
    for part in ("card.yaml", "history.json", "model/model.safetensors", "model/config.json"):
        assert (folder / part).is_file()
    assert load_card(folder / "card.yaml").model.backbone == "small-cnn"
    for word in (
        "samples/s",
        "peak memory",
        "busy",
        "accuracy of its û",
        "gradients",
        "checkpoint",
        "training images",
        " in all",
    ):
        assert word in result.stdout
    assert f"{summary['test_accuracy']:.2%}" in result.stdout


def test_tensorboard_holds_every_block_and_the_chain(trained):
    events = EventAccumulator(str(trained[0] / "tensorboard")).Reload()
    tags = set(events.Tags()["scalars"])
    wanted = {f"block-{index:02d}/{what}" for index in range(4) for what in ("loss", "train accuracy", "test accuracy")}
    assert wanted | {"test accuracy/mean", "learning rate", "samples per second"} <= tags
    assert [event.step for event in events.Scalars("block-03/loss")] == [4, 8]


def test_trace_prints_every_message_and_their_sum_is_the_counter(trained):
    folder, result = trained
    traced = re.findall(r"^trace: step \d+ (\w+) (\d)->(\d) (\d+) bytes$", result.stderr, re.MULTILINE)
    counted = json.loads((folder / "summary.json").read_text())["bytes"]
    for kind, count in counted.items():
        assert sum(int(size) for name, *_, size in traced if name == kind) == count, kind


def test_evaluate_repeats_the_run_to_the_last_digit(trained, capsys):
    folder, _ = trained
    summary = json.loads((folder / "summary.json").read_text())
    printed = [run(*PYTHON, "noprop_dist.evaluate", str(folder), cwd=folder).stdout, evaluated(capsys, folder / "model")]
    for found in map(json.loads, printed):
        assert found["accuracy"] == summary["accuracy"] and found["test_accuracy"] == summary["test_accuracy"]
        assert found["blocks"] == [block["accuracy"] for block in summary["blocks"]]


def test_a_cut_off_run_is_evaluated_at_its_newest_checkpoint(trained, tmp_path, capsys):
    folder, _ = trained
    shutil.copytree(folder / "checkpoints", tmp_path / "checkpoints")
    found = json.loads(evaluated(capsys, tmp_path))
    assert found["accuracy"] == json.loads((folder / "summary.json").read_text())["accuracy"]


def test_early_exit_uses_only_the_first_blocks(trained, capsys):
    folder, _ = trained
    found = json.loads(evaluated(capsys, "--inference.blocks", "2", "--inference.path", "stochastic", folder))
    whole = json.loads((folder / "summary.json").read_text())
    assert found["blocks"] == [block["accuracy"] for block in whole["blocks"]][:2]
    assert found["test_accuracy"] == found["accuracy"]["stochastic"] != whole["accuracy"]["stochastic"]


def test_two_nodes_that_share_no_disk_end_in_the_same_bytes(trained, tmp_path):
    """Two torchrun agents on this machine, each in a folder of its own."""
    port = str(20000 + os.getpid() % 20000)
    agents: list[subprocess.Popen[str]] = []
    for node in range(2):
        cwd = tmp_path / f"node-{node}"
        cwd.mkdir()
        command = [*TORCHRUN, "--nnodes=2", f"--node_rank={node}", "--nproc_per_node=2", "--rdzv_backend=c10d"]
        command += [f"--rdzv_endpoint=127.0.0.1:{port}", "--local_addr=127.0.0.1"]
        command += ["-m", "noprop_dist.train", *SMALL, "--run.name", "two"]
        agents.append(subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    outputs = [agent.communicate(timeout=240)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], "\n".join(outputs)
    written = [node for node in range(2) if (tmp_path / f"node-{node}/runs").exists()]
    assert len(written) == 1, "only the coordinator's node writes"
    assert files(tmp_path / f"node-{written[0]}/runs/two") == files(trained[0])


@pytest.mark.parametrize("card", CARDS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_shipped_card_loads_and_dry_runs_as_its_header_says(card, capsys):
    loaded, header = load_card(card), card.read_text().split("base:")[0]
    assert loaded.data.name.startswith(card.parent.name)
    assert loaded.method.name == card.stem.split("-")[0]
    (command,) = re.findall(r"^#   (.* -m noprop_dist\.train .*)$", header, re.MULTILINE)
    assert command.endswith(f" configs/{card.parent.name}/{card.name}")
    ranks = int((re.findall(r"nproc_per_node=(\d)", command) or [1])[0])
    dry_run(loaded, ranks)
    assert "placement" in capsys.readouterr().out


def test_a_card_for_every_row_of_the_papers_table_with_its_hyperparameters():
    rows = {f"{method}-{kind}" for method in ("backprop", "dt", "ct", "fm") for kind in ("one-hot", "dim20", "prototype")}
    epochs = {"mnist": (100, 100), "fashion": (100, 100), "cifar10": (150, 500), "cifar100": (150, 1000)}
    for data, (short, long) in epochs.items():
        for row in [*rows, "adjoint"]:
            card = load_card(CONFIGS / data / f"{row}.yaml")
            deep = card.method.name in ("dt", "backprop")
            assert (card.train.epochs, card.model.blocks) == ((short, 10) if deep else (long, 1)), (data, row)
            assert card.optim.name == ("adamw" if deep else "adam")
            assert (card.data.batch_size, card.data.augment, card.optim.lr, card.optim.weight_decay) == (
                128,
                "none",
                1e-3,
                1e-3,
            )
            assert card.model.backbone == "paper-cnn"
            kind = {"dim20": "learned", "prototype": "prototype"}.get(row.split("-")[-1], "one-hot")
            assert (card.model.embedding, card.model.embedding_dim) == (kind, 20)
    assert load_card(CONFIGS / "mnist/dt-one-hot.yaml").method.eta == 0.1
    assert load_card(CONFIGS / "mnist/ct-one-hot.yaml").method.eta == 1


def test_the_digits_card_is_what_a_run_without_a_card_does():
    assert load_card(CONFIGS / "digits/dt.yaml") == Card()


def test_a_dry_run_counts_learned_embeddings_that_travel(capsys):
    settings = {"model": {"embedding": "learned", "embedding_dim": 25, "embedding_lag": 10}, "parallel": {"feed": "resident"}}
    dry_run(Card.model_validate(settings), 2)
    printed = capsys.readouterr().out
    assert "label space: 1.0 kB to every other rank each 10 steps" in printed
    assert "100 B" in printed, "a tenth of 10 x 25 float32 each step"


def test_dry_run_starts_and_writes_nothing(tmp_path):
    command = [*PYTHON, "noprop_dist.train", str(CONFIGS / "cifar10/dt-one-hot.yaml"), "--dry-run", "--ranks", "3"]
    printed = run(*command, cwd=tmp_path).stdout
    assert "1,215,434 parameters" in printed and "3-5" in printed and "6-9" in printed
    assert not list(tmp_path.iterdir())


def test_threads_a_rank_are_cores_by_ranks_unless_the_user_says(tmp_path):
    """torchrun itself sets OMP_NUM_THREADS to 1, which is not the user's word."""
    probe = tmp_path / "probe.py"
    probe.write_text(
        "import os\nfrom noprop_dist.config import ParallelCard\nfrom noprop_dist.parallel.world import set_threads\n"
        "os.sched_getaffinity = lambda pid: range(6)\nprint('threads', set_threads(ParallelCard()))\n"
    )
    for given, threads in (({}, 3), ({"OMP_NUM_THREADS": "1"}, 1)):
        env = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"} | given
        command = [*TORCHRUN, "--nproc_per_node=2", str(probe)]
        printed = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240).stdout
        assert printed.count(f"threads {threads}\n") == 2, printed


def test_ones_own_pictures_stream_to_every_rank(tmp_path):
    """An image folder, decoded by workers of the coordinator."""
    digits = load_digits()
    for number, (pixels, label) in enumerate(zip(digits.images[:120], digits.target[:120], strict=True)):
        folder = tmp_path / "pictures" / ("train" if number % 4 else "val") / f"digit-{label}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels * 15).astype("uint8")).resize((20, 24)).save(folder / f"{number}.png")
    command = [*TORCHRUN, "--nproc_per_node=2", "-m", "noprop_dist.train", "--data.name", "imagefolder"]
    command += ["--data.root", "pictures", "--data.image_size", "16", "--data.workers", "2", *SMALL, "--run.name", "mine"]
    run(*command, cwd=tmp_path)
    card = load_card(tmp_path / "runs/mine/card.yaml")
    assert (card.data.augment, card.model.backbone) == ("crop-flip", "paper-cnn")
    model = NoPropModel.from_pretrained(tmp_path / "runs/mine/model")
    assert model.info.classes[0] == "digit-0" and model.info.shape == (3, 16, 16)


def test_train_and_model_from_python(tmp_path):
    script = """
import torch
from noprop_dist import Card, train, NoPropModel
result = train(Card(model={"blocks": 2}, train={"steps": 3}, run={"name": "mine"}))
images = torch.randint(0, 256, (5, 1, 8, 8), dtype=torch.uint8)
again = NoPropModel.from_pretrained("runs/mine/model")
assert torch.equal(result.model(images), again(images)) and again.predict(images).shape == (5,)
print(result.summary["steps"], result.summary["test_accuracy"])
"""
    assert run(sys.executable, "-c", script, cwd=tmp_path).stdout.splitlines()[-1].startswith("3 0.")


def test_debug_logs_shapes_and_gradient_norms_and_overfits(tmp_path):
    command = [*PYTHON, "noprop_dist.train", *SMALL, "--train.steps", "60", "--debug", "--debug.overfit_batches", "1"]
    command += ["--model.blocks", "2", "--model.dropout", "0", "--train.log_every", "20", "--run.name", "debug"]
    result = run(*command, cwd=tmp_path)
    assert "block 1: x (64, 1, 8, 8) torch.float32, features (64, 128)" in result.stderr
    norms = re.findall(r"step \d+: gradient norms (\S+) (\S+)", result.stdout)
    assert len(norms) == 3 and all(float(norm) > 0 for pair in norms for norm in pair)
    events = EventAccumulator(str(tmp_path / "runs/debug/tensorboard")).Reload()
    assert [event.value for event in events.Scalars("block-00/train accuracy")][-1] > 0.99


@pytest.mark.skipif("NOPROP_DATA" not in os.environ, reason="NOPROP_DATA is unset: no MNIST here")
def test_mnist_learns_within_a_few_steps(tmp_path):
    card = str(CONFIGS / "mnist/dt-one-hot.yaml")
    command = [*TORCHRUN, "--nproc_per_node=2", "-m", "noprop_dist.train", card, "--model.blocks", "2"]
    run(*command, "--train.steps", "60", "--train.precision", "bf16", "--run.name", "mnist", cwd=tmp_path)
    summary = json.loads((tmp_path / "runs/mnist/summary.json").read_text())
    assert summary["test_accuracy"] > 0.9
    model = NoPropModel.from_pretrained(tmp_path / "runs/mnist/model")
    images, labels = next(iter(open_data(model.card.data).test.batches([torch.arange(200)])))
    assert (model.predict(images) == labels).float().mean() > 0.9
