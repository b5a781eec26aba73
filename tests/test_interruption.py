"""SIGTERM and SIGINT: the run finishes its step, saves, and can go on exactly."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from test_promises import last_files, named

from noprop_dist import Card, TrainResult, interruption, train
from noprop_dist.checkpoint import read_manifest
from noprop_dist.parallel import heartbeat
from noprop_dist.runs import RunFolder
from noprop_dist.trainer import Trainer

LONG = 100_000  # steps: longer than any test waits


def heed_signals() -> None:
    """Also where whoever started the tests ignores some, as a shell does for what it starts in the background."""
    for number in interruption.SIGNALS:
        signal.signal(number, signal.SIG_DFL)


def stop_in_step(number: int, step: int = 4) -> Callable[[], None]:
    """Have this process send itself a signal while it does ``step``."""
    heed_signals()
    usual = Trainer._step

    def stepped(self: Trainer, now: int, *args: Any) -> None:
        if now == step:
            os.kill(os.getpid(), number)
        usual(self, now, *args)

    Trainer._step = stepped  # type: ignore[method-assign]
    return lambda: setattr(Trainer, "_step", usual)


def saved_step(card: Card) -> int:
    folders = sorted(RunFolder(card.run.dir / str(card.run.name)).checkpoints.iterdir())
    return int(read_manifest(folders[-1])["step"])


def run_and_stop(
    on_ranks: Callable[..., list[Any]], card: Card, ranks: int, number: int, hit: Iterable[int]
) -> list[TrainResult]:
    """Train on ranks that, all or some of them, get the signal in step 4."""

    def work(rank: int, init_method: str) -> Any:
        heartbeat.BEAT = 0.05
        if rank in hit:
            stop_in_step(number)
        result = train(card, init_method)
        return result.stopped, result.summary, result.model

    return on_ranks(ranks, work)


@pytest.mark.parametrize(
    ("ranks", "feed", "number", "hit"),
    [
        (1, "stream", signal.SIGTERM, [0]),
        (3, "stream", signal.SIGINT, [0]),
        (3, "stream", signal.SIGTERM, [2]),
        (3, "resident", signal.SIGTERM, [1]),
        (2, "stream", signal.SIGINT, [0, 1]),
    ],
)
def test_a_signal_to_any_rank_saves_and_the_run_goes_on_exactly(small_card, on_ranks, ranks, feed, number, hit):
    often = {"eval_every": 7, "checkpoint_every": 5, "steps": LONG}
    card = small_card(parallel={"feed": feed}, train=often, model={"blocks": 4, "embedding": "learned", "embedding_lag": 3})
    for stopped in run_and_stop(on_ranks, card, ranks, number, hit):
        assert stopped == (True, {}, None)
    step = saved_step(card)
    assert 5 <= step < LONG
    whole = named(card, "whole", steps=step + 3)
    expected = train(whole).summary
    resumed = on_ranks(ranks, lambda rank, init_method: train(named(card, "run", steps=step + 3), init_method).summary)[0]
    assert last_files(named(card, "run", steps=step + 3)) == last_files(whole)
    accuracies = [[(point["step"], point["mean"]) for point in each["curve"]] for each in (resumed, expected)]
    assert accuracies[0] == accuracies[1], "also the evaluation that was cut off is there"


def test_the_coordinators_own_signal_stops_it_within_the_batches_that_are_on_their_way(small_card, on_ranks):
    card = small_card(train={"steps": LONG, "eval_every": LONG}, parallel={"prefetch": 3})
    run_and_stop(on_ranks, card, 2, signal.SIGTERM, [0])
    assert saved_step(card) in (8, 9)  # that of the signal, 4, and three that were announced before or beside it


def test_a_signal_before_the_first_step_leaves_nothing_half_done(small_card, monkeypatch):
    card = small_card()
    usual = Trainer.run

    def run(self: Trainer, *args: Any) -> Any:
        self.world.interruption.ask("a test")
        return usual(self, *args)

    monkeypatch.setattr(Trainer, "run", run)
    assert train(card).stopped
    monkeypatch.undo()
    train(card)
    train(other := named(card, "other"))
    assert last_files(card) == last_files(other)


def test_a_signal_in_the_last_evaluation_is_made_up_for(small_card, monkeypatch):
    card = small_card(train={"eval_every": 0})
    usual = Trainer.evaluate

    def evaluate(self: Trainer, log: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        interrupted.wait(30)
        return usual(self, log)

    interrupted = threading.Event()
    asked = interruption.Interruption.ask
    monkeypatch.setattr(interruption.Interruption, "ask", lambda self, reason: (asked(self, reason), interrupted.set()))
    monkeypatch.setattr(Trainer, "evaluate", evaluate)
    assert train(card).stopped
    monkeypatch.undo()
    result = train(card)
    assert [point["step"] for point in result.summary["curve"]] == [6]


def test_signals_are_as_before_when_the_run_is_over(small_card):
    before = [signal.getsignal(number) for number in interruption.SIGNALS]
    train(small_card(train={"steps": 1}))
    assert [signal.getsignal(number) for number in interruption.SIGNALS] == before


def test_a_second_signal_stops_at_once(small_card, on_ranks):
    card = small_card(train={"steps": LONG})

    def work(rank: int, init_method: str) -> None:
        interruption.ECHO = 0.0

        def stuck(self: Trainer, *args: Any) -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            while not self.world.interruption.reason:
                pass
            os.kill(os.getpid(), signal.SIGTERM)
            threading.Event().wait()

        Trainer._step = stuck  # type: ignore[method-assign]
        train(card, init_method)

    (result,) = on_ranks(1, work, check=False)
    assert str(result) == f"rank 0 ended with {128 + signal.SIGTERM}"


COMMAND = ["-m", "noprop_dist.train", "--model.blocks", "2", "--train.steps", str(LONG), "--train.checkpoint_every", "5"]
TORCHRUN = ["-m", "torch.distributed.run", "--nproc_per_node=2"]


@pytest.mark.parametrize(
    ("command", "target", "number", "code"),
    [
        ([*COMMAND, "--run.stop_exit_code", "143"], "itself", signal.SIGINT, 143),
        ([*TORCHRUN, *COMMAND], "a rank", signal.SIGTERM, 0),
        ([*TORCHRUN, *COMMAND], "itself", signal.SIGTERM, None),  # torchrun passes it on, and has its own exit code
    ],
)
def test_a_command_that_is_signalled_saves_and_says_how_to_go_on(command, target, number, code, tmp_path):
    checkpoints = tmp_path / "runs/mine/checkpoints"
    with open(tmp_path / "log", "w") as log:
        start = [sys.executable, *command, "--run.name", "mine"]
        process = subprocess.Popen(start, cwd=tmp_path, stdout=log, stderr=subprocess.STDOUT, preexec_fn=heed_signals)
    while not list(checkpoints.glob("*/manifest.json")):
        assert process.poll() is None, (tmp_path / "log").read_text()
        threading.Event().wait(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(process.pid if target == "itself" else int(children[-1]), number)
    exit_code = process.wait(120)
    said = (tmp_path / "log").read_text()
    assert code in (None, exit_code), said
    assert f"stopped by {number.name}" in said and "to go on, start it again with --run.name mine" in said
    assert "Traceback" not in said or target == "itself"  # torchrun's own
    newest = sorted(checkpoints.iterdir())[-1]
    assert f"saved {newest.relative_to(tmp_path)}" in said and read_manifest(newest)["step"] > 0


def test_listening_ends_although_a_forked_worker_still_lives():
    """It has inherited the pipe that the listener reads."""
    with interruption.Interruption().listening():
        worker = multiprocessing.get_context("fork").Process(target=signal.pause, daemon=True)
        worker.start()
    assert worker.is_alive()
    worker.kill()
