"""Cards in and out: YAML below the command line, and everything wrong in either reported at once.

A card may build on others: its key ``base`` names the cards that lie below it (see :func:`read_layers`).
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import reprlib
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, CliSettingsSource, SettingsConfigDict
from pydantic_settings.exceptions import SettingsError

from noprop_dist.config import Card, UserError

Layers = dict[str, dict[str, Any]]
"""Sections by the place (a file, the command line) where they stand, the lowest first."""
COMMAND_LINE = "command line"
MACHINE: dict[str, set[str] | bool] = {
    "data": {"root", "workers"},
    "train": {"resume"},
    "parallel": True,
    "run": {"dir", "name", "stop_exit_code"},
    "debug": {"enabled"},
}
"""Settings that say where and how a run went on, and nothing of what came out. A model is handed on without them."""


class _CommandLine(Card, BaseSettings):
    """The card as pydantic-settings turns it into command-line arguments."""

    model_config = SettingsConfigDict(cli_avoid_json=True, cli_hide_none_type=True)


def read_card(
    parser: argparse.ArgumentParser, argv: Sequence[str], base: Callable[[argparse.Namespace], Card | Path] | None = None
) -> tuple[Card, argparse.Namespace]:
    """Read a card from ``argv`` with pydantic-settings on top of ``parser``'s own arguments.

    What lies below the command line: the YAML file that the parser's argument ``card`` names, if any, or what ``base`` makes of
    the parser's own arguments, a file or a card.
    Raises UserError listing every mistake, each with its place and, for a misspelt name, the nearest right one.
    """
    own = {action.dest for action in parser._actions}
    source: CliSettingsSource[Any] = CliSettingsSource(_CommandLine, root_parser=parser, cli_parse_args=False)
    arguments, unknown = parser.parse_known_args([_DEBUG.get(word, word) for word in argv])
    mistakes = [unknown_setting(word.split("=")[0].lstrip("-"), COMMAND_LINE) for word in unknown if word.startswith("-")]
    if not mistakes:
        mistakes = [f"{COMMAND_LINE}: {word!r} belongs to no setting; see --help" for word in unknown]
    path = getattr(arguments, "card", None)
    if mistakes and path and not Path(path).is_file():
        path = None  # it is the value of an unknown flag
    if base and mistakes:
        raise UserError("\n".join(mistakes))
    below = base(arguments) if base else Path(path) if path else None
    layers: Layers = {}
    if isinstance(below, Path):
        layers |= read_layers(below)
    elif below:
        layers["card"] = below.model_dump()
    try:
        layers[COMMAND_LINE] = source(parsed_args={name: value for name, value in vars(arguments).items() if name not in own})()
        card = Card.model_validate(_merge(layers))
    except SettingsError as error:
        mistakes.append(f"{COMMAND_LINE}: {error}; give its settings one by one")
    except ValidationError as error:
        mistakes += _mistakes(error, layers, str(below) if isinstance(below, Path) else COMMAND_LINE)
    if mistakes:
        raise UserError("\n".join(mistakes))
    return card, arguments


def load_card(path: Path) -> Card:
    """Read and check one YAML card. Raises UserError listing every mistake."""
    return stack(read_layers(path), str(path))


def stack(layers: Layers, main: str) -> Card:
    """The card of all layers. Raises UserError listing every mistake; ``main`` is the place of what stands in no layer."""
    try:
        return Card.model_validate(_merge(layers))
    except ValidationError as error:
        raise UserError("\n".join(_mistakes(error, layers, main))) from None


def dump_card(card: Card) -> str:
    """The card as YAML, every setting spelt out."""
    return yaml.safe_dump(card.model_dump(mode="json"), sort_keys=False)


def portable(card: Card) -> dict[str, Any]:
    """The card for JSON, without what is the machine's."""
    return card.model_dump(mode="json", exclude=MACHINE)


def localised(card: Card, home: Card) -> Card:
    """The card with what ``home``, one of the same run, has for its machine. Raises ValidationError where it is another's."""
    own, local = card.model_dump(exclude=MACHINE), home.model_dump(include=MACHINE)
    return Card.model_validate({section: own.get(section, {}) | local.get(section, {}) for section in Card.model_fields})


def chosen(card: Card) -> dict[str, dict[str, Any]]:
    """The settings, without the machine's, that are not their method's defaults; and always the data, the method, the seed."""
    plain = portable(Card.model_validate({"method": {"name": card.method.name}}))
    plain["data"]["name"] = plain["method"]["name"] = plain["run"]["seed"] = None
    parts = {
        section: {name: value for name, value in settings.items() if value != plain[section][name]}
        for section, settings in portable(card).items()
    }
    return {section: settings for section, settings in parts.items() if settings}


def explain(error: ValidationError) -> str:
    """In one line what is wrong with values that no user typed: a checkpoint's, a model's."""
    texts = (f"{'.'.join(map(str, item['loc']))}: {item['msg'].removeprefix('Value error, ')}" for item in error.errors())
    return " ".join("; ".join(text.removeprefix(": ") for text in texts).split())


def read_layers(path: Path, above: tuple[Path, ...] = ()) -> Layers:
    """The sections of a YAML card and of all that it builds on.

    ``base: PATH`` or ``base: [PATH, …]``, relative to the card's own folder, names the cards below it, later ones above earlier
    ones; each stands once, at its lowest place. ``above``: the cards on the way here. Raises UserError for bad files, circles.
    """
    own, way = read_yaml(path), (*above, path)
    base = own.pop("base", [])
    names = [base] if isinstance(base, str) else base
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path}: base: not the path of a card, or a list of paths, but {base!r}; mend it")
    layers: Layers = {}
    for below in (Path(os.path.normpath(path.parent / name)) for name in names):
        if below.resolve() in [each.resolve() for each in way]:
            raise UserError(f"{path}: base: {' -> '.join(map(str, (*way, below)))} is a circle; take one of them out")
        if not below.is_file():
            raise UserError(f"{path}: base: no card {below}; name one relative to {path.parent}/")
        layers |= read_layers(below, way)  # a place that is there already keeps its height
    return layers | {str(path): own}


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file's sections, empty ones left out. Raises UserError where it is missing, broken or no mapping of sections."""
    values = parse_yaml(path) or {}
    if not isinstance(values, dict) or not all(isinstance(section, str) for section in values):
        raise UserError(f"{path}: a card is a mapping of sections such as 'train: {{epochs: 3}}'")
    return {section: settings for section, settings in values.items() if settings is not None}


def parse_yaml(path: Path, what: str = "card") -> Any:
    """What a YAML file holds. Raises UserError where it is missing or broken."""
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except UnicodeDecodeError:
        raise UserError(f"{path}: cannot read this {what} (not UTF-8); save it as UTF-8, or name a YAML file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot read this {what} ({error.strerror}); name a YAML file") from None
    except RecursionError:
        raise UserError(f"{path}: cannot read this {what} (brackets within brackets without end); mend it") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f"{path}:{mark.line + 1}" if mark else str(path)
        reason = getattr(error, "problem", None) or getattr(error, "reason", error)
        raise UserError(f"{line}: not YAML ({reason}); mend that line") from None


class _Loader(yaml.SafeLoader):
    """YAML's plain values; a key that stands twice, of which YAML would drop one without a word, is a mistake."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for number, key in enumerate(keys):
            if key.value in [other.value for other in keys[:number]]:
                raise yaml.MarkedYAMLError(problem=f"{key.value} stands twice", problem_mark=key.start_mark)
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except ValueError as error:  # 2024-02-30 looks like a date
            raise yaml.MarkedYAMLError(problem=str(error), problem_mark=node.start_mark) from None


def setting_names() -> list[str]:
    """Every ``section.name`` there is."""
    return [
        f"{section}.{name}"
        for section, field in Card.model_fields.items()
        for name in field.annotation.model_fields  # type: ignore[union-attr]
    ]


_DEBUG = {"--debug": "--debug.enabled=true"}


def _merge(layers: Layers) -> dict[str, Any]:
    """The sections of all layers, setting by setting, upper ones above lower ones."""
    return reduce(_above, layers.values(), {})


def _above(values: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(values)
    for section, settings in given.items():
        below = values.get(section)
        merged[section] = below | settings if isinstance(below, dict) and isinstance(settings, dict) else settings
    return merged


def unknown_setting(name: str, place: str) -> str:
    """The line that tells of it, with the nearest right name."""
    nearest = difflib.get_close_matches(name, [*setting_names(), *Card.model_fields], n=1, cutoff=0.5)
    return f"{place}: unknown setting {name}" + (f"; did you mean {nearest[0]}?" if nearest else "; see --help")


def _mistakes(error: ValidationError, layers: Layers, main: str) -> list[str]:
    """One line each, with the uppermost place where the setting stands; ``main``: the place of what stands nowhere."""
    lines = []
    for item in error.errors():
        name = ".".join(map(str, item["loc"]))
        place = next((place for place in reversed(layers) if name and _stands(layers[place], item["loc"])), main)
        if item["type"] == "extra_forbidden":
            lines.append(unknown_setting(name, place))
        elif item["type"] == "model_type":
            lines.append(f"{place}: {name}: is a section, as in '{name}: {{setting: value}}', not {_shown.repr(item['input'])}")
        elif not name:  # our own checks, which name their settings themselves
            lines += [f"{place}: {text}" for text in item["msg"].removeprefix("Value error, ").splitlines()]
        else:
            lines.append(
                f"{place}: {name}: {item['msg'][0].lower()}{item['msg'][1:]}, not {_shown.repr(item['input'])}{_hint(item)}"
            )
    return [" ".join(line.split()) for line in lines]


_shown = reprlib.Repr()
_shown.maxstring = _shown.maxother = 100


def _hint(item: ErrorDetails) -> str:
    """What a wrong value was probably meant to be."""
    if item["type"] == "literal_error":
        known = re.findall("'([^']*)'", item["ctx"]["expected"])
        nearest = difflib.get_close_matches(str(item["input"]).lower(), known, n=1, cutoff=0.5)
        return f"; did you mean {nearest[0]}?" if nearest else ""
    return "; put it in quotes" if item["type"] == "string_type" and item["input"] is not None else ""


def _stands(sections: Any, where: Sequence[int | str]) -> bool:
    for part in where:
        if not isinstance(sections, Mapping) or part not in sections:
            return False
        sections = sections[part]
    return True
