"""Models go to a hub and come from it, by huggingface_hub's own code."""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hubs import TOKEN, Hub, running_hub
from huggingface_hub import constants
from PIL import Image

from noprop_dist import NoPropModel, UserError, predict
from noprop_dist.command import answer
from noprop_dist.hub import CONFIG, FILES, README, SHIPPED, WEIGHTS

DIGITS = {name: (SHIPPED / "digits" / name).read_bytes() for name in FILES}
OFFLINE = "no copy from the hub is here, and the hub is out of reach"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that huggingface_hub takes for its own, and an empty cache; the current folder is empty too."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with running_hub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.address + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield hub


def weights(model: NoPropModel) -> list[torch.Tensor]:
    return list(model.state_dict().values())


def test_a_model_goes_to_the_hub_and_comes_back(hub):
    model = NoPropModel.from_pretrained("digits")
    assert "/me/mine/commit/" in model.push_to_hub("me/mine", token=TOKEN)
    assert hub.repositories["me/mine"]["main"] == DIGITS
    again = NoPropModel.from_pretrained("me/mine")
    assert all(map(torch.equal, weights(model), weights(again))) and again.card == model.card and again.readme == model.readme
    assert sorted(hub.asked) == sorted(FILES)
    NoPropModel.from_pretrained("me/mine")
    assert sorted(hub.asked) == sorted(FILES), "what has been fetched is not fetched again"


def test_saving_pushes_on_demand_and_a_card_that_was_written_on_the_hub_stays(hub, tmp_path):
    model = NoPropModel.from_pretrained("digits")
    assert model.save_pretrained(tmp_path / "plain") is None and not hub.repositories
    hub.put("me/mine", {README: b"---\nlicense: mit\n---\nMine.\n"})
    model.save_pretrained(tmp_path / "mine", push_to_hub=True, repo_id="me/mine", token=TOKEN, commit_message="new")
    assert hub.repositories["me/mine"]["main"] == DIGITS | {README: b"---\nlicense: mit\n---\nMine.\n"}
    assert NoPropModel.from_pretrained("me/mine").readme == "---\nlicense: mit\n---\nMine.\n"


def test_revisions(hub, tmp_path):
    first = hub.put("me/mine", DIGITS | {README: b"first"})
    hub.put("me/mine", DIGITS | {README: b"second"})
    hub.put("me/mine", DIGITS | {README: b"third"}, "dev")
    for name, revision, text in [("me/mine", None, "second"), ("me/mine@dev", None, "third"), ("me/mine", first, "first")]:
        model = NoPropModel.from_pretrained(name, revision=revision, cache_dir=tmp_path / "other")
        assert model.readme == text
    assert (tmp_path / "other").exists() and not (tmp_path / "cache").exists()


def test_commands_take_the_hubs_names(hub, capsys):
    hub.put("me/mine", DIGITS)
    Image.new("L", (8, 8), 255).save("white.png")
    assert answer(predict.main, ["me/mine@main", "white.png"]) == 0
    assert capsys.readouterr().out.startswith("white.png  ")


def test_a_model_that_was_fetched_once_is_there_offline(hub, monkeypatch):
    hub.put("me/mine", DIGITS)
    NoPropModel.from_pretrained("me/mine")
    assert NoPropModel.from_pretrained("me/mine", local_files_only=True).info.classes[9] == "9"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert NoPropModel.from_pretrained("me/mine").info.classes[9] == "9"
    with pytest.raises(UserError, match=f"^me/other: no such folder, {OFFLINE}"):
        NoPropModel.from_pretrained("me/other")


def test_a_folder_comes_before_the_hub_and_a_slip_in_a_path_stays_here(hub):
    hub.put("me/mine", DIGITS | {README: b"the hub's"})
    Path("me").mkdir()
    with pytest.raises(UserError, match=r"^me/mine: no such folder; .*one of digits, mnist, or the hub's owner/name$"):
        NoPropModel.from_pretrained("me/mine")
    assert not hub.asked
    assert NoPropModel.from_pretrained("hf://me/mine").readme == "the hub's"
    shutil.copytree(SHIPPED / "digits", "me/mine")
    assert NoPropModel.from_pretrained("me/mine").readme == DIGITS[README].decode()


MISTAKES = {
    "no such model": ("me/nothing", {}, "no model of the hub's that you may read; mend the name, or hf auth login"),
    "no such revision": ("me/mine", {"revision": "v2"}, "no such revision"),
    "not fetched yet": ("me/mine", {"local_files_only": True}, OFFLINE),
    "another library's": ("me/bert", {}, "no NoProp model, by its config.json"),
    "a data set": ("me/data", {}, "no NoProp model, by its config.json"),
    "no weights": ("me/half", {}, "model.safetensors: cannot read"),
    "a config of bytes": ("me/broken", {}, "config.json: damaged"),
    "no name": ("me/a--b", {}, "failed at the hub (Cannot have -- or .. in repo_id"),
}


@pytest.mark.parametrize(("name", "settings", "words"), MISTAKES.values(), ids=MISTAKES)
def test_what_the_hub_does_not_give_is_told_in_a_line(hub, name, settings, words):
    hub.put("me/mine", DIGITS)
    hub.put("me/bert", {CONFIG: b'{"model_type": "bert"}', WEIGHTS: b"gigabytes"})
    hub.put("me/data", {"data.csv": b""})
    hub.put("me/half", {CONFIG: DIGITS[CONFIG]})
    hub.put("me/broken", {CONFIG: b"\xff"})
    with pytest.raises(UserError) as caught:
        NoPropModel.from_pretrained(name, **settings)
    assert words in str(caught.value) and "\n" not in str(caught.value), caught.value
    assert WEIGHTS not in hub.asked


def test_a_hub_that_takes_nothing_says_so_in_a_line(hub):
    for settings in ({}, {"token": "hf_wrong"}):
        with pytest.raises(UserError, match=r"^me/mine: failed at the hub \(.*401 .*\); .*hf auth login$"):
            NoPropModel.from_pretrained("digits").push_to_hub("me/mine", **settings)
    assert not hub.repositories


def test_without_the_extra_all_but_the_hub_works(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    model = NoPropModel.from_pretrained("digits")
    model.save_pretrained("mine")
    with contextlib.ExitStack() as stack:
        for call in (lambda: NoPropModel.from_pretrained("me/mine"), lambda: model.push_to_hub("me/mine")):
            caught = stack.enter_context(pytest.raises(UserError))
            call()
    assert "pip install 'noprop_dist[hub]'" in str(caught.value)
