"""All pictures of a model, from one look at it: what ``plot`` writes and what TensorBoard gets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from noprop_dist.config import LOCAL_METHODS, Card
from noprop_dist.data import DataInfo, Pixels
from noprop_dist.report import figures
from noprop_dist.report.denoising import denoising, film
from noprop_dist.viewing import Course, Viewing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

IMAGES = 5
"""Of the watched ones, how many are drawn in a model's own pictures."""


class LeftOut(Exception):
    """Why there is no such picture."""


@dataclass(frozen=True)
class Scene:
    """A model, as it is to be drawn."""

    card: Card
    info: DataInfo
    viewing: Viewing
    start: Tensor | None = None
    """CT: a learned schedule at its start, as :attr:`Viewing.gamma`."""
    medoids: Tensor | None = None
    """What prototypes began as, float32 (m, d)."""
    blind: str = ""
    """Why there are no test images."""

    @property
    def course(self) -> Course:
        """Raises LeftOut where there is none."""
        if self.card.method.name not in LOCAL_METHODS:
            raise LeftOut(f"{self.card.method.name} is trained end to end: it has no z on the way that means anything")
        if self.viewing.course is None:
            raise LeftOut(self.blind or f"z has {self.viewing.embedding.shape[1]:,} numbers, too many to keep at every step")
        if not self.viewing.course.z.isfinite().all():
            raise LeftOut("z is not finite: the model has diverged")
        return self.viewing.course


def gallery() -> Mapping[str, Callable[[Scene], Figure]]:
    """The pictures by name. Each raises LeftOut where there is nothing to draw."""
    return {
        "denoising": lambda scene: denoising(scene.course, scene.info.classes, "stochastic", IMAGES),
        "denoising-mean": lambda scene: denoising(scene.course, scene.info.classes, "mean", IMAGES),
        "paths": lambda scene: figures.paths(scene.course, scene.viewing.embedding, scene.info.classes),
        "confusion": _confusion,
        "schedule": _schedule,
        "embeddings": _embeddings,
        "prototypes": _prototypes,
    }


def make_film(scene: Scene) -> bytes:
    """The GIF of denoising. Raises LeftOut."""
    return film(scene.course, scene.info.classes)


def _confusion(scene: Scene) -> Figure:
    if scene.viewing.named is None:
        raise LeftOut(scene.blind)
    return figures.confusion(scene.viewing.named, scene.info.classes)


def _schedule(scene: Scene) -> Figure:
    if scene.card.method.name not in LOCAL_METHODS:
        raise LeftOut(f"{scene.card.method.name} has none")
    return figures.schedule(scene.card, scene.viewing.gamma, scene.start)


def _embeddings(scene: Scene) -> Figure:
    if scene.card.model.embedding == "one-hot":
        raise LeftOut("one-hot ones are fixed, and all equally far apart")
    if not scene.viewing.embedding.isfinite().all():
        raise LeftOut("they are not finite: the model has diverged")
    return figures.embeddings(scene.viewing.embedding, scene.info.classes)


def _prototypes(scene: Scene) -> Figure:
    if scene.card.model.embedding != "prototype":
        raise LeftOut(f"embeddings are {scene.card.model.embedding}")
    pictures = Pixels(scene.card.data, scene.info).pictures
    before = None if scene.medoids is None else pictures(scene.medoids)
    return figures.prototypes(before, pictures(scene.viewing.embedding), scene.info.classes)
