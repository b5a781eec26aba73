"""RUN/trace.json: what all ranks did when."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from itertools import pairwise

import pytest

from noprop_dist import UserError, train
from noprop_dist.parallel.placement import place
from noprop_dist.parallel.spans import Span
from noprop_dist.parallel.trace import Record
from noprop_dist.report.drawing import render
from noprop_dist.report.timeline import timeline
from noprop_dist.runs import RunFolder
from noprop_dist.tracing import trace

SHIFT = 5000.0  # seconds by which rank 1's clock is ahead


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    """Card, summary and trace of a run on 2 ranks whose clocks disagree."""
    from ranks import fork_ranks

    from noprop_dist import Card

    folder = tmp_path_factory.mktemp("traced")
    settings = {
        "data": {"batch_size": 32},
        "model": {"blocks": 4, "embedding": "learned", "embedding_lag": 2},
        "train": {"steps": 12, "log_every": 4, "checkpoint_every": 5, "eval_every": 6},
        "inference": {"batch_size": 100},
        "parallel": {"threads": 1},
        "run": {"dir": str(folder), "name": "run"},
    }
    card = Card.model_validate(settings)

    def work(rank, init_method):
        if rank == 1:
            usual = time.perf_counter
            time.perf_counter = lambda: usual() + SHIFT
        return train(card, init_method).summary

    summary = fork_ranks(folder / "meeting", 2, work)[0]
    return card, summary, json.loads(RunFolder(folder / "run").trace.read_text())


def pieces(events, rank):
    """Of what the rank did and waited for, in the order of time."""
    return sorted((event for event in events if event["ph"] == "X" and event["pid"] == rank), key=lambda event: event["ts"])


def test_its_events_are_chromes(traced):
    _, _, found = traced
    assert found["displayTimeUnit"] == "ms"
    names = {}
    for event in found["traceEvents"]:
        assert event["ph"] in ("X", "M", "b", "e", "C") and event["pid"] in (0, 1) and event["tid"] == 0
        if event["ph"] != "M":
            assert event["ts"] >= 0
        if event["ph"] == "X":
            assert event["dur"] >= 0 and event["args"]["step"] >= 0
        if event["name"] == "process_name":
            names[event["pid"]] = event["args"]["name"]
    assert names == {0: "rank 0 (blocks 0-1)", 1: "rank 1 (blocks 2-3)"}
    begun = {event["id"]: event for event in found["traceEvents"] if event["ph"] == "b"}
    ended = {event["id"]: event for event in found["traceEvents"] if event["ph"] == "e"}
    assert begun.keys() == ended.keys() and all(ended[key]["ts"] >= event["ts"] for key, event in begun.items())


def test_every_step_evaluation_and_checkpoint_is_there_and_nothing_overlaps(traced):
    _, _, found = traced
    for rank in (0, 1):
        mine = pieces(found["traceEvents"], rank)
        steps = defaultdict(set)
        for event in mine:
            steps[event["cat"]].add(event["args"]["step"])
        assert set(range(12)) <= steps["training"]
        assert steps["evaluation"] == {6, 12} and steps["saving"] == {5, 10, 12}
        assert steps["drawing"] <= {6, 12} and 12 in steps["drawing"] if rank == 0 else not steps["drawing"]
        for one, other in pairwise(mine):
            assert one["ts"] + one["dur"] <= other["ts"] + 0.1, (one, other)  # rounded to 0.1 µs
    assert {event["cat"] for event in found["traceEvents"] if "cat" in event and event["pid"] == 0} == {
        "training", "evaluation", "drawing", "saving", "waiting", "reading", "sending",
    }  # fmt: skip


def test_times_agree_with_the_busy_shares_of_the_summary(traced):
    card, summary, found = traced
    for rank, row in enumerate(summary["per_rank"]):
        trained = sum(event["dur"] for event in pieces(found["traceEvents"], rank) if event["cat"] == "training") / 1e6
        seconds = 12 * card.data.batch_size / row["samples_per_second"]
        assert trained / seconds == pytest.approx(row["busy_share"], abs=0.02)
        counters = [event for event in found["traceEvents"] if event["ph"] == "C" and event["pid"] == rank]
        width = min(b["ts"] - a["ts"] for a, b in pairwise(counters)) / 1e6
        assert sum(event["args"]["training"] for event in counters) * width == pytest.approx(trained, rel=0.02)


def test_what_was_sent_is_what_was_counted(traced):
    _, summary, found = traced
    sent = defaultdict(int)
    for event in found["traceEvents"]:
        if event["ph"] == "b":
            sent[event["args"]["kind"]] += event["args"]["bytes"]
    for kind in ("batches", "labels", "latents", "weights"):
        assert sent[kind] == summary["bytes"][kind] > 0, kind


def test_clocks_are_brought_together(traced):
    """The batch of a step cannot have been waited for before it was sent."""
    _, _, found = traced
    own, other = found["otherData"]["clocks"]
    assert own["offset_s"] == 0 and abs(other["offset_s"] - SHIFT) <= other["accuracy_s"] < 1
    events, slack = found["traceEvents"], 1e6 * other["accuracy_s"]
    sent: dict[int, float] = {}
    for event in events:
        if event["ph"] == "b" and event["args"]["kind"] == "batches":
            sent.setdefault(event["args"]["step"], event["ts"])  # later ones are of evaluations
    waits = [event for event in pieces(events, 1) if event["name"] == "waiting for batches"]
    assert len(waits) > 12
    assert all(event["ts"] + event["dur"] >= sent[event["args"]["step"]] - slack for event in waits)
    assert max(event["ts"] for event in events if "ts" in event) < SHIFT * 1e6 / 2


def test_a_start_that_trains_nothing_leaves_the_trace_as_it_was(small_card):
    path = RunFolder(small_card().run.dir / "run").trace
    train(small_card())
    before = path.read_bytes()
    train(small_card())
    assert path.read_bytes() == before
    train(small_card(train={"steps": 8}))
    told = pieces(json.loads(path.read_text())["traceEvents"], 0)
    assert {event["args"]["step"] for event in told if event["cat"] == "training"} == {6, 7, 8}, "of this start; 8: its end"


def test_of_times_of_which_something_is_forgotten_nothing_is_told():
    """The wait in which the evaluation began was pushed out by later spans."""
    spans = [
        Span("training", "", 0, 0.0, 1.0, 0),
        Span("waiting", "latents", 3, 8.0, 9.0, 0),
        Span("evaluation", "", 5, 2.0, 10.0, 0),
    ]
    record = Record(0, spans, 0.0, 1.0, 6.0, [[0.0]] * 4)
    told = pieces(trace([record], place([1.0], 1))["traceEvents"], 0)
    assert [(event["cat"], event["ts"] / 1e6, event["dur"] / 1e6) for event in told] == [
        ("training", 0, 1),
        ("evaluation", 6, 2),
        ("waiting", 8, 1),
        ("evaluation", 9, 1),
    ]


def test_a_picture_has_a_lane_for_every_rank_and_steps_from_the_middle_between_two_evaluations():
    """Each step takes a second, of which rank 1 waits for a half; an evaluation of a second after step 19."""
    at = [step + (step > 19) for step in range(40)]
    training = [Span("training", "", step, at[step], at[step] + 1.0, 0) for step in range(40)]
    waiting = [Span("waiting", "batches", step, at[step], at[step] + 0.5, 0) for step in range(40)]
    evaluation = [Span("evaluation", "", 20, 20.0, 21.0, 0)]
    overview = [[0.9] * 41, [0.0] * 41, [0.0] * 41, [0.0] * 41, [0.1] * 41]
    records = [
        Record(0, training + evaluation, 0.0, 1.0, 0.0, overview),
        Record(1, training + waiting + evaluation, 0.0, 1.0, 0.0, overview),
    ]
    figure = timeline(trace(records, place([1.0] * 4, 2)))
    above, below = figure.axes
    assert [label.get_text() for label in below.get_yticklabels()] == ["rank 0\nblocks 0-1", "rank 1\nblocks 2-3"]
    first, last = map(int, below.get_title(loc="left").split()[1].split("–"))
    assert last - first == 7 and (first == 20 or last == 19), "as many as there may be, and next to the middle"
    assert [int(text.get_text()) for text in below.texts] == [*range(first, last + 1)] * 2
    assert len(above.patches) == 2 * 41 * 5 and below.get_xlim() == (0, 8000)
    assert {text.get_text() for text in figure.legends[0].get_texts()} == {"training", "waiting"}


def test_the_picture_of_a_real_run_can_be_drawn(traced):
    assert render(timeline(traced[2])).startswith(b"\x89PNG")


def test_a_trace_without_steps_is_refused_in_a_line():
    with pytest.raises(UserError, match="no step in it"):
        timeline({"traceEvents": []})
