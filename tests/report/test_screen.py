"""The live board on a terminal, as ranks write to it, and the lines elsewhere."""

from __future__ import annotations

import io
import os
import re
import signal
import sys
import threading
import traceback

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from terminals import show, terminal

from noprop_dist import train
from noprop_dist.report import screen
from noprop_dist.report.console import log
from noprop_dist.trainer import Trainer

STEPS = {"steps": 8, "log_every": 4, "eval_every": 8}


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    monkeypatch.setattr("noprop_dist.parallel.feed.SAMPLE", 100)  # these tests ask for no accuracy
    monkeypatch.setenv("TERM", "xterm-256color")
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS", "LINES"):
        monkeypatch.delenv(name, raising=False)


def in_step(step, act):
    """Have this process ``act(rank)`` when it does ``step``."""
    usual = Trainer._step

    def stepped(self, now, *args):
        if now == step:
            act(self.world.rank)
        usual(self, now, *args)

    Trainer._step = stepped


def test_the_board_shows_every_ranks_own_figures_and_stays(small_card, on_ranks):
    card = small_card(train=STEPS, parallel={"prefetch": 1})
    with terminal() as screen:
        summary = on_ranks(2, screen.on(lambda rank, init_method: train(card, init_method).summary))[0]
    *above, progress, head, first, second, verdict, rest = screen.lines
    assert progress.startswith("finished   ━━━━") and "─" not in progress and " 8/8  100%  0:" in progress
    assert head.split() == ["rank", "blocks", "loss", "û", "right", "busy", "sent", "per", "step"]
    events = EventAccumulator(str(card.run.dir / "run/tensorboard")).Reload()
    for row, blocks in ((first, (0, 1)), (second, (2, 3))):
        rank, owned, *losses = row.split()[:4]
        assert (rank, owned) == (str(blocks[0] // 2), f"{blocks[0]}-{blocks[1]}")
        assert losses == [f"{events.Scalars(f'block-{index:02d}/loss')[-1].value:.3g}" for index in blocks]
        hits = [events.Scalars(f"block-{index:02d}/train accuracy")[-1].value for index in blocks]
        assert row.split()[4:6] == [f"{hit:.1%}" for hit in hits]
        share = events.Scalars(f"busy share of rank {rank}")[-1].value
        assert row.split()[6] == f"{share:.0%}" and 0 < share <= 1
    assert re.search(r" [\d.]+ kB +1\.6 kB$", first), "three batches of 32 pictures in four steps: the fourth was sent before"
    assert re.search(r" 240 B +0 B$", second), "by then a row of figures, 4 + 2 * 5 numbers, and two checkpoints' two sums"
    assert verdict.startswith(f"test, step 8: mean {summary['accuracy']['mean']:.2%}  stochastic") and rest == ""
    assert above[0].startswith("run ") and above[-1].startswith("step 8/8  test: mean ")
    assert sum(line.startswith("rank  blocks") for line in screen.lines) == 1, "one board"
    assert screen.text.rfind("\x1b[?25h") > screen.text.rfind("\x1b[?25l"), "the cursor is there"


def test_what_ranks_say_meanwhile_stands_above_the_board(small_card, on_ranks):
    def say(rank):
        log.warning("careful, says %d", rank)
        print(f"odd, finds {rank}", file=sys.stderr)  # as Python's own warnings are written
        if rank == 0:
            print("hello")

    def work(rank, init_method):
        in_step(5, say)
        return train(small_card(train=STEPS), init_method).summary

    with terminal() as screen:
        on_ranks(2, screen.on(work))
    lines, said = screen.lines, "\n".join(screen.lines)
    board = next(number for number, line in enumerate(lines) if line.startswith("rank  blocks"))
    for text in ("careful, says 0", "hello", "odd, finds 0", "rank 1: careful, says 1", "odd, finds 1"):
        assert text in lines[:board], said
    assert sum(line.startswith("rank  blocks") for line in lines) == 1, said


def test_a_run_that_is_stopped_leaves_the_board_as_it_was(small_card, on_ranks):
    def work(rank, init_method):
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        in_step(5, lambda rank: os.kill(os.getpid(), signal.SIGINT))
        return train(small_card(train=STEPS | {"steps": 1000, "eval_every": 1000}), init_method).stopped

    with terminal() as screen:
        assert on_ranks(1, screen.on(work)) == [True]
    (progress,) = [line for line in screen.lines if line.startswith("stopped   ")]
    step = int(re.search(r" (\d+)/1,000 ", progress)[1])
    saved = f"stopped by SIGINT after step {step}: saved"
    assert any(line.startswith(saved) for line in screen.lines) and step < 1000
    assert [line for line in screen.lines if line.strip()][-1] == "no evaluation yet"
    assert screen.text.rfind("\x1b[?25h") > screen.text.rfind("\x1b[?25l")


def test_a_ranks_own_failure_is_not_lost_under_the_board(small_card, on_ranks):
    def fail(rank):
        if rank == 1:
            raise ZeroDivisionError("a mistake in the program")

    def work(rank, init_method):
        in_step(5, fail)
        try:
            train(small_card(train=STEPS, parallel={"timeout": 5}), init_method)
        except ZeroDivisionError as error:
            traceback.print_exception(error)
            os._exit(1)

    with terminal() as screen:
        on_ranks(2, screen.on(work), check=False)
    assert "ZeroDivisionError: a mistake in the program" in screen.lines


@pytest.mark.parametrize(
    ("variable", "value", "board", "colour"), [("NO_COLOR", "1", True, False), ("TERM", "dumb", False, False)]
)
def test_terminals_that_want_less_get_less(variable, value, board, colour, small_card, on_ranks, monkeypatch):
    monkeypatch.setenv(variable, value)
    with terminal() as screen:
        on_ranks(1, screen.on(lambda rank, init_method: train(small_card(), init_method).summary))
    assert ("rank  blocks" in screen.text) == board
    assert bool(re.search(r"\x1b\[[0-9;]*3[0-9]", screen.text)) == colour
    assert "step 6/6  test: mean" in screen.text


def test_elsewhere_there_are_lines_and_one_a_minute_with_loss_speed_and_time_left(small_card, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # makes no terminal
    train(small_card(run={"name": "quick"}))
    quick = capsys.readouterr().out
    monkeypatch.setattr(screen, "MINUTE", 0.0)
    train(small_card(run={"name": "slow"}))
    slow = capsys.readouterr().out
    assert "\r" not in quick + slow and "\x1b[" not in re.sub(r"\x1b\[[0-9;]*m", "", quick + slow)
    assert re.fullmatch(r"(step [36]/6  test: mean .*\n){2}", quick)
    line = r"^step \d/6  loss [\d.e-]+(–[\d.]+)?  û [\d.]+(–[\d.]+)?%  [\d,]+/s  \d:\d\d left$"
    assert len(re.findall(line, slow, re.MULTILINE)) == 3
    assert "loss" not in quick


def test_processes_that_read_pictures_write_without_waiting_for_the_board():
    with terminal(60) as found, os.fdopen(os.dup(found.slave), "w") as file, pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdout", file)
        patch.setattr("sys.stderr", file)
        with screen.Screen(0, 10, [screen.Lane(0, range(2), [0.5, 0.5], [0.1, 0.2])]) as board:
            held, done = threading.Event(), threading.Event()

            def hold() -> None:  # as the board's own thread does at work
                with board._live._lock:
                    held.set()
                    done.wait()

            threading.Thread(target=hold).start()
            held.wait()
            if not (child := os.fork()):
                signal.alarm(20)
                print("a picture is odd", file=sys.stderr)
                os._exit(0)
            status = os.waitpid(child, 0)[1]
            done.set()
            assert status == 0
    assert found.lines[0] == "a picture is odd"
    assert [line.split()[0] for line in found.lines if line] == ["a", "stopped", "rank", "0", "no"]


def test_lines_of_another_rank_come_out_whole():
    file = io.StringIO("a\nb\nc\nd")
    file.seek(7)
    above = screen.Above(file, 4)
    for piece in ("one ", "line\nand", " more\n", "rest"):
        above.write(piece)
    lines = show(file.getvalue())
    assert lines[:2] == ["one line", "and more"] and not any(lines[2:]) and len(lines) == 2 + 4
