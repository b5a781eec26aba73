"""This process among the others: rank, device, wires, and who is silent when something fails.

The life of a world: ``World(...)`` meets the other ranks at a key-value store only; ``publish`` and ``exchange`` agree on
facts there; ``connect`` then forms the process groups, one a kind of message. A single rank has the same life without any.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, PrefixStore, Store  # what torch.distributed itself exports
from torch.distributed.rendezvous import rendezvous

from noprop_dist.config import ParallelCard, UserError
from noprop_dist.parallel.placement import Placement
from noprop_dist.parallel.traffic import KINDS, PeerError, Traffic, Wire

BEAT = 1.0  # seconds between a rank's signs of life


class Stopped(Exception):
    """The coordinator stopped the run for a mistake that it reports itself."""


class World:
    """Args:
    card: device, backend, timeout.
    init_method: where ranks meet, as torch.distributed names it; ranks and their count come from torchrun's environment.
    """

    def __init__(self, card: ParallelCard, init_method: str = "env://") -> None:
        self.card = card
        self.rank, self.size = rank_and_size()
        self.local_rank = int(os.environ.get("LOCAL_RANK", 0))
        self.local_size = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        self.device, self.backend = choose_device(card, self.local_rank, self.local_size)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        self.traffic = Traffic(self.rank)
        self.wires: dict[str, Wire] = {}
        self.step = 0
        self._placement: Placement | None = None
        self._leaving = threading.Event()
        if self.size == 1:
            self.store: Store = HashStore()
        else:
            if init_method != "env://":
                init_method += f"?rank={self.rank}&world_size={self.size}"
            self.store = PrefixStore("noprop", next(iter(rendezvous(init_method)))[0])
        self.store.set_timeout(timedelta(seconds=card.timeout))

    @property
    def is_coordinator(self) -> bool:
        """Rank 0 holds the data, the label space, and writes."""
        return self.rank == 0

    def publish(self, key: str, make: Callable[[], Any]) -> Any:
        """The coordinator's ``make()`` (a JSON value), on every rank. A UserError there stops all ranks."""
        if self.is_coordinator:
            try:
                self.store.set(key, json.dumps({"value": make()}))
            except UserError:
                self.store.set(key, json.dumps({}))
                raise
        message = json.loads(self._get(key))
        if "value" not in message:
            raise Stopped
        return message["value"]

    def exchange(self, key: str, value: Any) -> list[Any]:
        """Every rank's JSON value, in the order of ranks; waits for all."""
        self.store.set(f"{key}/{self.rank}", json.dumps(value))
        return [json.loads(self._get(f"{key}/{rank}")) for rank in range(self.size)]

    def connect(self, placement: Placement) -> None:
        """Form the process groups. From here on ``wires[kind]`` carries that kind's messages."""
        groups = self._form_groups() if self.size > 1 else {}
        for kind in KINDS[:-1]:
            device = self.device if kind == "batches" and self.backend == "nccl" else torch.device("cpu")
            self.wires[kind] = Wire(kind, self.traffic, groups.get(kind), self.size, device, self._explain)
        self._placement = placement

    def _form_groups(self) -> dict[str, dist.ProcessGroup]:
        timeout = timedelta(seconds=self.card.timeout)
        try:
            dist.init_process_group("gloo", store=self.store, rank=self.rank, world_size=self.size, timeout=timeout)
            groups = {
                kind: dist.new_group(backend=self.backend if kind == "batches" else "gloo", timeout=timeout)
                for kind in KINDS[:-1]
            }
        except RuntimeError as error:
            raise self._explain("process groups", None) from error
        self._beat(0)
        store = self.store.clone()  # type: ignore[attr-defined]
        threading.Thread(target=self._keep_beating, args=(store,), daemon=True).start()
        self.exchange("connected", True)
        return groups

    def close(self) -> None:
        """Leave together: nobody tears a connection down that another still reads from."""
        if self.size > 1:
            self.exchange("done", True)
            self.exchange("leaving", True)
            if self.is_coordinator:  # it may host the store, so it goes last
                for rank in range(1, self.size):
                    self._get(f"left/{rank}")
            self._leaving.set()
            self.store.set(f"left/{self.rank}", "")
            dist.destroy_process_group()

    def _get(self, key: str) -> bytes:
        try:
            return bytes(self.store.get(key))
        except RuntimeError as error:
            raise self._explain(f"its word on {key!r}", None) from error

    def _beat(self, number: int, store: Store | None = None) -> None:
        (store or self.store).set(f"beat/{self.rank}", f"{number} {self.step}")

    def _keep_beating(self, store: Store) -> None:
        number = 0
        while not self._leaving.wait(BEAT):
            number += 1
            try:
                self._beat(number, store)
            except RuntimeError:
                return  # the store is gone, and the run with it

    def _explain(self, what: str, peer: int | None) -> PeerError:
        """Name the ranks whose heart no longer beats; failing that, the one that was waited for."""
        if self._placement is None:
            return PeerError(f"rank {self.rank} waited in vain for {what}: not all {self.size} ranks have come")
        try:
            if not self.store.check(["verdict"]):
                self.store.set("verdict", self._name_silent(self._placement))
            verdict = bytes(self.store.get("verdict")).decode()  # the first one to notice is right: soon others are gone too
        except RuntimeError:
            verdict = ""
        if not verdict:
            verdict = "lost " + (self._placement.name(peer) if peer is not None else "another rank")
        return PeerError(f"{self._placement.name(self.rank)} at step {self.step} waited in vain for {what}: {verdict}")

    def _name_silent(self, placement: Placement) -> str:
        before = self._beats()
        self._leaving.wait(2.5 * BEAT)
        after = self._beats()
        silent = [
            f"{placement.name(rank)}, last heard of at step {after[rank].split()[1]}"
            for rank in range(self.size)
            if rank != self.rank and before[rank] == after[rank]
        ]
        return f"no sign of life from {'; '.join(silent)}" if silent else ""

    def _beats(self) -> dict[int, str]:
        return {rank: bytes(self.store.get(f"beat/{rank}")).decode() for rank in range(self.size)}


def rank_and_size() -> tuple[int, int]:
    """This process's rank and the number of ranks, from torchrun's environment (0 of 1 without it)."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def choose_device(card: ParallelCard, local_rank: int, local_size: int) -> tuple[torch.device, str]:
    """The device of this rank and the backend that carries its batches. Raises UserError for what is not there."""
    gpus = torch.cuda.device_count() if card.device != "cpu" else 0
    if card.device == "cuda" and not gpus:
        raise UserError("parallel.device: cuda was asked for, but torch sees no GPU here; use cpu or auto")
    own_gpu = gpus >= local_size > 0 and dist.is_nccl_available()
    if card.backend == "nccl" and not own_gpu:
        raise UserError(
            f"parallel.backend: nccl needs a GPU for each of the {local_size} local ranks, there are {gpus}; use gloo or auto"
        )
    backend = "nccl" if own_gpu and card.backend != "gloo" else "gloo"
    return torch.device(f"cuda:{local_rank % gpus}" if gpus else "cpu"), backend


def set_threads(card: ParallelCard) -> int:
    """CPU threads of this rank: the card's, else $OMP_NUM_THREADS, else cores / local ranks. Returns the number."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = card.threads or _omp_num_threads() or max(1, cores // local)
    torch.set_num_threads(threads)
    return threads


def _omp_num_threads() -> int:
    """$OMP_NUM_THREADS as the user gave it, else 0. torchrun sets it to 1 by itself, yet not where its own process began."""
    value = os.environ.get("OMP_NUM_THREADS", "")
    if value == "1" and "TORCHELASTIC_RUN_ID" in os.environ:
        with contextlib.suppress(OSError):
            given = Path(f"/proc/{os.getppid()}/environ").read_bytes().split(b"\0")
            value = next((item.partition(b"=")[2].decode() for item in given if item.startswith(b"OMP_NUM_THREADS=")), "")
    return int(value) if value.isdecimal() else 0
