"""Write a model as one graph that runs without this program, and compare the formats.

    python -m noprop_dist.export MODEL --to onnx|torch-export [--int8] [--out FILE_OR_FOLDER] [--inference.steps 20]
    python -m noprop_dist.export MODEL --compare

MODEL is a run's, a model's or a checkpoint's folder, or a model that comes with the program: digits, mnist. The graph takes
uint8 pixels (B, C, H, W) of any number B of images, normalises them itself and gives log-probabilities (B, m): what
NoPropModel's forward gives on the mean path, in float32. Before it is written it is compared with PyTorch, on 1,000 of the
model's own pictures where its data are at hand (--data.root or NOPROP_DATA), else on random pixels. --int8 needs training
pictures. A solver's steps are unrolled: 50 of them take about a minute to export.
--compare writes nothing: it measures every format's size, accuracy and speed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from noprop_dist import command, files
from noprop_dist.cards import read_card
from noprop_dist.config import Card, UserError
from noprop_dist.data import DataSet
from noprop_dist.exporting import (
    INPUT,
    Run,
    check_extra,
    data_at_hand,
    difference,
    exportable,
    latencies,
    open_onnx,
    open_torch,
    to_int8,
    to_onnx,
    to_torch,
    trace,
)
from noprop_dist.model import NoPropModel
from noprop_dist.report.console import make_table, size
from noprop_dist.runs import differences
from noprop_dist.trained import Trained, find

PYTORCH, ONNX, INT8, TORCH = "PyTorch", "ONNX", "ONNX int8", "torch.export"
SUFFIXES = {ONNX: ".onnx", INT8: "-int8.onnx", TORCH: ".pt2"}
PICTURES, TOLERANCE = 1000, 1e-4
CALIBRATION = 500
"""Training pictures that say in which ranges int8's numbers lie."""


def main(argv: list[str]) -> None:
    """Export, check, write, and show the table."""
    trained, card, arguments = _read(argv)
    model, chosen = trained.model, INT8 if arguments.int8 else ONNX if arguments.to == "onnx" else TORCH
    place = None if arguments.compare else _place(arguments.out, trained, SUFFIXES[chosen])
    reduced = model.card.train.precision != card.train.precision
    model.card = card
    torch.set_num_threads(1)
    data = data_at_hand(model, arguments.root)
    if data is None and arguments.int8:
        raise UserError("--int8: training pictures are needed to find the numbers' ranges; say where they lie with --data.root")
    formats = {PYTORCH, *((SUFFIXES if data else (ONNX, TORCH)) if arguments.compare else (chosen,))}
    blobs = _make(model, data, formats)
    runs: dict[str, Run] = {PYTORCH: model}
    runs |= {name: open_torch(blob) if name == TORCH else open_onnx(blob) for name, blob in blobs.items() if name != PYTORCH}
    images, origin = _pictures(model, data)
    found = {name: _answers(run, images) for name, run in runs.items()}
    for name in formats - {PYTORCH, INT8}:
        if not (off := difference(found[name], found[PYTORCH])) <= TOLERANCE:
            raise UserError(
                f"{name}: differs from PyTorch by {off:.2g} on {origin}, more than {TOLERANCE}; nothing was written"
            )
    if place:
        files.write(place, blobs[chosen])
    _show(model, data, runs, blobs, found, origin)
    if reduced:
        print("Trained in bf16; exported, and compared, in float32.")
    if place:
        _explain(place, model)


def _read(argv: list[str]) -> tuple[Trained, Card, argparse.Namespace]:
    """What is to be exported, its card, and the arguments; ``root``: where the data lie, if it was said."""
    parser = command.Parser("-m noprop_dist.export", __doc__)
    parser.add_argument("model", help="a run's, a model's or a checkpoint's folder, or a model's name")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--to", choices=("onnx", "torch-export"), help="the format to write")
    what.add_argument("--compare", action="store_true", help="measure every format, write none")
    parser.add_argument("--int8", action="store_true", help="onnx: weights and activations in 8 bits")
    parser.add_argument("--out", type=Path, help="the file, or a folder for it (default: here, under the model's name)")
    models: list[Trained] = []

    def own_card(arguments: argparse.Namespace) -> Card:
        models.append(find(arguments.model))
        return models[0].model.card

    card, arguments = read_card(parser, argv, base=own_card)
    own = models[0].model.card
    if changed := differences(own.model_dump(mode="json"), card.model_dump(mode="json"), {"inference", "data.root"}):
        raise UserError(f"command line: this model cannot be exported with {'; '.join(changed)}; leave those out")
    if card.inference.samples != own.inference.samples:
        raise UserError("inference.samples: only stochastic chains have samples, and the mean path is exported; leave it out")
    if arguments.compare and (arguments.int8 or arguments.out):
        raise UserError("--compare measures every format and writes none; leave --int8 and --out out, or say --to onnx")
    if arguments.int8 and arguments.to != "onnx":
        raise UserError("--int8: torch.export has it only through torchao, which its readers would need, slower than float32 "
                        "unless compiled; use --to onnx --int8")  # fmt: skip
    if arguments.to != "torch-export":
        check_extra()
    arguments.root = card.data.root if card.data.root != own.data.root else None
    return models[0], exportable(card), arguments


def _place(out: Path | None, trained: Trained, suffix: str) -> Path:
    """The file to write. Raises UserError where it cannot be one."""
    home = trained.run.path if trained.run else trained.place
    name = f"{home.resolve().name}{suffix}"
    if out is None or out.is_dir() or not out.suffix:
        out = (out or Path()) / name
    kind = Path(name).suffix
    if out.suffix != kind:
        raise UserError(f"--out: {out} does not end in {kind}; name such a file, or a folder")
    files.check_ways(reversed(out.parents), (out,), "choose another --out")
    return out


def _make(model: NoPropModel, data: DataSet | None, formats: set[str]) -> dict[str, bytes]:
    """Each format's bytes, PyTorch's as it is saved."""
    program = trace(model)
    blobs = {PYTORCH: files.pack(model.state_dict())}
    if formats & {ONNX, INT8}:
        blobs[ONNX] = to_onnx(program, model)
    if INT8 in formats and data:
        rows = torch.linspace(0, len(data.train) - 1, min(CALIBRATION, len(data.train))).long()
        blobs[INT8] = to_int8(blobs[ONNX], next(iter(data.train.batches([rows])))[0])
    if TORCH in formats:
        blobs[TORCH] = to_torch(program, model)
    return {name: blob for name, blob in blobs.items() if name in formats}


def _pictures(model: NoPropModel, data: DataSet | None) -> tuple[Tensor, str]:
    """What to compare on, uint8 (N, C, H, W): test pictures, filled up with training ones; and what they are, in words."""
    if data is None:
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(256, (PICTURES, *model.info.shape), dtype=torch.uint8, generator=generator)
        return images, f"{PICTURES:,} pictures of random pixels"
    tests = min(PICTURES, len(data.test))
    more = min(PICTURES - tests, len(data.train))
    halves = ((data.test, tests), (data.train, more))
    parts = [images for half, count in halves for images, _ in half.batches(torch.split(torch.arange(count), 100)) if count]
    return torch.cat(parts), f"{tests:,} test pictures" + (f" and {more:,} training pictures" if more else "")


@torch.no_grad()
def _answers(run: Run, images: Tensor) -> Tensor:
    return torch.cat([run(some) for some in torch.split(images, 100)])


@torch.no_grad()
def _accuracy(run: Run, data: DataSet, batch: int) -> float:
    rows = torch.split(torch.arange(len(data.test)), batch)
    return sum(int((run(images).argmax(dim=1) == labels).sum()) for images, labels in data.test.batches(rows)) / len(data.test)


def _show(
    model: NoPropModel,
    data: DataSet | None,
    runs: dict[str, Run],
    blobs: dict[str, bytes],
    found: dict[str, Tensor],
    origin: str,
) -> None:
    times = latencies(runs, [torch.zeros(count, *model.info.shape, dtype=torch.uint8) for count in (1, 100)])
    columns = ("size", "accuracy", "off by at most", "same class", "ms, 1 image", "ms, 100 images")
    table = make_table("", "format", *columns)
    for name, run in runs.items():
        accuracy = f"{_accuracy(run, data, model.card.inference.batch_size):.2%}" if data else "-"
        off = difference(found[name], found[PYTORCH])
        same = (found[name].argmax(dim=1) == found[PYTORCH].argmax(dim=1)).float().mean()
        spans = (f"{1000 * median:.3g} ({1000 * low:.3g}–{1000 * high:.3g})" for low, median, high in times[name])
        table.add_row(name, size(len(blobs[name])), accuracy, f"{off:.1e}", f"{same:.2%}", *spans)
    console = Console(highlight=False, soft_wrap=True, width=120)
    console.print(table)
    tested = (
        f"Accuracy: of all {len(data.test):,} test pictures. " if data else "No accuracy: the model's data are not at hand. "
    )
    console.print(f"{tested}Compared with PyTorch on {origin}.")
    console.print("Milliseconds: median (quartiles), one CPU thread, formats in turn. PyTorch walks stochastic chains besides.")


def _explain(place: Path, model: NoPropModel) -> None:
    shape = ", ".join(map(str, model.info.shape))
    if place.suffix == ".onnx":
        lines = (
            "import json, numpy, onnxruntime",
            f'session = onnxruntime.InferenceSession("{place}")',
            'classes = json.loads(session.get_modelmeta().custom_metadata_map["classes"])',
            f"images = numpy.zeros((5, {shape}), numpy.uint8)  # yours",
            f'[log_probabilities] = session.run(None, {{"{INPUT}": images}})',
            "print([classes[index] for index in log_probabilities.argmax(1)])",
        )
    else:
        lines = (
            "import json, torch",
            'facts = {"noprop.json": ""}',
            f'network = torch.export.load("{place}", extra_files=facts).module()',
            'classes = json.loads(facts["noprop.json"])["classes"]',
            f"images = torch.zeros(5, {shape}, dtype=torch.uint8)  # yours",
            "print([classes[index] for index in network(images).argmax(1)])",
        )
    print(f"\n{place}\n", *(f"    {line}" for line in lines), sep="\n")


if __name__ == "__main__":
    command.run(main)
