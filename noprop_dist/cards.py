"""Cards in and out: YAML below the command line, and everything wrong in either reported at once."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from pydantic import ValidationError
from pydantic_settings import BaseSettings, CliSettingsSource, SettingsConfigDict
from pydantic_settings.exceptions import SettingsError

from noprop_dist.config import Card, UserError


class _CommandLine(Card, BaseSettings):
    """The card as pydantic-settings turns it into command-line arguments."""

    model_config = SettingsConfigDict(cli_avoid_json=True, cli_hide_none_type=True)


def read_card(
    parser: argparse.ArgumentParser, argv: Sequence[str], base: Callable[[argparse.Namespace], Card] | None = None
) -> tuple[Card, argparse.Namespace]:
    """Read a card from ``argv`` with pydantic-settings on top of ``parser``'s own arguments.

    A ``card`` argument of the parser names a YAML file; ``base`` (instead of a file) makes the card below the command line
    from the parser's own arguments.
    Raises UserError listing every mistake, each with its place and, for a misspelt name, the nearest right one.
    """
    own = {action.dest for action in parser._actions}
    source: CliSettingsSource[Any] = CliSettingsSource(_CommandLine, root_parser=parser, cli_parse_args=False)
    parser.error = _refuse  # type: ignore[method-assign]
    arguments, unknown = parser.parse_known_args([_DEBUG.get(word, word) for word in argv])
    mistakes = [_unknown(word.split("=")[0].lstrip("-"), "command line") for word in unknown if word.startswith("-")]
    if not mistakes:
        mistakes = [f"command line: {word!r} belongs to no setting; see --help" for word in unknown]
    path = getattr(arguments, "card", None)
    if mistakes and path and not Path(path).is_file():
        path = None  # it is the value of an unknown flag
    if base and mistakes:
        raise UserError("\n".join(mistakes))
    values = read_yaml(Path(path)) if path else base(arguments).model_dump() if base else {}
    given: Mapping[str, Any] = {}
    try:
        given = source(parsed_args={name: value for name, value in vars(arguments).items() if name not in own})()
        card = Card.model_validate(_above(values, given))
    except SettingsError as error:
        mistakes.append(f"command line: {error}; give its settings one by one")
    except ValidationError as error:
        mistakes += _mistakes(error, path, given)
    if mistakes:
        raise UserError("\n".join(mistakes))
    return card, arguments


def load_card(path: Path) -> Card:
    """Read and check one YAML card. Raises UserError listing every mistake."""
    values = read_yaml(path)
    try:
        return Card.model_validate(values)
    except ValidationError as error:
        raise UserError("\n".join(_mistakes(error, path, {}))) from None


def dump_card(card: Card) -> str:
    """The card as YAML, every setting spelt out."""
    return yaml.safe_dump(card.model_dump(mode="json"), sort_keys=False)


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file's sections, empty ones left out. Raises UserError where it is missing, broken or no mapping of sections."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot read this card ({reason}); name a YAML file") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f"{path}:{mark.line + 1}" if mark else str(path)
        reason = getattr(error, "problem", None) or getattr(error, "reason", error)
        raise UserError(f"{line}: not YAML ({reason}); mend that line") from None
    if not isinstance(values, dict) or not all(isinstance(section, str) for section in values):
        raise UserError(f"{path}: a card is a mapping of sections such as 'train: {{epochs: 3}}'")
    return {section: settings for section, settings in values.items() if settings is not None}


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


def _above(values: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """A file's sections with the command line's settings above them."""
    merged = dict(values)
    for section, settings in given.items():
        below = values.get(section)
        merged[section] = below | settings if isinstance(below, dict) else settings
    return merged


def _unknown(name: str, place: str) -> str:
    nearest = difflib.get_close_matches(name, [*setting_names(), *Card.model_fields], n=1, cutoff=0.5)
    return f"{place}: unknown setting {name}" + (f"; did you mean {nearest[0]}?" if nearest else "; see --help")


def _mistakes(error: ValidationError, path: object, given: Mapping[str, Any]) -> list[str]:
    lines = []
    for item in error.errors():
        name = ".".join(map(str, item["loc"]))
        found: Any = given
        for part in item["loc"]:
            found = found.get(part) if isinstance(found, Mapping) else None
        place = str(path) if path and not (name and found is not None) else "command line"
        if item["type"] == "extra_forbidden":
            lines.append(_unknown(name, place))
        elif not name:  # our own checks, which name their settings themselves
            lines += [f"{place}: {text}" for text in item["msg"].removeprefix("Value error, ").splitlines()]
        else:
            lines.append(f"{place}: {name}: {item['msg'][0].lower()}{item['msg'][1:]}, not {item['input']!r}")
    return [" ".join(line.split()) for line in lines]
