"""The run card: every setting with its type, unit, default and check.

One source for YAML files, the command line (``--section.name value``) and ``--help``: the docstring under a field is its
help text. How cards are read and written: cards.py.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class UserError(Exception):
    """A mistake in what the user gave (card, command line, data, files). Printed as it is, without a traceback."""


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class DataCard(Section):
    name: Literal["digits", "mnist", "fashion-mnist", "kmnist", "cifar10", "cifar100", "svhn", "imagefolder", "npz"] = "digits"
    """The data set. digits is bundled with scikit-learn; imagefolder and npz are your own pictures."""
    root: Path | None = None
    """Where the data lies: torchvision's root, the image folder, or the .npz file. Default: $NOPROP_DATA, else ./data."""
    batch_size: int = Field(128, gt=1)
    """Images per step (the same batch for every block)."""
    augment: Literal["auto", "none", "crop", "crop-flip"] = "auto"
    """Random crops and flips of training images; auto: crop-flip for CIFAR and image folders, crop for SVHN, else none."""
    image_size: int = Field(64, ge=8)
    """imagefolder: side in pixels to which pictures are resized and centre-cropped."""
    workers: int = Field(2, ge=0)
    """imagefolder: decoding processes on the coordinator."""


class MethodCard(Section):
    name: Literal["dt"] = "dt"
    """dt: NoProp-DT (discrete time; eqs 3-8, algorithm 1)."""
    eta: float = Field(0.1, gt=0)
    """η, the weight of the denoising loss (eq 8)."""
    schedule: Literal["cosine"] = "cosine"
    """Signal level over the blocks: ᾱ(s) = sin²(πs/2) at s = t/T, clipped to [alpha_min, alpha_max]."""
    alpha_min: float = Field(1e-3, ge=0, lt=1)
    """Lowest signal level ᾱ_0."""
    alpha_max: float = Field(0.99, gt=0, lt=1)
    """Highest signal level ᾱ_T; below 1, so that the last SNR difference stays finite."""
    loss_weight: Literal["snr", "uniform"] = "snr"
    """snr: each block's loss carries eq 8's factor (T/2)·η·(SNR(t)−SNR(t−1)). uniform: the factor 1. With fixed embeddings
    the minimum is the same; under AdamW so is every step (but for eps). Gradient clipping, SGD and Adam's decay feel it."""


class ModelCard(Section):
    blocks: int = Field(10, ge=1)
    """T, the number of denoising blocks."""
    backbone: Literal["auto", "paper-cnn", "small-cnn"] = "auto"
    """A block's image path; auto: paper-cnn (figure 5) from 14 pixels a side on, small-cnn below."""
    embedding: Literal["one-hot"] = "one-hot"
    """Class embeddings W."""
    head: Literal["linear"] = "linear"
    """p̂_out, from z_T to class logits."""
    dropout: float = Field(0.2, ge=0, le=0.99)
    """Dropout probability in the image path."""


class OptimCard(Section):
    name: Literal["adamw", "adam", "sgd"] = "adamw"
    """Optimizer; every block (and the head) has its own."""
    lr: float = Field(1e-3, gt=0)
    """Peak learning rate."""
    weight_decay: float = Field(1e-3, ge=0)
    """Weight decay (decoupled for adamw, L2 for adam and sgd)."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """sgd: Nesterov momentum."""
    schedule: Literal["constant", "cosine", "one-cycle"] = "constant"
    """Learning rate over the run. one-cycle rises for 30 % of the steps from lr/25, then falls to lr/10^4 by cosine."""
    warmup_steps: int = Field(0, ge=0)
    """constant and cosine: steps of linear warm-up from 0 to lr."""
    clip_norm: float = Field(0.0, ge=0)
    """Largest gradient norm of one block; 0: no clipping."""
    ema: float = Field(0.0, ge=0, lt=1)
    """Decay of an exponential moving average of each block's weights, used for inference; 0: off."""


class TrainCard(Section):
    epochs: int = Field(30, ge=1)
    """Passes over the training set."""
    steps: int | None = Field(None, ge=1)
    """Length in steps instead of epochs."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: autocast (weights and optimizer stay in fp32)."""
    channels_last: bool = True
    """Memory format of images and convolutions."""
    log_every: int = Field(50, ge=1)
    """Steps between scalars."""
    eval_every: int = Field(0, ge=0)
    """Steps between evaluations on the test set; 0: once an epoch. There is always one at the end."""
    checkpoint_every: int = Field(500, ge=0)
    """Steps between checkpoints; 0: only at the end."""
    keep_checkpoints: int = Field(2, ge=1)
    """How many of the newest checkpoints stay on disk."""
    resume: str = "auto"
    """auto: continue this run from its newest whole checkpoint; never: refuse an old run's folder; or a checkpoint's path."""


class ParallelCard(Section):
    feed: Literal["stream", "resident"] = "stream"
    """stream: the coordinator broadcasts every batch; resident: it broadcasts the data set once and ranks pick batches."""
    prefetch: int = Field(2, ge=0)
    """stream: batches sent ahead of need."""
    backend: Literal["auto", "gloo", "nccl"] = "auto"
    """Carrier of batches; auto: nccl where every local rank has a GPU of its own, else gloo."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where blocks train; auto: a GPU if there is one."""
    threads: int = Field(0, ge=0)
    """CPU threads a rank; 0: $OMP_NUM_THREADS, else cores / local ranks."""
    timeout: float = Field(600.0, gt=0)
    """Seconds that a rank waits for another before it gives up and names it."""


class InferenceCard(Section):
    path: Literal["mean", "stochastic", "average"] = "mean"
    """What the run's test_accuracy stands for. mean: z_0 = 0, no noise; stochastic: the paper's chain; average: mean of
    every block's û along stochastic chains. All three are always reported."""
    samples: int = Field(1, ge=1)
    """Stochastic chains averaged per image."""
    blocks: int | None = Field(None, ge=1)
    """Early exit: use only the first so many blocks."""
    batch_size: int = Field(500, ge=1)
    """Images per evaluation batch."""


class RunCard(Section):
    dir: Path = Path("runs")
    """Folder of all runs."""
    name: str | None = Field(None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Folder of this run inside dir; default: a time stamp. Give a name to be able to resume."""
    seed: int = Field(0, ge=0)
    """Seed of everything random."""


class DebugCard(Section):
    enabled: bool = False
    """``--debug`` for short: anomaly detection, deterministic algorithms, shapes and gradient norms logged."""
    overfit_batches: int = Field(0, ge=0)
    """Train on the first so many batches again and again; 0: on all."""


class Card(Section):
    """All settings of a run. ``Card()`` trains NoProp-DT with 10 blocks on scikit-learn's digits."""

    data: DataCard = DataCard()
    method: MethodCard = MethodCard()
    model: ModelCard = ModelCard()
    optim: OptimCard = OptimCard()
    train: TrainCard = TrainCard()
    parallel: ParallelCard = ParallelCard()
    inference: InferenceCard = InferenceCard()
    run: RunCard = RunCard()
    debug: DebugCard = DebugCard()

    @model_validator(mode="after")
    def _consistent(self) -> Card:
        blocks, low, high = self.model.blocks, self.method.alpha_min, self.method.alpha_max
        first, last = (math.sin(math.pi / 2 * s / blocks) ** 2 for s in (1, blocks - 1))
        flat = f"would flatten the schedule of {blocks} blocks"
        mistakes = [
            (low >= high, f"method.alpha_min: {low} is not below method.alpha_max {high}; lower it"),
            (blocks > 1 and first <= low < high, f"method.alpha_min: {low} {flat}; use less than {first:.2g}"),
            (blocks > 1 and low < high <= last, f"method.alpha_max: {high} {flat}; use more than {last:.6g}"),
            (
                (self.inference.blocks or 0) > blocks,
                f"inference.blocks: {self.inference.blocks} is more than model.blocks {blocks}; lower it",
            ),
        ]
        if found := [text for wrong, text in mistakes if wrong]:
            raise ValueError("\n".join(found))
        return self


def default_root() -> Path:
    """Where data lies when ``data.root`` is unset."""
    return Path(os.environ.get("NOPROP_DATA", "data"))
