"""Scalars and pictures to TensorBoard; the coordinator alone writes."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from pathlib import Path

from torch.nn import functional
from torch.utils.tensorboard import SummaryWriter

from noprop_dist.config import Card
from noprop_dist.data import DataInfo, Pixels
from noprop_dist.model import fresh_schedules
from noprop_dist.report.console import log
from noprop_dist.report.drawing import pixels
from noprop_dist.report.gallery import LeftOut, Scene, gallery
from noprop_dist.viewing import Viewing, as_curve

DPI = 80
"""Of pictures, which a training run waits for."""
SHARE = 0.1
"""Of a run's time that drawing takes, at most; but for the first pictures and the last."""
ROWS, SIDE, NUMBERS = 1000, 48, 2**20
"""Of the projector: embeddings at most, pixels a side of their pictures, numbers in all."""


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


class PictureBoard:
    """Pictures of a model as it learns, in event files of their own in ``folder``, and its embeddings for the projector.

    Opens a file with the first picture; those of that step and later ones, which an earlier, cut-off run wrote, are hidden.
    """

    def __init__(self, folder: Path, card: Card, info: DataInfo) -> None:
        self._folder, self._card, self._info = folder, card, info
        self._writer: SummaryWriter | None = None
        self._failed = False
        self._began, self._spent = time.monotonic(), 0.0

    def show(self, step: int, viewing: Viewing, *, last: bool = False) -> None:
        """Draw what there is, unless that has taken too long so far. A failure is told, and ends the drawing, not the run."""
        begin = time.monotonic()
        if self._failed or (self._spent > SHARE * (begin - self._began) and not last):
            return
        try:
            self._show(step, viewing)
        except Exception as error:  # matplotlib, sklearn, a disk: no picture is worth a run
            self._failed = True
            log.warning("no more pictures for TensorBoard: %s: %s", type(error).__name__, " ".join(str(error).split()))
        self._spent += time.monotonic() - begin

    def close(self) -> None:
        """Write what is left."""
        if self._writer:
            self._writer.close()

    def _show(self, step: int, viewing: Viewing) -> None:
        if self._writer is None:
            self._writer = SummaryWriter(str(self._folder), purge_step=step)
            self._start = as_curve(self._card, fresh_schedules(self._card, self._info))
        scene = Scene(self._card, self._info, viewing, self._start)
        for name, make in gallery().items():
            if name == "denoising-mean" or (name == "schedule" and viewing.gamma is None):  # much alike; never changes
                continue
            try:
                self._writer.add_image(name, pixels(make(scene), DPI), step, dataformats="HWC")
            except LeftOut:
                continue
        self._project(step, viewing)
        self._writer.flush()

    def _project(self, step: int, viewing: Viewing) -> None:
        """The embeddings as they are now, in place of earlier ones; one-hot ones never change."""
        rows = min(len(viewing.embedding), ROWS, NUMBERS // viewing.embedding.shape[1])
        if self._card.model.embedding == "one-hot" or not rows or self._writer is None:
            return
        for old in self._folder.glob("*/embeddings"):
            shutil.rmtree(old.parent)
        (self._folder / "projector_config.pbtxt").unlink(missing_ok=True)
        images = None
        if self._card.model.embedding == "prototype":
            pictures = Pixels(self._card.data, self._info).pictures(viewing.embedding[:rows])
            images = functional.interpolate(pictures.float() / 255, (SIDE, SIDE))
        names = list(self._info.classes[:rows])
        self._writer.add_embedding(viewing.embedding[:rows], names, images, step, "embeddings")
