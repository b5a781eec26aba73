"""The ports that ranks open: who can reach them."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import socket
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from noprop_dist.config import ParallelCard
from noprop_dist.parallel.placement import place
from noprop_dist.parallel.world import World


def children(process: int) -> list[int]:
    return [int(word) for path in Path(f"/proc/{process}/task").glob("*/children") for word in path.read_text().split()]


def listening(process: int) -> set[str]:
    """IPv4 addresses, and IPv6 ones as the kernel writes them, at which a process or one of its children listens."""
    found = {address for child in children(process) for address in listening(child)}
    open_files = set()
    for path in Path(f"/proc/{process}/fd").iterdir():
        with contextlib.suppress(OSError):  # closed meanwhile
            open_files.add(os.readlink(path))
    for table in ("tcp", "tcp6"):
        for row in Path(f"/proc/{process}/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *rest = row.split()
            address = local.split(":")[0]
            if state == "0A" and f"socket:[{rest[5]}]" in open_files:
                found.add(socket.inet_ntoa(bytes.fromhex(address)[::-1]) if table == "tcp" else address)
    return found


def network() -> tuple[str, str]:
    """This host's address on a network and that network's interface; empty where it is on none. Sends nothing."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
        probe.connect(("192.0.2.1", 9))
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):
                address = fcntl.ioctl(probe, 0x8915, struct.pack("256s", name.encode()))[20:24]  # SIOCGIFADDR
                if name != "lo" and socket.inet_ntoa(address) == probe.getsockname()[0]:
                    return socket.inet_ntoa(address), name
    return "", ""


ADDRESS, INTERFACE = network() if sys.platform == "linux" else ("", "")
RENAMED = ["unshare", "--map-root-user", "--uts"]
on_a_network = pytest.mark.skipif(not ADDRESS, reason="not Linux, or on no network")


def can_rename() -> bool:
    return bool(shutil.which("unshare")) and not subprocess.run([*RENAMED, "true"], capture_output=True).returncode


@on_a_network
@pytest.mark.skipif(not can_rename(), reason="this user may not give a process a host name of its own")
def test_ranks_of_one_host_listen_on_the_loopback_alone(tmp_path):
    """Under a host name that stands for an address on the network, where gloo would listen by itself."""
    command = f"hostname {ADDRESS} && exec {sys.executable} -m torch.distributed.run --standalone --nproc_per_node=2"
    command += " -m noprop_dist.train --model.blocks 2 --data.batch_size 32 --train.steps 100000"
    with subprocess.Popen(
        [*RENAMED, "sh", "-c", command], cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    ) as agent:
        assert agent.stderr
        try:
            said = next(line for line in agent.stderr if "run runs/" in line or "rror" in line)
            assert said.startswith("run runs/"), said  # from here on the process groups are there
            found = [listening(rank) for rank in children(agent.pid)]
        finally:
            agent.terminate()
            agent.stderr.close()
    assert found == [{"127.0.0.1"}] * 2


@on_a_network
def test_ranks_of_several_hosts_or_with_a_network_named_are_left_to_it(on_ranks, monkeypatch):
    def work(rank: int, init_method: str) -> set[str]:
        world = World(ParallelCard(timeout=20), place([1.0] * 2, 2), init_method)
        world.connect()
        found = listening(os.getpid())
        world.close()
        return found

    def apart(rank: int, init_method: str) -> str | None:
        os.environ["LOCAL_WORLD_SIZE"] = "1"
        World(ParallelCard(timeout=20), place([1.0] * 2, 2), init_method)
        return os.environ.get("GLOO_SOCKET_IFNAME")

    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    assert on_ranks(2, work) == [{"127.0.0.1"}] * 2
    assert on_ranks(2, apart) == [None, None]
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", INTERFACE)
    assert on_ranks(2, work) == [{ADDRESS}] * 2
