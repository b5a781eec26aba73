"""A Ray cluster of this machine alone, and the commands as a user types them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from processes import descendants, free_port, kill

HOUSE = Path(__file__).parents[2]
LOOPBACK = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # to be there before any test imports ray
    "RAY_AUTH_MODE": "disabled",
    "RAY_worker_niceness": "0",
    "RAY_local_fs_capacity_threshold": "1",  # of a nearly full disk Ray speaks in between our lines
    "PYTHONPATH": os.pathsep.join(filter(None, [str(HOUSE), os.environ.get("PYTHONPATH")])),
}
os.environ |= LOOPBACK


@dataclass(frozen=True)
class Cluster:
    """``address`` for --address, ``dashboard`` for ray job submit; ``pid`` is the ancestor of all its processes."""

    address: str
    dashboard: str
    pid: int


@pytest.fixture(scope="package")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two CPUs, started as a user does, on ports and in a folder of its own."""
    port, dashboard, client = (free_port() for _ in range(3))
    command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", "--num-cpus=2", f"--port={port}"]
    command += ["--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"]
    command += [f"--ray-client-server-port={client}", "--disable-usage-stats"]
    command += ["--min-worker-port=0", "--max-worker-port=0", f"--temp-dir={short_folder(tmp_path_factory)}"]
    head = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert head.stdout
        said = []
        for line in head.stdout:
            said.append(line)
            if "Ray runtime started" in line:
                break
        else:
            pytest.fail("no Ray: " + "".join(said))
        yield Cluster(f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}", head.pid)
    finally:
        kill([head.pid, *descendants(head.pid)])
        head.wait()


def short_folder(factory: pytest.TempPathFactory) -> Path:
    """For sockets, whose paths may have 107 characters."""
    link = Path("/tmp") / f"ray-{os.getpid()}"
    link.symlink_to(factory.mktemp("ray"))
    return link
