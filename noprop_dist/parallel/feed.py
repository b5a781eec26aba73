"""Batches to every rank: streamed ahead of need, or picked by each rank from a resident copy of the data set.

A streamed message is one uint8 tensor: the step (int64, 8 bytes), the labels (int32 each), the pixels (uint8).
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
CHUNK = 64 << 20  # bytes of a resident data set per message
SAMPLE = 10_000  # training images on which the finished chain's accuracy is measured


class Batch(NamedTuple):
    """images uint8 (B, C, H, W), labels int64 (B,), both on the rank's device."""

    images: Tensor
    labels: Tensor


def message_size(batch: int, shape: tuple[int, int, int]) -> int:
    """Bytes of one streamed batch of images (C, H, W)."""
    channels, height, width = shape
    return HEADER + batch * (4 + channels * height * width)


def pack(step: int, images: Tensor, labels: Tensor) -> Tensor:
    """One uint8 message from uint8 images (B, C, H, W) and labels (B,)."""
    header = torch.tensor([step]).view(torch.uint8)
    return torch.cat([header, labels.to(torch.int32).view(torch.uint8), images.contiguous().flatten()])


def unpack(message: Tensor, shape: tuple[int, int, int]) -> tuple[int | None, Batch]:
    """The step (None for a message on a GPU: reading it would wait for all its work) and the batch; views where possible."""
    batch = (len(message) - HEADER) // (message_size(1, shape) - HEADER)
    labels = message[HEADER : HEADER + 4 * batch].view(torch.int32).long()
    images = message[HEADER + 4 * batch :].view(batch, *shape)
    return None if message.is_cuda else int(message[:HEADER].view(torch.int64)), Batch(images, labels)


class Feed:
    """Batches for all ranks of a run, in the same order on each.

    ``train(start, stop)`` yields the batches of those steps, ``test()`` the test set's, ``sample()`` the first training images.
    What step s holds is a pure function of (seed, s), so any step can come next. Data are there on the coordinator only.
    """

    def __init__(self, card: Card, info: DataInfo, world: World, data: DataSet | None) -> None:
        self._card, self._info, self._world = card, info, world
        self._wire: Wire = world.wires["batches"]
        self._splits: dict[str, Split | None] = {
            "train": data.train if data else None,
            "test": data.test if data else None,
        }
        self._resident: dict[str, Batch] = {}
        if card.parallel.feed == "resident":
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

        return self._batches("train", indices, range(start, stop))

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

        return self._batches(name, indices, range(-(-size // batch_size)))

    def _batches(self, name: str, indices: Callable[[int], Tensor], steps: range) -> Iterator[Batch]:
        if self._resident:
            images, labels = self._resident[name]
            for step in steps:
                chosen = indices(step).to(labels.device)
                yield Batch(images[chosen], labels[chosen])
        else:
            yield from self._stream(self._splits[name], indices, steps)

    def _stream(self, split: Split | None, indices: Callable[[int], Tensor], steps: range) -> Iterator[Batch]:
        """Post each batch ``prefetch`` steps ahead. All ranks run this, so their broadcasts are in the same order."""
        source = iter(split.batches(indices(step) for step in steps)) if split else None
        ahead = deque(self._post(step, source, len(indices(step))) for step in steps[: self._card.parallel.prefetch])
        for step in steps:
            coming = step + self._card.parallel.prefetch
            if coming in steps:
                ahead.append(self._post(coming, source, len(indices(coming))))
            arrived, batch = unpack(ahead.popleft().wait(), self._info.shape)
            if arrived not in (step, None):
                raise PeerError(f"rank {self._world.rank} expected the batch of step {step}, got that of {arrived}")
            yield Batch(*(tensor.to(self._world.device, non_blocking=True) for tensor in batch))

    def _post(self, step: int, source: Iterator[tuple[Tensor, Tensor]] | None, batch: int) -> Pending:
        message = (
            pack(step, *next(source))
            if source
            else torch.empty(message_size(batch, self._info.shape), dtype=torch.uint8, device=self._wire.device)
        )
        return self._wire.broadcast(message, step)

    def _broadcast_all(self, name: str, size: int) -> Batch:
        split = self._splits[name]
        loaded: list[tuple[Tensor, Tensor]] = []

        def load() -> bool:
            loaded.extend([split.load()] if split else [])
            return True

        self._world.publish(f"loaded {name}", load, patient=True)
        chunk = max(1, CHUNK // message_size(1, self._info.shape))
        batches = []
        for start in range(0, size, chunk):
            part = slice(start, min(start + chunk, size))
            source = iter([(images[part], labels[part]) for images, labels in loaded]) if loaded else None
            message = self._post(start, source, part.stop - start).wait()
            batches.append(unpack(message.to(self._world.device), self._info.shape)[1])
        return Batch(*(torch.cat(tensors) for tensors in zip(*batches, strict=True)))
