"""Predict samples/s, traffic, memory and idle time on ranks that are not at hand, from a block's step on this device.

    python -m noprop_dist.plan [CARD] [--ranks 1,2,4,8] [--bandwidth 1Gbit] [--latency 0.5ms] [--speeds 1,1,0.5]

--check measures 2 ranks of this machine too, and prints how far off the prediction for them is.
"""

from __future__ import annotations

import argparse
import re
import statistics
import tempfile
from functools import partial
from pathlib import Path

from rich.console import Console

from noprop_dist import command
from noprop_dist.benchmark.calibration import calibrate, task_of
from noprop_dist.benchmark.contest import Plan, change, contest, endless, synthetic
from noprop_dist.cards import read_card
from noprop_dist.config import LOCAL_METHODS, Card, UserError
from noprop_dist.planning import METHODS, Calibration, Network, Task, crossover, predict
from noprop_dist.report.console import make_table, size

SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9}
CHECKED, ROUNDS = 2, 3  # ranks and rounds of a check
DEFAULT = Card.model_validate({"data": {"name": "mnist"}, "model": {"blocks": 8}, "parallel": {"threads": 1}})


def main(argv: list[str]) -> None:
    """Calibrate on this device, and print what the model makes of it."""
    parser = command.Parser("-m noprop_dist.plan", __doc__)
    several = "numbers of ranks (default: 1,2,4,8, as far as there are blocks)"
    link = "of a rank's link: 100Mbit, 1Gbit, 2GB, a second (default: 1Gbit)"
    kinds = "of the ranks, this device's being 1; those not named are like the last (default: 1)"
    parser.add_argument("card", nargs="?", type=Path, help="a YAML card (default: 8 of the paper's DT blocks, MNIST's shape)")
    parser.add_argument("--ranks", type=_ranks, help=several)
    parser.add_argument("--bandwidth", type=command.bandwidth, default=1.25e8, help=link)
    parser.add_argument("--latency", type=_latency, default=5e-4, help="of a message: 0.5ms, 20us (default: 0.5ms)")
    parser.add_argument("--speeds", type=_speeds, default=[], help=kinds)
    parser.add_argument("--check", action="store_true", help=f"measure {CHECKED} ranks of this machine, and compare")
    card, arguments = read_card(parser, argv, base=lambda arguments: arguments.card or DEFAULT)
    ranks = arguments.ranks or [number for number in (1, 2, 4, 8) if number <= card.model.blocks]
    check(card, ranks + [CHECKED] * arguments.check)
    with tempfile.TemporaryDirectory() as folder:
        pixels = endless(synthetic(card, None, Path(folder)))
        task, times = task_of(pixels), calibrate(pixels, 1, Path(folder) / "log")
        _tell(card, task, times, ranks, arguments)
        if arguments.check:
            _check(pixels, task, Path(folder))


def check(card: Card, ranks: list[int]) -> None:
    """Raise UserError for what cannot be planned."""
    if card.method.name not in LOCAL_METHODS:
        raise UserError(f"method.name: {card.method.name} runs on one rank, there is nothing to plan; give dt, ct or fm")
    if card.model.embedding != "one-hot":
        raise UserError(f"model.embedding: the model knows one-hot embeddings, not {card.model.embedding}; leave it out")
    if too_many := [number for number in ranks if number > card.model.blocks]:
        raise UserError(f"--ranks: {too_many[0]} for {card.model.blocks} blocks; leave it out, or raise --model.blocks")


def _tell(card: Card, task: Task, times: Calibration, several: list[int], arguments: argparse.Namespace) -> None:
    network = Network(arguments.bandwidth, arguments.latency)
    table = make_table("plan", "ranks, method", "samples/s", "bytes a step", "memory a rank", "idle", "slower below")
    for ranks in several:
        speeds = (arguments.speeds + [arguments.speeds[-1] if arguments.speeds else 1.0] * ranks)[:ranks]

        def speed(method: str, bandwidth: float, ranks: int = ranks, speeds: list[float] = speeds) -> float:
            return predict(method, task, times, ranks, Network(bandwidth, network.latency), speeds).samples_per_second

        for method in METHODS:
            found = predict(method, task, times, ranks, network, speeds)
            row = [f"{found.samples_per_second:,.0f}", size(found.sent), size(found.memory), f"{found.idle:.0%}"]
            rival = method != METHODS[0] and ranks > 1
            below = _words(crossover(partial(speed, METHODS[0]), partial(speed, method))) if rival else ""
            table.add_row(f"{ranks}, {method}", *row, below)
    console = Console(width=120, highlight=False)
    console.print(table)
    block, chain, optimizer = (f"{1000 * each:.1f} ms" for each in (times.block, times.chain[task.batch], times.optimizer))
    for line in (
        f"{card.model.blocks} blocks of {task.cost.parameters:,} parameters, batch {task.batch}. Here a NoProp block's step",
        f"takes {block}, one of the chain {chain} and its optimizer {optimizer}.",
        f"Links of {8 * network.bandwidth / 1e6:,.0f} Mbit/s and {1000 * network.latency:g} ms. Last column: the bandwidth",
        "under which that method is slower than layer-parallel NoProp.",
    ):
        console.print(line)


def _words(bandwidth: float | None) -> str:
    if bandwidth is None:
        return "any bandwidth"
    return f"{8 * bandwidth / 1e6:,.3g} Mbit/s" if bandwidth else "no bandwidth"


def _check(pixels: Card, task: Task, folder: Path) -> None:
    """Ranks of one machine share its caches and memory: blocks are timed in all of them at once, and anew for each round."""
    pixels = change(pixels, parallel={"threads": pixels.parallel.threads or 1})
    rounds: list[dict[str, tuple[float, float]]] = []
    for _ in range(ROUNDS):
        times = calibrate(pixels, CHECKED, folder / "log")
        found = contest(Plan(pixels, CHECKED, 1, 4.0, METHODS), folder / "logs", print)["rounds"][0]
        predicted = (predict(method, task, times, CHECKED, Network(1e15, 0.0), [1.0] * CHECKED) for method in METHODS)
        pairs = ((method, found[method]["samples_per_second"]) for method in METHODS)
        rounds.append(
            {method: (each.samples_per_second, speed) for each, (method, speed) in zip(predicted, pairs, strict=True)}
        )
    table = make_table(f"{CHECKED} ranks of this machine, samples/s", "method", "predicted", "measured", "off by (median)")
    for method in METHODS:
        ours, theirs = (", ".join(f"{each[method][place]:,.0f}" for each in rounds) for place in (0, 1))
        error = statistics.median(each[method][0] / each[method][1] - 1 for each in rounds)
        table.add_row(method, ours, theirs, f"{error:+.1%}")
    Console(width=120, highlight=False).print(table)


def _numbers(text: str, kind: type[int] | type[float]) -> list[float]:
    try:
        found = [kind(word) for word in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of positive numbers such as 1,2,4")
    return found


def _ranks(text: str) -> list[float]:
    return _numbers(text, int)


def _speeds(text: str) -> list[float]:
    return _numbers(text, float)


def _latency(text: str) -> float:
    """Seconds."""
    if not (found := re.fullmatch(r"([0-9.]+) ?(s|ms|us|µs|ns)", text)):
        raise argparse.ArgumentTypeError(f"{text!r} is no time such as 0.5ms or 20us")
    return float(found[1]) * SECONDS[found[2]]


if __name__ == "__main__":
    command.run(main)
