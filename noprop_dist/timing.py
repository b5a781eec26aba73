"""How long one block's step takes on this device: for placing blocks, and for planning."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from noprop_dist.config import Card
from noprop_dist.data import DataInfo, Pixels
from noprop_dist.learner import Learner
from noprop_dist.learning import Local, Means, prepare
from noprop_dist.model import fresh_block, fresh_labels

WARMUP, LEAST = 2, 3  # steps


def seconds(step: Callable[[], object], device: torch.device, within: float = 1.0) -> float:
    """Median seconds of calling ``step`` again and again for ``within`` seconds, LEAST times at least, after a warm-up."""

    def timed() -> float:
        begin = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - begin

    for _ in range(WARMUP):
        timed()
    end, times = time.perf_counter() + within, list[float]()
    while len(times) < LEAST or time.perf_counter() < end:
        times.append(timed())
    return statistics.median(times)


def block_step(card: Card, info: DataInfo, device: torch.device, blocks: int = 1) -> Callable[[], None]:
    """A step of fresh blocks, as the trainer does it, on a batch without meaning; to be called again and again."""
    learners = {
        index: Learner(fresh_block(card, info, index, device), card.optim, 1_000_000, card.train.max_bad_steps)
        for index in range(blocks)
    }
    lesson = Local(card, learners, None, fresh_labels(card, info, device).requires_grad_(False))
    images = torch.randint(256, (card.data.batch_size, *info.shape), dtype=torch.uint8, device=device)
    labels = torch.arange(card.data.batch_size, device=device) % len(info.classes)
    x, log = prepare(card, Pixels(card.data, info), 0, images), Means()

    def step() -> None:
        lesson.teach(learners[0].steps, x, labels, log)

    return step
