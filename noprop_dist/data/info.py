"""What the rest of the program knows about a data set: its facts and its two splits."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from pydantic import PositiveInt, TypeAdapter
from torch import Tensor


@dataclass(frozen=True)
class DataInfo:
    """The facts of a data set. Small and plain: it travels to every rank and into every checkpoint's manifest."""

    name: str
    shape: tuple[PositiveInt, PositiveInt, PositiveInt]
    """(C, H, W) of every image."""
    classes: tuple[str, ...]
    """Class names; label i is classes[i]."""
    train_size: int
    test_size: int
    mean: tuple[float, ...]
    """Per channel, over the training pixels scaled to 0..1."""
    std: tuple[float, ...]
    """As mean; 1 for a channel that never varies."""

    def to_json(self) -> dict[str, Any]:
        """The fields by name, ready for json.dump."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> DataInfo:
        """The inverse of :meth:`to_json`, also after a trip through JSON, which turns tuples into lists.

        Raises pydantic's ValidationError for other values than a data set's.
        """
        return _CHECKED.validate_python(values)


_CHECKED = TypeAdapter(DataInfo)


class Split(Protocol):
    """The training or the test half of a data set."""

    def __len__(self) -> int: ...

    @property
    def labels(self) -> Tensor:
        """All labels, int64 (N,). Not to be written to."""
        ...

    def batches(self, indices: Iterable[Tensor]) -> Iterable[tuple[Tensor, Tensor]]:
        """For each int64 (B,) index tensor, in order: images uint8 (B, C, H, W) and labels int64 (B,).

        Lazy: ``indices`` may be endless. Raises :class:`~noprop_dist.config.UserError` for an unreadable picture.
        """
        ...

    def load(self) -> tuple[Tensor, Tensor]:
        """The whole split in memory: images uint8 (N, C, H, W) and labels int64 (N,). Not to be written to."""
        ...


@dataclass(frozen=True)
class DataSet:
    info: DataInfo
    train: Split
    test: Split


def moments(chunks: Iterable[Tensor]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Exact mean and standard deviation per channel of uint8 (B, C, H, W) chunks, of pixels scaled to 0..1.

    Counts how often each of the 256 values occurs, so that nothing is ever held in floating point.
    """
    counts = sum(
        torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in chunk.unbind(1)]) for chunk in chunks
    )
    weights = torch.as_tensor(counts).double()
    weights /= weights.sum(1, keepdim=True)
    levels = torch.arange(256, dtype=torch.float64) / 255
    mean = weights @ levels
    std = (weights * (levels - mean[:, None]) ** 2).sum(1).sqrt()
    varies = (weights > 0).sum(1) > 1
    return tuple(mean.tolist()), tuple(torch.where(varies, std, 1.0).tolist())
