"""Cards in and out: YAML below the command line, and everything wrong in either reported at once.

A card may build on others: its key ``base`` names the cards that lie below it (see :func:`read_layers`).
"""

from __future__ import annotations

import argparse
import difflib
import os
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any, NoReturn

import yaml
from pydantic import ValidationError
from pydantic_settings import BaseSettings, CliSettingsSource, SettingsConfigDict
from pydantic_settings.exceptions import SettingsError

from noprop_dist.config import Card, UserError

Layers = dict[str, dict[str, Any]]
"""Sections by the place (a file, the command line) where they stand, the lowest first."""
COMMAND_LINE = "command line"


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
    parser.error = _refuse  # type: ignore[method-assign]
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
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot read this {what} ({reason}); name a YAML file") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f"{path}:{mark.line + 1}" if mark else str(path)
        reason = getattr(error, "problem", None) or getattr(error, "reason", error)
        raise UserError(f"{line}: not YAML ({reason}); mend that line") from None


def setting_names() -> list[str]:
    """Every ``section.name`` there is."""
    return [
        f"{section}.{name}"
        for section, field in Card.model_fields.items()
        for name in field.annotation.model_fields  # type: ignore[union-attr]
    ]


_DEBUG = {"--debug": "--debug.enabled=true"}


def _refuse(message: str) -> NoReturn:
    raise UserError(f"command line: {message}; see --help")


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
        elif not name:  # our own checks, which name their settings themselves
            lines += [f"{place}: {text}" for text in item["msg"].removeprefix("Value error, ").splitlines()]
        else:
            lines.append(f"{place}: {name}: {item['msg'][0].lower()}{item['msg'][1:]}, not {item['input']!r}")
    return [" ".join(line.split()) for line in lines]


def _stands(sections: Any, where: Sequence[int | str]) -> bool:
    for part in where:
        if not isinstance(sections, Mapping) or part not in sections:
            return False
        sections = sections[part]
    return True
