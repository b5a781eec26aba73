"""A fleet's workers, and the batches that they fetch: what runs on Ray actors."""

from __future__ import annotations

import os
import sys
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import ray
from ray import cloudpickle

from noprop_dist.config import Card
from noprop_dist.data import DataInfo, open_data
from noprop_dist.interruption import Interruption
from noprop_dist.units import Pair, Report, Workbench, training_batches

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers need not have this file

CHUNK = 16  # batches a message
CACHED = 32  # chunks: blocks that are not far from each other share what is read once


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)
class Batches:
    """The data, where the driver is; batches go out through Ray's object store."""

    def __init__(self, card: dict[str, Any]) -> None:
        self._card = Card.model_validate(card)
        self._data = open_data(self._card.data)
        self._cache: OrderedDict[range, Any] = OrderedDict()

    def get(self, steps: range) -> list[Any]:
        """The batches of those steps: a list of one reference, so that all who ask read the same object."""
        if steps not in self._cache:
            self._cache[steps] = ray.put(list(training_batches(self._card, self._data, steps)))
            if len(self._cache) > CACHED:
                self._cache.popitem(last=False)
        self._cache.move_to_end(steps)
        return [self._cache[steps]]


@ray.remote(max_concurrency=2)  # to be asked and stopped while it trains
class Worker:
    """Trains one block at a time."""

    def __init__(self, card: dict[str, Any], info: dict[str, Any], batches: Any) -> None:
        self._bench = Workbench(Card.model_validate(card), DataInfo.from_json(info))
        self._batches, self._interruption = batches, Interruption()
        self._waited, self._bytes = 0.0, 0

    def hello(self) -> str:
        """Who this is."""
        return f"pid {os.getpid()} on {ray.util.get_node_ip_address()}"

    def train(self, index: int, state: bytes | None, steps: range, values: Mapping[int, Any]) -> tuple[Report, bytes, Work]:
        """See :meth:`noprop_dist.units.Workbench.train`."""
        begin, self._waited, self._bytes = time.perf_counter(), 0.0, 0
        report = self._bench.train(index, state, steps, self._fetch(steps), values, self._interruption)
        state = self._bench.state()
        return report, state, Work(time.perf_counter() - begin, self._waited, self._bytes)

    def progress(self) -> tuple[int, int]:
        """The block that it has in hand and the steps that this has done."""
        return self._bench.progress

    def stop(self) -> None:
        """Finish the step under way, and no more."""
        self._interruption.ask("the driver")

    def _fetch(self, steps: range) -> Iterator[Pair]:
        """One chunk ahead. Chunks are cut at the same steps for every block."""
        edges = sorted({steps.start, steps.stop, *(step for step in steps if step % CHUNK == 0)})
        chunks = [range(*pair) for pair in pairwise(edges)]
        ahead = self._batches.get.remote(chunks[0]) if chunks else None
        for number in range(len(chunks)):
            begin = time.perf_counter()
            pairs = ray.get(ray.get(ahead)[0])
            self._waited += time.perf_counter() - begin
            if number + 1 < len(chunks):
                ahead = self._batches.get.remote(chunks[number + 1])
            for images, labels in pairs:
                self._bytes += images.nbytes + labels.nbytes
                yield images, labels


@dataclass
class Work:
    """What a stretch of work took."""

    seconds: float
    waited: float
    """Seconds of these in which batches were not there yet."""
    bytes: int
    """Of batches."""
