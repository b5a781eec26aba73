"""What a user sees: log lines, the end table, the placement of a dry run. Ranks other than 0 only warn."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table

log = logging.getLogger("noprop_dist")


class _Stderr(logging.StreamHandler[TextIO]):
    """To whatever stderr is at the time: while a live board stands, lines come out above it."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def set_up_logging(rank: int) -> None:
    """Rank 0 says what it does; others only warnings and worse, with their rank."""
    handler = _Stderr()
    handler.setFormatter(logging.Formatter("%(message)s" if rank == 0 else f"rank {rank}: %(message)s"))
    log.handlers[:] = [handler]
    log.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    log.propagate = False


def print_summary(summary: Mapping[str, Any]) -> None:
    """The end table of a run, from what summary.json holds."""
    console = Console()
    ranks = make_table("ranks", "rank", "blocks", "samples/s", "peak memory", "busy")
    for row in summary["per_rank"]:
        owned = row["blocks"]
        name = f"{owned[0]}-{owned[-1]}" if len(owned) > 1 else str(owned[0])
        speed, share = f"{row['samples_per_second']:,.0f}", f"{row['busy_share']:.0%}"
        ranks.add_row(str(row["rank"]), name, speed, size(row["peak_memory_bytes"]), share)
    blocks = make_table("blocks", "block", "rank", "loss", "accuracy of its û")
    for row in summary["blocks"]:
        blocks.add_row(str(row["index"]), str(row["rank"]), _number(row["loss"], ".4g"), _number(row["accuracy"], ".2%"))
    chain = make_table("chain", "path", "accuracy")
    for path, accuracy in summary["accuracy"].items():
        chosen = " ◂ test_accuracy" if path == summary["path"] else ""
        chain.add_row(path, f"{accuracy:.2%}{chosen}")
    chain.add_row(f"{summary['path']}, training images", f"{summary['train_accuracy']:.2%}")
    traffic = make_table("bytes across ranks", "kind", "bytes")
    for kind, count in summary["bytes"].items():
        traffic.add_row(kind, f"{count:,}")
    for table in (ranks, blocks, chain, traffic):
        console.print(table)
    parameters = summary["parameters"]
    sizes = {
        "parameters": f"{parameters['block']:,} a block, {parameters['total']:,} in all",
        "training": f"{summary['seconds']:,.1f} s, without evaluation and saving",
    }
    for what, line in (sizes | summary["files"]).items():
        console.print(f"{what:<12} {line}", highlight=False, soft_wrap=True)


def print_placement(rows: Sequence[Mapping[str, Any]], notes: Sequence[str]) -> None:
    """A dry run: who would own what, and what it would cost."""
    console = Console()
    table = make_table("placement", "rank", "blocks", "parameters", "memory", "sent per step", "received per step")
    for row in rows:
        table.add_row(
            str(row["rank"]),
            row["blocks"],
            f"{row['parameters']:,}",
            size(row["memory"]),
            size(row["sent"]),
            size(row["received"]),
        )
    console.print(table)
    for note in notes:
        console.print(note, highlight=False, soft_wrap=True)


def size(count: float) -> str:
    """Bytes for a reader, e.g. ``1.5 MB``."""
    if count < 1000:
        return f"{count:.0f} B"
    for unit in ("kB", "MB", "GB"):
        count /= 1000
        if count < 1000:
            return f"{count:.1f} {unit}"
    return f"{count / 1000:.1f} TB"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def make_table(title: str, *columns: str) -> Table:
    """An empty table; all columns but the first are for figures."""
    table = Table(title=title, title_justify="left", header_style="bold")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right")
    return table
