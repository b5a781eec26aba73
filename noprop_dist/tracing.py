"""RUN/trace.json: what all ranks did when, in Chrome's trace-event format, which Perfetto and chrome://tracing open.

A process there is a rank. Its spans do not overlap: training, evaluation, drawing (pictures for TensorBoard) and saving, each
without the waiting in it, and waiting (reading: for pictures to be read). Messages that it sent go on beside them. The counter
tells of the whole run, spans of its first and its last steps. Times are microseconds from when the first rank began.
"""

from __future__ import annotations

import json
import time
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from noprop_dist import files
from noprop_dist.parallel.placement import Placement
from noprop_dist.parallel.spans import DOING, SHARES, Span
from noprop_dist.parallel.trace import Record

COUNTER = "share of time"


def keep(path: Path, records: Sequence[Record], placement: Placement) -> None:
    """Write the trace of one rank or more. Raises UserError on a disk's refusal."""
    files.write(path, json.dumps(trace(records, placement), separators=(",", ":")).encode())


def trace(records: Sequence[Record], placement: Placement) -> dict[str, Any]:
    """A trace as trace.json holds it."""
    zero = min(record.origin - record.offset for record in records)
    began = time.time() - (time.perf_counter() - zero)
    clocks = [{"rank": each.rank, "offset_s": each.offset, "accuracy_s": each.accuracy} for each in records]
    return {
        "traceEvents": [event for record in records for event in _events(record, placement, zero)],
        "displayTimeUnit": "ms",
        "otherData": {"program": "noprop_dist", "began": began, "clocks": clocks},
    }


def _events(record: Record, placement: Placement, zero: float) -> Iterator[dict[str, Any]]:
    def at(seconds: float) -> float:
        return round((seconds - record.offset - zero) * 1e6, 1)

    thread: dict[str, Any] = {"pid": record.rank, "tid": 0}
    owned = placement.ranges[record.rank]
    for name, label in (
        ("process_name", {"name": placement.name(record.rank)}),
        ("process_labels", {"labels": f"{len(owned)} block{'s' * (len(owned) > 1)}"}),
        ("process_sort_index", {"sort_index": record.rank}),
        ("thread_name", {"name": "doing"}),
    ):
        yield {"ph": "M", **thread, "name": name, "args": label}
    for span in _apart(record):
        name = f"waiting for {span.kind}" if span.what == "waiting" else span.what
        args = {"step": span.step, **({"kind": span.kind} if span.kind else {})}
        times = {"ts": at(span.begin), "dur": round(at(span.end) - at(span.begin), 1)}
        yield {"ph": "X", **thread, "name": name, "cat": span.what, **times, "args": args}
    for number, span in enumerate(span for span in record.spans if span.what == "sending"):
        message = {**thread, "name": f"sending {span.kind}", "cat": span.what, "id": f"{record.rank}.{number}"}
        args = {"step": span.step, "kind": span.kind, "bytes": span.size}
        yield {"ph": "b", **message, "ts": at(span.begin), "args": args}
        yield {"ph": "e", **message, "ts": at(span.end)}
    for number, seconds in enumerate(zip(*record.overview, strict=True)):
        if any(seconds):
            shares = {what: round(max(0.0, each) / record.width, 4) for what, each in zip(SHARES, seconds, strict=True)}
            yield {"ph": "C", **thread, "name": COUNTER, "ts": at(record.origin + number * record.width), "args": shares}


def _apart(record: Record) -> Iterator[Span]:
    """What the rank did and waited for, in pieces that do not overlap; none of times of which something is forgotten."""
    spans = sorted((span for span in record.spans if span.what != "sending"), key=lambda span: span.begin)
    waits = [span for span in spans if span.what not in DOING]
    begins = [wait.begin for wait in waits]
    for span in spans:
        if span.what not in DOING:
            yield span
            continue
        begin = max(span.begin, record.horizon) if span.end > record.horizon else span.begin
        for wait in waits[bisect_left(begins, begin) : bisect_left(begins, span.end)]:
            yield span._replace(begin=begin, end=wait.begin)
            begin = wait.end
        yield span._replace(begin=begin)
