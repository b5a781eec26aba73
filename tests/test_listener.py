"""What a run tells a listener, and how it is stopped from outside: what clusters and searches build on."""

from __future__ import annotations

from noprop_dist import train
from noprop_dist.interruption import Interruption


def test_every_rank_is_told_of_every_evaluation_and_checkpoint_and_of_the_end_when_all_is_written(small_card, on_ranks):
    card = small_card(train={"steps": 7, "checkpoint_every": 2, "eval_every": 3, "log_every": 2})

    def work(rank, init_method):
        told = []

        def listen(progress):
            complete = progress.folder.summary.exists() and progress.folder.model.exists()
            place = progress.checkpoint and progress.checkpoint.relative_to(progress.folder.checkpoints).name
            told.append((progress.step, place, dict(progress.figures), complete))

        train(card, init_method, listener=listen)
        return told

    coordinator, other = on_ranks(2, work)
    places = [(2, "step-00000002"), (3, None), (4, "step-00000004"), (6, "step-00000006"), (7, "step-00000007")]
    assert [(step, place) for step, place, _, _ in coordinator] == places
    assert [(step, place, figures) for step, place, figures, _ in other] == [(*place, {}) for place in places]
    assert [complete for *_, complete in coordinator] == [False] * 4 + [True]
    figures = {step: figures for step, _, figures, _ in coordinator}
    assert [step for step in figures if "test_accuracy" in figures[step]] == [3, 6, 7]
    assert figures[7]["test_accuracy"] == figures[7]["mean"] and figures[7]["epoch"] == 7 * 32 / 1437
    assert figures[7]["loss"] > 0


def test_asked_from_outside_a_run_saves_and_tells_and_stops(small_card, on_ranks):
    card = small_card(train={"steps": 1000, "checkpoint_every": 3, "eval_every": 0})

    def work(rank, init_method):
        told, wish = [], Interruption()

        def listen(progress):
            told.append(progress.checkpoint.name)
            if rank == 1:
                wish.ask("the test")

        result = train(card, init_method, listener=listen, interruption=wish)
        return result.stopped, told

    results = on_ranks(2, work)
    last = sorted(path.name for path in (card.run.dir / "run/checkpoints").iterdir())[-1]
    assert [stopped for stopped, _ in results] == [True, True]
    assert results[0][1] == results[1][1] and results[0][1][-1] == last
    assert last < "step-00001000"
