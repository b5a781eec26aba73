"""The card: what is read from where, and what a user is told about a mistake."""

import argparse
from pathlib import Path

import pytest

from noprop_dist.cards import dump_card, load_card, read_card, setting_names
from noprop_dist.config import Card, UserError


@pytest.fixture
def read(tmp_path, monkeypatch):
    """``read(yaml, *argv)``: the card of c.yaml (None: no file) and a command line."""
    monkeypatch.chdir(tmp_path)

    def call(yaml, *argv, base=None):
        if yaml is not None:
            (tmp_path / "c.yaml").write_text(yaml)
            argv = ("c.yaml", *argv)
        parser = argparse.ArgumentParser(prog="train", allow_abbrev=False)
        parser.add_argument("card", nargs="?")
        return read_card(parser, argv, base)[0]

    return call


@pytest.mark.parametrize("yaml", ["", "# only a comment", "train: {}"])
def test_an_empty_card_is_the_default_card(read, yaml):
    assert read(yaml) == read(None) == Card()


def test_the_command_line_stands_above_the_file(read):
    card = read("train: {epochs: 3, log_every: 7}\noptim: {lr: 0.5}", "--train.epochs", "9", "--optim.name=sgd")
    assert (card.train.epochs, card.train.log_every, card.optim.lr, card.optim.name) == (9, 7, 0.5, "sgd")


def test_the_command_line_mends_a_mistake_in_the_file(read):
    assert read("train: {epochs: none at all}", "--train.epochs", "9").train.epochs == 9


def test_the_command_line_stands_above_a_base_card(read):
    base = Card.model_validate({"train": {"epochs": 3}, "inference": {"samples": 4}})
    card = read(None, "--inference.samples", "2", base=lambda arguments: base)
    assert (card.train.epochs, card.inference.samples) == (3, 2)


@pytest.fixture
def cards(tmp_path):
    """``cards(name=yaml, ...)`` writes cards; those whose name begins with ``sub_`` into the folder sub/."""

    def write(**texts):
        (tmp_path / "sub").mkdir(exist_ok=True)
        for name, text in texts.items():
            (tmp_path / f"{name.replace('sub_', 'sub/')}.yaml").write_text(text)

    return write


def test_a_card_builds_on_others_the_later_above_the_earlier_and_itself_above_all(read, cards):
    cards(
        sub_low="train: {epochs: 1, log_every: 1, eval_every: 1}\nrun: {seed: 1}", sub_high="train: {epochs: 2, log_every: 2}"
    )
    card = read("base: [sub/low.yaml, sub/high.yaml]\ntrain: {epochs: 3}", "--train.keep_checkpoints", "4")
    train = card.train
    assert (train.epochs, train.log_every, train.eval_every, train.keep_checkpoints, card.run.seed) == (3, 2, 1, 4, 1)
    assert load_card(Path("c.yaml")).train.log_every == 2


def test_a_base_has_bases_relative_to_its_own_folder_and_one_used_twice_lies_below_both(read, cards):
    cards(
        root="train: {epochs: 1, log_every: 1}",
        sub_left="base: ../root.yaml\ntrain: {epochs: 2}",
        sub_right="base: ../root.yaml\ntrain: {eval_every: 3}",
    )
    train = read("base: [sub/left.yaml, sub/right.yaml]").train
    assert (train.epochs, train.log_every, train.eval_every) == (2, 1, 3)


def test_a_mistake_in_a_base_is_told_with_the_file_where_it_stands(read, cards):
    cards(sub_low="optim: {lr: fast}\ntrain: {epohcs: 3}", sub_broken="a: [", sub_round="base: ../c.yaml")
    with pytest.raises(UserError) as caught:
        read("base: sub/low.yaml\nmodel: {blocks: 0}", "--run.seed", "x")
    assert sorted(line.split(": ")[:2] for line in str(caught.value).split("\n")) == [
        ["c.yaml", "model.blocks"],
        ["command line", "run.seed"],
        ["sub/low.yaml", "optim.lr"],
        ["sub/low.yaml", "unknown setting train.epohcs; did you mean train.epochs?"],
    ]
    with pytest.raises(UserError, match=r"^sub/broken\.yaml:1: not YAML"):
        read("base: sub/broken.yaml")
    with pytest.raises(UserError, match=r"^sub/round\.yaml: base: c\.yaml -> sub/round\.yaml -> c\.yaml is a circle.*$"):
        read("base: sub/round.yaml")


@pytest.mark.parametrize("yaml", ["optim: {lr: 1e-3}", "optim: {lr: '0.001'}", "optim: {lr: 1.0e-3}"])
def test_a_number_in_scientific_notation_is_a_number(read, yaml):
    assert read(yaml).optim.lr == 0.001


@pytest.mark.parametrize(("argv", "expected"), [((), False), (("--debug",), True), (("--debug.enabled", "true"), True)])
def test_debug_alone_switches_debugging_on(read, argv, expected):
    assert read("train: {epochs: 3}", *argv).debug.enabled is expected


@pytest.mark.parametrize(("word", "expected"), [("false", False), ("true", True), ("0", False)])
def test_switches_are_given_as_words(read, word, expected):
    assert read(None, "--train.channels_last", word).train.channels_last is expected


def test_the_environment_changes_no_card(read, monkeypatch):
    for name, value in {
        "DATA": '{"name": "mnist"}',
        "MODEL": '{"blocks": 3}',
        "model": "nonsense",
        "TRAIN__EPOCHS": "1",
        "OPTIM.LR": "7",
        "RUN_NAME": "x",
        "DEBUG": "1",
    }.items():
        monkeypatch.setenv(name, value)
    assert read(None) == Card()


def test_reading_twice_with_one_command_line_gives_the_same_card(read):
    assert read("run: {seed: 4}", "--model.blocks=3") == read("run: {seed: 4}", "--model.blocks=3")


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {
            "data": {"name": "npz", "root": "/data/with space/ü.npz", "augment": "none"},
            "method": {"alpha_min": 1.23456789e-7, "loss_weight": "uniform"},
            "optim": {"name": "sgd", "lr": 1e-05, "ema": 0.999},
            "train": {"steps": 10, "channels_last": False, "resume": "never"},
            "inference": {"blocks": 3},
            "run": {"name": "007", "seed": 2**40},
        },
        {"run": {"name": "1e3"}, "train": {"resume": "null"}},
    ],
)
def test_a_dumped_card_reads_back_as_it_was(tmp_path, sections):
    card = Card.model_validate(sections)
    path = tmp_path / "card.yaml"
    path.write_text(dump_card(card), encoding="utf-8")
    assert load_card(path) == card
    for name in setting_names():
        assert f"{name.split('.')[1]}:" in path.read_text(encoding="utf-8"), "every setting is spelt out"


def test_load_card_too_reports_every_mistake(tmp_path):
    path = tmp_path / "card.yaml"
    path.write_text("train: {epohcs: 3}\noptim: {lr: 0}")
    with pytest.raises(UserError) as caught:
        load_card(path)
    assert sorted(line.split(": ")[1] for line in str(caught.value).split("\n")) == [
        "optim.lr",
        "unknown setting train.epohcs; did you mean train.epochs?",
    ]


def test_every_setting_has_a_help_text():
    for name in setting_names():
        section, setting = name.split(".")
        description = Card.model_fields[section].annotation.model_fields[setting].description
        assert description, name
        assert description.rstrip().endswith((".", ":", "]")), f"{name}: {description!r} is no sentence"


def test_help_lists_every_setting(read, capsys):
    with pytest.raises(SystemExit) as caught:
        read(None, "--help")
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert not [name for name in setting_names() if f"--{name} " not in text]
    assert "rises for 30 % of the" in " ".join(text.split()), "with the text under the field"


@pytest.mark.parametrize("name", ["x", "2024-01-01", "a.b_c-D", "0"])
def test_ordinary_run_names_are_taken(read, name):
    assert read(None, "--run.name", name).run.name == name


def test_a_card_is_frozen():
    with pytest.raises(ValueError, match="frozen"):
        Card().train.epochs = 3


@pytest.mark.parametrize("blocks", [1, 2, 10])
def test_the_default_clip_suits_usual_numbers_of_blocks(blocks):
    assert Card.model_validate({"model": {"blocks": blocks}}).model.blocks == blocks


@pytest.mark.parametrize(
    ("name", "blocks"), [("dt", 10), ("backprop", 10), ("ct", 1), ("fm", 1), ("cnn", 1), ("adjoint", 1), ("liquid", 1)]
)
def test_a_method_has_as_many_blocks_as_in_the_paper_unless_told_otherwise(name, blocks, read):
    assert read(f"method: {{name: {name}}}").model.blocks == blocks
    assert read(None, "--method.name", name).model.blocks == blocks
    if name in ("dt", "ct", "fm", "backprop"):
        assert read(f"method: {{name: {name}}}", "--model.blocks", "3").model.blocks == 3


def test_a_methods_defaults_hold_however_the_card_is_made():
    from noprop_dist.config import MethodCard, ModelCard

    for card in (
        Card(method={"name": "fm"}),
        Card(method=MethodCard(name="fm")),
        Card(method=MethodCard(name="fm"), model=ModelCard()),
    ):
        assert (card.model.blocks, card.method.label_noise) == (1, 0.0)
    assert Card(method=MethodCard(name="fm", label_noise=0.3), model=ModelCard(blocks=4)).method.label_noise == 0.3
    assert Card(method=MethodCard(name="ct")).method.eta == 1
    assert Card.model_validate(Card(method={"name": "ct", "eta": 0.1}).model_dump()).method.eta == 0.1


def test_what_is_placed_on_ranks_are_blocks_or_one_network():
    assert Card(method={"name": "fm"}, model={"blocks": 4}).units == 4
    assert Card(method={"name": "backprop"}, model={"blocks": 4}).units == 1
