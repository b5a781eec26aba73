"""What is seen of a chain: the same from a model as from a run, on any number of ranks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from noprop_dist import Card, NoPropModel, train
from noprop_dist.chain import Moment
from noprop_dist.data import describe, open_data
from noprop_dist.report import board
from noprop_dist.runs import PICTURED, evaluates, pictured, total_steps
from noprop_dist.viewing import HEADER, IMAGES, MOMENTS, WATCHED, Viewing, moments, sample

SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "dt": {},
    "dt-early-exit": {"inference": {"blocks": 3}},
    "ct-learned": {"method": {"name": "ct", "schedule": "learned"}, "inference": {"steps": 12}},
    "fm-learned": {"method": {"name": "fm"}, "model": {"embedding": "learned"}, "inference": {"steps": 12}},
    "prototypes": {"model": {"embedding": "prototype"}},
}


def card_of(small_card: Callable[..., Card], name: str, run: str) -> Card:
    sections = {section: dict(values) for section, values in SETTINGS[name].items()}
    sections["model"] = sections.get("model", {}) | {"blocks": 4}
    return small_card(**sections, train={"pictures": True, "steps": 3}, run={"name": run})


def flat(viewing: Viewing) -> dict[str, Any]:
    """All that there is, by name; as NumPy arrays, which travel between processes."""
    course = {field.name: getattr(viewing.course, field.name) for field in dataclasses.fields(viewing.course)}
    found = course | {"embedding": viewing.embedding, "gamma": viewing.gamma, "named": viewing.named}
    return {name: part.detach().numpy() if isinstance(part, torch.Tensor) else part for name, part in found.items()}


def seen(card: Card, init_method: str = "env://") -> list[dict[str, Any]]:
    """What the coordinator of a run had to draw, at each evaluation."""
    found: list[dict[str, Any]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(board.PictureBoard, "_show", lambda self, step, viewing: found.append(flat(viewing)))
        patch.setattr(board, "SHARE", 1e9)
        train(card, init_method)
    return found


@pytest.mark.parametrize("name", SETTINGS)
def test_any_number_of_ranks_and_the_gathered_model_see_the_same(name, small_card, on_ranks):
    (alone,) = seen(card_of(small_card, name, "alone"))
    card = card_of(small_card, name, "four")
    (four,) = on_ranks(4, lambda rank, init_method: seen(card, init_method))[0]
    model = NoPropModel.from_pretrained(card.run.dir / "four/model")
    data = open_data(card.data).test
    for other in (four, flat(model.view(data))):
        assert other.keys() == alone.keys()
        for part, values in alone.items():
            assert np.array_equal(values, other[part]), part
    assert (alone["gamma"] is not None) == (name == "ct-learned") and (alone["pictures"] is not None) == (name == "prototypes")
    accuracy = (alone["named"][0] == alone["named"][1]).mean()
    assert accuracy == model.evaluate(data).mean
    assert alone["labels"].tolist() == list(range(IMAGES)), "one of each of the first classes"


@pytest.mark.parametrize("name", ["dt", "ct", "fm"])
def test_a_course_is_what_the_blocks_were_given_and_said(name, small_card):
    steps = {} if name == "dt" else {"inference": {"steps": 12}}
    card = small_card(method={"name": name}, model={"blocks": 3}, **steps)
    model = NoPropModel(card, describe(card.data))
    images = open_data(card.data).test.load()[0][:5]
    course, (watched, paths) = model.course(images), model.watch(images)
    assert course is not None and len(course.steps) == len(watched) == course.said.shape[2]
    for step, moment in enumerate(watched):
        assert course.z[:, :, step].equal(moment.z)
        made = course.said[:, :, step] @ model.labels.embedding
        if name != "fm":  # a velocity leads to no mixture
            torch.testing.assert_close(made, moment.estimate, atol=1e-3, rtol=0)
    assert course.z[:, :, -1].equal(paths[:2])
    torch.testing.assert_close(course.answer[0], model(images).exp())
    assert course.told[0, :, 0].allclose(torch.full((5, 10), 0.1), atol=0.01), "z = 0 tells nothing"
    assert (course.told[0, :, -1].argmax(dim=1) == course.z[0, :, -1].argmax(dim=1)).all()


def test_images_that_are_watched_are_one_of_each_class_then_the_next_ones():
    labels = torch.tensor([3, 3, 0, 1, 0, 3, 1])
    assert sample(labels, 5).tolist() == [2, 3, 0, 1, 4]
    assert sample(torch.zeros(3, dtype=torch.int64), 8).tolist() == [0, 1, 2]


@pytest.mark.parametrize("sections", [
    {"method": {"name": "ct"}, "inference": {"steps": 1000}},
    {"method": {"name": "fm"}, "model": {"blocks": 7}},
    {"model": {"blocks": 50}, "method": {"schedule": "sigmoid"}},
    {"method": {"name": "ct"}, "model": {"blocks": 50}},
])  # fmt: skip
def test_of_many_steps_some_are_kept_spread_over_all_of_the_time(sections):
    times = sorted(time for some in moments(Card.model_validate(sections)).values() for time in some)
    assert MOMENTS / 2 <= len(times) <= MOMENTS and times[0] == 0 and times[-1] > 0.9
    assert max(after - before for before, after in pairwise(times)) < 0.1


def test_large_embeddings_are_watched_on_fewer_images_or_none(small_card, monkeypatch):
    card = small_card(model={"blocks": 2, "embedding": "prototype"})
    model = NoPropModel(card, describe(card.data))
    images = open_data(card.data).test.load()[0][:9]
    for numbers, count in ((10**6, IMAGES), (2 * 2 * 2 * 64 * 3, 3), (10, None)):
        monkeypatch.setattr("noprop_dist.viewing.NUMBERS", numbers)
        course = model.course(images)
        assert (None if course is None else len(course.images)) == count


def test_a_solvers_tries_are_not_kept_as_steps(small_card):
    """midpoint and rk4 look ahead; what is kept are the z at the grid's own times."""
    images = open_data(small_card().data).test.load()[0][:3]
    for solver in ("midpoint", "rk4", "dopri5"):
        card = small_card(method={"name": "fm"}, model={"blocks": 2}, inference={"solver": solver, "steps": 8})
        model = NoPropModel(card, describe(card.data))
        course = model.course(images)
        if solver != "dopri5":
            assert course.steps == tuple(f"{step / 8:.2f}" for step in range(8))
        assert 2 <= len(course.steps) <= MOMENTS and course.z.isfinite().all()


def test_a_baseline_shows_its_answer_alone(small_card):
    card = small_card(method={"name": "cnn"}, model={"blocks": 1})
    course = NoPropModel(card, describe(card.data)).course(open_data(card.data).test.load()[0][:3])
    assert course.steps == () and course.told.shape == (len(WATCHED), 3, 1, 10) and course.said.shape[2] == 0


@pytest.mark.parametrize(("every", "epochs"), [(0, 3), (0, 40), (7, 10), (1, 3)])
def test_pictures_are_drawn_at_ten_evaluations_at_most_and_the_last(every, epochs):
    card = Card.model_validate({"train": {"eval_every": every, "epochs": epochs}})
    total = total_steps(card, 1437)
    due = [step for step in range(1, total + 1) if evaluates(card, 1437, step) or step == total]
    drawn = [step for step in due if pictured(card, 1437, step)]
    assert min(len(due), PICTURED / 2) <= len(drawn) <= PICTURED + 1 and drawn[-1] == total
    assert not any(pictured(Card(train={"pictures": False}), 1437, step) for step in due)


def test_tensorboard_gets_pictures_and_the_projector_embeddings(small_card):
    settings = {"steps": 4, "eval_every": 2, "checkpoint_every": 2, "pictures": True}
    card = small_card(model={"blocks": 2, "embedding": "prototype"}, train=settings)
    for steps in (4, 6):  # made longer: the last picture of the shorter run stays, its embeddings go
        train(small_card(model={"blocks": 2, "embedding": "prototype"}, train=settings | {"steps": steps}))
    folder = card.run.dir / "run/tensorboard/pictures"
    events = EventAccumulator(str(folder), size_guidance={"images": 0}).Reload()
    assert set(events.Tags()["images"]) == {"denoising", "paths", "confusion", "embeddings", "prototypes"}
    steps = [event.step for event in events.Images("denoising")]
    assert {2, 4, 6} >= set(steps) >= {2, 6} and len(set(steps)) == len(steps)
    assert sum(file.stat().st_size for file in folder.rglob("*")) < 3e6
    assert [path.name for path in folder.glob("0*")] == ["00006"]
    names = (folder / "00006/embeddings/metadata.tsv").read_text().split()
    assert names == list("0123456789") and (folder / "00006/embeddings/sprite.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "projector_config.pbtxt").read_text().count("embeddings {") == 1


def test_a_picture_that_fails_does_not_end_a_run(small_card, monkeypatch, capsys):
    def fail(*args: Any) -> None:
        raise ValueError("no such colour")

    monkeypatch.setattr("noprop_dist.report.figures.paths", fail)
    summary = train(small_card(train={"pictures": True})).summary
    assert summary["steps"] == 6
    assert capsys.readouterr().err.count("no more pictures for TensorBoard: ValueError: no such colour") == 1


def test_watching_changes_no_result(small_card, monkeypatch):
    monkeypatch.setattr(board.PictureBoard, "_show", lambda self, step, viewing: None)
    watched, blind = (
        train(small_card(train={"pictures": pictures}, run={"name": str(pictures)})).summary for pictures in (True, False)
    )
    for what in ("accuracy", "train_accuracy", "blocks"):
        assert watched[what] == blind[what]


def test_a_moment_is_kept_by_its_last_word(small_card):
    """A rejected step of dopri5 is tried again, from the same time."""
    from noprop_dist.viewing import Witness

    card = small_card(method={"name": "ct"}, model={"blocks": 1}, inference={"steps": 4})
    model = NoPropModel(card, describe(card.data))
    witness = Witness(card, model._segment(card), torch.tensor([0]))
    for time, value in ((0.0, 1.0), (0.25, 2.0), (0.2, 3.0), (0.25, 4.0), (0.3, 5.0)):
        witness(Moment(0, time, torch.full((2, 1, 10), value), torch.zeros(2, 1, 10)))
    rows = witness.record.view(4, -1)
    assert rows[0, HEADER] == 1 and rows[1, HEADER] == 4 and rows[2:, 0].isnan().all()
