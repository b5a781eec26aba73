"""The house keeps its rooms: what the sources may import and how long they may be."""

import ast
from pathlib import Path

import pytest

import noprop_dist

HOUSE = Path(noprop_dist.__file__).parent
SOURCES = sorted(HOUSE.rglob("*.py"))
ELSEWHERE = [path for path in SOURCES if HOUSE / "parallel" not in path.parents]


def nodes(path):
    return list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


def modules(path):
    """Everything imported or reached by a dotted name, e.g. ``torch.distributed``."""
    found = set()
    for node in nodes(path):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Attribute):
            found.add(ast.unparse(node))
    return found


def within(names, package):
    return {name for name in names if name == package or name.startswith(f"{package}.")}


def test_the_scan_sees_the_house():
    assert HOUSE / "parallel" / "placement.py" in SOURCES
    assert HOUSE / "config.py" in ELSEWHERE
    assert any(within(modules(path), "torch.distributed") for path in SOURCES), "else the next test tests nothing"


@pytest.mark.parametrize("path", ELSEWHERE, ids=lambda path: str(path.relative_to(HOUSE)))
def test_only_the_parallel_room_speaks_to_other_ranks(path):
    assert not within(modules(path), "torch.distributed")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(HOUSE)))
def test_the_core_does_not_need_ray(path):
    assert not within(modules(path), "ray")


@pytest.mark.parametrize("path", ELSEWHERE, ids=lambda path: str(path.relative_to(HOUSE)))
def test_one_rank_is_no_special_case(path):
    """No comparison of a number of ranks with a constant outside parallel/."""
    for node in nodes(path):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            ranks = [side for side in map(ast.unparse, sides) if side.endswith(("world_size", "world.size", "num_ranks"))]
            constant = any(isinstance(side, ast.Constant) for side in sides)
            assert not (ranks and constant), f"line {node.lineno}: {ast.unparse(node)}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(HOUSE)))
def test_no_file_holds_two_ideas(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 300
