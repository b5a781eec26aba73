"""The model card: what a model's README.md says of it, with the front matter that the Hugging Face hub reads."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from noprop_dist import files
from noprop_dist.cards import chosen
from noprop_dist.chain import PATHS
from noprop_dist.config import LOCAL_METHODS, Card
from noprop_dist.data import DataInfo
from noprop_dist.hub import CONFIG

METHODS = {
    "dt": "NoProp-DT",
    "ct": "NoProp-CT",
    "fm": "NoProp-FM",
    "backprop": "backpropagation through NoProp's blocks",
    "cnn": "a plain convolutional network",
    "adjoint": "a neural ODE",
    "liquid": "a liquid network",
}
DATA = {  # names, and the hub's ids where it has them
    "digits": ("scikit-learn's digits", None),
    "mnist": ("MNIST", "ylecun/mnist"),
    "fashion-mnist": ("Fashion-MNIST", "zalando-datasets/fashion_mnist"),
    "kmnist": ("KMNIST", None),
    "cifar10": ("CIFAR-10", "uoft-cs/cifar10"),
    "cifar100": ("CIFAR-100", "uoft-cs/cifar100"),
    "svhn": ("SVHN", "ufldl-stanford/svhn"),
}
OWN = ("pictures of one's own", None)
MEANING = {
    "mean": "z_0 = 0, no noise",
    "stochastic": "the paper's chain, from noise and with noise",
    "average": "mean of all blocks' û along stochastic chains",
}
LISTED = 100
"""Classes that a card lists, at most."""
SEAL = re.compile(r"<!-- made by noprop_dist; changed by hand, it is kept as it is: ([0-9a-f]{16}) -->\n\Z")


def describe(card: Card, info: DataInfo, parameters: int, summary: Mapping[str, Any] | None = None) -> str:
    """The text of a model's README.md, sealed.

    ``parameters``: how many the model has. ``summary``: what its run's summary.json holds; without one, or where that lacks
    something, the text says only what is known.
    """
    known = summary or {}
    matter = yaml.safe_dump(_metadata(card, info, known), sort_keys=False, allow_unicode=True, width=100)
    parts = [
        f"---\n{matter}# license: yours to choose, e.g. mit\n---",
        *_head(card, info),
        *_use(card, info),
        *(_accuracy(card, info, known) if known.get("accuracy") else ()),
        *_making(card, info, parameters, known),
        *_limits(card, info, known),
    ]
    return _seal("\n\n".join(parts) + "\n\n")


def write(path: Path, text: str) -> bool:
    """Write a model card, unless one is there that was changed by hand, or is another's: then False.

    Raises UserError on a disk's refusal.
    """
    if path.exists() and not _is_sealed(files.read(path)):
        return False
    files.write(path, text.encode())
    return True


def _seal(text: str) -> str:
    return f"{text}<!-- made by noprop_dist; changed by hand, it is kept as it is: {_sum(text.encode())} -->\n"


def _is_sealed(blob: bytes) -> bool:
    text = blob.decode(errors="replace")
    seal = SEAL.search(text)
    return seal is not None and seal[1] == _sum(text[: seal.start()].encode())


def _sum(blob: bytes) -> str:
    return hashlib.sha256(blob).hexdigest()[:16]


def _metadata(card: Card, info: DataInfo, summary: Mapping[str, Any]) -> dict[str, Any]:
    """What the hub reads: https://github.com/huggingface/hub-docs/blob/main/modelcard.md."""
    name, known_as = DATA.get(info.name, OWN)
    method = card.method.name
    values: dict[str, Any] = {
        "library_name": "noprop_dist",
        "pipeline_tag": "image-classification",
        "tags": ["noprop", f"noprop-{method}"] if method in LOCAL_METHODS else [method],
    }
    if known_as:
        values["datasets"] = [known_as]
    if summary.get("accuracy"):
        metrics = [
            {"type": "accuracy", "value": round(value, 6), "name": f"Accuracy, {path} path"}
            for path, value in summary["accuracy"].items()
        ]
        result = {
            "task": {"type": "image-classification"},
            "dataset": {"type": known_as or info.name, "name": name, "split": "test"},
            "metrics": metrics,
        }
        values |= {"metrics": ["accuracy"], "model-index": [{"name": f"{method}-{info.name}", "results": [result]}]}
    return values


def _head(card: Card, info: DataInfo) -> Iterator[str]:
    blocks = f", {card.units} block{'s' * (card.units > 1)}" if card.method.name in LOCAL_METHODS else ""
    method = METHODS[card.method.name]
    yield f"# {method[0].upper()}{method[1:]}{blocks}, on {_data(info)}"
    names = [f"`{name}`" for name in map(_plain, info.classes[:LISTED])]
    more = f" and {len(info.classes) - LISTED} more, see {CONFIG}" * (len(info.classes) > LISTED)
    yield f"Names what is in {_images(info)}, one of {len(info.classes)} classes: {', '.join(names)}{more}."
    if blocks:
        yield (
            "[NoProp](https://arxiv.org/abs/2503.24322) trains every block alone, to tell the clean label from the image and a "
            "noised label: no activation and no gradient passes between blocks. One after another they turn noise into a label."
        )


def _use(card: Card, info: DataInfo) -> Iterator[str]:
    channels, height, width = info.shape
    yield "## Use"
    yield "With `noprop_dist` installed; FOLDER is this folder, or its `owner/name` on the hub:"
    yield "```sh\npython -m noprop_dist.predict FOLDER picture.png\n```"
    yield f"""```python
from noprop_dist import NoPropModel

model = NoPropModel.from_pretrained("FOLDER")
classes = model.predict(images)  # uint8 (B, {channels}, {height}, {width}) -> int64 (B,)
names = [model.info.classes[index] for index in classes]
```"""
    if ":" in card.model.backbone:
        yield f"Its image path is its maker's own class `{_plain(card.model.backbone)}`, which must be there too."
    yield (
        "Meant for pictures such as it was trained on, and for looking at how NoProp learns. For anything that matters, "
        "measure it on your own pictures first."
    )


def _accuracy(card: Card, info: DataInfo, summary: Mapping[str, Any]) -> Iterator[str]:
    accuracy = summary["accuracy"]
    yield "## Accuracy"
    yield (
        f"On the {info.test_size:,} test images, after the last step: no step was picked by its accuracy. "
        f"One run, seed {card.run.seed}; another seed's may differ."
    )
    rows = [
        f"| {path}{' (the default)' * (path == card.inference.path)} | {MEANING[path]} | {100 * accuracy[path]:.2f} |"
        for path in PATHS
        if path in accuracy
    ]
    yield "\n".join(["| path from noise to label | | test accuracy, % |", "|---|---|---:|", *rows])
    own = [block.get("accuracy") for block in summary.get("blocks", [])]
    if own and None not in own:
        yield f"Each block's own estimate û, first to last: {', '.join(f'{100 * share:.2f}' for share in own)} %."
    if "train_accuracy" in summary:
        share = f"{100 * summary['train_accuracy']:.2f} %"
        yield f"On training images (the first 10,000, if there are more), {summary.get('path')} path: {share}."


def _making(card: Card, info: DataInfo, parameters: int, summary: Mapping[str, Any]) -> Iterator[str]:
    yield "## How it was made"
    facts = [f"{info.train_size:,} training images", f"{parameters:,} parameters"]
    if "steps" in summary:
        epochs = summary["steps"] * card.data.batch_size / info.train_size
        facts.append(f"{summary['steps']:,} steps of {card.data.batch_size} images ({epochs:.4g} epochs)")
    facts += [card.train.precision, f"seed {card.run.seed}"]
    ranks = summary.get("ranks")
    if ranks:
        facts.append("a fleet of workers" if summary.get("fleet") else f"{ranks} rank{'s' * (ranks > 1)}")
    if "torch" in summary:
        facts.append(f"torch {summary['torch']}")
    yield f"{', '.join(facts)}. Settings, but for those left as they are by default (config.json has all), as `card.yaml`:"
    yield f"```yaml\n{yaml.safe_dump(chosen(card), sort_keys=False, allow_unicode=True)}```"
    yield f"```sh\ntorchrun --nproc_per_node={ranks or 1} -m noprop_dist.train card.yaml --parallel.threads 1\n```"
    if card.method.name in LOCAL_METHODS:
        yield "Any number of ranks gives the same weights, bit for bit, on CPUs of one kind with one thread a rank."


def _limits(card: Card, info: DataInfo, summary: Mapping[str, Any]) -> Iterator[str]:
    lines = [
        "It knows its classes and no other: a picture of anything else gets one of them too, maybe with high confidence.",
        "It has seen these training images alone. On pictures taken, drawn or cut in another way expect less than above.",
        "Nobody has checked whether its confidences are right as probabilities.",
    ]
    if count := card.debug.overfit_batches:
        lines.append(f"Trained on the first {count} batches again and again, to debug: of no use for other pictures.")
    if given_up := [block["index"] for block in summary.get("blocks", []) if block.get("given_up")]:
        lines.append(f"Training of blocks {', '.join(map(str, given_up))} ended early: their losses were no longer finite.")
    yield "## Limits"
    yield "\n".join(f"- {line}" for line in lines)


def _data(info: DataInfo) -> str:
    return DATA.get(info.name, OWN)[0]


def _images(info: DataInfo) -> str:
    channels, height, width = info.shape
    kind = {1: "grey ", 3: "colour "}.get(channels, f"{channels}-channel ")
    return f"{kind}pictures of {height}×{width} pixels"


def _plain(text: str) -> str:
    """A name from someone's disk, such that it cannot end its own code span, its line or its paragraph."""
    return " ".join(text.split()).replace("`", "'")
