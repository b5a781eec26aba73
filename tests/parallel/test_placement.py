import random
import re
from itertools import combinations

import pytest

from noprop_dist.config import UserError
from noprop_dist.parallel.placement import COORDINATOR, COORDINATOR_COST, Placement, place

EQUAL = [(blocks, ranks) for blocks in range(1, 13) for ranks in range(1, blocks + 1)]


def cuts(blocks, ranks):
    """Every way of cutting blocks into contiguous ranges, none empty."""
    for ends in combinations(range(1, blocks), ranks - 1):
        edges = (0, *ends, blocks)
        yield [range(edges[rank], edges[rank + 1]) for rank in range(ranks)]


def loads(ranges, costs, speeds):
    mean, fastest = sum(costs) / len(costs), max(speeds)
    return [
        (sum(costs[i] for i in owned) / mean + COORDINATOR_COST * (r == COORDINATOR)) * fastest / speeds[r]
        for r, owned in enumerate(ranges)
    ]


@pytest.mark.parametrize(("blocks", "ranks"), EQUAL)
def test_equal_blocks_are_spread_evenly_in_order_and_the_coordinator_has_the_fewest(blocks, ranks):
    ranges = place([2.5] * blocks, ranks).ranges
    assert [index for owned in ranges for index in owned] == list(range(blocks)), "every block once, in order"
    counts = [len(owned) for owned in ranges]
    assert len(counts) == ranks
    assert min(counts) >= 1
    assert max(counts) - min(counts) <= 1
    assert counts[COORDINATOR] == min(counts)


@pytest.mark.parametrize("seed", range(20))
def test_unequal_blocks_are_cut_as_well_as_any_cut_could(seed):
    chance = random.Random(seed)
    blocks = chance.randint(2, 10)
    ranks = chance.randint(2, min(blocks, 5))
    costs = [chance.choice([1, 1, 2, 5, 20]) * chance.uniform(0.5, 1.5) for _ in range(blocks)]
    speeds = [chance.choice([1, 1, 2, 0.5]) for _ in range(ranks)] if seed % 2 else [1.0] * ranks
    ranges = place(costs, ranks, speeds if seed % 2 else None).ranges
    assert [index for owned in ranges for index in owned] == list(range(blocks))
    assert min(map(len, ranges)) >= 1

    everything = [loads(cut, costs, speeds) for cut in cuts(blocks, ranks)]
    found = loads(ranges, costs, speeds)
    assert sum(load**8 for load in found) == pytest.approx(min(sum(load**8 for load in cut) for cut in everything))
    # which bounds the heaviest load: at most the eighth root of the number of ranks above the best
    assert max(found) <= min(map(max, everything)) * ranks**0.125 * (1 + 1e-9)


def test_a_rank_of_half_the_speed_gets_half_the_blocks():
    assert place([1.0] * 9, 2, [30, 15]).ranges == (range(0, 6), range(6, 9))
    assert place([1.0] * 10, 3, [1, 2, 2]).ranges == (range(0, 2), range(2, 6), range(6, 10))


def test_one_heavy_block_stands_alone():
    assert place([1, 1, 1, 9, 1, 1], 3).ranges == (range(0, 3), range(3, 4), range(4, 6))


def test_the_unit_of_cost_does_not_matter():
    costs = [1.0, 2, 3, 4, 5, 6]
    assert place([cost * 1e12 for cost in costs], 3) == place(costs, 3) == place([cost * 1e-9 for cost in costs], 3)


@pytest.mark.parametrize(("blocks", "ranks"), [(1, 2), (3, 4), (10, 64)])
def test_more_ranks_than_blocks_is_refused_with_what_to_do(blocks, ranks):
    message = rf"{ranks} ranks for {blocks} blocks?:.*at most {blocks} ranks \(--nproc_per_node\).*--model\.blocks$"
    with pytest.raises(UserError) as caught:
        place([1.0] * blocks, ranks)
    assert re.search(message, str(caught.value))


def test_every_block_has_one_owner():
    placement = place([1.0] * 10, 4)
    for rank, owned in enumerate(placement.ranges):
        assert [placement.owner(index) for index in owned] == [rank] * len(owned)


def test_a_rank_is_named_with_its_blocks():
    placement = Placement((range(0, 1), range(1, 4)))
    assert [placement.name(rank) for rank in (0, 1)] == ["rank 0 (block 0)", "rank 1 (blocks 1-3)"]
