"""The table of a comparison, for the terminal and for Markdown. An entry is one card's part of table.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

from noprop_dist.report.console import make_table, size

Entry = Mapping[str, Any]
COLUMNS = (
    "card",
    "method",
    "test, %",
    "stochastic, %",
    "train, %",
    "parameters a block",
    "in all",
    "epochs",
    "ranks",
    "seconds",
    "samples/s",
    "peak memory",
    "bytes a step",
)


def markdown(entries: Sequence[Entry]) -> str:
    """The table, and below it what failed."""
    rule = ["---", "---", *["---:"] * (len(COLUMNS) - 2)]
    lines = [f"| {' | '.join(row)} |" for row in (COLUMNS, rule, *map(_cells, entries))]
    return "\n".join([*lines, *(f"\n{line}" for line in _failures(entries)), ""])


def show(entries: Sequence[Entry]) -> None:
    """Print it, as wide as its figures need."""
    rows = list(map(_cells, entries))
    words = [heading.split() for heading in COLUMNS]
    table = make_table("comparison", *map("\n".join, words))
    for row in rows:
        table.add_row(*row)
    width = 1 + sum(3 + max(map(len, column)) for column in zip(*rows, (max(each, key=len) for each in words), strict=True))
    console = Console(width=width, highlight=False)
    console.print(table)
    for line in _failures(entries):
        console.print(line, markup=False, soft_wrap=True)


def _cells(entry: Entry) -> list[str]:
    mean, errors = entry["mean"], entry["errors"]
    ranks = " or ".join(map(str, entry["ranks"]))
    seeds = f" ({len(entry['seeds'])} of {len(entry['seeds']) + len(errors)} seeds)" if errors else ""
    names = [entry["card"] + seeds, entry["method"]]
    if not mean:
        return [*names, "failed", *["-"] * 5, ranks, *["-"] * 4]
    return [
        *names,
        *(_percent(entry, name) for name in ("test_accuracy", "stochastic", "train_accuracy")),
        *(f"{mean[name]:,.0f}" for name in ("block_parameters", "parameters")),
        f"{mean['epochs']:,.1f}".removesuffix(".0"),
        ranks,
        *(f"{mean[name]:,.{0 if mean[name] >= 100 else 1}f}" for name in ("seconds", "samples_per_second")),
        *(size(mean[name]) for name in ("peak_memory_bytes", "bytes_per_step")),
    ]


def _percent(entry: Entry, name: str) -> str:
    error = entry["standard_error"].get(name)
    return f"{100 * entry['mean'][name]:.2f}" + ("" if error is None else f" ± {100 * error:.2f}")


def _failures(entries: Sequence[Entry]) -> list[str]:
    return [f"failed: {entry['card']}, seed {seed}: {line}" for entry in entries for seed, line in entry["errors"].items()]
