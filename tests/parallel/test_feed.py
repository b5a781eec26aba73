"""Batches: what a message holds, and in which order they come."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from noprop_dist.config import ParallelCard
from noprop_dist.data import DataSet, open_data, train_indices
from noprop_dist.parallel import traffic
from noprop_dist.parallel.feed import Feed, message_size, pack, step_of, unpack
from noprop_dist.parallel.placement import place
from noprop_dist.parallel.world import World


def test_a_message_is_small_and_whole():
    images = torch.randint(0, 256, (5, 3, 4, 6), dtype=torch.uint8)
    labels = torch.tensor([0, 1, 99, 1000, 70000])
    message = pack(2**40, images, labels)
    assert message.dtype == torch.uint8 and len(message) == message_size(5, (3, 4, 6)) == 8 + 5 * (4 + 72)
    batch = unpack(message, (3, 4, 6))
    assert step_of(message) == 2**40 and torch.equal(batch.images, images) and torch.equal(batch.labels, labels)


@pytest.mark.parametrize("feed", ["stream", "resident"])
@pytest.mark.parametrize("prefetch", [0, 1, 2, 50])
def test_every_rank_sees_the_batches_of_the_order_whatever_travels_ahead(small_card, on_ranks, feed, prefetch):
    card = small_card(parallel={"feed": feed, "prefetch": prefetch})
    data = open_data(card.data)

    def work(rank: int, init_method: str, ranks: int = 3) -> list[list[int]]:
        world = World(ParallelCard(timeout=30), place([1.0] * 4, ranks), init_method)
        world.connect()
        feed = Feed(card, data.info, world, data if rank == 0 else None)
        seen = [batch.labels for batch in feed.train(3, 8)]
        seen += [batch.labels for batch in feed.test()]  # an evaluation between two steps
        seen += [batch.labels for batch in feed.train(8, 9)]
        world.close()
        return [labels.tolist() for labels in seen]

    labels = data.train.load()[1]
    wanted = [labels[train_indices(card.run.seed, step, size=len(labels), batch_size=32)] for step in (3, 4, 5, 6, 7, 8)]
    wanted[5:5] = data.test.load()[1].split(100)
    for seen in on_ranks(3, work):
        assert seen == [part.tolist() for part in wanted]


def test_an_evaluation_in_mid_training_does_not_mix_up_the_batches_under_way(small_card, on_ranks):
    card = small_card(parallel={"prefetch": 2})
    data = open_data(card.data)

    def work(rank: int, init_method: str, ranks: int = 2) -> list[int]:
        world = World(ParallelCard(timeout=30), place([1.0] * 4, ranks), init_method)
        world.connect()
        feed = Feed(card, data.info, world, data if rank == 0 else None)
        seen = []
        for batch in feed.train(0, 3):
            seen += [int(batch.labels.sum()), *(int(part.labels.sum()) for part in feed.test())]
        world.close()
        return seen

    first, second = on_ranks(2, work)
    assert first == second and len(set(first)) > 4


@pytest.mark.parametrize(("batch_size", "ahead"), [(64, 8), (3_500, 4), (10_000, 2)])
def test_unless_told_as_many_batches_travel_ahead_as_a_megabyte_holds(small_card, batch_size, ahead):
    card = small_card(data={"batch_size": batch_size})
    data = open_data(card.data)
    asked = []

    class Split:
        def batches(self, indices):
            for rows in indices:
                asked.append(len(rows))
                yield torch.zeros(len(rows), *data.info.shape, dtype=torch.uint8), torch.zeros(len(rows), dtype=torch.int64)

    world = World(card.parallel, place([1.0] * 4, 1))
    world.connect()
    info = replace(data.info, train_size=batch_size)
    next(Feed(card, info, world, DataSet(info, Split(), data.test)).train(0, 100))
    world.close()
    assert asked == [batch_size] * (ahead + 1)


def test_time_in_which_the_coordinator_reads_a_batch_is_waiting(small_card, monkeypatch):
    card, clock = small_card(parallel={"prefetch": 1}), [0.0]
    data = open_data(card.data)
    monkeypatch.setattr(traffic.time, "perf_counter", lambda: clock[0])

    class Slow:
        """A second a batch."""

        def __len__(self) -> int:
            return len(data.train)

        def batches(self, indices):
            for batch in data.train.batches(indices):
                clock[0] += 1
                yield batch

    world = World(ParallelCard(), place([1.0], 1))
    world.connect()
    assert len(list(Feed(card, data.info, world, replace(data, train=Slow())).train(0, 5))) == 5
    assert world.traffic.waited["batches"] == 5
