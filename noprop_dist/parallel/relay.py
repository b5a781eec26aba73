"""Inference across ranks: weights stay, z travels. All ranks encode a batch at once; only denoising is in sequence."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

import torch
from torch import Tensor

from noprop_dist.chain import Scores, Segment, Tally, read_out
from noprop_dist.config import Card
from noprop_dist.nets.labels import LabelSpace
from noprop_dist.parallel.feed import Batch
from noprop_dist.parallel.placement import COORDINATOR, Placement
from noprop_dist.parallel.scalars import gather_rows
from noprop_dist.parallel.traffic import Pending
from noprop_dist.parallel.world import World


def relay(
    card: Card, world: World, placement: Placement, segment: Segment, labels: LabelSpace, batches: Iterable[Batch]
) -> Scores | None:
    """Score the chain on images in order. Every rank calls it with its own segment; the coordinator gets the scores.

    A batch goes down the ranks and its finished paths come back to the coordinator; later batches follow close behind.
    """
    wire, rank, end = world.wires["latents"], world.rank, world.size - 1
    tally = Tally()
    sent: deque[Pending] = deque()
    returning: deque[tuple[Pending, Tensor]] = deque()

    def finish() -> None:
        paths, target = returning.popleft()
        tally.chain(read_out(card, labels, paths.wait().to(world.device)), target)

    for number, batch in enumerate(batches):
        features = segment.encode(batch.images)
        if rank == COORDINATOR:
            paths = segment.start(len(batch.labels), number)
        else:
            paths = wire.receive(segment.empty(len(batch.labels)), rank - 1, number).wait().to(world.device)
        paths, guesses = segment.advance(features, paths, number)
        tally.estimates(guesses, batch.labels)
        if rank != end:
            sent.append(wire.send(paths, rank + 1, number))
        elif rank != COORDINATOR:
            sent.append(wire.send(paths, COORDINATOR, number))
        if rank == COORDINATOR:
            back = Pending(paths) if rank == end else wire.receive(segment.empty(len(batch.labels)), end, number)
            returning.append((back, batch.labels))
        if len(sent) > world.size:
            sent.popleft().wait()
        if len(returning) > 2 * world.size:
            finish()
    while returning:
        finish()
    for message in sent:
        message.wait()

    counts = torch.tensor([tally.blocks.get(index, 0) for index in placement.ranges[rank]])
    rows = gather_rows(world, counts, [len(owned) for owned in placement.ranges]).wait()
    if rank != COORDINATOR or not tally.seen:  # asked to stop before the first batch
        return None
    tally.blocks = dict(enumerate(torch.cat(rows).tolist()))
    return tally.scores(segment.guessing)
