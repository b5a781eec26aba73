"""A comparison: the same cards with several seeds, each run trained in processes of its own, and what came of them."""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from noprop_dist.cards import dump_card, load_card
from noprop_dist.config import Card, UserError
from noprop_dist.data import DataInfo, describe
from noprop_dist.files import check_ways, read_json, write
from noprop_dist.launcher import check_baseline, resolve
from noprop_dist.model import CONFIG
from noprop_dist.parallel.placement import place
from noprop_dist.report.curves import draw_curves
from noprop_dist.report.standings import markdown, show
from noprop_dist.runs import FREE, RunFolder, differences, total_steps

TABLES = ("table.md", "table.json", "curves.png")


@dataclass(frozen=True)
class Run:
    """One card with one seed; ``card`` names the run and its folder. ``steps``: its length."""

    label: str
    card: Card
    ranks: int
    steps: int

    @property
    def name(self) -> str:
        """Of its folder, card and log."""
        return str(self.card.run.name)

    @property
    def folder(self) -> RunFolder:
        """Where it lies."""
        return RunFolder(self.card.run.dir / self.name)

    @property
    def summary(self) -> dict[str, Any] | None:
        """What a finished run reports; None before."""
        found: dict[str, Any] = read_json(self.folder.summary) if self.folder.summary.exists() else {}
        return found if found.get("steps") == self.steps else None


def plan(cards: Mapping[Path, Card], seeds: Sequence[int], ranks: int, out: Path) -> list[Run]:
    """Every card with every seed, on ``ranks`` ranks or as many as it has blocks, card by card.

    Raises UserError for what can be known to be wrong before the first run starts.
    """
    if len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise UserError(f"command line: --seeds: {' '.join(map(str, seeds))} are not different numbers from 0 on; mend them")
    check_ways(
        (out, *(out / name for name in ("cards", "logs", "runs"))), (out / name for name in TABLES), "choose another --out"
    )
    labels = {path: f"{path.resolve().parent.name}/{path.stem}" for path in cards}
    runs: list[Run] = []
    for path, card in cards.items():
        name = re.sub(r"[^A-Za-z0-9.-]", "_", labels[path].replace("/", "-")).lstrip("_.-")
        if name in {run.name.rpartition("-")[0] for run in runs}:
            raise UserError(f"{path}: another card is called {labels[path]} too; rename one or its folder")
        try:
            info = describe(card.data)
            card = resolve(card, info)
            check_baseline(card, 1)
            on = len(place([1.0] * card.units, min(ranks, card.units)).ranges)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        for seed in seeds:
            own = card.run.model_copy(update={"dir": out / "runs", "name": f"{name}-{seed}", "seed": seed})
            run = Run(labels[path], card.model_copy(update={"run": own}), on, total_steps(card, info.train_size))
            _refuse_another_card(run, info)
            runs.append(run)
    return runs


def _refuse_another_card(run: Run, info: DataInfo) -> None:
    """A finished run's figures stand, also those that other inference settings would change, for the data that it had."""
    if run.folder.summary.exists():
        then, now = (card.model_dump(mode="json") for card in (load_card(run.folder.card), run.card))
        if changed := differences(then, now, FREE - {"inference"}):
            raise UserError(f"{run.folder.path}: has run with another card ({'; '.join(changed)}); choose another --out")
        config = run.folder.model / CONFIG
        try:
            data = DataInfo.from_json(read_json(config)["data"])
        except (ValueError, KeyError):
            raise UserError(f"{config}: damaged; delete {run.folder.path} to have it trained anew") from None
        if run.card.data.name in ("npz", "imagefolder") and data != info:  # of the others no file has been read yet
            raise UserError(f"{run.folder.path}: has run on other data than {run.card.data.root} holds; choose another --out")


def compare(runs: Sequence[Run], out: Path) -> bool:
    """Train what is not finished, one run after the other; write and print the table; draw the curves.

    Returns whether all runs succeeded: where one fails the others go on.
    """
    errors: dict[str, str] = {}
    for number, run in enumerate(runs, start=1):
        log = out / "logs" / f"{run.name}.log"
        doing = "finished before" if run.summary else f"log: {log}"
        ranks = f"{run.ranks} rank{'s' * (run.ranks > 1)}"
        print(f"run {number}/{len(runs)}: {run.label}, seed {run.card.run.seed}, {ranks}; {doing}", flush=True)
        if not run.summary and (error := _train(run, out, log)):
            errors[run.name] = error
            print(f"failed: {error}", flush=True)
    labels = dict.fromkeys(run.label for run in runs)
    entries = [_entry([run for run in runs if run.label == label], errors) for label in labels]
    write(out / "table.json", json.dumps(entries, indent=1).encode())
    write(out / "table.md", markdown(entries).encode())
    draw_curves(entries, out / "curves.png")
    show(entries)
    for name in TABLES:
        print(out / name)
    return not errors


def _train(run: Run, out: Path, log: Path) -> str | None:
    """Train in processes of their own, so that memory and failures are apart. Returns the line that tells of a failure."""
    card = out / "cards" / f"{run.name}.yaml"
    write(card, dump_card(run.card).encode())
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "wb") as file, tempfile.NamedTemporaryFile() as meeting:
        torchrun = [  # that meets itself at a file and on the loopback: nothing listens beyond
            "torch.distributed.run", "--rdzv-backend=c10d", "--rdzv-conf=store_type=file", f"--rdzv-endpoint={meeting.name}",
            "--local-addr=127.0.0.1", f"--nproc-per-node={run.ranks}", "-m",
        ]  # fmt: skip
        command = [sys.executable, "-m", *(torchrun if run.ranks > 1 else []), "noprop_dist.train", str(card)]
        code = subprocess.run(
            command, stdout=file, stderr=subprocess.STDOUT, env=os.environ | {"PYTHONUNBUFFERED": "1"}
        ).returncode
    if run.summary and not code:
        return None
    said = re.search(_FAILURE, log.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
    return said[1].strip().removeprefix("error: ") if said else f"ended with exit code {code}"


_FAILURE = r"^(?:\[rank\d+\]: ?)?(error: .*|[\w.]*(?:Error|Exception)\b.*)$"
"""A mistake as our commands tell it, or the last line of a traceback; the first such line is the cause."""


def _entry(runs: Sequence[Run], errors: Mapping[str, str]) -> dict[str, Any]:
    """All figures of one card: each seed's, their means and, of more than one, the standard errors."""
    failed = {run.card.run.seed: errors[run.name] for run in runs if run.name in errors}
    summaries = {run.card.run.seed: run.summary for run in runs if run.name not in errors}
    figures = [_figures(summary) for summary in summaries.values() if summary]
    columns = {name: [each[name] for each in figures] for name in (figures[0] if figures else ())}
    return {
        "card": runs[0].label,
        "method": runs[0].card.method.name,
        "path": runs[0].card.inference.path,
        "ranks": sorted({summary["ranks"] for summary in summaries.values() if summary} or {runs[0].ranks}),
        "mean": {name: statistics.fmean(values) for name, values in columns.items()},
        "standard_error": {
            name: statistics.stdev(values) / len(values) ** 0.5 for name, values in columns.items() if len(values) > 1
        },
        "errors": failed,
        "seeds": summaries,
    }


def _figures(summary: Mapping[str, Any]) -> dict[str, float]:
    return {
        "test_accuracy": summary["test_accuracy"],
        "stochastic": summary["accuracy"]["stochastic"],
        "train_accuracy": summary["train_accuracy"],
        "block_parameters": summary["parameters"]["block"],
        "parameters": summary["parameters"]["total"],
        "epochs": summary["curve"][-1]["epoch"],
        "seconds": summary["seconds"],
        "samples_per_second": summary["samples_per_second"],
        "peak_memory_bytes": summary["peak_memory_bytes"],
        "bytes_per_step": summary["bytes_per_step"],
    }
