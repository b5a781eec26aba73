"""Measure layer-parallel NoProp beside back-propagation through the same blocks, on this machine.

    python -m noprop_dist.bench [CARD] [--ranks 2] [--rounds 5] [--out DIR] [--section.name value]...

It starts its own ranks and needs no data: speed is measured on random pixels; the race to an accuracy is run on the card's data
where --data.root or NOPROP_DATA says where they lie, else on scikit-learn's digits.
Leaves DIR/{bench.json, bench.md, bench.png, logs/}.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

from noprop_dist import command
from noprop_dist.benchmark.contest import OURS, Plan, change, contenders, contest, endless, microbatches, race, synthetic
from noprop_dist.cards import read_card
from noprop_dist.config import Card, UserError
from noprop_dist.data import open_data
from noprop_dist.files import check_ways, write
from noprop_dist.report.scoreboard import draw_result, markdown, show

FILES = ("bench.json", "bench.md", "bench.png")
IN_SWEEPS = ("NoProp, 1 rank", OURS, "backprop, 1 rank", "DDP backprop", "1F1B backprop")


def main(argv: list[str]) -> None:
    """Check card and arguments, measure, and write what came of it."""
    card, arguments = _read(argv)
    out: Path = arguments.out
    check_ways((out, out / "logs", out / "data"), (out / name for name in FILES), "choose another --out")
    cells = [(*_read([*argv, f"--{name}", value]), f"{name} {value}") for name, values in arguments.sweep for value in values]
    for each, its, _ in [(card, arguments, ""), *cells]:
        _check(each, its)
    known = contenders(card, arguments.ranks)
    if unknown := [name for name in arguments.only or () if name not in known]:
        raise UserError(f"--only: no contender {unknown[0]!r}; there are: {'; '.join(known)}")
    racing = _at_hand(card)
    if arguments.target:
        open_data(racing.data)  # its mistakes are told now, not after all rounds

    def say(line: str) -> None:
        print(line, flush=True)

    def measured(card: Card, its: argparse.Namespace, only: Any) -> dict[str, Any]:
        pixels = endless(synthetic(card, its.image_size, out / "data"))
        return contest(Plan(pixels, its.ranks, its.rounds, its.seconds, only, its.link), out / "logs", say)

    def keep() -> None:
        """What there is so far."""
        write(out / "bench.json", json.dumps(result, indent=1).encode())
        write(out / "bench.md", markdown(result).encode())
        draw_result(result, out / "bench.png")

    result = measured(card, arguments, arguments.only) | {"machine": _machine(card)}
    keep()
    if arguments.target:
        result["race"] = race(endless(racing), arguments.ranks, arguments.target, arguments.only, out / "logs", say)
        keep()
    for each, its, name in cells:
        say(f"sweep: {name}")
        result.setdefault("sweep", []).append({"cell": name, **measured(each, its, its.only or IN_SWEEPS)})
        keep()
    show(result)
    for name in FILES:
        print(out / name)


def _machine(card: Card) -> dict[str, str]:
    """What the figures are of."""
    gpu = torch.cuda.is_available() and card.parallel.device != "cpu"
    return {
        "processor": _processor(),
        "device": torch.cuda.get_device_name() if gpu else "",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
    }


def _read(argv: list[str]) -> tuple[Card, argparse.Namespace]:
    parser = command.Parser("-m noprop_dist.bench", __doc__)
    parser.add_argument(
        "card", nargs="?", type=Path, help="a YAML card (default: NoProp-DT, 8 of the paper's blocks, MNIST's shape)"
    )
    parser.add_argument("--ranks", type=int, default=2, help="ranks of those that use several (default: 2)")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds (default: 5)")
    parser.add_argument("--seconds", type=float, default=5.0, help="of measuring a contender in a round, about (default: 5)")
    parser.add_argument("--image-size", type=int, help="pixels a side of the random images (default: those of the card's data)")
    cable = "of a rank's link, for those on several: 100Mbit, say; takes Linux and root (default: the loopback's)"
    parser.add_argument("--link", type=command.bandwidth, help=cable)
    parser.add_argument("--target", type=float, default=0.95, help="test accuracy of the race; 0: no race (default: 0.95)")
    parser.add_argument("--only", type=_names, help="contenders, by name, separated by semicolons (default: all)")
    more = "measure also with these values of a setting, of ranks, image-size or link; can be repeated"
    parser.add_argument("--sweep", type=_values, action="append", default=[], metavar="NAME=V1,V2,…", help=more)
    parser.add_argument("--out", type=Path, default=Path("bench"), help="folder for what it leaves (default: bench)")
    return read_card(parser, argv, base=lambda arguments: arguments.card or DEFAULT)


DEFAULT = Card.model_validate({"data": {"name": "mnist"}, "model": {"blocks": 8}, "parallel": {"threads": 1}})


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(";")]


def _values(text: str) -> tuple[str, list[str]]:
    name, _, values = text.partition("=")
    if not (name and values):
        raise argparse.ArgumentTypeError(f"{text!r} is no NAME=V1,V2,…")
    return name, values.split(",")


def _check(card: Card, arguments: argparse.Namespace) -> None:
    """Raise UserError for what the benchmark cannot do."""
    if card.method.name not in ("dt", "ct", "fm"):
        raise UserError(f"method.name: {card.method.name} is what bench compares with; give dt, ct or fm")
    if card.model.embedding != "one-hot":
        raise UserError(
            f"model.embedding: bench measures one-hot, for a pipeline cannot share {card.model.embedding} ones; leave it out"
        )
    for name in ("ranks", "rounds", "seconds"):
        if getattr(arguments, name) <= 0:
            raise UserError(f"--{name}: {getattr(arguments, name)} is nothing to measure; give a positive number")
    if not 0 <= arguments.target < 1:
        raise UserError(f"--target: {arguments.target} is no accuracy below 1; give 0.95, say, or 0 for no race")
    if arguments.ranks > card.model.blocks:
        raise UserError(
            f"--ranks: {arguments.ranks} for {card.model.blocks} blocks; give at most so many, or raise --model.blocks"
        )
    if torch.cuda.device_count() < arguments.ranks > 1 and card.parallel.device != "cpu" and torch.cuda.is_available():
        raise UserError(f"--ranks: {arguments.ranks} for {torch.cuda.device_count()} GPUs, which the rivals cannot share; "
                        "give as many at most, or --parallel.device cpu")  # fmt: skip
    if card.data.batch_size < 8 or not microbatches(card.data.batch_size, arguments.ranks):
        why = f"{arguments.ranks} cannot share {card.data.batch_size} images a step"
        raise UserError(f"--ranks: {why}; take a larger --data.batch_size, a multiple of it")


def _at_hand(card: Card) -> Card:
    """The card, on digits where nobody has said where its own data lie: a benchmark fetches nothing unasked."""
    if card.data.root or os.environ.get("NOPROP_DATA"):
        return card
    return change(card, data={"name": "digits"}, model={"backbone": "auto"})


def _processor() -> str:
    """Its name, as Linux knows it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    command.run(main)
