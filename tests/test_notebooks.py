"""The notebooks as they are stored. That they run is tested by nbmake: pytest calls it on notebooks/ (see pyproject.toml)."""

from __future__ import annotations

import json
import re
import struct
from base64 import b64decode
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
LARGEST, WIDEST = 700_000, 1200  # bytes of a file, pixels of a picture
ABSOLUTE = re.compile(r"(?<![\w.~*)\]/])/[\w.-]+/[\w.-]+")


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def path(request):
    return request.param


@pytest.fixture
def cells(path):
    return [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]


@pytest.fixture
def outputs(cells):
    return [output for cell in cells for output in cell["outputs"]]


def test_both_are_there():
    assert [path.name[:2] for path in NOTEBOOKS] == ["1-", "2-"]


def test_all_cells_have_run_in_order_and_leave_outputs_and_pictures_or_tables(cells, outputs):
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    kinds = {kind for output in outputs for kind in output.get("data", {})}
    assert kinds >= {"text/markdown"} and any("text" in output for output in outputs)


def test_nothing_went_wrong_and_nobody_warned(outputs):
    assert not [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"]


def test_a_stored_notebook_is_small_and_of_no_machine(path, cells, outputs):
    assert path.stat().st_size < LARGEST
    assert json.loads(path.read_text(encoding="utf-8"))["metadata"]["kernelspec"]["name"] == "python3"
    assert not any("execution" in cell["metadata"] for cell in cells), "time stamps: use make notebooks"
    for output in outputs:
        for kind, content in {"text/plain": output.get("text", ""), **output.get("data", {})}.items():
            if kind == "image/png":
                assert struct.unpack(">I", b64decode("".join(content))[16:20])[0] <= WIDEST
            else:
                assert not ABSOLUTE.findall("".join(content))
