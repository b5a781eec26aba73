"""Comparisons as a user starts them: real trainings in processes of their own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from noprop_dist.report.curves import draw_curves

COMPARE = [sys.executable, "-m", "noprop_dist.compare"]
QUICK = ["--train.steps", "6", "--train.eval_every", "2", "--data.batch_size", "32", "--parallel.threads", "1"]
QUICK += ["--train.pictures", "false"]


def run(*arguments: str, cwd: Path, expect: int = 0, **env: str) -> subprocess.CompletedProcess[str]:
    command = [*COMPARE, *arguments]
    result = subprocess.run(command, cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, timeout=240)
    assert result.returncode == expect, f"exit {result.returncode}\n{result.stdout}\n{result.stderr}"
    return result


def write_cards(folder: Path, **cards: object) -> None:
    for name, card in cards.items():
        path = folder / f"{name.replace('_', '/')}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(yaml.safe_dump(card))


def table(folder: Path) -> dict[str, dict]:
    return {entry["card"]: entry for entry in json.loads((folder / "out/table.json").read_text())}


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], subprocess.CompletedProcess[str]]:
    """Two cards of the same file name, one with two blocks and one with one, two seeds each, on at most two ranks."""
    folder = tmp_path_factory.mktemp("compared")
    write_cards(folder, a_card={"model": {"blocks": 2}}, b_card={"method": {"name": "fm"}})
    arguments = ["a/card.yaml", "b/card.yaml", "--seeds", "0", "1", "--ranks", "2", "--out", "out", *QUICK]
    return folder, arguments, run(*arguments, cwd=folder)


def test_a_comparison_sets_what_the_runs_report_side_by_side(compared):
    folder, _, result = compared
    entries = table(folder)
    assert list(entries) == ["a/card", "b/card"]
    assert [(entry["method"], entry["ranks"]) for entry in entries.values()] == [("dt", [2]), ("fm", [1])]
    for letter, entry in zip("ab", entries.values(), strict=True):
        summaries = [json.loads((folder / f"out/runs/{letter}-card-{seed}/summary.json").read_text()) for seed in (0, 1)]
        assert entry["seeds"] == {"0": summaries[0], "1": summaries[1]} and not entry["errors"]
        assert all(summary["steps"] == 6 for summary in summaries), "the settings stand above every card"
        assert [point["step"] for point in summaries[0]["curve"]] == [2, 4, 6]
        first, second = (summary["test_accuracy"] for summary in summaries)
        assert entry["mean"]["test_accuracy"] == pytest.approx((first + second) / 2)
        assert entry["standard_error"]["test_accuracy"] == pytest.approx(abs(first - second) / 2)
        shown = f"{50 * (first + second):.2f} ± {50 * abs(first - second):.2f}"
        assert shown in (folder / "out/table.md").read_text() and shown in result.stdout
        assert summaries[0]["curve"] != summaries[1]["curve"], "the seeds differ"
    assert re.search(r"\| b/card \| fm \| .* \| 217,930 \| 218,040 \| 0.1 \| 1 \|", (folder / "out/table.md").read_text())
    assert (folder / "out/curves.png").read_bytes().startswith(b"\x89PNG")
    assert "run 3/4: b/card, seed 0, 1 rank; log: out/logs/b-card-0.log" in result.stdout


def test_the_same_command_again_trains_nothing_anew(compared):
    folder, arguments, _ = compared
    before = {path: path.stat().st_mtime_ns for path in (folder / "out/runs").rglob("*")}
    expected = table(folder)
    said = run(*arguments, cwd=folder).stdout
    assert said.count("finished before") == 4
    assert {path: path.stat().st_mtime_ns for path in (folder / "out/runs").rglob("*")} == before
    assert table(folder) == expected


def test_a_longer_comparison_goes_on_where_it_ended(compared):
    folder, _, _ = compared
    run("b/card.yaml", "--out", "out", *QUICK, "--train.steps", "8", cwd=folder)
    assert list(table(folder)["b/card"]["seeds"]) == ["0"]
    assert [point["step"] for point in table(folder)["b/card"]["seeds"]["0"]["curve"]] == [2, 4, 6, 8]


@pytest.mark.parametrize("setting", ["--optim.lr", "--inference.samples"])
def test_other_settings_do_not_pass_for_a_finished_run(compared, setting):
    folder, arguments, _ = compared
    said = run(*arguments, setting, "3", cwd=folder, expect=2).stderr
    assert re.fullmatch(rf"error: out/runs/a-card-0: has run with another card \({setting[2:]}.*choose another --out\n", said)


def test_a_run_that_fails_is_told_and_the_others_go_on(tmp_path):
    write_cards(tmp_path, c_bad={"parallel": {"device": "cuda"}}, c_good={"model": {"blocks": 1}})
    said = run("c/bad.yaml", "c/good.yaml", "--out", "out", *QUICK, cwd=tmp_path, expect=1, CUDA_VISIBLE_DEVICES="").stdout
    entries = table(tmp_path)
    assert list(entries["c/bad"]["errors"]) == ["0"] and not entries["c/bad"]["seeds"]
    assert entries["c/good"]["seeds"]["0"]["steps"] == 6
    line = "failed: c/bad, seed 0: parallel.device: cuda was asked for, but torch sees no GPU here; use cpu or auto"
    assert line in said and line in (tmp_path / "out/table.md").read_text()


def test_the_picture_has_a_line_a_card_against_epochs_and_against_seconds(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    def entry(card: str, path: str, *curves: list[tuple[int, float, float, float]]) -> dict:
        points = [
            [{"step": s, "epoch": s / 10, "seconds": t, "mean": m, "stochastic": n} for s, t, m, n in curve] for curve in curves
        ]
        return {"card": card, "path": path, "seeds": {str(seed): {"curve": curve} for seed, curve in enumerate(points)}}

    first = entry(
        "a", "mean", [(10, 1, 0.5, 0.1), (20, 2, 0.9, 0.2)], [(10, 3, 0.7, 0.1), (20, 4, 0.9, 0.2), (30, 5, 0.9, 0.2)]
    )
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **settings: drawn.append(self))
    draw_curves([first, entry("b", "stochastic", [(10, 8, 0.5, 0.4)]), entry("failed", "mean")], tmp_path / "curves.png")
    (figure,) = drawn
    by_epoch, by_seconds = figure.axes
    assert (by_epoch.get_xlabel(), by_seconds.get_xlabel(), by_epoch.get_ylabel()) == (
        "epochs",
        "seconds of training",
        "test accuracy, %",
    )
    lines = [
        {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axis.lines} for axis in figure.axes
    ]
    assert lines[0] == {"a": ([1, 2], pytest.approx([60, 90])), "b": ([1], pytest.approx([40]))}
    assert lines[1] == {"a": ([2, 3], pytest.approx([60, 90])), "b": ([8], pytest.approx([40]))}
    (band, _) = by_epoch.collections
    assert (band.get_datalim(by_epoch.transData).y0, band.get_datalim(by_epoch.transData).y1) == pytest.approx((50, 90))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]


def test_other_data_do_not_pass_for_a_finished_run(tmp_path):
    write_cards(tmp_path, d_own={"data": {"name": "npz"}, "model": {"blocks": 1}})
    for name, value in (("one", 0), ("other", 200)):
        images = np.random.default_rng(0).integers(value, 256, (60, 8, 8), dtype=np.uint8)
        labels = np.arange(60) % 2
        np.savez(tmp_path / f"{name}.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    command = ["d/own.yaml", "--out", "out", *QUICK, "--data.root"]
    run(*command, "one.npz", cwd=tmp_path)
    (tmp_path / "one.npz").rename(tmp_path / "moved.npz")
    assert "finished before" in run(*command, "moved.npz", cwd=tmp_path).stdout
    said = run(*command, "other.npz", cwd=tmp_path, expect=2).stderr
    assert re.fullmatch(r"error: out/runs/d-own-0: has run on other data than other\.npz holds; choose another --out\n", said)
