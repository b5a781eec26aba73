"""The sections of the run card: every setting with its type, unit, default and check.

One source for YAML files, the command line (``--section.name value``) and ``--help``: the docstring under a field is its
help text.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

BACKBONE_NAMES = ("paper-cnn", "small-cnn", "strided-cnn", "mlp", "resnet18", "resnet34", "resnet50", "vit-tiny")
"""The image paths of nets/backbones.py."""


class UserError(Exception):
    """A mistake in what the user gave (card, command line, data, files). Printed as it is, without a traceback."""


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_switch_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """YAML reads yes, no, on and off as truth values, which pydantic would take for 1 and 0."""
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation in (int, float, int | None):
            raise PydanticCustomError("switch", "Input should be a number")
        return value


def _usable(path: Path) -> Path:
    """``path`` with its ``~`` resolved, if a file can have that name."""
    try:
        path = path.expanduser()
        if b"\0" not in str(path).encode():
            return path
    except (RuntimeError, UnicodeEncodeError):  # no such user; bytes of the command line that are no UTF-8
        pass
    raise PydanticCustomError("path", "Input should be a path in UTF-8, its ~ the home of a user that there is")


Place = Annotated[Path, AfterValidator(_usable)]


class DataCard(Section):
    name: Literal["digits", "mnist", "fashion-mnist", "kmnist", "cifar10", "cifar100", "svhn", "imagefolder", "npz"] = "digits"
    """The data set. digits is bundled with scikit-learn; imagefolder and npz are your own pictures."""
    root: Place | None = None
    """Where the data lies: torchvision's root, the image folder, or the .npz file. Default: $NOPROP_DATA, else ./data."""
    batch_size: int = Field(128, gt=1, le=1_000_000)
    """Images per step (the same batch for every block)."""
    augment: Literal["auto", "none", "crop", "crop-flip"] = "auto"
    """Random crops and flips of training images; auto: crop-flip for CIFAR and image folders, crop for SVHN, else none."""
    image_size: int = Field(64, ge=8, le=2048)
    """imagefolder: side in pixels to which pictures are resized and centre-cropped."""
    workers: int = Field(2, ge=0, le=256)
    """imagefolder: decoding processes on the coordinator."""


class MethodCard(Section):
    name: Literal["dt", "ct", "fm", "backprop", "cnn", "adjoint", "liquid"] = "dt"
    """dt, ct, fm: NoProp in discrete time (eqs 3-8), continuous time (eq 9), by flow matching (eqs 10-13). Baselines, trained
    end to end on one rank: backprop (the same blocks, eqs 17-19), cnn (a plain image path), adjoint (neural ODE), liquid (a
    recurrent liquid network that reads the image's rows; extra "baselines")."""
    eta: float = Field(0.1, gt=0)
    """dt, ct: η, the weight of the denoising loss (eqs 8 and 9). Unset, 1 for ct (table 4)."""
    schedule: Literal["cosine", "linear", "sigmoid", "learned"] = "cosine"
    """dt, ct: signal level ᾱ over time. cosine: sin²(πs/2); linear: s; sigmoid: log SNR is linear; learned (ct):
    a monotone net's."""
    alpha_min: float = Field(1e-3, ge=0, lt=1)
    """dt, ct: lowest signal level ᾱ_0 (of a learned schedule: at its start)."""
    alpha_max: float = Field(0.99, gt=0, lt=1)
    """dt, ct: highest signal level ᾱ_T; below 1, so that the SNR stays finite."""
    loss_weight: Literal["snr", "uniform"] = "snr"
    """snr: a block's loss carries eq 8's factor (T/2)·η·(SNR(t)−SNR(t−1)), or eq 9's η/2·SNR′(t). uniform: the factor 1. For dt
    with fixed embeddings the minimum is the same; under AdamW so is every step (but for eps)."""
    partition: Literal["uniform", "equal-mass"] = "uniform"
    """ct, fm: how the blocks share the time [0, 1]. uniform: equal times. equal-mass: equal shares of EDM's distribution of
    noise levels, ln(noise/signal) ~ N(-1.2, 1.2²), as DiffusionBlocks cuts it."""
    overlap: float = Field(0.0, ge=0, le=1)
    """ct, fm: share of each neighbour's interval that a block also trains on."""
    sigma: float = Field(0.0, ge=0)
    """fm: σ of z_t = t·z_1 + (1−t)·z_0 + σε."""
    label_noise: float = Field(0.1, ge=0, lt=1)
    """dt, ct, fm: probability that a block's z is noised from a wrong label while training (it still has to name the
    right one). Unset, 0 for fm."""
    ode_steps: int = Field(10, ge=1, le=100_000)
    """adjoint: Heun's steps from z(0) to z(1), in training as in inference; each costs the small layers twice."""


class ModelCard(Section):
    blocks: int = Field(10, ge=1, le=1000)
    """dt, backprop: T, the number of denoising blocks, each a step. ct, fm: K, the number of blocks that share the time;
    unset, 1 (the paper's). The other baselines have one."""
    backbone: str = "auto"
    """A block's image path: paper-cnn (figure 5), small-cnn, strided-cnn, mlp, resnet18, resnet34, resnet50, vit-tiny, or your
    own nn.Module class as package.module:Class, called with (shape, dropout); auto: paper-cnn from 14 pixels a side on,
    small-cnn below."""
    width: int | None = Field(None, ge=2, le=65_536)
    """Features of a block's own layers; unset, what its image path asks for: 256 (figure 5), small-cnn 128."""
    embedding: Literal["one-hot", "learned", "prototype"] = "one-hot"
    """Class embeddings W. one-hot: fixed. learned: embedding_dim numbers a class. prototype: learned, of the image's size;
    starts from each class's medoid image."""
    embedding_dim: int = Field(20, ge=1, le=100_000)
    """learned: d, numbers a class."""
    embedding_lag: int = Field(10, ge=1)
    """dt, ct, fm, with learned or prototype: their values are sent to the blocks every so many steps, and used from so many
    steps later on."""
    head: Literal["linear", "radial", "mlp"] = "linear"
    """p̂_out, from z_T to class logits. radial: eqs 15-16. mlp: two layers, a non-linear decoder."""
    head_sigma: float = Field(0.5, gt=0)
    """radial: σ of eq 16."""
    dropout: float = Field(0.2, ge=0, le=0.99)
    """Dropout probability in the image path."""

    @field_validator("backbone")
    @classmethod
    def _known_backbone(cls, name: str) -> str:
        known = ("auto", *BACKBONE_NAMES)
        if name in known or ":" in name:
            return name
        nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f" (did you mean {nearest[0]}?)" if nearest else ""
        raise PydanticCustomError("backbone", f"Input should be {', '.join(known)} or your own package.module:Class{hint}")


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
    """Steps between evaluations on the test set; 0: at each step that completes an epoch. There is always one at the end."""
    checkpoint_every: int = Field(500, ge=0)
    """Steps between checkpoints; 0: only at the end."""
    pictures: bool = True
    """Draw the model for TensorBoard at each evaluation, or at ten of a run's where there are more; at fewer where that would
    take over a tenth of the run's time."""
    keep_checkpoints: int = Field(2, ge=1)
    """How many of the newest checkpoints stay on disk."""
    max_bad_steps: int = Field(10, ge=0)
    """An update whose loss or gradient is not finite is skipped; after so many in a row that block stays as it is; 0: never."""
    resume: str = "auto"
    """auto: continue this run from its newest whole checkpoint; never: refuse an old run's folder; or a checkpoint's path."""


class ParallelCard(Section):
    feed: Literal["stream", "resident"] = "stream"
    """stream: the coordinator broadcasts every batch; resident: it broadcasts the data set once and ranks pick batches."""
    balance: Literal["even", "measured"] = "even"
    """How many blocks a rank owns. measured: by the time that one block's step takes on it at the start, all ranks at once: for
    GPUs of several kinds, or a machine that others use too. What is computed stays the same."""
    prefetch: int | None = Field(None, ge=0, le=1000)
    """Batches that travel ahead: steps that ranks may be apart, and that are still done once the run is asked to stop. Unset,
    as many as 1 MiB holds, from 2 to 8, for small images make short steps."""
    backend: Literal["auto", "gloo", "nccl"] = "auto"
    """Carrier of batches; auto: nccl where every local rank has a GPU of its own, else gloo."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where blocks train; auto: a GPU if there is one."""
    cuda_graphs: bool = False
    """Have a GPU run each block's forward and backward pass as one launch, where launching takes longer than computing: small
    blocks, many of them on a GPU. Batches of one size, networks without decisions on the CPU."""
    threads: int = Field(0, ge=0, le=1024)
    """CPU threads a rank; 0: $OMP_NUM_THREADS, else cores / local ranks."""
    timeout: float = Field(600.0, gt=0, le=1e6)
    """Seconds that a rank waits for another before it gives up and names it."""


class InferenceCard(Section):
    path: Literal["mean", "stochastic", "average"] = "mean"
    """What the run's test_accuracy stands for. mean: z_0 = 0, no noise; stochastic: the paper's chain; average: mean of
    every block's û along stochastic chains. All three are always reported (cnn and liquid have no chain: they are the same)."""
    samples: int = Field(1, ge=1, le=100_000)
    """Stochastic chains averaged per image."""
    blocks: int | None = Field(None, ge=1)
    """Early exit: use only the first so many blocks."""
    solver: Literal["auto", "sde", "euler", "midpoint", "heun", "rk4", "dopri5"] = "auto"
    """ct, fm: from z_0 to z_1. sde (ct): ancestral steps, eqs 3-5 on a fine grid; the others: the probability-flow ODE (ct) or
    eq 10's flow (fm), dopri5 by torchdiffeq. auto: sde for ct, heun for fm."""
    steps: int = Field(50, ge=1, le=100_000)
    """ct, fm: steps from 0 to 1, shared among the blocks by their intervals. dopri5 chooses its own."""
    tolerance: float = Field(1e-3, ge=1e-6)
    """dopri5: relative and absolute, of a whole batch: an image's result depends a little on the others in it."""
    readout: Literal["auto", "head", "nearest"] = "auto"
    """How the last z names a class: by the head or by the nearest embedding; auto: nearest for fm, else head."""
    batch_size: int = Field(500, ge=1, le=1_000_000)
    """Images per evaluation batch."""


class RunCard(Section):
    dir: Place = Path("runs")
    """Folder of all runs."""
    name: str | None = Field(None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=250)
    """Folder of this run inside dir; default: a time stamp. Give a name to be able to resume."""
    seed: int = Field(0, ge=0)
    """Seed of everything random."""
    stop_exit_code: int = Field(0, ge=0, le=255)
    """Exit code of a run that SIGTERM or SIGINT stopped, saved; 143 for what starts a job again only when it failed."""


class DebugCard(Section):
    enabled: bool = False
    """``--debug`` for short: anomaly detection, deterministic algorithms, shapes and gradient norms logged."""
    overfit_batches: int = Field(0, ge=0)
    """Train on the first so many batches again and again; 0: on all."""
