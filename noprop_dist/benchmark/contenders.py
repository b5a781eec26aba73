"""Who runs in the benchmark: the trainer as users start it, a bare loop over the same blocks, back-propagation through them.

Each trains the same blocks from the same batches with the same kind of optimizer, precision and memory format.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, Protocol, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from noprop_dist.config import Card
from noprop_dist.data import DataInfo, DataSet, Pixels, open_data, test_indices
from noprop_dist.launcher import opened, resolve
from noprop_dist.learner import make_optimizer
from noprop_dist.learning import prepare
from noprop_dist.method import make_method
from noprop_dist.method.base import squared_loss
from noprop_dist.model import fresh_block, fresh_labels
from noprop_dist.nets.baselines import Backprop
from noprop_dist.nets.block import Block
from noprop_dist.nets.precision import autocast
from noprop_dist.parallel import rivals
from noprop_dist.parallel.placement import place
from noprop_dist.parallel.world import choose_device, set_threads
from noprop_dist.seeding import reseed
from noprop_dist.units import training_batches

Way = Literal["whole", "recompute", "accumulate", "ddp", "gpipe", "1f1b"]


class Contender(Protocol):
    """One rank's part of it."""

    device: torch.device

    def steps(self) -> Iterator[object]:
        """Train, a step for each item, without end."""
        ...


class Racer(Contender, Protocol):
    """A contender that can be asked how good it has become."""

    def accuracy(self) -> float | None:
        """On the test set, along the mean path, on rank 0; None elsewhere. Every rank calls it."""
        ...


class Trained:
    """The trainer, feed and log and all, as ``train`` starts it."""

    def __init__(self, card: Card, init_method: str) -> None:
        self._stack = contextlib.ExitStack()  # never closed: the process ends with it
        self._trainer, _ = self._stack.enter_context(opened(card, init_method))
        self._log = self._trainer.begin(None)
        self.device, self.traffic = self._trainer.world.device, self._trainer.world.traffic

    def steps(self) -> Iterator[object]:
        """See :class:`Contender`."""
        return self._trainer.steps(self._log)

    def accuracy(self) -> float | None:
        """See :class:`Racer`."""
        scores = self._trainer.evaluate(self._log)
        return None if scores is None else scores.mean


class _Alone:
    """What the others share: data that every rank reads itself, and images made ready as the trainer does it."""

    def __init__(self, card: Card, local_rank: int, local_size: int) -> None:
        set_threads(card.parallel)
        self.device, _ = choose_device(card.parallel, local_rank, local_size)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        self.data: DataSet = open_data(card.data)
        self.info: DataInfo = self.data.info
        self.card = resolve(card, self.info)
        self._pixels = Pixels(self.card.data, self.info)

    def batches(self, rows: slice = slice(None)) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Step, images ready for a network, and labels; of each batch the rows asked for."""
        for step, (images, labels) in enumerate(training_batches(self.card, self.data, itertools.count())):
            x = prepare(self.card, self._pixels, step, images[rows].to(self.device))
            yield step, x, labels[rows].to(self.device)


class Bare(_Alone):
    """A rank's share of the blocks in the plainest loop: the method's loss, backward, optimizer. No feed, no log, no checks.

    N of them at once are the limit of what N ranks can reach on a machine.
    """

    def __init__(self, card: Card, rank: int, ranks: int) -> None:
        super().__init__(card, rank, ranks)
        card = self.card
        self._blocks = {
            index: fresh_block(card, self.info, index, self.device) for index in place([1.0] * card.units, ranks).ranges[rank]
        }
        self._optimizers = {index: make_optimizer(card.optim, block) for index, block in self._blocks.items()}
        self._labels = fresh_labels(card, self.info, self.device)

    def steps(self) -> Iterator[object]:
        """See :class:`Contender`."""
        card, method, labels = self.card, make_method(self.card), self._labels
        embedding = labels.embedding.detach()
        for step, x, y in self.batches():
            u = embedding[y]
            for index, block in self._blocks.items():
                draw = method.draw(index, u, u, block.gamma)
                with autocast(card.train, x.device):
                    output = block.denoise(draw.z, block.encode(x), embedding, draw.time)
                loss = squared_loss(output, draw)
                self._optimizers[index].zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                self._optimizers[index].step()
            yield step

    def chain(self, blocks: int) -> tuple[Part, torch.optim.Optimizer]:
        """So many blocks of back-propagation's chain, with the head."""
        card = self.card
        method, model = card.method.model_copy(update={"name": "backprop"}), card.model.model_copy(update={"blocks": blocks})
        part = Part(card.model_copy(update={"method": method, "model": model}), self.info, range(blocks), self.device).train()
        return part, make_optimizer(card.optim, part)


class Part(nn.Module):
    """Some consecutive blocks of the chain that back-propagation trains (eqs 17-19), with the head where they are the last."""

    def __init__(self, card: Card, info: DataInfo, owned: range, device: torch.device, recompute: bool = False) -> None:
        super().__init__()
        chain = cast(Backprop, fresh_block(card, info, 0, device))
        self.labels = fresh_labels(card, info, device)
        self.blocks = nn.ModuleDict({str(index): chain.blocks[index] for index in owned})
        self.w = nn.ParameterDict({str(index): nn.Parameter(chain.w[index].detach().clone()) for index in owned})
        self._last = len(chain.blocks) - 1 in owned
        self._card, self._recompute = card, recompute

    def forward(self, z: Tensor, images: Tensor) -> Tensor:
        """The latent (B, d) after these blocks, or the logits (B, m)."""

        def pass_on(name: str, z: Tensor) -> Tensor:
            block, alpha = cast(Block, self.blocks[name]), torch.tanh(self.w[name])
            return (1 - alpha) * z + alpha * block.denoise(z, block.encode(images), self.labels.embedding)

        with autocast(self._card.train, images.device):
            for name in self.blocks:
                z = cast(Tensor, checkpoint(pass_on, name, z, use_reentrant=False)) if self._recompute else pass_on(name, z)
        return cast(Tensor, self.labels(z.float())) if self._last else z


class Backpropagated(_Alone):
    """The same blocks as one chain, trained by cross-entropy at its end.

    Args:
        way: whole: as it is; recompute: activation checkpointing, a block at a time; accumulate: gradients of microbatches;
            ddp, gpipe, 1f1b: on several ranks.
        microbatches: of accumulate, gpipe and 1f1b.
        folder: where ranks hand over their parts for an evaluation.
        meet: called to wait for all ranks.
    """

    def __init__(
        self,
        card: Card,
        way: Way,
        microbatches: int,
        rank: int,
        ranks: int,
        init_method: str,
        folder: Path,
        meet: Callable[[], object],
    ) -> None:
        super().__init__(card, rank, ranks)
        method = self.card.method.model_copy(update={"name": "backprop"})
        self.card = card = self.card.model_copy(update={"method": method})
        self._way, self._microbatches, self._rank, self._ranks = way, microbatches, rank, ranks
        self._folder, self._meet = folder, meet
        everything = range(card.model.blocks)
        owned = place([1.0] * len(everything), ranks).ranges[rank] if way in rivals.SCHEDULES else everything
        self._part = Part(card, self.info, owned, self.device, recompute=way == "recompute").train()
        self._optimizer = make_optimizer(card.optim, self._part)
        self._rows, self._network = slice(None), cast(nn.Module, self._part)
        if ranks > 1:
            rivals.join(init_method, rank, ranks, self.device, card.parallel.timeout)
        if way == "ddp":
            self._rows, self._network = slice(rank, None, ranks), rivals.data_parallel(self._part)
        if way == "gpipe" or way == "1f1b":
            size, (classes, width) = card.data.batch_size // microbatches, self._part.labels.embedding.shape
            shapes = (size, width), (size, classes if rank == ranks - 1 else width)
            self._pass = rivals.pipeline(way, self._part, rank, ranks, self.device, microbatches, shapes, cross_entropy)

    def steps(self) -> Iterator[object]:
        """See :class:`Contender`."""
        width = self._part.labels.embedding.shape[1]
        for step, x, y in self.batches(self._rows):
            reseed(x.device, self.card.run.seed, "block", self._rank, step)
            z = torch.randn(len(y), width, device=x.device)
            self._optimizer.zero_grad(set_to_none=True)
            if self._way in rivals.SCHEDULES:
                self._pass(z, x, y)
            else:
                pieces = self._microbatches if self._way == "accumulate" else 1
                for z_i, x_i, y_i in zip(z.chunk(pieces), x.chunk(pieces), y.chunk(pieces), strict=True):
                    loss = cross_entropy(self._network(z_i, x_i), y_i) * (len(y_i) / len(y))
                    loss.backward()  # type: ignore[no-untyped-call]
            self._optimizer.step()
            yield step

    def unsynchronised(self) -> contextlib.AbstractContextManager[None]:
        """In which ranks of ddp keep their gradients to themselves."""
        return rivals.unsynchronised(self._network)

    @torch.no_grad()
    def accuracy(self) -> float | None:
        """See :class:`Racer`."""
        self._meet()
        save_file({name: value.contiguous() for name, value in self._part.state_dict().items()}, self._file(self._rank))
        self._meet()
        if self._rank:
            return None
        card = self.card
        whole = Part(card, self.info, range(card.model.blocks), self.device)
        for rank in range(self._ranks if self._way in rivals.SCHEDULES else 1):  # of the heads the last is the trained one
            whole.load_state_dict(load_file(self._file(rank)), strict=False)
        whole.eval()
        size, batch = self.info.test_size, card.inference.batch_size
        hits = 0
        for images, labels in self.data.test.batches(
            test_indices(n, size=size, batch_size=batch) for n in range(-(-size // batch))
        ):
            x = self._pixels.normalise(images.to(self.device))
            logits = whole(torch.zeros(len(x), whole.labels.embedding.shape[1], device=x.device), x)
            hits += int((logits.argmax(dim=1).cpu() == labels).sum())
        return hits / size

    def _file(self, rank: int) -> Path:
        return self._folder / f"part-{rank}.safetensors"
