"""The fleet on a real Ray cluster: workers are killed and join, and the end is that of one rank."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from clusters import wait_until

from noprop_dist import Card, checkpoint, train
from noprop_dist.cards import dump_card
from noprop_dist.config import UserError
from noprop_dist.interruption import Interruption
from noprop_dist.launcher import agree
from noprop_dist.parallel.placement import place
from noprop_dist.parallel.world import World
from noprop_dist.runs import RunFolder
from noprop_dist.units import LabelSpaceAlone, Workbench, training_batches

LAUNCH = Path(__file__).parents[2] / "launch"
STEPS = 60


def small(folder: Path, **sections: dict[str, Any]) -> Card:
    settings: dict[str, dict[str, Any]] = {
        "data": {"batch_size": 16, "augment": "crop"},
        "model": {"blocks": 4, "backbone": "mlp", "embedding": "learned", "embedding_lag": 7},
        "train": {"steps": STEPS, "checkpoint_every": 10, "pictures": False},
        "parallel": {"threads": 1},
        "run": {"dir": str(folder / "runs"), "name": "run"},
    }
    for section, values in sections.items():
        settings[section] = settings.get(section, {}) | values
    return Card.model_validate(settings)


def end_files(card: Card) -> dict[str, bytes]:
    folder = checkpoint.step_folder(RunFolder(card.run.dir / str(card.run.name)).checkpoints, card.train.steps or 0)
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


@pytest.mark.parametrize(
    "extra", [{}, {"method": {"name": "fm"}, "optim": {"ema": 0.9}}, {"model": {"embedding": "prototype"}}]
)
def test_blocks_trained_apart_in_any_order_end_in_the_bytes_of_one_run(extra, tmp_path):
    """Each on another workbench, for other stretches, the last block first; the label space's values are kept for it."""
    card = small(tmp_path, train={"steps": 23}, **extra)
    train(card)
    apart = card.model_copy(update={"run": card.run.model_copy(update={"name": "apart"})})
    world = World(apart.parallel, place([1.0] * 4, 1))
    plan = agree(apart, 1, world)
    world.connect()
    labels = LabelSpaceAlone(plan.card, plan.data, world, None)
    states: dict[int, bytes] = {}
    for index in (3, 1, 0, 2):
        start, state = 0, None
        for stop in (index + 1, 9 + index, 23):
            bench, steps = Workbench(plan.card, plan.info), range(start, stop)
            report = bench.train(
                index, state, steps, training_batches(plan.card, plan.data, steps), labels.values(steps), Interruption()
            )
            start, state = report.step, bench.state()
        states[index] = state
    labels.finish(plan.folder, states)
    assert end_files(apart) == end_files(card)


@dataclass
class Nodes:
    """A Ray cluster on this machine. ``add(cpus)`` has one more node join."""

    address: str
    add: Callable[[int], None]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Nodes]:
    """A head, where the data are, that trains nothing, and two nodes with room for two workers each."""
    pytest.importorskip("ray", reason="ray is not installed; pip install 'noprop_dist[ray]'")
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=_nodes, args=(theirs,))
    process.start()
    theirs.close()
    address = ours.recv()
    yield Nodes(address, ours.send)
    ours.send(0)
    process.join()


def _nodes(pipe: Connection) -> None:
    """In a process of its own: Ray's threads stay, and forks of other tests would have to do without them."""
    os.environ["RAY_AUTH_MODE"] = "disabled"  # before Ray is imported: a plain cluster, as ray start makes it
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for _ in range(2):
        cluster.add_node(num_cpus=2)
    pipe.send(cluster.address)
    while cpus := pipe.recv():
        cluster.add_node(num_cpus=cpus)
    cluster.shutdown()


def fleet(card: Card, *arguments: str, address: str, folder: Path) -> subprocess.Popen[str]:
    path = folder / "card.yaml"
    path.write_text(dump_card(card))
    command = [sys.executable, str(LAUNCH / "ray_fleet.py"), str(path), "--address", address, *arguments]
    with open(folder / "fleet.log", "a") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, text=True)


def test_workers_are_killed_and_join_late_and_the_end_is_that_of_one_rank(cluster, tmp_path):
    card, log = small(tmp_path, parallel={"timeout": 20}), tmp_path / "fleet.log"
    alone = card.model_copy(update={"run": card.run.model_copy(update={"name": "alone"})})
    train(alone)
    process = fleet(card, "--workers", "5", address=cluster.address, folder=tmp_path)  # one more than there is room for

    def finished() -> int:
        stretches = RunFolder(card.run.dir / "run").path / "fleet.jsonl"
        return len(stretches.read_text().splitlines()) if stretches.exists() else 0

    def joined(count: int) -> tuple[str, int]:
        """The name and process of the worker that joined as number ``count``, whichever it is."""
        wait_until(lambda: log.read_text().count(" joins: pid ") >= count, log, process=process)
        name, pid = re.findall(r"(worker \d+) joins: pid (\d+)", log.read_text())[count - 1]
        return name, int(pid)

    os.kill(joined(1)[1], signal.SIGKILL)
    wait_until(lambda: finished() >= 3, log, process=process)
    os.kill(joined(2)[1], signal.SIGKILL)
    stopped, pid = joined(3)
    os.kill(pid, signal.SIGSTOP)
    cluster.add(1)
    assert process.wait(240) == 0, log.read_text()
    assert end_files(card) == end_files(alone)
    assert "is lost; block" in log.read_text() and f"{stopped} has not got on with block" in log.read_text()
    assert not RunFolder(card.run.dir / "run").alone.exists(), "the run's own checkpoint has all of it"
    summary = json.loads((card.run.dir / "run/summary.json").read_text())
    assert summary["steps"] == STEPS and summary["seconds"] > 0 and summary["bytes_per_step"] > 0
    assert ", a fleet of workers, torch " in (card.run.dir / "run/model/README.md").read_text()


def test_a_signal_saves_every_block_and_one_rank_can_take_over(cluster, tmp_path):
    card, log = small(tmp_path, train={"steps": 200, "checkpoint_every": 100}), tmp_path / "fleet.log"
    process = fleet(card, "--workers", "2", address=cluster.address, folder=tmp_path)
    wait_until(lambda: "joins" in log.read_text(), log, process=process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 0, log.read_text()
    assert "stopped by SIGTERM: every block is saved in" in log.read_text()
    train(card)
    alone = card.model_copy(update={"run": card.run.model_copy(update={"name": "alone"})})
    train(alone)
    assert end_files(card) == end_files(alone)


@pytest.mark.parametrize(
    ("extra", "arguments", "message"),
    [
        ({"method": {"name": "cnn"}, "model": {}}, [], "method.name: cnn has no blocks that learn alone"),
        ({"parallel": {"feed": "resident"}}, [], "parallel.feed: a fleet fetches batches"),
        ({"parallel": {"balance": "measured"}}, [], "parallel.balance: a fleet's fast workers"),
        ({"debug": {"enabled": True}}, [], "debug.enabled"),
        ({"train": {"resume": "never"}}, [], "train.resume"),
        ({}, ["--workers", "0"], "--workers: 0 train nothing"),
        ({}, ["--storage", "/tmp"], "--storage"),
    ],
)
def test_what_a_fleet_cannot_do_is_refused_at_once(extra, arguments, message, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(LAUNCH))
    import ray_fleet

    path = tmp_path / "card.yaml"
    path.write_text(dump_card(Card.model_validate({"run": {"dir": str(tmp_path / "runs")}} | extra)))
    with pytest.raises(UserError, match=re.escape(message)):
        ray_fleet.main([str(path), *arguments])
    assert not (tmp_path / "runs").exists()
