"""The board's table in any width."""

from __future__ import annotations

import math

import pytest

from noprop_dist.parallel.placement import place
from noprop_dist.report.lanes import Lane, clock, span, table


def lanes(blocks, ranks, device=""):
    return [
        Lane(rank, owned, [10.0**-index for index in owned], [0.5 + index / 100 for index in owned], 0.9, 1e9, 5e4, device)
        for rank, owned in enumerate(place([1.0] * blocks, ranks).ranges)
    ]


@pytest.mark.parametrize("width", [60, 80, 100, 200])
@pytest.mark.parametrize(("blocks", "ranks"), [(10, 1), (10, 2), (50, 1), (50, 16)])
def test_a_line_for_every_rank_fits_a_narrow_terminal(blocks, ranks, width):
    lines = [line for line, _ in table(lanes(blocks, ranks), width, 40)]
    assert len(lines) == 1 + ranks and max(map(len, lines)) <= width
    assert [line.split()[0] for line in lines[1:]] == [str(rank) for rank in range(ranks)]
    assert all("%" in line and "90%" in line for line in lines[1:]), "busy shares are always there"


def test_with_room_every_block_has_its_figures_else_their_range():
    wide, narrow = (table(lanes(6, 2, "cuda:0"), width, 40)[1][0] for width in (120, 60))
    assert wide.split()[1:8] == ["0-2", "1", "0.1", "0.01", "50.0%", "51.0%", "52.0%"] and wide.endswith("cuda:0")
    assert narrow.split()[1:4] == ["0-2", "0.01–1", "50.0–52.0%"] and "cuda" not in narrow


def test_ranks_that_do_not_fit_are_counted():
    lines = [line for line, _ in table(lanes(16, 16), 100, 6)]
    assert len(lines) == 1 + 6 and lines[-1].split()[1:] == ["11", "more", "ranks,", "busy", "90%"]


def test_idle_ranks_stand_out():
    idle = Lane(0, range(1), [1.0], [0.5], 0.5, 0.0, 0.0)
    assert [style for _, style in table([*lanes(1, 1), idle], 80, 10)] == ["bold", "", "yellow"]


def test_what_is_not_known_is_a_dash():
    row = table([Lane(0, range(3), [math.nan] * 3, [math.nan] * 3)], 80, 10)[1][0]
    assert row.split() == ["0", "0-2", "-", "-", "-", "-", "-"]
    assert span([math.nan], ".1%") == "-" and span([math.nan, 0.5], ".1%") == "50.0%"


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (187.9, "3:07"), (3787, "1:03:07")])
def test_times(seconds, text):
    assert clock(seconds) == text
