"""Which samples make up batch number ``step``: a pure function of the seed and the step, the same on every rank."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from noprop_dist.seeding import generator


def train_indices(seed: int, step: int, *, size: int, batch_size: int, overfit_batches: int = 0) -> Tensor:
    """Rows of the training set in batch ``step`` (from 0), int64 (batch_size,).

    Batches are cut from an endless stream of samples, one permutation of the ``size`` rows an epoch. So every batch is
    full, and the border of two epochs may fall inside one. ``overfit_batches`` k > 0 repeats batches 0..k-1 for ever.
    """
    if overfit_batches:
        step %= overfit_batches
    first, last = step * batch_size, (step + 1) * batch_size
    return torch.cat(
        [  # cat copies: the cached permutations stay out of the caller's reach
            _permutation(seed, epoch, size)[max(0, first - epoch * size) : last - epoch * size]
            for epoch in range(first // size, (last - 1) // size + 1)
        ]
    )


def test_indices(batch: int, *, size: int, batch_size: int) -> Tensor:
    """Rows of the test set in its batch number ``batch`` (from 0), int64, in order. The last batch may be shorter."""
    return torch.arange(batch * batch_size, min((batch + 1) * batch_size, size))


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, size: int) -> Tensor:
    return torch.randperm(size, generator=generator(seed, "order", epoch))
