"""Ranks of one machine as if on hosts of their own with slow cables: network namespaces, a bridge, token buckets."""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

from noprop_dist.config import UserError

CABLE = "eth0"
NEWNET = 0x40000000  # of Linux' setns
REMEDY = "it takes Linux, root, ip and tc (iproute2); leave it out"


@contextlib.contextmanager
def cables(ranks: int, bandwidth: float) -> Iterator[list[str]]:
    """The names of ``ranks`` namespaces, each with a cable, CABLE, into one switch; it can send ``bandwidth`` bytes a second.

    Raises UserError where this is not permitted.
    """
    names = [f"noprop-{os.getpid()}-{number}" for number in ("hub", *range(ranks))]
    hub, *hosts = names
    rate = f"{bandwidth * 8 / 1000:.0f}kbit"
    try:
        for name in names:
            _run("ip", "netns", "add", name)
        _run("ip", "-n", hub, "link", "add", "switch", "type", "bridge")
        _run("ip", "-n", hub, "link", "set", "switch", "up")
        for number, host in enumerate(hosts):
            end = f"port{number}"
            _run("ip", "link", "add", CABLE, "netns", host, "type", "veth", "peer", "name", end, "netns", hub)
            _run("ip", "-n", hub, "link", "set", end, "master", "switch", "up")
            _run("ip", "-n", host, "address", "add", f"10.78.0.{number + 1}/24", "dev", CABLE)
            _run("ip", "-n", host, "link", "set", "lo", "up")
            _run("ip", "-n", host, "link", "set", CABLE, "up")
            bucket = ("rate", rate, "burst", f"{max(32_000, int(bandwidth / 250))}", "latency", "400ms")
            _run("ip", "netns", "exec", host, "tc", "qdisc", "add", "dev", CABLE, "root", "tbf", *bucket)
        yield hosts
    finally:
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def enter(host: str) -> None:
    """Move this process to a namespace of :func:`cables`."""
    with Path("/run/netns", host).open() as namespace:
        if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), NEWNET):
            raise OSError(ctypes.get_errno(), f"cannot enter {host}")


def _run(*command: str) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        why = " ".join(str(getattr(error, "stderr", None) or error).split())
        raise UserError(f"--link: cannot lay cables ({why}); {REMEDY}") from None
