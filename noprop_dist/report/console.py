"""What a user sees: the progress bar, the end table, the placement of a dry run. Ranks other than 0 only warn."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

log = logging.getLogger("noprop_dist")


def set_up_logging(rank: int) -> None:
    """Rank 0 says what it does; others only warnings and worse, with their rank."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s" if rank == 0 else f"rank {rank}: %(message)s"))
    log.handlers[:] = [handler]
    log.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    log.propagate = False


class Bar:
    """Progress on rank 0: a live bar on a terminal; elsewhere only what ``say`` prints."""

    def __init__(self, rank: int, start: int, total: int) -> None:
        self._rank = rank
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"))
        self._progress = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), disable=rank != 0)
        self._live = rank == 0 and self._progress.console.is_terminal
        self._task = self._progress.add_task("training", total=total, completed=start, note="")
        if self._live:
            self._progress.start()

    def update(self, step: int, note: str | None = None) -> None:
        """``step`` steps are done; ``note`` stands beside the bar until the next one."""
        if self._live:
            self._progress.update(self._task, completed=step)
            if note is not None:
                self._progress.update(self._task, note=note)

    def say(self, line: str) -> None:
        """A line that stays, on rank 0."""
        if self._rank == 0:
            self._progress.console.print(line, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._live:
            self._progress.stop()


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
