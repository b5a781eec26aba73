"""What one step teaches the modules of a rank: NoProp's local losses, or a baseline's single one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, cast

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from noprop_dist.config import LOCAL_METHODS, Card
from noprop_dist.data import Pixels
from noprop_dist.learner import Learner, update
from noprop_dist.method import make_method
from noprop_dist.method.base import Draw, Gamma, squared_loss
from noprop_dist.nets.block import Block
from noprop_dist.nets.labels import LabelSpace, nearest
from noprop_dist.nets.precision import autocast, lay_out
from noprop_dist.nets.step import Pass
from noprop_dist.seeding import reseed


class Log(Protocol):
    """Who wants to know what a step was like, see :class:`~noprop_dist.metrics.RunLog`."""

    def add(self, indices: Sequence[int], losses: Tensor, hits: Tensor) -> None: ...

    def debug(self, index: int, norm: float, tensors: Mapping[str, Tensor]) -> None: ...


class Means:
    """A :class:`Log` that adds everything up: ``means`` of loss and of hits so far."""

    def __init__(self) -> None:
        self._sums, self._count = torch.zeros(2, dtype=torch.float64), 0

    def add(self, indices: Sequence[int], losses: Tensor, hits: Tensor) -> None:
        self._sums = self._sums.to(losses.device) + torch.stack([losses.double().sum(), hits.double().mean(dim=1).sum()])
        self._count += len(indices)

    def debug(self, index: int, norm: float, tensors: Mapping[str, Tensor]) -> None:
        pass

    @property
    def means(self) -> list[float]:
        return (self._sums / max(1, self._count)).tolist()


class Lesson(Protocol):
    """Everything random in it is seeded by (run.seed, what it is for, step): neither ranks nor resumes matter."""

    def teach(self, step: int, x: Tensor, y: Tensor, log: Log) -> None:
        """One optimizer step of this rank's modules on images x (B, C, H, W), ready for a network, and labels y (B,)."""
        ...


def prepare(card: Card, pixels: Pixels, step: int, images: Tensor) -> Tensor:
    """What networks see of uint8 images (B, C, H, W) in a training step: augmented, normalised, laid out."""
    reseed(images.device, card.run.seed, "augment", step)
    return lay_out(card.train, pixels.normalise(pixels.augment(images)))


class LabelLesson:
    """NoProp: what the label space learns, from labels alone. ``gamma``: the schedule that a single block learns."""

    def __init__(self, card: Card, labels: Learner, gamma: Gamma | None = None) -> None:
        self._card, self._labels, self._gamma = card, labels, gamma
        self._method = make_method(card)

    def teach(self, step: int, y: Tensor) -> None:
        """One optimizer step on labels y (B,)."""
        reseed(y.device, self._card.run.seed, "labels", step)
        own = cast(LabelSpace, self._labels.module)
        u = own.embedding[y]
        loss = cross_entropy(own(self._method.final_latent(u, self._gamma)), y)
        if u.requires_grad:  # else the prior's term is a constant
            loss = loss + self._method.prior_loss(u, self._gamma)
        update(loss, step, self._labels)


class Local:
    """NoProp: every block learns by its own loss, and the label space, where this rank owns it, by its own.

    Args:
        labels: the label space's learner; None on ranks that do not own it.
        seen: the label space as blocks know it, constants of the step (see parallel.publication).
    """

    def __init__(self, card: Card, blocks: Mapping[int, Learner], labels: Learner | None, seen: LabelSpace) -> None:
        self._card, self._blocks, self._seen = card, blocks, seen
        self._method = make_method(card)
        self._passes = {index: Pass(card.train, cast(Block, learner.module)) for index, learner in blocks.items()}
        self._to_capture = card.parallel.cuda_graphs
        # block 0's schedule is of use where it has all of the time, and so is here
        self._labels = LabelLesson(card, labels, cast(Block, blocks[0].module).gamma) if labels else None

    def teach(self, step: int, x: Tensor, y: Tensor, log: Log) -> None:
        """See :class:`Lesson`."""
        card, method, seen = self._card, self._method, self._seen
        taught: dict[int, tuple[Tensor, Tensor]] = {}
        u = seen.embedding[y]
        if self._to_capture:
            self._capture(x, u)
        for index, learner in self._blocks.items():
            if step < learner.steps:  # it was saved when another rank was lost, after the checkpoint
                continue
            reseed(x.device, card.run.seed, "block", index, step)
            block = cast(Block, learner.module)
            if not block.training:  # an evaluation came between; asking costs less than telling all layers anew
                block.train()
            draw = method.draw(index, u, seen.embedding[self._mislabel(y)], block.gamma)
            output, features = self._passes[index](*_inputs(draw, x, seen.embedding))
            extra = method.extra_loss(output, draw, u, lambda z: cross_entropy(seen(z), y), block.gamma)
            loss = squared_loss(output, draw) + extra
            update(loss, step, learner)
            taught[index] = loss.detach(), method.estimate(output.detach(), draw.z.detach(), draw.time)
            if card.debug.enabled:
                log.debug(index, learner.gradient_norm(), {"x": x, "features": features, "z": draw.z, "û": output})
        if taught:  # of all blocks at once: small operations cost more by the piece than by the pound
            losses, estimates = (torch.stack(tensors) for tensors in zip(*taught.values(), strict=True))
            log.add([*taught], losses, nearest(estimates, seen.embedding) == y)
        if self._labels:
            self._labels.teach(step, y)

    def _capture(self, x: Tensor, u: Tensor) -> None:
        """Blocks run one after the other, and so their graphs share what memory they need in between."""
        pool, self._to_capture = torch.cuda.graph_pool_handle(), False
        for index, each in self._passes.items():
            draw = self._method.draw(index, u, u, each.block.train().gamma)
            each.capture(pool, *_inputs(draw, x, self._seen.embedding))

    def _mislabel(self, y: Tensor) -> Tensor:
        """Labels (B,), each another one with probability label_noise."""
        share, classes = self._card.method.label_noise, len(self._seen.embedding)
        if not share:
            return y
        wrong = (y + torch.randint(1, classes, y.shape, device=y.device)) % classes
        return torch.where(torch.rand(y.shape, device=y.device) < share, wrong, y)


def _inputs(draw: Draw, x: Tensor, embedding: Tensor) -> list[Tensor]:
    return [draw.z, x, embedding, *([] if draw.time is None else [draw.time])]


class EndToEnd:
    """A baseline: cross-entropy at the head trains the one network, the head and W together."""

    def __init__(self, card: Card, network: Learner, labels: Learner) -> None:
        self._card, self._network, self._labels = card, network, labels

    def teach(self, step: int, x: Tensor, y: Tensor, log: Log) -> None:
        """See :class:`Lesson`."""
        card = self._card
        reseed(x.device, card.run.seed, "block", 0, step)
        network, labels = cast(Block, self._network.module).train(), cast(LabelSpace, self._labels.module)
        z = torch.randn(len(y), labels.embedding.shape[1], device=x.device)
        with autocast(card.train, x.device):
            features = network.encode(x)
            z = network.denoise(z, features, labels.embedding)
        logits = labels(z.float())
        loss = cross_entropy(logits, y)
        update(loss, step, self._network, self._labels)
        log.add([0], loss.detach()[None], logits.detach().argmax(dim=1)[None] == y)
        if card.debug.enabled:
            log.debug(0, self._network.gradient_norm(), {"x": x, "features": features, "z": z, "logits": logits})


def make_lesson(card: Card, blocks: Mapping[int, Learner], labels: Learner, seen: LabelSpace, owns_labels: bool) -> Lesson:
    """The lesson of the card's method, for this rank's blocks and, where it owns it, the label space."""
    if card.method.name in LOCAL_METHODS:
        return Local(card, blocks, labels if owns_labels else None, seen)
    return EndToEnd(card, blocks[0], labels)


def travelling(card: Card, labels: LabelSpace) -> tuple[str, ...]:
    """Parameters of the label space that blocks on other ranks rely on and that change: W where it is learned; the head too
    where a block's own loss reads it (see the methods' ``extra_loss``)."""
    method, model = card.method, card.model
    if method.name not in LOCAL_METHODS:
        return ()
    if (method.name == "fm" and labels.learned) or (method.schedule == "learned" and model.blocks == 1):
        return tuple(name for name, _ in labels.named_parameters())
    return ("embedding",) if labels.learned else ()
