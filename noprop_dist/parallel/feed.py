"""Batches to every rank: streamed ahead of need, or picked by each rank from a resident copy of the data set.

A message is one uint8 tensor: the step (int64, 8 bytes), then, where batches are streamed, labels (int32 each), pixels (uint8).
Once the run is asked to stop, the coordinator sends STOP as the step, and so all ranks end after the same one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from noprop_dist.config import Card
from noprop_dist.data import DataInfo, DataSet, Split, test_indices, train_indices
from noprop_dist.parallel.traffic import PeerError, Pending, Wire
from noprop_dist.parallel.world import World

HEADER = 8  # bytes
STOP = -1
CHUNK = 64 << 20  # bytes of a resident data set per message
AHEAD, LEAST, MOST = 1 << 20, 2, 8  # of batches that travel ahead: bytes, and how many
SAMPLE = 10_000  # training images on which the finished chain's accuracy is measured


class Batch(NamedTuple):
    """images uint8 (B, C, H, W), labels int64 (B,), both on the rank's device."""

    images: Tensor
    labels: Tensor


def message_size(batch: int, shape: tuple[int, int, int]) -> int:
    """Bytes of one streamed batch of images (C, H, W)."""
    channels, height, width = shape
    return HEADER + batch * (4 + channels * height * width)


def pack(step: int, images: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
    """One uint8 message from a step and, of a streamed batch, uint8 images (B, C, H, W) and labels (B,)."""
    header = torch.tensor([step]).view(torch.uint8)
    if images is None or labels is None:
        return header
    return torch.cat([header, labels.to(torch.int32).view(torch.uint8), images.contiguous().flatten()])


def unpack(message: Tensor, shape: tuple[int, int, int]) -> Batch:
    """The batch that :func:`pack` was given (empty where there was none); a view where possible."""
    batch = (len(message) - HEADER) // (message_size(1, shape) - HEADER)
    labels = message[HEADER : HEADER + 4 * batch].view(torch.int32).long()
    return Batch(message[HEADER + 4 * batch :].view(batch, *shape), labels)


def step_of(message: Tensor) -> int:
    """The step that :func:`pack` was given."""
    # on a stream of its own: on the current one, reading would first wait for all work under way
    aside = torch.cuda.Stream(message.device) if message.is_cuda else None  # type: ignore[no-untyped-call]
    with torch.cuda.stream(aside):  # does nothing with None
        return int(message[:HEADER].view(torch.int64))


def _carry(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor`` on ``device``; to a GPU from pinned memory, for else its copy would first wait for all work under way."""
    if device.type == "cuda" and not tensor.is_cuda:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class Feed:
    """Batches for all ranks of a run, in the same order on each.

    ``train(start, stop)`` yields the batches of those steps, ``test()`` the test set's, ``sample()`` the first training images.
    What step s holds is a pure function of (seed, s), so any step can come next. Data are there on the coordinator only.
    Batches end early where the run was asked to stop; ``stopped`` tells.
    """

    def __init__(self, card: Card, info: DataInfo, world: World, data: DataSet | None) -> None:
        self._card, self._info, self._world = card, info, world
        self._streams = card.parallel.feed == "stream"
        self._wire: Wire = world.wires["batches" if self._streams else "scalars"]
        self.stopped = False
        self._splits: dict[str, Split | None] = {
            "train": data.train if data else None,
            "test": data.test if data else None,
        }
        self._resident: dict[str, Batch] = {}
        if not self._streams:
            self._resident = {
                "train": self._broadcast_all("train", info.train_size),
                "test": self._broadcast_all("test", info.test_size),
            }

    @property
    def training_set(self) -> Split | None:
        """On the coordinator."""
        return self._splits["train"]

    def train(self, start: int, stop: int) -> Iterator[Batch]:
        """The batches of steps start…stop−1."""
        info, card = self._info, self._card

        def indices(step: int) -> Tensor:
            return train_indices(
                card.run.seed,
                step,
                size=info.train_size,
                batch_size=card.data.batch_size,
                overfit_batches=card.debug.overfit_batches,
            )

        return self._batches("train", indices, range(start, stop), card.data.batch_size)

    def test(self) -> Iterator[Batch]:
        """The whole test set in batches of ``inference.batch_size``, the last one shorter."""
        return self._in_order("test", self._info.test_size)

    def sample(self) -> Iterator[Batch]:
        """The first training images, SAMPLE at most, in batches as :meth:`test` has them."""
        return self._in_order("train", min(SAMPLE, self._info.train_size))

    def _in_order(self, name: str, size: int) -> Iterator[Batch]:
        batch_size = self._card.inference.batch_size

        def indices(batch: int) -> Tensor:
            return test_indices(batch, size=size, batch_size=batch_size)

        return self._batches(name, indices, range(-(-size // batch_size)), batch_size)

    def _batches(self, name: str, indices: Callable[[int], Tensor], steps: range, size: int) -> Iterator[Batch]:
        """Announce each step, of ``size`` images, some ahead. All ranks run this: their broadcasts are in the same order."""
        prefetch = self._card.parallel.prefetch
        if prefetch is None:
            prefetch = min(max(AHEAD // message_size(size, self._info.shape), LEAST), MOST)
        split = self._splits[name] if self._streams else None
        source = iter(split.batches(indices(step) for step in steps)) if split else None
        ahead = deque(self._announce(step, source, len(indices(step))) for step in steps[:prefetch])
        for step in steps:
            coming = step + prefetch
            if coming in steps:
                ahead.append(self._announce(coming, source, len(indices(coming))))
            message = ahead.popleft().wait()
            if (announced := step_of(message)) == STOP:
                self.stopped = True
                for pending in ahead:
                    pending.wait()
                return
            if announced != step:
                raise PeerError(f"rank {self._world.rank} expected the batch of step {step}, got that of {announced}")
            if self._streams:
                yield unpack(_carry(message, self._world.device), self._info.shape)
            else:
                images, labels = self._resident[name]
                chosen = _carry(indices(step), labels.device)
                yield Batch(images[chosen], labels[chosen])

    def _announce(self, step: int, source: Iterator[tuple[Tensor, Tensor]] | None, images: int) -> Pending:
        """Tell all ranks that ``step`` comes, with its batch where batches are streamed, or that the run stops."""
        size = message_size(images, self._info.shape) if self._streams else HEADER
        message = torch.empty(size, dtype=torch.uint8, device=self._wire.device)
        if self._world.is_coordinator:
            if self._world.interruption.reason:
                message[:HEADER] = pack(STOP)
            else:
                with self._world.traffic.waiting(self._wire.kind, step, "reading"):
                    batch = next(source) if source else ()
                message = pack(step, *batch)
        return self._wire.broadcast(_carry(message, self._wire.device), step)

    def _broadcast_all(self, name: str, size: int) -> Batch:
        split, wire = self._splits[name], self._world.wires["batches"]
        loaded: list[tuple[Tensor, Tensor]] = []

        def load() -> bool:
            loaded.extend([split.load()] if split else [])
            return True

        self._world.publish(f"loaded {name}", load, patient=True)
        chunk = max(1, CHUNK // message_size(1, self._info.shape))
        batches = []
        for start in range(0, size, chunk):
            part = slice(start, min(start + chunk, size))
            message = torch.empty(message_size(part.stop - start, self._info.shape), dtype=torch.uint8, device=wire.device)
            for images, labels in loaded:
                message = pack(start, images[part], labels[part])
            batches.append(unpack(wire.broadcast(message, start).wait().to(self._world.device), self._info.shape))
        return Batch(*(torch.cat(tensors) for tensors in zip(*batches, strict=True)))
