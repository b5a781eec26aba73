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
from noprop_dist.viewing import POINTS, Viewing, Witness, schedules


def relay(
    card: Card,
    world: World,
    placement: Placement,
    segment: Segment,
    labels: LabelSpace,
    batches: Iterable[Batch],
    *,
    view: bool = False,
) -> tuple[Scores, Viewing | None] | None:
    """Score the chain on images in order. Every rank calls it with its own segment; the coordinator gets the scores and, with
    ``view``, what is to be seen.

    A batch goes down the ranks and its finished paths come back to the coordinator; later batches follow close behind. To be
    seen, the ranks also send what a few images of the first batch looked like on their way, and their learned schedules.
    """
    wire, rank, end = world.wires["latents"], world.rank, world.size - 1
    tally = Tally()
    sent: deque[Pending] = deque()
    returning: deque[tuple[Pending, Tensor]] = deque()
    sight: Sight | None = None

    def finish() -> None:
        paths, target = returning.popleft()
        finished = paths.wait().to(world.device)
        tally.chain(read_out(card, labels, finished), target)
        if sight and sight.ends is None:
            sight.ends = finished

    for number, batch in enumerate(batches):
        features = segment.encode(batch.images)
        if rank == COORDINATOR:
            paths = segment.start(len(batch.labels), number)
        else:
            paths = wire.receive(segment.empty(len(batch.labels)), rank - 1, number).wait().to(world.device)
        if view and not number:
            sight = Sight(card, world, placement, segment, batch)
            paths, guesses = segment.advance(features, paths, number, sight.witness)
        else:
            paths, guesses = segment.advance(features, paths, number)
        tally.estimates(guesses, batch.labels)
        if rank != end:
            sent.append(wire.send(paths, rank + 1, number))
        elif rank != COORDINATOR:
            sent.append(wire.send(paths, COORDINATOR, number))
        if rank == COORDINATOR:
            back = Pending(paths) if rank == end else wire.receive(segment.empty(len(batch.labels)), end, number)
            returning.append((back, batch.labels))
        if sight and not number:
            sight.send()
        if len(sent) > world.size:
            sent.popleft().wait()
        if len(returning) > 2 * world.size:
            finish()
    while returning:
        finish()
    for message in sent:
        message.wait()
    seen = sight.wait() if sight else None

    counts = torch.tensor([tally.blocks.get(index, 0) for index in placement.ranges[rank]])
    rows = gather_rows(world, counts, [len(owned) for owned in placement.ranges]).wait()
    if rank != COORDINATOR or not tally.seen:  # asked to stop before the first batch
        return None
    tally.blocks = dict(enumerate(torch.cat(rows).tolist()))
    return tally.scores(segment.guessing), sight.develop(labels, tally, *seen) if sight and seen else None


class Sight:
    """What there is to see of the first batch, on its way to the coordinator."""

    def __init__(self, card: Card, world: World, placement: Placement, segment: Segment, batch: Batch) -> None:
        self._card, self._world, self._placement, self._segment, self._batch = card, world, placement, segment, batch
        self.witness = Witness(card, segment, batch.labels)
        self.ends: Tensor | None = None
        """The batch's finished paths, on the coordinator."""

    def send(self) -> None:
        """Once this rank's blocks are through with the batch. Nobody waits."""
        world, ranges, segment = self._world, self._placement.ranges, self._segment
        points = POINTS * (self._card.method.schedule == "learned")
        lengths = [points * sum(index < segment.used for index in owned) for owned in ranges]
        self._gammas = gather_rows(world, schedules(self._card, segment.blocks), lengths, "latents")
        lengths = [self.witness.length(owned) for owned in ranges]
        self._records = gather_rows(world, self.witness.record, lengths, "latents")

    def wait(self) -> tuple[list[Tensor], list[Tensor]]:
        """Until all has gone out. On the coordinator all ranks' records and learned schedules; nothing elsewhere."""
        return self._records.wait(), self._gammas.wait()

    def develop(self, labels: LabelSpace, tally: Tally, records: list[Tensor], gammas: list[Tensor]) -> Viewing:
        """On the coordinator, after the last batch."""
        assert self.ends is not None
        course = self.witness.develop(labels, *self._batch, torch.cat(records), self.ends)
        return Viewing.of(self._card, labels, torch.cat(gammas), course, tally)
