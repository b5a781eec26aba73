"""Inference along the chain of blocks: what one rank does with its part of it, and what a whole model does with all of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor

from noprop_dist.config import LOCAL_METHODS, Card
from noprop_dist.data import Pixels
from noprop_dist.method import make_method
from noprop_dist.method.base import Chain, Level, Method, start
from noprop_dist.method.endtoend import EndToEnd
from noprop_dist.nets.block import Block
from noprop_dist.nets.labels import LabelSpace, nearest, squared_distances
from noprop_dist.nets.precision import autocast, lay_out
from noprop_dist.seeding import generator

PATHS = ("mean", "stochastic", "average")
Watch = Callable[["Moment"], None]


@dataclass(frozen=True)
class Scores:
    """Accuracies (0–1) on a test set: by each way of predicting, and of every used block's own û on the mean path (none for a
    baseline)."""

    mean: float
    stochastic: float
    average: float
    blocks: tuple[float, ...]


@dataclass(frozen=True)
class Moment:
    """A block at work at inference: what it was given, and what it made of that. R rows: the mean path, stochastic chains."""

    block: int
    time: float
    """From 0 to 1, of z; t/T for DT."""
    z: Tensor
    """(R, B, d)."""
    estimate: Tensor
    """û (R, B, d), see :meth:`~noprop_dist.method.base.Method.estimate`."""


class Segment:
    """Blocks of a chain, ready for inference: all of them, or those of one rank.

    ``card.inference`` says how many chains run and where they end. Noise is a pure function of (run.seed, step of the chain,
    batch number), drawn on the CPU, so that a chain gives the same result however it is cut into segments.
    """

    def __init__(self, card: Card, blocks: Mapping[int, Block], embedding: Tensor, pixels: Pixels) -> None:
        self._card, self.embedding, self.pixels = card, embedding, pixels
        self._method: Method | None = make_method(card) if card.method.name in LOCAL_METHODS else None
        self._chain: Chain = self._method or EndToEnd()
        self.used = card.inference.blocks or card.units
        self.guessing = self.used if self._method else 0  # a baseline has no û
        self.blocks = {index: block.eval() for index, block in blocks.items() if index < self.used}
        self.device = embedding.device

    def start(self, size: int, batch: int) -> Tensor:
        """Paths of batch number ``batch`` before the first block, (rows, size, d); see method.base."""
        return start(self._noise(0, size, batch))

    def empty(self, size: int) -> Tensor:
        """A tensor of the shape of paths, on the CPU."""
        return torch.empty(self._card.inference.samples + 2, size, self.embedding.shape[1])

    @torch.no_grad()
    def encode(self, images: Tensor) -> dict[int, Tensor]:
        """Every block's features of uint8 images (B, C, H, W)."""
        x = lay_out(self._card.train, self.pixels.normalise(images))
        with autocast(self._card.train, self.device):
            return {index: block.encode(x) for index, block in self.blocks.items()}

    @torch.no_grad()
    def advance(
        self, features: Mapping[int, Tensor], paths: Tensor, batch: int, watch: Watch | None = None
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Take the paths through these blocks. Also returns the class (B,) that each block's û names on the mean path.

        ``watch`` is told of every call of a block of NoProp; a solver may call it between its steps too.
        """
        guesses = {}

        def noise(number: int) -> Tensor:
            return self._noise(number, paths.shape[1], batch)

        for index, block in self.blocks.items():

            def denoise(z: Tensor, time: Tensor | None, block: Block = block, index: int = index) -> Tensor:
                rows = features[index].repeat(len(z), 1)
                times = None if time is None else time.reshape(1)
                with autocast(self._card.train, self.device):
                    output = block.denoise(z.flatten(0, 1), rows, self.embedding, times).view_as(z)
                if watch is not None and self._method is not None:
                    when = index / self._card.units if time is None else float(time)
                    watch(Moment(index, when, z, self._method.estimate(output.float(), z, time)))
                return output

            paths, estimate = self._chain.advance(index, denoise, paths, noise, self.used, block.gamma)
            if self.guessing:
                guesses[index] = nearest(estimate, self.embedding)
        return paths, guesses

    def level(self, index: int, time: float) -> Level:
        """What the forward process makes of z at a time (0 to 1) of block ``index``, one of these; not for a baseline."""
        assert self._method is not None
        return self._method.level(time, self.blocks[index].gamma)

    def _noise(self, number: int, size: int, batch: int) -> Tensor:
        shape = (self._card.inference.samples, size, self.embedding.shape[1])
        return torch.randn(shape, generator=generator(self._card.run.seed, "inference", number, batch)).to(self.device)


def logits(card: Card, labels: LabelSpace, z: Tensor) -> Tensor:
    """Class logits (…, m) of latents (…, d), read by the head or as the nearest embedding (``inference.readout``)."""
    readout = card.inference.readout
    if readout == "nearest" or (readout == "auto" and card.method.name == "fm"):
        return squared_distances(z, labels.embedding) / -2
    return cast(Tensor, labels(z))


@torch.no_grad()
def read_out(card: Card, labels: LabelSpace, paths: Tensor) -> Tensor:
    """Log-probabilities (3, B, m) from finished paths, in the order of PATHS; several stochastic chains are averaged."""
    found = logits(card, labels, paths).log_softmax(dim=-1)  # finite, where the logarithm of a softmax need not be
    return torch.stack([found[0], found[1:-1].logsumexp(dim=0) - math.log(len(found) - 2), found[-1]])


@dataclass
class Tally:
    """Counts hits over a test set."""

    seen: int = 0
    hits: Tensor = field(default_factory=lambda: torch.zeros(len(PATHS), dtype=torch.int64))
    named: list[Tensor] = field(default_factory=list)
    """Of each batch the classes: the right ones, then those that each of PATHS names, (4, B) on the CPU."""
    blocks: dict[int, int] = field(default_factory=dict)

    def chain(self, log_probabilities: Tensor, labels: Tensor) -> None:
        """Add a batch of :func:`read_out` (3, B, m) against labels (B,)."""
        self.seen += len(labels)
        answers = log_probabilities.argmax(dim=-1)
        self.hits += (answers == labels).sum(dim=1).cpu()
        self.named.append(torch.cat([labels[None], answers]).cpu())

    def estimates(self, guesses: Mapping[int, Tensor], labels: Tensor) -> None:
        """Add a batch of the blocks' guesses (B,)."""
        for index, guess in guesses.items():
            self.blocks[index] = self.blocks.get(index, 0) + int((guess == labels).sum())

    def scores(self, used: int) -> Scores:
        """Hits as shares; the first ``used`` blocks have guessed."""
        mean, stochastic, average = (hits / self.seen for hits in self.hits.tolist())
        return Scores(mean, stochastic, average, tuple(self.blocks[index] / self.seen for index in range(used)))
