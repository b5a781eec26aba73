"""Predictions against cases that can be worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from noprop_dist import command, plan
from noprop_dist.config import UserError
from noprop_dist.nets.cost import BlockCost
from noprop_dist.planning import METHODS, Calibration, Network, Task, crossover, predict

OURS, DDP, PIPELINE = METHODS
TASK = Task(blocks=8, cost=BlockCost(1_000_000, 0, 12_000_000, 4_000_000, 20_000_000), batch=128, message=100_000, latent=40)
TIMES = Calibration(prepare=0.0, block=0.010, chain={128: 0.012, 64: 0.006, 32: 0.003}, optimizer=0.001, byte=0.0, message=0.0)
FAST = Network(1e15, 0.0)


def speed(
    method: str, ranks: int, network: Network = FAST, speeds: list[float] | None = None, times: Calibration = TIMES
) -> float:
    return predict(method, TASK, times, ranks, network, speeds or [1.0] * ranks).samples_per_second


def test_blocks_side_by_side_take_the_time_of_the_busiest_rank():
    assert speed(OURS, 1) == pytest.approx(128 / 0.080)
    assert speed(OURS, 2) == pytest.approx(128 / 0.040)
    assert speed(OURS, 3) == pytest.approx(128 / 0.030)
    assert speed(OURS, 2, speeds=[1.0, 0.5]) == pytest.approx(128 / 0.060), (
        "5 and 3 blocks, of which the slow rank's take 60 ms"
    )
    found = predict(OURS, TASK, TIMES, 3, FAST, [1.0] * 3)
    assert found.idle == pytest.approx(1 - 8 / 9) and found.sent == 2 * 100_000
    assert found.memory == 3 * 12_000_000 + 4_000_000 + 20_000_000


def test_a_pipeline_waits_for_its_slowest_stage_in_every_slot():
    times = replace(TIMES, prepare=0.004, slot=0.002)
    found = predict(PIPELINE, replace(TASK, blocks=9, batch=4), replace(times, chain={2: 0.006}), 2, FAST, [1.0, 0.5])
    slow = 3  # of nine blocks; two microbatches of two images take three slots
    assert 4 / found.samples_per_second == pytest.approx((0.004 + slow * (3 * 0.006 + 0.001) + 3 * 0.002) / 0.5)


def test_a_slow_link_makes_the_batch_the_bottleneck():
    assert speed(OURS, 2, Network(1e6, 0.0)) == pytest.approx(128 / 0.1)
    assert speed(OURS, 8, Network(1e6, 0.0)) == pytest.approx(128 / 0.3), "three times over the coordinator's link"


def test_ddp_hides_its_ring_behind_the_backward_pass_and_no_further():
    compute = 8 * (0.006 + 0.001)
    assert speed(DDP, 2) == pytest.approx(128 / compute)
    hidden, wire = 2 / 3 * 8 * 0.006, 32_000_000 / 1e8
    assert speed(DDP, 2, Network(1e8, 0.0)) == pytest.approx(128 / (compute + wire - hidden))
    assert predict(DDP, TASK, TIMES, 2, FAST, [1.0, 1.0]).sent == 2 * 32_000_000


def test_a_pipeline_pays_for_its_bubble():
    pieces = {2: 0.006, 4: 0.003}
    expected = min(4 * ((m + 1) * time + 0.001) for m, time in pieces.items())
    assert speed(PIPELINE, 2) == pytest.approx(128 / expected)
    found = predict(PIPELINE, TASK, TIMES, 2, FAST, [1.0, 1.0])
    assert found.idle == pytest.approx(1 - 4 * (4 * 0.003 + 0.001) / expected)


def test_the_crossover_is_where_both_are_as_fast():
    found = crossover(
        lambda bandwidth: speed(OURS, 4, Network(bandwidth, 0.0)), lambda bandwidth: speed(DDP, 4, Network(bandwidth, 0.0))
    )
    assert found is None, "layer-parallel is never slower here"
    slow = Calibration(0.0, 0.020, TIMES.chain, 0.001, 0.0, 0.0)
    ours, ddp = (
        lambda bandwidth, method=method: speed(method, 4, Network(bandwidth, 0.0), times=slow) for method in (OURS, DDP)
    )
    found = crossover(ours, ddp)
    assert found and ours(found) == pytest.approx(ddp(found), rel=0.02)
    assert ours(found / 2) > ddp(found / 2) and ours(found * 2) < ddp(found * 2)


def test_a_plan_prints_a_line_for_each_method_and_number_of_ranks(capsys):
    plan.main(
        ["--data.name", "digits", "--model.blocks", "2", "--data.batch_size", "16", "--ranks", "1,2", "--bandwidth", "100Mbit"]
    )
    lines = capsys.readouterr().out.splitlines()
    assert [sum(f"{ranks}, {method}" in line for line in lines) for ranks in (1, 2) for method in METHODS] == [1] * 6
    assert "Links of 100 Mbit/s and 0.5 ms" in " ".join(lines)


@pytest.mark.parametrize(("text", "bytes_per_second"), [("1Gbit", 1.25e8), ("100Mbit/s", 1.25e7), ("2GB", 2e9), ("1.5kbps", 0)])
def test_bandwidths_are_in_bits_or_bytes(text, bytes_per_second):
    if bytes_per_second:
        assert command.bandwidth(text) == bytes_per_second
    else:
        with pytest.raises(Exception, match="no bandwidth such as"):
            command.bandwidth(text)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--ranks", "16"], "--ranks: 16 for 8 blocks; leave it out, or raise --model.blocks"),
        (["--ranks", "1,two"], "'1,two' is no list of positive numbers"),
        (["--latency", "5"], "'5' is no time such as 0.5ms"),
        (["--speeds", "1,0"], "'1,0' is no list of positive numbers"),
        (["--method.name", "cnn", "--model.blocks", "1"], "method.name: cnn runs on one rank"),
    ],
)
def test_what_cannot_be_planned_is_told_at_once(arguments, words):
    with pytest.raises(UserError) as caught:
        plan.main(arguments)
    assert words in str(caught.value)
