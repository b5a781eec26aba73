"""Two hosts for real: two network namespaces joined by a cable (a veth pair), which is then pulled out."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from clusters import ARGUMENTS, CARD, LAUNCH, block_files, checkpoints, environment, undisturbed, wait_until

ADDRESSES = ("10.77.0.1", "10.77.0.2")
RANK = r"rank (\d) \(block (\d)\)"
LOST = re.compile(rf"^error: {RANK} at step \d+ waited in vain for .*: (?:lost|no sign of life from) {RANK}", re.MULTILINE)


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """The names of two namespaces, in each of which eth0 has its address of ADDRESSES."""
    names = [f"noprop-{os.getpid()}-{number}" for number in range(2)]
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", "eth0", "netns", names[0], "type", "veth", "peer", "name", "eth0", "netns", names[1])
        for name, address in zip(names, ADDRESSES, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", "eth0", "up")
        yield names
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no network namespaces here: {getattr(error, 'stderr', None) or error}")
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


def start(host: str, command: list[str], cwd: Path, **variables: object) -> subprocess.Popen[bytes]:
    """A command on a host, its output in the file cwd/HOST.log."""
    with (cwd / f"{host}.log").open("wb") as log:
        command = ["ip", "netns", "exec", host, *command]
        return subprocess.Popen(command, cwd=cwd, env=environment(**variables), stdout=log, stderr=subprocess.STDOUT)


def test_a_cable_pulled_out_and_put_back_costs_nothing(hosts, tmp_path):
    """torchrun on both hosts; the runs' folder is a disk that they share."""
    script = [str(LAUNCH / "torchrun.sh"), CARD, *ARGUMENTS]
    meeting = {"NNODES": 2, "HEAD": f"{ADDRESSES[0]}:29500", "MAX_RESTARTS": 9}
    agents = [start(host, script, tmp_path, **meeting) for host in hosts]
    logs = [tmp_path / f"{host}.log" for host in hosts]
    run = tmp_path / "runs/dt"
    try:
        wait_until(lambda: checkpoints(run), "a checkpoint")
        ip("-n", hosts[1], "link", "set", "eth0", "down")
        wait_until(lambda: all(LOST.search(log.read_text()) for log in logs), "both hosts miss the other")
        ip("-n", hosts[1], "link", "set", "eth0", "up")
        assert [agent.wait(timeout=600) for agent in agents] == [0, 0], "\n".join(log.read_text() for log in logs)
    finally:
        for agent in agents:
            agent.kill()
    assert any("resumes runs/dt/checkpoints/step-" in log.read_text() for log in logs)
    assert block_files(run) == undisturbed()


def test_when_the_cable_is_cut_each_side_names_the_other_and_leaves(hosts, tmp_path):
    command = [sys.executable, "-m", "noprop_dist.train", CARD, *ARGUMENTS, "--train.steps", "100000", "--run.name", "cut"]
    meeting = {"WORLD_SIZE": 2, "MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": 29500, "GLOO_SOCKET_IFNAME": "eth0"}
    ranks = [start(host, command, tmp_path, RANK=rank, **meeting) for rank, host in enumerate(hosts)]
    try:
        wait_until(lambda: checkpoints(tmp_path / "runs/cut"), "a checkpoint")
        ip("-n", hosts[1], "link", "set", "eth0", "down")
        assert [rank.wait(timeout=300) for rank in ranks] == [1, 1]
    finally:
        for rank in ranks:
            rank.kill()
    for rank, host in zip("01", hosts, strict=True):
        printed = (tmp_path / f"{host}.log").read_text()
        other = "10"[int(rank)]
        assert LOST.findall(printed) == [(rank, rank, other, other)], printed
        assert "Traceback" not in printed
