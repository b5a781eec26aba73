"""The benchmark from end to end, small: its own ranks, its tables, its picture."""

from __future__ import annotations

import json

import pytest

from noprop_dist import bench
from noprop_dist.benchmark.contest import LIMIT, OURS, endless, synthetic
from noprop_dist.benchmark.runner import Job, Memory, Speed, measure
from noprop_dist.config import UserError

SMALL = ["--model.blocks", "2", "--data.name", "digits", "--data.batch_size", "32", "--parallel.threads", "1"]
QUICK = ["--rounds", "2", "--seconds", "0.05"]


def test_a_benchmark_leaves_figures_a_table_and_a_picture(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("NOPROP_DATA", raising=False)
    out = tmp_path / "bench"
    only = f"{OURS}; backprop, 1 rank; DDP backprop"
    bench.main([*SMALL, *QUICK, "--out", str(out), "--only", only, "--target", "0.3", "--sweep", "model.blocks=3"])
    result = json.loads((out / "bench.json").read_text())
    entries = {entry["name"]: entry for entry in result["entries"]}
    assert list(entries) == only.split("; ")
    assert all(len(each) == len(entries) + 2 and each[LIMIT]["samples_per_second"] > 0 for each in result["rounds"])
    ddp, ours = entries["DDP backprop"], entries[OURS]
    assert ddp["ranks"] == 2 and ddp["ours_is"]["median"] > 0
    # the kernel counts what all processes of the machine send
    assert ddp["bytes"] > 0.95 * ddp["bytes_by_formula"] > 1000 * ours["bytes_by_formula"] > 0
    assert ours["bytes"] > 0.95 * ours["bytes_by_formula"]
    assert ours["memory"] < entries["backprop, 1 rank"]["memory"]
    race = result["race"]
    assert race["data"] == "digits" and race["courses"][OURS][-1][2] >= 0.3 and race["seconds"][OURS] > 0
    assert [cell["cell"] for cell in result["sweep"]] == ["model.blocks 3"]
    table = (out / "bench.md").read_text()
    assert table.count("\n| DDP backprop |") == 1 and "2 interleaved rounds" in table
    assert (out / "bench.png").read_bytes().startswith(b"\x89PNG")
    assert "DDP backprop" in capsys.readouterr().out


def test_nothing_is_said_about_scaling_where_there_are_too_few_cores(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("noprop_dist.benchmark.contest._cores", lambda: 1)
    bench.main([*SMALL, *QUICK, "--out", str(tmp_path / "bench"), "--only", f"{OURS};NoProp, 1 rank", "--target", "0"])
    said = capsys.readouterr().out
    assert "NO CLAIM ABOUT SCALING: 2 ranks were asked for" in said
    table = (tmp_path / "bench/bench.md").read_text()
    assert "×" not in table.replace("ranks × threads", "").replace("2 × 1", "").replace("1 × 1", "")


def test_a_contender_that_fails_is_named_with_its_log(tmp_path, monkeypatch):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "mine.py").write_text(
        "import torch\nclass Net(torch.nn.Module):\n    def __init__(self, *a): raise RuntimeError('no')\n"
    )
    monkeypatch.syspath_prepend(str(broken))
    with pytest.raises(UserError, match=r"mine:Net"):
        bench.main([*SMALL, *QUICK, "--model.backbone", "mine:Net", "--out", str(tmp_path / "bench"), "--target", "0"])


def test_ranks_with_slow_links_send_no_faster_than_these(tmp_path, small_card):
    """A real network of namespaces: DDP's ring takes at least its bytes' time."""
    card = endless(synthetic(small_card(model={"blocks": 2}), None, tmp_path))
    try:
        figures = measure(Job(card, "ddp", 2, link=1.25e6), Speed(1, 3), tmp_path / "log")
    except UserError as error:
        if "cannot lay cables" in str(error):
            pytest.skip(str(error))
        raise
    for each in figures:
        assert each.sent and each.sent > 3 * 0.9e6, "half of two blocks' gradients leaves each rank twice, at each step"
        assert each.seconds > 0.8 * each.sent / 1.25e6


def test_with_a_rank_for_each_block_a_rank_has_its_share_of_the_chains_memory(tmp_path, small_card):
    """Within 15 %: backprop keeps all blocks' activations, NoProp one block's, and gradients for no longer than a step."""
    card = small_card(data={"name": "mnist", "batch_size": 128, "augment": "none"})
    card = endless(synthetic(card, None, tmp_path))
    ours, (chain,) = (
        measure(Job(card, kind, ranks), Memory(), tmp_path / "log") for kind, ranks in (("trained", 4), ("whole", 1))
    )
    assert max(ours) <= 1.15 / 4 * chain
