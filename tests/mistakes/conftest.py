"""What every mistake has to be: told in a line with its place and remedy, in time, and without a trace on the disk."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from urllib.error import URLError

import pytest

from noprop_dist import command
from noprop_dist.parallel.world import World

Tell = Callable[..., list[str]]
REMEDY = re.compile(r"; \w|should |did you mean |see --help|such as |is a section, as in ")


def contents(folder: Path) -> dict[Path, bytes | None]:
    """Everything below a folder, with the bytes of files."""
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.fixture
def tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Tell:
    """``tell(main, *argv)``: the lines that a command says of a mistake in the current folder, without their ``error: ``.

    It must end with exit code 2 before process groups are formed, say nothing but lines with a remedy, and leave all files as
    they are.
    """

    def no_groups(self: World) -> None:
        pytest.fail("the mistake was not found before process groups are formed")

    def no_network(*args: object, **settings: object) -> None:
        raise URLError("no\nnetwork")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(World, "connect", no_groups)
    monkeypatch.setattr("urllib.request.urlopen", no_network)

    def call(main: Callable[[list[str]], None], *argv: object) -> list[str]:
        before = contents(tmp_path)
        capsys.readouterr()
        code = command.answer(main, [str(word) for word in argv])
        lines = capsys.readouterr().err.splitlines()
        assert code == 2, lines
        for line in lines:
            assert line.startswith("error: ") and REMEDY.search(line), line
        assert contents(tmp_path) == before, "something was written"
        return [line.removeprefix("error: ") for line in lines]

    return call


@pytest.fixture
def told(tell: Tell) -> Callable[..., None]:
    """``told(words, main, *argv)``: as ``tell``, where it is one line with all these words."""

    def check(words: tuple[str, ...], main: Callable[[list[str]], None], *argv: object) -> None:
        lines = tell(main, *argv)
        assert len(lines) == 1 and all(word in lines[0] for word in words), lines

    return check
