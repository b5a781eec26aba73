"""This process among the others: rank, device, wires, and who is silent when something fails.

The life of a world: ``World(...)`` meets the other ranks at a key-value store only; ``publish`` and ``exchange`` agree on
facts there; ``connect`` then forms the process groups, one a kind of message. A single rank has the same life without any.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import os
import socket
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, PrefixStore, Store, TCPStore  # what torch.distributed itself exports
from torch.distributed.rendezvous import rendezvous

from noprop_dist.config import ParallelCard, UserError
from noprop_dist.interruption import Interruption
from noprop_dist.parallel.heartbeat import BEAT, Heartbeat, within
from noprop_dist.parallel.placement import COORDINATOR, Placement
from noprop_dist.parallel.traffic import CARRIED, PeerError, Traffic, Wire

_runs = itertools.count()
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


class Stopped(Exception):
    """The coordinator stopped the run for a mistake that it reports itself."""


class World:
    """This rank and its ways to the others.

    Args:
        card: device, backend, timeout.
        placement: who owns what, as far as is known; one range a rank.
        init_method: where ranks meet, as torch.distributed names it; ranks and their number come from torchrun's environment.
        interruption: asked from elsewhere to stop the run; default: this rank's own.

    Raises UserError for a device that is not there, PeerError where the ranks do not meet.
    """

    def __init__(
        self,
        card: ParallelCard,
        placement: Placement,
        init_method: str = "env://",
        interruption: Interruption | None = None,
    ) -> None:
        self._card, self._placement = card, placement
        self.rank, self.size = rank_and_size()
        local_rank, local_size = _launched("LOCAL_RANK", 0), _launched("LOCAL_WORLD_SIZE", 1)
        if local_size == self.size > 1:
            keep_to_this_host()
        self.device, self.backend = choose_device(card, local_rank, local_size)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        self.traffic = Traffic(self.rank)
        self.wires: dict[str, Wire] = {}
        self._store = self._meet(init_method)
        self.interruption = interruption or Interruption()
        """Whether someone wants the run to stop: this rank's own users and, on the coordinator, all ranks'."""
        self._heart = Heartbeat(self._store, placement, self.rank, self.interruption) if self.size > 1 else None
        self._step = 0

    @property
    def is_coordinator(self) -> bool:
        """Rank 0 holds the data, the label space, and writes."""
        return self.rank == COORDINATOR

    @property
    def step(self) -> int:
        """Steps that this rank has done."""
        return self._step

    @step.setter
    def step(self, step: int) -> None:
        self._step = step
        if self._heart:
            self._heart.step = step

    @property
    def placement(self) -> Placement:
        """Who owns what; may change until the ranks train."""
        return self._placement

    @placement.setter
    def placement(self, placement: Placement) -> None:
        self._placement = placement
        if self._heart:
            self._heart.placement = placement

    def publish(self, key: str, make: Callable[[], Any], *, patient: bool = False) -> Any:
        """The coordinator's ``make()`` (a JSON value), on every rank. A UserError there stops all ranks.

        ``patient``: the others wait for as long as the coordinator lives, however long ``make`` takes (a download, say).
        """
        if self.is_coordinator:
            try:
                self._store.set(key, json.dumps({"value": make()}))
            except UserError:
                self._store.set(key, json.dumps({}))
                raise
        message = json.loads(self._get(key, COORDINATOR, patient))
        if "value" not in message:
            raise Stopped
        return message["value"]

    def exchange(self, key: str, value: Any) -> list[Any]:
        """Every rank's JSON value, in the order of ranks; waits for all."""
        self._store.set(f"{key}/{self.rank}", json.dumps(value))
        return [json.loads(self._get(f"{key}/{rank}", rank)) for rank in range(self.size)]

    def connect(self) -> None:
        """Form the process groups, one a kind of message. From here on ``wires[kind]`` carries that kind."""
        self._settle_backend()
        groups = self._form_groups() if self.size > 1 else {}
        for kind in CARRIED:
            group, timeout = groups.get(kind), self._card.timeout
            device = self.device if kind == "batches" and group and self.backend == "nccl" else torch.device("cpu")
            self.wires[kind] = Wire(kind, self.traffic, group, self.size, device, timeout, self._explain)

    def close(self) -> None:
        """Leave together: nobody tears a connection down that another still reads from."""
        if self._heart is None:
            return
        self.exchange("done", True)
        self.exchange("leaving", True)
        if self.is_coordinator:  # it may host the store, so it goes last
            for rank in range(1, self.size):
                self._get(f"left/{rank}", rank)
        self._heart.stop()
        self._store.set(f"left/{self.rank}", "")
        dist.destroy_process_group()

    def _meet(self, init_method: str) -> Store:
        if self.size == 1:
            return HashStore()
        if init_method != "env://":
            init_method += f"?rank={self.rank}&world_size={self.size}"
        try:
            store = self._loopback_store(init_method) or next(iter(rendezvous(init_method)))[0]
        except ValueError as error:  # MASTER_ADDR or MASTER_PORT is missing, or no such thing
            raise UserError(
                f"environment: {str(error).split(': ')[-1]}; start ranks with torchrun, or unset WORLD_SIZE"
            ) from None
        except (RuntimeError, OSError) as error:
            raise PeerError(f"rank {self.rank} found no other rank at {init_method}: {str(error).splitlines()[0]}") from error
        store.set_timeout(timedelta(seconds=self._card.timeout))
        return PrefixStore(f"noprop-{next(_runs)}", store)  # the store outlives a run, a process may train again

    def _loopback_store(self, init_method: str) -> Store | None:
        """The store, where this rank hosts it for ranks of this machine alone: torch's own would listen on every interface."""
        host, port = (os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))
        hosts_it = self.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != str(True)
        local = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) == self.size and host in ("127.0.0.1", "localhost")
        if init_method != "env://" or not (hosts_it and local and port.isdecimal() and 0 < int(port) < 2**16):
            return None
        listener = socket.create_server((host, int(port))).detach()
        return TCPStore(host, int(port), is_master=True, multi_tenant=True, master_listen_fd=listener)

    def _settle_backend(self) -> None:
        """nccl only where all ranks want it and no two share a GPU, on whatever hosts they are."""
        uuid = torch.cuda.get_device_properties(self.device).uuid if self.device.type == "cuda" else ""
        words = self.exchange("device", [self.backend, f"{socket.gethostname()} {uuid}"])
        if {backend for backend, _ in words} != {"nccl"} or len({device for _, device in words}) < self.size:
            if self._card.backend == "nccl":
                raise UserError(f"rank {self.rank}: not every rank has a GPU of its own for nccl; set --parallel.backend gloo")
            self.backend = "gloo"

    def _form_groups(self) -> dict[str, dist.ProcessGroup]:
        timeout = timedelta(seconds=self._card.timeout)
        try:
            dist.init_process_group("gloo", store=self._store, rank=self.rank, world_size=self.size, timeout=timeout)
            return {
                kind: dist.new_group(backend=self.backend if kind == "batches" else "gloo", timeout=timeout) for kind in CARRIED
            }
        except RuntimeError as error:
            raise self._explain("process groups", None) from error

    def _get(self, key: str, source: int, patient: bool = False) -> bytes:
        while True:
            try:
                return within(self._card.timeout + BEAT, lambda: bytes(self._store.get(key)))
            except (RuntimeError, TimeoutError) as error:
                if not patient or self._heart is None or source in self._heart.silent():
                    raise self._explain(f"its word on {key!r}", source) from error

    def _explain(self, what: str, peer: int | None) -> PeerError:
        """The error that names whoever a wait failed for."""
        verdict = ""
        if self._heart:
            with contextlib.suppress(RuntimeError, TimeoutError):  # the store may be gone with its host
                verdict = within(5 * BEAT, self._heart.verdict)
        if not verdict:
            verdict = "lost " + ("another rank" if peer in (None, self.rank) else self._placement.name(peer))
        return PeerError(f"{self._placement.name(self.rank)} at step {self.step} waited in vain for {what}: {verdict}")


def rank_and_size() -> tuple[int, int]:
    """This process's rank and the number of ranks, from torchrun's environment (0 of 1 without it). Raises UserError for
    nonsense there."""
    rank, size = _launched("RANK", 0), _launched("WORLD_SIZE", 1)
    if rank >= size:
        raise UserError(f"environment: RANK {rank} is none of WORLD_SIZE {size}; start ranks with torchrun, or unset both")
    return rank, size


def _launched(name: str, default: int) -> int:
    """A number in torchrun's environment: ranks from 0 on, sizes from 1 on."""
    value = os.environ.get(name, str(default))
    if not value.isdecimal() or int(value) < default:
        raise UserError(
            f"environment: {name} is {value!r}, no number from {default} on; start ranks with torchrun, or unset it"
        )
    return int(value)


def keep_to_this_host() -> None:
    """The ports that gloo and NCCL open are for whoever reaches them: on the loopback, unless the user has named a network."""
    for loopback in {name for _, name in socket.if_nameindex()} & {"lo", "lo0"}:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", loopback)


def choose_device(card: ParallelCard, local_rank: int, local_size: int) -> tuple[torch.device, str]:
    """The device of this rank and the backend that carries its batches. Raises UserError for what is not there."""
    gpus = torch.cuda.device_count() if card.device != "cpu" else 0
    if card.device == "cuda" and not gpus:
        raise UserError("parallel.device: cuda was asked for, but torch sees no GPU here; use cpu or auto")
    if card.cuda_graphs and not gpus:
        raise UserError("parallel.cuda_graphs: there is no GPU here to run them; leave it out")
    own_gpu = gpus >= local_size > 0 and dist.is_nccl_available()
    if card.backend == "nccl" and not own_gpu:
        raise UserError(
            f"parallel.backend: nccl needs a GPU for each of the {local_size} local ranks, there are {gpus}; use gloo or auto"
        )
    backend = "nccl" if own_gpu and card.backend != "gloo" else "gloo"
    return torch.device(f"cuda:{local_rank % gpus}" if gpus else "cpu"), backend


def set_threads(card: ParallelCard) -> int:
    """CPU threads of this rank: the card's, else $OMP_NUM_THREADS, else cores / local ranks. Returns the number.

    And have malloc keep what is freed: see :func:`_keep_memory`.
    """
    local = _launched("LOCAL_WORLD_SIZE", 1)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = card.threads or _omp_num_threads() or max(1, cores // local)
    torch.set_num_threads(threads)
    _keep_memory()
    return threads


def _keep_memory() -> None:
    """glibc gives large tensors back to the kernel, step by step, and gets them again page by zeroed page, which took up to a
    seventh of a CPU's step. This process will need the same ones again."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt and (mallopt(M_MMAP_THRESHOLD, 1 << 30) or mallopt(M_MMAP_THRESHOLD, 1 << 25)):  # older ones take no more
        mallopt(M_TRIM_THRESHOLD, 1 << 30)


def _omp_num_threads() -> int:
    """$OMP_NUM_THREADS as the user gave it, else 0. torchrun sets it to 1 by itself, yet not where its own process began."""
    value = os.environ.get("OMP_NUM_THREADS", "")
    if value == "1" and "TORCHELASTIC_RUN_ID" in os.environ:
        with contextlib.suppress(OSError):
            given = Path(f"/proc/{os.getppid()}/environ").read_bytes().split(b"\0")
            value = next((item.partition(b"=")[2].decode() for item in given if item.startswith(b"OMP_NUM_THREADS=")), "")
    return min(int(value), 1024) if value.isdecimal() else 0
