"""Training on Ray: real clusters of this machine, real workers."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from clusters import wait_until
from processes import descendants, kill, left_of, listening
from ray_train import main

from noprop_dist import Card, UserError, train
from noprop_dist.data import open_data
from noprop_dist.trained import load

HOUSE = Path(__file__).parents[2]
TRAIN = [sys.executable, str(HOUSE / "launch/ray_train.py")]


def settings(steps: int) -> dict[str, dict]:
    return {
        "data": {"batch_size": 32, "augment": "crop"},
        "model": {"blocks": 2, "embedding": "learned"},
        "train": {"steps": steps, "checkpoint_every": 4, "eval_every": steps, "log_every": 4, "pictures": False},
        "run": {"name": "mine"},
    }


def arguments(steps: int) -> list[str]:
    return [
        word
        for section, values in settings(steps).items()
        for name, value in values.items()
        for word in (f"--{section}.{name}", str(value))
    ]


def block_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], dict[str, bytes]]:
    """The last files of a run of so many steps on one rank, without Ray."""

    def run(steps: int) -> dict[str, bytes]:
        folder, made = tmp_path_factory.mktemp("plain"), settings(steps)
        made |= {"parallel": {"threads": 1}, "run": {"dir": str(folder), "name": "plain"}}
        train(Card.model_validate(made))
        return block_files(folder / f"plain/checkpoints/step-{steps:08d}")

    return run


def start(*words: str, log: Path) -> subprocess.Popen[str]:
    with open(log, "w") as file:
        return subprocess.Popen([*TRAIN, *words], cwd=log.parent, stdout=file, stderr=subprocess.STDOUT, text=True)


def test_a_submitted_job_trains_the_same_bits_and_leaves_copies_in_rays_storage(cluster, tmp_path, undisturbed):
    command = [str(Path(sys.executable).parent / "ray"), "job", "submit", "--address", cluster.dashboard]
    command += ["--working-dir", str(HOUSE / "launch"), "--", sys.executable, "ray_train.py", "--workers", "2"]
    command += [*arguments(10), "--run.dir", str(tmp_path / "runs"), "--storage", str(tmp_path / "storage")]
    for _ in range(10):
        result = subprocess.run(command, capture_output=True, text=True, timeout=400)
        if "No available agent" not in result.stderr:  # as long as the cluster is just coming up
            break
    assert result.returncode == 0, result.stdout + result.stderr
    assert "2 blocks on 2 ranks (cpu, gloo, 1 thread)" in result.stdout and "◂ test_accuracy" in result.stdout
    expected = undisturbed(10)
    assert len(expected) == 3 and block_files(tmp_path / "runs/mine/checkpoints/step-00000010") == expected
    copies = sorted((tmp_path / "storage/mine").glob("step-*"))
    assert [path.name[:13] for path in copies] == ["step-00000008", "step-00000010"], "no more than train.keep_checkpoints"
    assert block_files(copies[1] / "checkpoints/step-00000010") == expected
    summary = json.loads((copies[1] / "summary.json").read_text())
    assert load(copies[1]).evaluate(open_data(Card().data).test).mean == summary["accuracy"]["mean"]
    known = json.loads((tmp_path / "storage/mine/checkpoint_manager_snapshot.json").read_text())["latest_checkpoint_result"]
    assert known["checkpoint_dir_name"] == copies[1].name
    assert known["metrics"]["test_accuracy"] == summary["test_accuracy"] and known["metrics"]["step"] == 10


def test_killed_workers_and_a_lost_disk_cost_nothing_but_time(cluster, tmp_path, undisturbed):
    """kill -9 of one worker; then of both, with the run's folder gone too, as on another node."""

    def workers() -> list[int]:
        return [pid for pid, command in descendants(cluster.pid).items() if command.startswith("ray::RayTrainWorker")]

    steps, run, copies, log = 120, tmp_path / "runs/mine", tmp_path / "runs/ray/mine", tmp_path / "log"

    def newest() -> str:
        return max((path.parent.name for path in run.glob("checkpoints/step-*/manifest.json")), default="")

    def known() -> str:
        """The newest copy that Ray has taken note of."""
        snapshot = copies / "checkpoint_manager_snapshot.json"
        return max(re.findall(r"step-\d+", snapshot.read_text()), default="") if snapshot.exists() else ""

    process = start("--address", cluster.address, "--workers", "1:2", *arguments(steps), log=log)
    wait_until(newest, log, process=process)
    kill(workers()[-1:])
    first = newest()
    wait_until(lambda: newest() > first and "resumes" in log.read_text(), log, process=process)
    second = newest()
    wait_until(lambda: known() > second, log, process=process)
    kill(workers())
    shutil.rmtree(run)
    assert process.wait(400) == 0, log.read_text()
    said = log.read_text()
    assert len(re.findall(r"rank \d failed: ", said)) >= 2
    resumed = re.findall(r"resumes .*/step-(\d+)", said)
    assert len(resumed) == 2 and 0 < int(resumed[0]) < int(resumed[1]) < steps, "from its own folder, then from Ray's copy"
    assert block_files(run / f"checkpoints/step-{steps:08d}") == undisturbed(steps)


def test_a_mistake_that_a_worker_finds_is_one_line_and_is_not_tried_again(cluster, tmp_path):
    words = ["--address", cluster.address, "--data.name", "npz", "--data.root", "none.npz", "--workers", "2"]
    result = subprocess.run([*TRAIN, *words], cwd=tmp_path, capture_output=True, text=True, timeout=400)
    assert result.returncode == 2, result.stdout + result.stderr
    ours = [line for line in result.stderr.splitlines() if not re.match(r"\x1b\[36m\(\w+ pid=", line)]  # Ray's actors speak too
    assert len(ours) == 1, result.stderr
    assert re.fullmatch(r"error: data\.root: /.*/none\.npz does not exist; name an \.npz file with --data\.root", ours[0])
    assert "Traceback" not in result.stdout and "failed" not in result.stdout
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").glob("2*")), "something was half-written"


def test_a_cluster_without_room_is_named_instead_of_waited_for(cluster, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"lacks room for 3 workers of 1 CPU each: it has 2 CPU \(2 free\) on 1 node;"):
        main(["--address", cluster.address, "--workers", "3:4"])
    with pytest.raises(UserError, match=r"lacks room for 1 worker of 1 CPU and 1 GPU each: .*, 0 GPU"):
        main(["--address", cluster.address, "--gpus"])
    assert not list(tmp_path.iterdir())


def test_rays_own_cluster_stays_on_loopback_and_a_signal_saves_and_ends_it(tmp_path):
    log = tmp_path / "log"
    process = start("--run.stop_exit_code", "143", *arguments(100_000), "--model.blocks", "1", log=log)
    wait_until(lambda: any(tmp_path.glob("runs/mine/checkpoints/step-*/manifest.json")), log, process=process)
    ours = [process.pid, *descendants(process.pid)]
    addresses = listening(ours)
    assert len(addresses) > 5 and all(address.is_loopback for address in addresses), addresses
    process.send_signal(signal.SIGTERM)
    assert process.wait(240) == 143, log.read_text()
    saved = re.search(r"stopped by SIGTERM after step (\d+): saved (\S+)", log.read_text())
    newest = sorted((tmp_path / "runs/mine/checkpoints").iterdir())[-1]
    assert Path(saved[2]) == newest == tmp_path / f"runs/mine/checkpoints/step-{int(saved[1]):08d}"
    assert sorted((tmp_path / "runs/ray/mine").glob("step-*"))[-1].name.startswith(newest.name)
    assert not left_of(ours)
