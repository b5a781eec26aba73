"""Processes and ports of this machine, as Linux tells of them."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import signal
import socket
import time
from collections.abc import Iterable
from pathlib import Path

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def descendants(ancestor: int) -> dict[int, str]:
    """Every process below ``ancestor``, with its command line."""
    parents, commands = {}, {}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it may just have ended
            commands[int(process.name)] = (process / "cmdline").read_text().replace("\0", " ")
            parents[int(process.name)] = int((process / "stat").read_text().rpartition(")")[2].split()[1])
    ours = {ancestor}
    while new := {pid for pid, parent in parents.items() if parent in ours} - ours:
        ours |= new
    return {pid: commands[pid] for pid in ours - {ancestor}}


def kill(pids: Iterable[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def left_of(pids: Iterable[int], within: float = 60) -> list[int]:
    """Those of ``pids`` that still run after so many seconds."""
    deadline = time.monotonic() + within
    while (left := [pid for pid in pids if _runs(pid)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def listening(pids: Iterable[int]) -> list[Address]:
    """The addresses on which these processes accept TCP connections."""
    own = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            own |= {os.readlink(file) for file in Path(f"/proc/{pid}/fd").iterdir()}
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    return [_address(row[1].partition(":")[0]) for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in own]


def _address(text: str) -> Address:
    raw = bytes.fromhex(text)
    address = ipaddress.ip_address(b"".join(raw[start : start + 4][::-1] for start in range(0, len(raw), 4)))
    return getattr(address, "ipv4_mapped", None) or address
