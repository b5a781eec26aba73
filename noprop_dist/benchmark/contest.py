"""Rounds of all contenders on one card, and the figures that come of them."""

from __future__ import annotations

import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from noprop_dist.benchmark.runner import Figures, Job, Memory, Race, Speed, measure
from noprop_dist.config import Card
from noprop_dist.data import DataInfo, describe, open_data, resolve_augment
from noprop_dist.launcher import resolve
from noprop_dist.nets.cost import block_cost
from noprop_dist.nets.labels import embedding_size
from noprop_dist.parallel.feed import HEADER, message_size

LIMIT, ALONE, OURS = "limit", "one of its processes alone", "layer-parallel NoProp"
WARMUP, TRIAL = 3, 5  # steps
ENOUGH = 0.75  # of the cores that ranks ask for: below, nothing is said about scaling


@dataclass(frozen=True)
class Plan:
    """What to measure: ``ranks``, ``rounds`` of at least ``seconds`` a contender, and which contenders (None: all)."""

    card: Card
    ranks: int
    rounds: int
    seconds: float
    only: Sequence[str] | None = None
    link: float | None = None
    """Bytes a second that a rank can send; None: over the loopback."""


def synthetic(card: Card, size: int | None, folder: Path) -> Card:
    """The card with random pixels and labels in the place of its data, of the same shape or ``size`` pixels a side: speed does
    not depend on what is to be seen, and nothing needs to be downloaded. Two batches and a few test images, as an .npz file."""
    info = describe(card.data)
    channels, *sides = info.shape
    height, width = (size, size) if size else sides
    random = np.random.default_rng(0)
    arrays: dict[str, Any] = {}
    for name, count in (("train", max(2 * card.data.batch_size, len(info.classes))), ("test", len(info.classes))):
        pixels = random.integers(0, 256, (count, height, width, channels), dtype=np.uint8)
        arrays |= {f"x_{name}": pixels, f"y_{name}": np.arange(count) % len(info.classes)}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"random-{channels}x{height}x{width}-{card.data.batch_size}.npz"
    np.savez(path, **arrays)
    return change(card, data={"name": "npz", "root": path.absolute(), "augment": resolve_augment(card.data)})


def endless(card: Card) -> Card:
    """The card, for steps without end, evaluation or checkpoint: the benchmark says when. For all contenders alike the learning
    rate is constant, without clipping and moving average."""
    plain = {"schedule": "constant", "warmup_steps": 0, "clip_norm": 0.0, "ema": 0.0}
    return change(card, train={"steps": 10**9, "eval_every": 10**9, "checkpoint_every": 0, "pictures": False}, optim=plain)


def contenders(card: Card, ranks: int) -> dict[str, Job]:
    """Every contender by name. The threads of a rank are the card's, 1 by default."""
    threads = card.parallel.threads or 1
    card = change(card, parallel={"threads": threads, "feed": "stream"})
    resident, parallel = change(card, parallel={"feed": "resident"}), change(card, parallel={"threads": ranks * threads})
    jobs = {
        "NoProp, bare loop": Job(card, "bare"),
        "NoProp, 1 rank": Job(card, "trained"),
        OURS: Job(card, "trained", ranks),
        f"{OURS}, resident feed": Job(resident, "trained", ranks),
        "backprop, 1 rank": Job(card, "whole"),
        f"backprop, {ranks * threads} threads": Job(parallel, "whole"),
        "backprop, checkpointed": Job(card, "recompute"),
        "backprop, accumulated": Job(card, "accumulate", microbatches=4),
        "DDP backprop": Job(card, "ddp", ranks),
        "GPipe backprop": Job(card, "gpipe", ranks),
        "1F1B backprop": Job(card, "1f1b", ranks),
    }
    alone = ("NoProp, bare loop", "NoProp, 1 rank", "backprop, 1 rank", "backprop, checkpointed", "backprop, accumulated")
    return jobs if ranks > 1 else {name: jobs[name] for name in alone}


def contest(plan: Plan, logs: Path, say: Any) -> dict[str, Any]:
    """Measure, and gather everything in one JSON value; ``say`` is told how far it is."""
    card, ranks = plan.card, plan.ranks
    jobs = contenders(card, ranks)
    card = jobs["NoProp, 1 rank"].card
    if plan.only:
        jobs = {name: job for name, job in jobs.items() if name in plan.only}
    jobs = {
        LIMIT: Job(card, "bare", ranks),
        ALONE: Job(card, "bare", ranks, alone=True),
        **{name: replace(job, link=plan.link if job.ranks > 1 else None) for name, job in jobs.items()},
    }
    batch = card.data.batch_size

    def rate(name: str, steps: int) -> tuple[float, list[Figures]]:
        figures: list[Figures] = measure(jobs[name], Speed(WARMUP, steps), logs / f"{_slug(name)}.log")
        return steps * batch / max(each.seconds for each in figures), figures

    first, _ = rate(LIMIT, TRIAL)
    steps = max(TRIAL, round(plan.seconds * first / batch))
    for name in ("GPipe backprop", "1F1B backprop"):
        if name in jobs:
            tried = {}
            for count in microbatches(batch, ranks):
                jobs[name] = replace(jobs[name], microbatches=count)
                tried[count], _ = rate(name, TRIAL)
            jobs[name] = replace(jobs[name], microbatches=max(tried, key=tried.__getitem__))
    memory = {
        name: max(measure(job, Memory(), logs / f"{_slug(name)}.log"))
        for name, job in jobs.items()
        if name not in (LIMIT, ALONE)
    }
    rounds: list[dict[str, dict[str, Any]]] = []
    for number in range(plan.rounds):
        results = {}
        order = list(jobs) if number % 2 == 0 else list(reversed(jobs))
        for name in order:
            speed, figures = rate(name, steps)
            results[name] = {
                "samples_per_second": speed,
                "busy": statistics.fmean(each.busy for each in figures),
                "waited": max((each.waited for each in figures if each.waited is not None), default=None),
                "sent": _sent(jobs[name], figures, steps),
            }
        rounds.append(results)
        speeds = ", ".join(f"{name} {results[name]['samples_per_second']:,.0f}" for name in jobs)
        say(f"round {number + 1}/{plan.rounds}, samples/s: {speeds}")
    info = open_data(card.data).info
    result = {
        "card": card.model_dump(mode="json"),
        "shape": list(info.shape),
        "ranks": ranks,
        "steps": steps,
        "rounds": rounds,
        "cores": _cores(),
        "entries": [_entry(name, jobs, rounds, memory, info) for name in jobs if name not in (LIMIT, ALONE)],
    }
    limit = _across(rounds, lambda each: each[LIMIT]["samples_per_second"])
    given = _across(rounds, lambda each: ranks * each[LIMIT]["samples_per_second"] / each[ALONE]["samples_per_second"])
    result |= {"limit": limit, "cores_given": given, "scales": bool(given["median"] >= ENOUGH * ranks and _cores() >= ranks)}
    return result


def race(card: Card, ranks: int, target: float, only: Sequence[str] | None, logs: Path, say: Any) -> dict[str, Any]:
    """Seconds of training until a test accuracy, on real data, a contender at a time. Each evaluates after every epoch of at
    most 100 steps, with the clock stopped."""
    info = describe(card.data)
    size, batch = info.train_size, card.data.batch_size
    every = max(1, min(100, size // batch))
    courses = {}
    for name, job in contenders(card, ranks).items():
        if job.kind == "bare" or (only and name not in only):
            continue
        if job.kind in ("gpipe", "1f1b"):
            job = replace(job, microbatches=microbatches(batch, ranks)[-1])
        course = measure(job, Race(target, every, 30 * every), logs / f"race-{_slug(name)}.log")[0]
        courses[name] = course
        steps, seconds, accuracy = course[-1]
        reached = "reached" if accuracy >= target else "not reached"
        say(f"{name}: {target:.1%} {reached}: {accuracy:.2%} after {steps} steps, {seconds:.1f} s")
    return {
        "every": every,
        "data": info.name,
        "train_size": size,
        "test_size": info.test_size,
        "target": target,
        "courses": courses,
        "seconds": {name: course[-1][1] if course[-1][2] >= target else None for name, course in courses.items()},
    }


def microbatches(batch: int, ranks: int) -> list[int]:
    """Into how many a pipeline may cut a batch: the least three numbers from ``ranks`` on that divide it."""
    return [count for count in range(ranks, batch // 2 + 1) if batch % count == 0][:3]  # batch norm needs two images


def _entry(
    name: str, jobs: Mapping[str, Job], rounds: Sequence[Mapping[str, Any]], memory: Mapping[str, int], info: DataInfo
) -> dict[str, Any]:
    """A contender's line."""
    job = jobs[name]
    ours = OURS if OURS in jobs else "NoProp, 1 rank"
    sent = [each[name]["sent"] for each in rounds if each[name]["sent"] is not None]
    return {
        "name": name,
        "ranks": job.ranks,
        "threads": job.card.parallel.threads,
        "microbatches": job.microbatches,
        "samples_per_second": _across(rounds, lambda each: each[name]["samples_per_second"]),
        "of_limit": _across(rounds, lambda each: each[name]["samples_per_second"] / each[LIMIT]["samples_per_second"]),
        "ours_is": _across(rounds, lambda each: each[ours]["samples_per_second"] / each[name]["samples_per_second"])
        if ours in jobs
        else None,
        "bytes": statistics.median(sent) if sent and job.ranks > 1 else None,
        "bytes_by_formula": _bytes(job, info),
        "memory": memory[name],
        "busy": statistics.median(each[name]["busy"] for each in rounds),
        "waited": statistics.median(each[name]["waited"] for each in rounds) if job.kind == "trained" else None,
    }


def _sent(job: Job, figures: Sequence[Figures], steps: int) -> float | None:
    """Bytes a step of all ranks, which on the loopback each of them sees."""
    seen = [each.sent for each in figures if each.sent is not None]
    return sum(seen if job.link else seen[:1]) / steps if seen else None


def _across(rounds: Sequence[Mapping[str, Any]], figure: Any) -> dict[str, float]:
    values = [figure(each) for each in rounds]
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def _bytes(job: Job, info: DataInfo) -> int:
    """Bytes that all ranks send in a step, by formula."""
    others, batch = job.ranks - 1, job.card.data.batch_size
    if job.kind == "trained":
        return others * (message_size(batch, info.shape) if job.card.parallel.feed == "stream" else HEADER)
    if job.kind == "ddp":  # each rank passes 2(N−1)/N of all gradients on
        card = resolve(change(job.card, method={"name": "backprop"}), info)
        head = embedding_size(card.model, info.shape, len(info.classes)) * len(info.classes) + len(info.classes)
        return 2 * others * 4 * (block_cost(card, info.shape, len(info.classes)).parameters + head)
    if job.kind in ("gpipe", "1f1b"):  # z forwards, its gradient back
        return 2 * others * batch * 4 * embedding_size(job.card.model, info.shape, len(info.classes))
    return 0


def change(card: Card, **sections: Mapping[str, Any]) -> Card:
    """The card with some settings changed."""
    return card.model_copy(
        update={name: getattr(card, name).model_copy(update=dict(changes)) for name, changes in sections.items()}
    )


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _slug(name: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in name.lower())
