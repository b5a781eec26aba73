"""README and docs/: what they name is there, what they tell people to type is taken. `make docs` builds the pages, strictly."""

import importlib
import importlib.util
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from noprop_dist import command
from noprop_dist.cards import read_card, setting_names
from noprop_dist.config import Card, UserError

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
TEXTS = {str(page.relative_to(ROOT)): re.sub("<!--.*?-->", "", page.read_text(encoding="utf-8")) for page in PAGES}
HOUSE = ROOT / "noprop_dist"
PLACEHOLDERS = ("CARD", "CARD.yaml", "DIR/best.yaml")


@pytest.fixture(scope="module")
def hooks():
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def page(hooks):
    """``page(name)``: the Markdown of docs/NAME, with all that is generated in it."""

    def call(name):
        text = (ROOT / "docs" / name).read_text(encoding="utf-8")
        return hooks.on_page_markdown(text, page=SimpleNamespace(file=SimpleNamespace(src_uri=name)))

    return call


def test_the_page_of_settings_has_every_one_with_its_values_and_its_help(page):
    parts = re.split("^### ", page("settings.md"), flags=re.MULTILINE)[1:]
    assert [part.split("`")[1] for part in parts] == setting_names()
    for part, name in zip(parts, setting_names(), strict=True):
        section, setting = name.split(".")
        field = Card.model_fields[section].annotation.model_fields[setting]
        first = " ".join(field.description.split())[:15].split("``")[0].split("&")[0]
        assert first in " ".join(part.split()), name
        assert ("unset by default" in part) == (field.default is None), name


@pytest.mark.parametrize(
    ("name", "facts"),
    [
        ("train.epochs", "a whole number from 1 · default `30`"),
        ("train.precision", "`fp32` or `bf16` · default `fp32`"),
        ("model.blocks", "from 1 to 1,000 · default `10` · `1` for `ct`, `fm`, `cnn`, `adjoint` or `liquid`"),
        ("method.sigma", "only `fm`"),
        ("optim.momentum", "a number from 0 to below 1 · default `0.9` · only with [optim.name](#optim.name) `sgd`"),
        ("train.channels_last", "`true` or `false` · default `true`"),
        ("data.root", "a path · unset by default"),
    ],
)
def test_a_setting_says_what_it_takes(page, name, facts):
    assert facts in page("settings.md").split(f"{{ #{name} }}")[1].split("{ .facts }")[0]


def test_the_page_of_commands_has_every_one_with_its_own_arguments_alone(page):
    text = page("commands.md")
    sources = [*HOUSE.glob("*.py"), *(ROOT / "launch").glob("*.py")]
    expected = {path.stem for path in sources if "command.Parser(" in path.read_text(encoding="utf-8")}
    assert set(re.findall(r"^## (\w+)$", text, re.MULTILINE)) == expected
    assert "| `--dry-run` | print placement, memory and traffic; start nothing |" in text
    assert "| `MODEL` | a run's or a model's folder" in text
    assert not re.findall(r"\| `--\w+\.\w+", text), "settings have their own page"


def test_mathematics_becomes_mathml_and_what_cannot_is_told(hooks, caplog):
    drawn = hooks.on_page_content(r'<p><span class="arithmatex">\(\hat u_t\)</span></p>')
    assert drawn.startswith("<p><math") and "\\" not in drawn
    numbered = hooks.on_page_content('<div class="arithmatex">\\[\nz_t \\sim q \\tag{3–5}\n\\]</div>')
    assert '<span class="tag">(3–5)</span>' in numbered and numbered.count("3–5") == 1
    assert not caplog.records
    hooks.on_page_content(r'<span class="arithmatex">\(\nosuchthing x\)</span>')
    assert "nosuchthing" in caplog.text


@pytest.mark.parametrize("name", TEXTS)
def test_what_is_linked_to_is_there(name):
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", re.sub("```.*?```", "", TEXTS[name], flags=re.DOTALL))
    missing = [link for link in links if "://" not in link and not ((ROOT / name).parent / link).exists()]
    assert not missing


def test_tests_that_hold_the_promises_are_there():
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    named = re.findall(r"`(test_\w+)`", TEXTS["docs/layer-parallel.md"])
    assert named
    assert [name for name in named if f"def {name}(" not in tests] == []


def test_readmes_picture_of_the_rooms_has_every_one(hooks):
    picture = hooks.rooms()
    rooms = {path.stem for path in HOUSE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert {room for room in rooms if not re.search(rf"\b{room}\b", picture)} == {"__init__"}


def commands():
    """(page, command) of what is to be typed, but for other programs' commands."""
    for name, text in TEXTS.items():
        for block in re.findall("^```sh\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
            for line in block.replace("\\\n", " ").splitlines():
                if re.search(r"noprop_dist\.|launch/", line) and not line.startswith("#"):
                    yield name, " ".join(line.split(" # ")[0].split())


class Taken(Exception):
    """The command line has been read."""


@pytest.mark.parametrize(("name", "line"), list(commands()))
def test_what_is_to_be_typed_is_taken(name, line, monkeypatch):
    monkeypatch.chdir(ROOT)
    found = re.search(r"(?:-m noprop_dist\.|launch/)(\w+)(?:\.py|\.sh)?(.*)", line)
    script, rest = ("train" if found[1] == "torchrun" else found[1]), found[2]
    words = subprocess.run(["bash", "-c", f"printf '%s\\n' {rest}"], check=True, capture_output=True, text=True).stdout
    argv = ["configs/digits/dt.yaml" if word in PLACEHOLDERS else word for word in words.splitlines() if word]
    module = importlib.import_module(script if script.startswith("ray_") else f"noprop_dist.{script}")

    def ended(parse):
        def call(*arguments):
            parse(*arguments)
            raise Taken

        return call

    def card_read(parser, argv, base=None):
        def below(arguments):
            try:
                return base(arguments)
            except UserError:  # of a run that is not here
                return Card()

        read_card(parser, argv, below if base else None)
        raise Taken

    for way in ("parse_args", "parse_intermixed_args"):
        monkeypatch.setattr(command.Parser, way, ended(getattr(command.Parser, way)))
    monkeypatch.setattr(module, "read_card", card_read, raising=False)
    with pytest.raises(Taken):
        module.main(argv)
