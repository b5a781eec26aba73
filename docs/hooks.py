"""What mkdocs does for these pages beside Markdown: mathematics, settings, commands, notebooks, sources, Sphinx's roles.

A page says where things go: ``<!-- settings -->``, ``<!-- commands -->``, ``<!-- rooms -->``. ``$…$`` becomes MathML, which
browsers draw by themselves; an equation's number is its ``\\tag``. A link to a file elsewhere, ``../launch/torchrun.sh``, leads
to a page that shows it.
"""

from __future__ import annotations

import argparse
import html
import importlib
import logging
import posixpath
import re
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args
from unittest import mock

import griffe
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page
from nbconvert import MarkdownExporter

from noprop_dist import command
from noprop_dist.cards import setting_names
from noprop_dist.config import BELONGS, DEFAULTS, NEEDS, Card

log = logging.getLogger("mkdocs.hooks")
ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LINK = re.compile(r"\]\((\.\./[^)#\s]+)")
MATHS = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
TAG = re.compile(r"\\tag\{(.*?)\}")
LARGER = re.compile(r"\\[Bb]igg?[lrm]?(?=\\)")  # before \\|, latex2mathml takes no size
ROLE = re.compile(r":\w+:`(~?)([\w.]+)`")
MEANT = {
    "<mi>&#x0007E;</mi>": "<mo>&#x0223C;</mo>",  # ~ between two terms is a relation
    "<mo>&#x0005E;</mo>": '<mo stretchy="false">&#x002C6;</mo>',  # a hat, no wider than its letter, and clear of it
    ' accent="true"': "",
}
"""What latex2mathml writes, and what browsers should draw."""
TYPED = re.compile(r"(?:^(?:    |python |torchrun ).*\n?)+", re.MULTILINE)
PROMPTS = re.compile(r"(?:^>>> .*\n?)+", re.MULTILINE)
WIDE = "---\nhide: [toc]\n---\n"
LANGUAGES = {".py": "python", ".yaml": "yaml"}
KINDS = {int: "a whole number", float: "a number", bool: "`true` or `false`", str: "a text", Path: "a path"}
LIMITS = {
    "ge": "from {:,}",
    "gt": "above {:,}",
    "le": "to {:,}",
    "lt": "to below {:,}",
    "max_length": "of {} characters at most",
    "pattern": "that matches `{}`",
}


# --- settings


def settings() -> str:
    """Every setting of the card, as Markdown."""
    return "\n".join(_setting(*name.split(".")) for name in setting_names())


def _setting(section: str, name: str) -> str:
    card = Card.model_fields[section].annotation
    field, whole = card.model_fields[name], f"{section}.{name}"
    own = {method: changed[section][name] for method, changed in DEFAULTS.items() if name in changed.get(section, {})}
    facts = [_kind(field), "unset by default" if field.default is None else f"default {_value(field.default)}"]
    for value in dict.fromkeys(own.values()):
        facts.append(f"{_value(value)} for {_either([method for method in own if own[method] == value])}")
    if whole in BELONGS:
        facts.append(f"only {_either(BELONGS[whole])}")
    if whole in NEEDS:
        other, values = NEEDS[whole]
        facts.append(f"only with [{other}](#{other}) {_either(values)}")
    first = next(iter(card.model_fields)) == name
    heading = f"## {section}\n\n" if first else ""
    text = re.sub(r"``(.*?)``", r"`\1`", html.escape(field.description, quote=False))
    return f"{heading}### `{whole}` {{ #{whole} }}\n\n{' · '.join(facts)}\n{{ .facts }}\n\n{text}\n"


def _kind(field: Any) -> str:
    """What values it takes: type and limits, or the words there are."""
    words = get_args(field.annotation)
    if words and all(isinstance(word, str) for word in words):
        return _either(words)
    found = {part for word in (field.annotation, *words) for part in (word, *get_args(word))}
    kind = next(text for kind, text in KINDS.items() if kind in found)
    facts = ((text, getattr(fact, name, None)) for fact in field.metadata for name, text in LIMITS.items())
    return " ".join([kind, *(text.format(limit) for text, limit in facts if limit is not None)])


def _value(value: Any) -> str:
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _either(words: Sequence[str]) -> str:
    *others, last = (f"`{word}`" for word in words)
    return f"{', '.join(others)} or {last}" if others else last


# --- commands


class _Caught(Exception):
    """A command's parser, on its way out of the command."""


def commands() -> str:
    """What each command says of itself, and its own arguments, as Markdown."""
    paths = [*sorted((ROOT / "noprop_dist").glob("*.py")), *sorted((ROOT / "launch").glob("*.py"))]
    return "\n".join(_command(path) for path in paths if "command.run(main)" in path.read_text(encoding="utf-8"))


def _command(path: Path) -> str:
    parser = parser_of(path)
    assert parser.description
    title, _, text = parser.description.partition("\n\n")
    sections = {"--help", *(f"--{name}" for name in Card.model_fields)}
    own = [action for action in parser._actions if "." not in action.dest and not sections & {*action.option_strings}]
    rows = [f"| {_argument(action)} | {(action.help or '').replace('|', '&#124;')} |" for action in own]
    card = len(own) < len(parser._actions) - 1
    more = "\nAnd `--section.name value` for every [setting](settings.md), and `--debug`." if card else ""
    text = TYPED.sub(lambda found: f"```sh\n{textwrap.dedent(found[0]).rstrip()}\n```\n", text)
    return "\n".join(
        [f"## {path.stem}\n", " ".join(title.split()), "", text.rstrip(), "", "| argument | |\n| --- | --- |", *rows, more, ""]
    )


def _argument(action: argparse.Action) -> str:
    name = ", ".join(action.option_strings) or str(action.metavar or action.dest).upper()
    value = f" {action.metavar or action.dest.upper()}" if action.option_strings and action.nargs != 0 else ""
    return f"`{name}{value}{' …' if action.nargs in ('+', '*') else ''}`"


def parser_of(path: Path) -> argparse.ArgumentParser:
    """The parser that a command's ``main`` makes, when it is asked to parse."""

    def caught(self: argparse.ArgumentParser, *arguments: Any) -> None:
        raise _Caught(self)

    sys.path.insert(0, str(path.parent))
    try:
        module = importlib.import_module(f"noprop_dist.{path.stem}" if path.parent.name == "noprop_dist" else path.stem)
    finally:
        sys.path.pop(0)
    with mock.patch.multiple(command.Parser, parse_args=caught, parse_intermixed_args=caught, parse_known_args=caught):
        try:
            module.main([])
        except _Caught as error:
            return error.args[0]
    raise AssertionError(f"{path} parses nothing")


def rooms() -> str:
    """README's picture of the rooms."""
    return re.findall("^```text.*?^```$", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)[-1]


# --- mkdocs asks


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """The generated parts, and links upwards."""
    for name, text in {"settings": settings, "commands": commands, "rooms": rooms}.items():
        if (mark := f"<!-- {name} -->") in markdown:
            markdown = markdown.replace(mark, text())
    uri = page.file.src_uri
    return LINK.sub(
        lambda found: f"]({posixpath.relpath(_shown(_meant(found[1], uri)), posixpath.dirname(uri) or '.')}", markdown
    )


def on_page_content(content: str, **_: Any) -> str:
    """LaTeX to MathML."""
    return MATHS.sub(_mathml, content)


def _mathml(found: re.Match[str]) -> str:
    latex, block = LARGER.sub("", html.unescape(found[2]).strip()).replace("'", "′"), found[1] == "div"  # raised by itself
    number = "".join(f'<span class="tag">({tag})</span>' for tag in TAG.findall(latex))
    drawn = convert(TAG.sub("", latex), display="block" if block else "inline")
    for written, meant in MEANT.items():
        drawn = drawn.replace(written, meant)
    if "\\" in drawn:
        log.warning("latex2mathml does not know all of %s", latex)
    return f'<div class="equation">{drawn}{number}</div>' if block else drawn


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """The notebooks into the navigation."""
    if NOTEBOOKS:
        config.nav.insert(2, {"Notebooks": [f"notebooks/{path.stem}.md" for path in NOTEBOOKS]})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Pages for the notebooks, with their pictures, and for the files that others link to."""
    for path in NOTEBOOKS:
        text, resources = MarkdownExporter().from_filename(str(path), {"unique_key": path.stem})
        text = WIDE + re.sub(r"\]\(([\w-]+)\.ipynb", r"](\1.md", text)
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=text))
        for name, content in resources["outputs"].items():
            files.append(File.generated(config, f"notebooks/{name}", content=content))
    pages = [(file.src_uri, file.content_string) for file in files.documentation_pages()]
    for path in sorted({_meant(link, uri) for uri, text in pages for link in LINK.findall(text)}):
        if _shown(path).startswith("files/") and (ROOT / path).is_file():
            files.append(File.generated(config, _shown(path), content=_page(path), inclusion=InclusionLevel.NOT_IN_NAV))
    return files


def _meant(link: str, uri: str) -> str:
    """The path in the repository that a link of a page (docs/URI, or a notebook) leads to."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(uri if uri.startswith("notebooks/") else f"docs/{uri}"), link))


def _shown(path: str) -> str:
    """The page that shows a file of the repository."""
    if path.startswith(("docs/", "notebooks/")):
        return path.removeprefix("docs/").replace(".ipynb", ".md")
    return f"files/{path}.md"


def _page(path: str) -> str:
    language = LANGUAGES.get(Path(path).suffix, "bash")
    text = (ROOT / path).read_text(encoding="utf-8")
    return f"---\nsearch: {{exclude: true}}\nhide: [toc]\n---\n# {path}\n\n````{language}\n{text}````\n"


class Roles(griffe.Extension):
    """Sphinx's roles in docstrings, ``:meth:`~a.b.c``` and the like, become links where their object has a page, else code."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = ROLE.sub(lambda found: _reference(obj, found), _examples(obj.docstring.value))


def _reference(obj: griffe.Object, found: re.Match[str]) -> str:
    name = found[2]
    try:
        target = obj.resolve(name)
    except griffe.NameResolutionError:
        target = name
    return f'<autoref identifier="{target}" optional><code>{name.rpartition(".")[2] if found[1] else name}</code></autoref>'


def _examples(text: str) -> str:
    """Prompts (>>>) in fences, for in Markdown they would be quotations of quotations of quotations."""
    return PROMPTS.sub(lambda found: "```python\n" + found[0].replace(">>> ", "").rstrip() + "\n```\n", text)
