"""What a rank notes of its time, in memory that does not grow."""

from __future__ import annotations

import math

import pytest

from noprop_dist.parallel import spans
from noprop_dist.parallel.spans import BINS, FIRST, LAST, SHARES, Spans


class Clock:
    """Time that passes when told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(spans.time, "perf_counter", lambda: self.now)

    def wait(self, noted: Spans, seconds: float, step: int = 0) -> None:
        begin, self.now = self.now, self.now + seconds
        noted.waited("waiting", "batches", step, begin, self.now)


def test_however_long_a_run_is_the_first_and_last_spans_stay_and_an_overview_of_all(monkeypatch):
    clock = Clock(monkeypatch)
    noted, steps = Spans(), 5000
    for step in range(steps):
        with noted.during("training", step):
            clock.wait(noted, 0.25, step)
            clock.now += 1
        with noted.during("evaluation", step):
            clock.now += 0.5
    kept = noted.kept
    assert len(kept) == FIRST + LAST
    assert kept[0].step == 0 and kept[-1].step == steps - 1
    assert [span.step for span in kept if span.what == "training"] == [
        *range((FIRST + 1) // 3),
        *range(steps - (LAST + 1) // 3, steps),
    ]
    assert kept[FIRST - 1].end < noted.horizon <= kept[FIRST].end, "of the times after it nothing is forgotten"
    sums = dict(zip(SHARES, map(sum, noted.overview), strict=True))
    assert sums == pytest.approx({"training": steps, "evaluation": steps / 2, "waiting": steps / 4, "drawing": 0, "saving": 0})
    assert len(noted.overview[0]) == BINS and noted.width * BINS >= 1.75 * steps > noted.width * BINS / 2
    full = int(1.75 * steps / noted.width)
    for stretch in list(zip(*noted.overview, strict=True))[:full]:
        assert sum(stretch) == pytest.approx(noted.width), "all of the time is told"


def test_a_message_is_under_way_until_the_rank_finds_it_complete(monkeypatch):
    clock, arrived = Clock(monkeypatch), []
    noted = Spans()
    noted.sends("batches", 7, clock.now, 1000, lambda: bool(arrived))
    clock.wait(noted, 1)
    assert not [span for span in noted.kept if span.what == "sending"]
    arrived.append(True)
    clock.wait(noted, 1)
    (sent,) = [span for span in noted.kept if span.what == "sending"]
    assert (sent.kind, sent.step, sent.begin, sent.end, sent.size) == ("batches", 7, 100, 102, 1000)
    clock.wait(noted, 1)
    assert len([span for span in noted.kept if span.what == "sending"]) == 1
    assert math.isclose(sum(map(sum, noted.overview)), 3), "sending is beside all else"
