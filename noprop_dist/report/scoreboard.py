"""A benchmark's figures for readers: Markdown, terminal, and a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from noprop_dist.report.console import make_table, size
from noprop_dist.report.drawing import COLOURS, draw, save

Figures = Mapping[str, Any]


def columns(result: Figures) -> list[tuple[str, ...]]:
    """The table: its headings, then a line a contender."""
    ranks, race = result["ranks"], result.get("race")
    heading = ["", "ranks × threads", "samples/s (range)", "of the limit", "layer-parallel is", "bytes a step", "by formula"]
    heading += ["memory a rank", "busy"]
    if race:
        heading.append(f"s to {race['target']:.0%}")
    lines = [tuple(heading)]
    for entry in result["entries"]:
        claims = result["scales"] or entry["ranks"] == 1
        several = entry["ranks"] > 1
        line = [entry["name"] + (f", {entry['microbatches']} microbatches" if entry["microbatches"] > 1 else "")]
        line += [f"{entry['ranks']} × {entry['threads']}", _range(entry["samples_per_second"], ",.0f")]
        line += [f"{entry['of_limit']['median']:.2f}" if claims and ranks > 1 else "-"]
        line += [f"{_range(entry['ours_is'], '.2f')} ×" if result["scales"] and entry["ours_is"] else "-"]
        line += [size(entry["bytes"]) if entry["bytes"] is not None else "-"]
        line += [size(entry["bytes_by_formula"]) if several else "-", size(entry["memory"]), f"{entry['busy']:.0%}"]
        if race:
            seconds = race["seconds"].get(entry["name"])
            line.append("-" if entry["name"] not in race["courses"] else "not reached" if seconds is None else f"{seconds:.1f}")
        lines.append(tuple(line))
    return lines


def sweep_columns(cells: Sequence[Figures]) -> list[tuple[str, ...]]:
    """A line a cell of a sweep: samples/s of every contender, and how much faster layer-parallel is."""
    names = list(dict.fromkeys(entry["name"] for cell in cells for entry in cell["entries"]))
    lines = [("", "limit", *names)]
    for cell in cells:
        found = {entry["name"]: entry for entry in cell["entries"]}
        line = [cell["cell"], f"{cell['limit']['median']:,.0f}"]
        for name in names:
            entry = found.get(name)
            ratio = f" ({entry['ours_is']['median']:.2f} ×)" if entry and entry["ours_is"] and cell["scales"] else ""
            line.append(f"{entry['samples_per_second']['median']:,.0f}{ratio}" if entry else "-")
        lines.append(tuple(line))
    return lines


def notes(result: Figures) -> list[str]:
    """What the table's figures are of."""
    card, ranks, machine = result["card"], result["ranks"], result["machine"]
    limit, given = result["limit"], result["cores_given"]
    method, model, train = card["method"]["name"], card["model"], card["train"]
    where = [machine["processor"], f"{result['cores']} cores", *([machine["device"]] if machine["device"] else [])]
    where += [f"torch {machine['torch']}", f"Python {machine['python']}", machine["system"]]
    lines = [
        f"{method}, {model['blocks']} blocks, {model['backbone']}, images {tuple(result['shape'])}, batch "
        f"{card['data']['batch_size']}, {train['precision']}, {card['optim']['name']}; random pixels; {len(result['rounds'])} "
        f"interleaved rounds of {result['steps']} steps; medians (least-most), ratios within a round",
        f"limit: {ranks} unconnected processes at once, each with one rank's share of the blocks in a bare loop: "
        f"{_range(limit, ',.0f')} samples/s; one of them alone runs {ranks / given['median']:.2f} times as fast",
        f"machine: {', '.join(where)}",
        "memory: the most bytes of tensors alive in a step, on the rank that has most; busy: CPU time of a rank's main thread",
    ]
    if not result["scales"]:
        lines.append(
            f"NO CLAIM ABOUT SCALING: {ranks} ranks were asked for, and this machine gave them "
            f"{given['median']:.1f} of its {result['cores']} cores"
        )
    if race := result.get("race"):
        lines.append(
            f"seconds to {race['target']:.0%} test accuracy: {race['data']}, {race['train_size']:,} training and "
            f"{race['test_size']:,} test images, seed {card['run']['seed']}, training time alone, looked at every "
            f"{race['every']} steps"
        )
    return lines


def markdown(result: Figures) -> str:
    """All tables and notes."""
    parts = [_table(columns(result)), "\n".join(f"- {note}" for note in notes(result))]
    if result.get("sweep"):
        parts.append(
            "Sweep, samples/s (and how many times as fast layer-parallel NoProp is):\n\n"
            + _table(sweep_columns(result["sweep"]))
        )
    return "\n\n".join(parts) + "\n"


def show(result: Figures) -> None:
    """Print all tables and notes, as wide as they need."""
    tables = [("benchmark", columns(result))]
    if result.get("sweep"):
        tables.append(("sweep, samples/s (layer-parallel NoProp is so many times as fast)", sweep_columns(result["sweep"])))
    for title, (heading, *lines) in tables:
        table = make_table(title, *heading)
        for line in lines:
            table.add_row(*line)
        width = 2 + sum(3 + max(map(len, column)) for column in zip(heading, *lines, strict=True))
        Console(width=width, highlight=False).print(table)
    for note in notes(result):
        print(note)


def draw_result(result: Figures, path: Path) -> None:
    """Write a PNG: samples/s with their range and the limit, memory a rank, and of a race the way to the accuracy."""
    panels = [
        _draw_speed,
        _draw_memory,
        *([_draw_race] if result.get("race") else []),
        *([_draw_sweep] if result.get("sweep") else []),
    ]

    def paint(figure: Any) -> None:
        for panel, ax in zip(panels, figure.subplots(1, len(panels)), strict=True):
            panel(ax, result)
            ax.tick_params(labelsize=7)

    save(draw(4.4 * len(panels), 4.4, paint), path)


def _draw_speed(ax: Any, result: Figures) -> None:
    entries = list(reversed(result["entries"]))
    speeds = [entry["samples_per_second"] for entry in entries]
    ranges = [[abs(speed[end] - speed["median"]) for speed in speeds] for end in ("least", "most")]
    names, medians = [entry["name"] for entry in entries], [speed["median"] for speed in speeds]
    ax.barh(names, medians, xerr=ranges, color=_colours(entries), error_kw={"linewidth": 1, "capsize": 2})
    if result["ranks"] > 1:
        limit = f"limit of {result['ranks']} processes"
        ax.axvline(result["limit"]["median"], color=COLOURS[1], linestyle="--", linewidth=1, label=limit)
        ax.legend(fontsize=7, loc="lower right")
    ax.set_xlabel("samples per second")


def _draw_memory(ax: Any, result: Figures) -> None:
    entries = list(reversed(result["entries"]))
    ax.barh([entry["name"] for entry in entries], [entry["memory"] / 1e6 for entry in entries], color=_colours(entries))
    ax.set_yticklabels([])
    ax.set_xlabel("tensors alive on a rank, MB")


def _draw_race(ax: Any, result: Figures) -> None:
    race = result["race"]
    for (name, course), colour in zip(race["courses"].items(), COLOURS * len(race["courses"]), strict=False):
        _, seconds, accuracies = zip(*course, strict=True)
        style = {"linestyle": "-" if "NoProp" in name else "--", "color": colour, "linewidth": 1.5, "label": name}
        ax.plot(seconds, [100 * accuracy for accuracy in accuracies], **style)
    ax.set_xlabel(f"seconds of training, {race['data']}")
    ax.set_ylabel("test accuracy, %")
    ax.legend(fontsize=6, loc="lower right")


def _draw_sweep(ax: Any, result: Figures) -> None:
    speeds: dict[str, list[tuple[str, float]]] = {}
    for cell in result["sweep"]:
        for entry in cell["entries"]:
            speeds.setdefault(entry["name"], []).append((cell["cell"], entry["samples_per_second"]["median"]))
    for (name, points), colour in zip(speeds.items(), COLOURS * len(speeds), strict=False):
        ax.plot(*zip(*points, strict=True), "o-", color=colour, markersize=3, linewidth=1, label=name)
    ax.set_yscale("log")
    ax.tick_params(axis="x", rotation=60)
    ax.set_ylabel("samples per second")
    ax.legend(fontsize=6)


def _colours(entries: Sequence[Figures]) -> list[str]:
    return [COLOURS[0] if "NoProp" in entry["name"] else COLOURS[4] for entry in entries]


def _range(figure: Mapping[str, float], form: str) -> str:
    return f"{figure['median']:{form}} ({figure['least']:{form}}-{figure['most']:{form}})"


def _table(lines: Sequence[Sequence[str]]) -> str:
    heading, *rest = lines
    rule = ["---", *["---:"] * (len(heading) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (heading, rule, *rest))
