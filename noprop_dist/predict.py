"""Name what is in pictures: any size and kind, files or folders of them.

    python -m noprop_dist.predict MODEL PICTURE... [--top 3] [--json] [--explain out.png]

MODEL is a run's or a model's folder, or a model that comes with the program: digits, mnist. Of a folder all pictures are taken,
those in folders within it too. A picture that cannot be read is told, the others go on; the exit code is then 1, or 2 if none
could be read.
Drawings, dark on white as on paper, are made like the data of MNIST and its kin; --as-is leaves that out.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from noprop_dist import command
from noprop_dist.config import UserError
from noprop_dist.data.picture import endings, read_picture
from noprop_dist.model import NoPropModel
from noprop_dist.report.denoising import denoising
from noprop_dist.report.drawing import save
from noprop_dist.trained import load, settle
from noprop_dist.viewing import IMAGES


def main(argv: list[str]) -> None:
    """Print each picture's classes."""
    parser = command.Parser("-m noprop_dist.predict", __doc__)
    parser.add_argument("model", help="a run's or a model's folder, or a model's name")
    parser.add_argument("pictures", nargs="+", type=Path, metavar="PICTURE", help="files, or folders of them")
    parser.add_argument("--top", type=command.positive, default=3, help="how many classes to print (default: 3)")
    parser.add_argument("--json", action="store_true", help="print one JSON list")
    parser.add_argument("--explain", type=picture_name, metavar="OUT", help="draw what every block believed (.png or .svg)")
    parser.add_argument("--as-is", action="store_true", help="take drawings as they are: not inverted, not centred")
    arguments = parser.parse_intermixed_args(argv)
    model = settle(load(arguments.model))
    paths = list(_files(arguments.pictures))
    found: list[dict[str, Any]] = []
    explained: list[Tensor] = []
    for some in _chunks(paths, model.card.inference.batch_size):
        images, answers = _read(some, model, as_is=arguments.as_is)
        explained += images[: IMAGES - len(explained)]
        if images:
            _name(model, torch.stack(images), [answer for answer in answers if "error" not in answer], arguments.top)
        found += answers
        if not arguments.json:
            _show(answers, max(len(str(path)) for path in paths))
    if arguments.json:
        print(json.dumps(found, indent=1))
    failed = sum("error" in answer for answer in found)
    if arguments.explain and explained:
        explain(model, torch.stack(explained), arguments.explain)
        more = f"; the first {IMAGES} pictures" if len(found) - failed > IMAGES else ""
        print(f"{arguments.explain}{more}", file=sys.stderr)
    if failed:
        raise SystemExit(1 if failed < len(found) else 2)


def explain(model: NoPropModel, images: Tensor, path: Path) -> None:
    """Draw what every block believed of uint8 images (N, C, H, W), on the mean path, which gives the answer.

    Raises UserError on a disk's refusal, and where there is nothing to draw.
    """
    course = model.course(images)
    if course is None:
        raise UserError(f"{path}: z is too large here to be kept at every step; leave --explain out")
    save(denoising(course, model.info.classes), path)


def picture_name(text: str) -> Path:
    """The path of a picture that can be drawn, for argparse."""
    path = Path(text)
    if path.suffix not in (".png", ".svg"):
        raise argparse.ArgumentTypeError(f"{text!r} does not end in .png or .svg")
    return path


def _files(paths: Sequence[Path]) -> Iterator[Path]:
    """The files, and the pictures of the folders; a folder without one as it is."""
    names = endings()
    for path in paths:
        found = path.rglob("[!.]*") if os.path.isdir(path) else ()  # not Path's own, which raises for an overlong name
        yield from sorted(file for file in found if file.suffix.lower() in names and file.is_file()) or [path]


def _chunks(paths: Sequence[Path], size: int) -> Iterator[Sequence[Path]]:
    for start in range(0, len(paths), size):
        yield paths[start : start + size]


def _read(paths: Sequence[Path], model: NoPropModel, *, as_is: bool) -> tuple[list[Tensor], list[dict[str, Any]]]:
    images, answers = list[Tensor](), list[dict[str, Any]]()
    for path in paths:
        answer: dict[str, Any] = {"file": str(path)}
        try:
            images.append(read_picture(path, model.info, as_is=as_is))
        except UserError as error:
            answer["error"] = str(error)
        answers.append(answer)
    return images, answers


def _name(model: NoPropModel, images: Tensor, answers: Sequence[dict[str, Any]], top: int) -> None:
    """Put the classes of uint8 images (N, C, H, W) into their answers."""
    best = model(images).exp().topk(min(top, len(model.info.classes)), dim=1)
    for answer, confidences, classes in zip(answers, best.values.tolist(), best.indices.tolist(), strict=True):
        names = [model.info.classes[index] for index in classes]
        ranked = [{"class": name, "confidence": round(share, 6)} for name, share in zip(names, confidences, strict=True)]
        answer |= {**ranked[0], "top": ranked}


def _show(answers: Sequence[dict[str, Any]], width: int) -> None:
    for answer in answers:
        if "error" in answer:
            sys.stdout.flush()
            print(f"error: {_plain(answer['error'])}", file=sys.stderr)
        else:
            ranked = "   ".join(f"{each['class']} {each['confidence']:6.2%}" for each in answer["top"])
            print(_plain(f"{answer['file']:<{width}}  {ranked}"))


def _plain(text: str) -> str:
    """One line, whatever a file's name holds: line breaks, a terminal's commands, bytes that are no UTF-8."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` is no mistake
    command.run(main)
