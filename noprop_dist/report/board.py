"""Scalars to TensorBoard; the coordinator alone writes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter


class Board:
    """TensorBoard event files in ``folder``; scalars of steps after ``start`` that an earlier, cut-off run wrote are hidden."""

    def __init__(self, folder: Path, start: int) -> None:
        self._writer = SummaryWriter(str(folder), purge_step=start + 1)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """One value per tag."""
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, step)
        self._writer.flush()

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()
