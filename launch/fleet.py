"""The fleet: workers on Ray actors, and a driver that hands blocks out and keeps what comes back."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import ray
from fleet_workers import Batches, Work, Worker
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from noprop_dist import UserError, checkpoint
from noprop_dist.config import Card
from noprop_dist.data import DataSet
from noprop_dist.files import read, unpack
from noprop_dist.history import History
from noprop_dist.interruption import Interruption
from noprop_dist.launcher import agree
from noprop_dist.learner import STEPS
from noprop_dist.parallel.placement import place
from noprop_dist.parallel.traffic import PeerError
from noprop_dist.parallel.world import World, set_threads
from noprop_dist.report.board import Board
from noprop_dist.report.console import log
from noprop_dist.report.screen import Screen
from noprop_dist.runs import total_steps
from noprop_dist.saving import keep_block, kept_block
from noprop_dist.units import LabelSpaceAlone, Report


@dataclass
class Member:
    """A worker, as the driver knows it. ``holds``: the block and step that it has in memory."""

    name: str
    actor: Any
    holds: tuple[int, int] = (-1, 0)


@dataclass
class Lease:
    """A block in a worker's hands; without a block, a worker on its way."""

    member: Member
    index: int = -1
    start: int = 0
    asked: Any = None
    """How far it is: the question under way."""
    progress: tuple[int, int] = (-1, 0)
    moved: float = field(default_factory=time.monotonic)
    """When it was last seen to get on."""


class Fleet:
    """A run of a settled card on ``workers`` actors at most, each with the resources ``each``.

    A block that fails ``max_failures`` times and once more without getting on ends the run.
    """

    def __init__(self, card: Card, workers: int, each: Mapping[str, float], max_failures: int) -> None:
        here = card.parallel.model_copy(update={"device": "cpu"})  # for the label space alone; the workers may have GPUs
        self._world = World(here, place([1.0] * card.units, 1))
        plan = agree(card, set_threads(card.parallel), self._world)
        self._world.connect()
        self._card, self._info, self._folder = plan.card, plan.info, plan.folder
        self._data = cast(DataSet, plan.data)
        self._total, self._workers, self._each = total_steps(self._card, self._info.train_size), workers, dict(each)
        self._max_failures, self._failures = max_failures, dict.fromkeys(range(-1, card.units), 0)
        self._world.step, self._checkpoint = plan.start, plan.checkpoint
        self._steps = {index: self._state(index)[0] for index in range(card.units)}
        self._skipped = dict.fromkeys(self._steps, 0)
        self._leases: dict[Any, Lease] = {}
        self._idle: list[Member] = []
        self._hired, self._begin = 0, 0.0

    def run(self) -> bool:
        """Train all blocks to the end and write the checkpoint of it. False where a signal stopped it, all saved."""
        if self._world.step == self._total:
            return True
        fed = 0
        labels = LabelSpaceAlone(self._card, self._data, self._world, self._checkpoint)
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        card = self._card.model_dump(mode="json")
        self._batches = Batches.options(scheduling_strategy=here).remote(card)
        log.info("fleet %s: %d blocks, %d steps each, at most %d workers", self._folder.path, self._card.units, self._total,
                 self._workers)  # fmt: skip
        interruption, stopping = Interruption(), False
        board, screen = (
            Board(self._folder.tensorboard, min(self._steps.values())),
            Screen(self._done, self._total * len(self._steps)),
        )
        with interruption.listening(), screen:
            while self._done < self._total * len(self._steps):
                if interruption.reason and not stopping:
                    stopping = True
                    for lease in self._leases.values():
                        lease.member.actor.stop.remote()
                working = any(lease.index >= 0 for lease in self._leases.values())
                if stopping and not working:
                    break
                if not stopping:
                    self._hire(card)
                    self._hand_out(labels)
                ready, _ = ray.wait(list(self._leases), timeout=1)
                self._watch()
                for reference in ready:
                    fed += self._take_back(reference, board)
                    screen.update(self._done)
        board.close()
        if stopping:
            log.info("stopped by %s: every block is saved in %s; to go on, start it again with --run.name %s",
                     interruption.reason, self._folder.alone, self._folder.path.name)  # fmt: skip
            return False
        states = {index: self._state(index)[1] for index in self._steps}
        done = labels.finish(self._folder, {index: state for index, state in states.items() if state})
        history = History(self._folder.history, self._world.step, self._checkpoint)
        whole = {"seconds": time.perf_counter() - self._begin, "steps": self._total, "bytes": fed}
        epoch = self._total * self._card.data.batch_size / self._info.train_size
        history.note(self._total, epoch=epoch, **{name: value + history.before[name] for name, value in whole.items()})
        log.info("all blocks are trained: %s", done)
        return True

    @property
    def _done(self) -> int:
        return sum(self._steps.values())

    def _state(self, index: int) -> tuple[int, bytes | None]:
        """The step of a block and its state; 0 and None: fresh."""
        step, path = kept_block(self._folder.alone, self._card, self._info, index)
        kept = read(path) if path else None
        if self._checkpoint:
            saved = read(self._checkpoint / checkpoint.block_file(index))
            step, kept = max((int(unpack(saved)[STEPS]), saved), (step, kept), key=lambda each: each[0])
        return step, kept

    def _hire(self, card: dict[str, Any]) -> None:
        """Ask for workers up to the number wanted. Ray starts them when it has room."""
        while len(self._idle) + len(self._leases) < self._workers:
            self._hired += 1
            options = {"num_cpus": self._each["CPU"], "num_gpus": self._each.get("GPU", 0)}
            actor = Worker.options(**options).remote(card, self._info.to_json(), self._batches)
            self._leases[actor.hello.remote()] = Lease(Member(f"worker {self._hired}", actor))

    def _hand_out(self, labels: LabelSpaceAlone) -> None:
        """Give each idle worker the free block that is furthest behind; among equals the one that it has already."""
        taken = {lease.index for lease in self._leases.values()}
        every = self._card.train.checkpoint_every or self._total
        while self._idle and (free := {i: s for i, s in self._steps.items() if i not in taken and s < self._total}):
            least = min(free.values())
            fitting = [member for member in self._idle if free.get(member.holds[0]) == least == member.holds[1]]
            member = fitting[0] if fitting else self._idle[0]
            index = member.holds[0] if fitting else min(free, key=lambda index: (free[index], index))
            steps = range(free[index], min(self._total, (free[index] // every + 1) * every))
            state = None if member.holds == (index, steps.start) else self._state(index)[1]
            work = member.actor.train.remote(index, state, steps, labels.values(steps))
            self._leases[work] = Lease(member, index, steps.start)
            self._idle.remove(member)
            taken.add(index)
            labels.forget(min(self._steps.values()))

    def _take_back(self, reference: Any, board: Board) -> int:
        """What a worker has done, if it still lives. Returns the bytes of batches that it took."""
        lease = self._leases.pop(reference)
        try:
            answer = ray.get(reference)
        except ray.exceptions.RayError as error:
            cause: Any = error
            while isinstance(cause, ray.exceptions.RayTaskError):  # a worker's, or that of the batches that it asked for
                cause = cause.cause
            if isinstance(cause, UserError):
                raise cause from None
            if not isinstance(cause, ray.exceptions.RayError):  # its own failure; else Ray lost it, or what it needs
                raise PeerError(f"{lease.member.name} failed with block {lease.index}: {_last_line(error)}") from error
            ray.kill(lease.member.actor)
            self._lost(lease, error)
            return 0
        self._idle.append(lease.member)
        if lease.index < 0:
            self._begin, self._failures[-1] = self._begin or time.perf_counter(), 0
            log.info("%s joins: %s", lease.member.name, answer)
            return 0
        report, state, work = answer
        keep_block(self._folder.alone, self._card, self._info, lease.index, report.step, state)
        self._steps[lease.index], self._failures[lease.index] = report.step, 0
        lease.member.holds = (lease.index, report.step)
        self._note(lease, report, work, board)
        return int(work.bytes)

    def _watch(self) -> None:
        """Ask those at work how far they are. End those that have not got on for ``parallel.timeout``, being stopped, say."""
        for lease in self._leases.values():
            if lease.index < 0:
                continue
            lease.asked = lease.asked or lease.member.actor.progress.remote()
            if ray.wait([lease.asked], timeout=0)[0]:
                with contextlib.suppress(ray.exceptions.RayError):  # it is lost, as its work will tell
                    if (progress := ray.get(lease.asked)) != lease.progress:
                        lease.progress, lease.moved = progress, time.monotonic()
                lease.asked = None
            if (idle := time.monotonic() - lease.moved) > self._card.parallel.timeout:
                log.warning("%s has not got on with block %d for %.0f s, since step %d: it is ended", lease.member.name,
                            lease.index, idle, max(lease.start, lease.progress[1]))  # fmt: skip
                lease.moved = math.inf
                ray.kill(lease.member.actor)

    def _lost(self, lease: Lease, error: Exception) -> None:
        self._failures[lease.index] += 1
        failures = self._failures[lease.index]
        if lease.index < 0:
            log.warning("%s could not start: %s", lease.member.name, _last_line(error))
            if 0 <= self._max_failures < failures:
                raise PeerError(f"{failures} workers in a row could not start, the last one: {_last_line(error)}")
            return
        log.warning("%s is lost; block %d goes back to step %d", lease.member.name, lease.index, lease.start)
        if 0 <= self._max_failures < failures:
            raise PeerError(
                f"block {lease.index} lost {self._failures[lease.index]} workers in a row at steps from {lease.start} on"
            )

    def _note(self, lease: Lease, report: Report, work: Work, board: Board) -> None:
        tag = f"block-{lease.index:02d}"
        board.scalars(report.step, {f"{tag}/loss": report.loss, f"{tag}/train accuracy": report.accuracy})
        if report.skipped > self._skipped[lease.index]:
            self._skipped[lease.index] = report.skipped
            given_up = 0 < self._card.train.max_bad_steps <= report.in_a_row
            log.warning("step %d: block %d: %d updates skipped, loss or gradient not finite%s", report.step, lease.index,
                        report.skipped, "; IT IS NO LONGER TRAINED" * given_up)  # fmt: skip
        figures = {"time": time.time(), "worker": lease.member.name, "block": lease.index, "from": lease.start}
        figures |= {"to": report.step, "seconds": work.seconds, "waited": work.waited}
        with open(self._folder.fleet, "a") as file:
            print(json.dumps(figures), file=file)


def _last_line(error: Exception) -> str:
    """Of Ray's long message: the cause."""
    return str(error).strip().splitlines()[-1].strip()
