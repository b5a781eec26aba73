"""The assembled chain: an ordinary module that classifies images. Needs neither ranks nor a trainer."""

from __future__ import annotations

import contextlib
import json
import logging
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from noprop_dist import files, hub, modelcard
from noprop_dist.cards import explain, portable
from noprop_dist.chain import PATHS, Moment, Scores, Segment, Tally, Watch, logits, read_out
from noprop_dist.config import Card, UserError
from noprop_dist.data import DataInfo, Pixels, Split, test_indices
from noprop_dist.method.intervals import cuts
from noprop_dist.nets.block import Block
from noprop_dist.nets.build import build_network
from noprop_dist.nets.labels import LabelSpace
from noprop_dist.nets.precision import lay_out
from noprop_dist.seeding import derive
from noprop_dist.viewing import Course, Viewing, Witness, schedules

WEIGHTS, CONFIG, README = hub.WEIGHTS, hub.CONFIG, hub.README
log = logging.getLogger("noprop_dist")


def fresh_block(card: Card, info: DataInfo, index: int, device: torch.device) -> Block:
    """Block ``index`` before its first step: a pure function of (seed, index). Reseeds torch's global generator."""
    torch.manual_seed(derive(card.run.seed, "init", index))
    ends = cuts(card.method, card.units)
    block = build_network(card, info.shape, len(info.classes), (ends[index], ends[index + 1]))
    return lay_out(card.train, block).to(device)


def fresh_schedules(card: Card, info: DataInfo) -> Tensor:
    """What :func:`~noprop_dist.viewing.schedules` gives of all blocks before their first step."""
    used = range(card.inference.blocks or card.units) if card.method.schedule == "learned" else ()
    with torch.random.fork_rng([]):
        return schedules(card, {index: fresh_block(card, info, index, torch.device("cpu")) for index in used})


def fresh_labels(card: Card, info: DataInfo, device: torch.device, prototypes: Tensor | None = None) -> LabelSpace:
    """The label space before its first step: a pure function of the seed (and of the prototypes (m, d), for that kind of
    embedding). Reseeds torch's global generator."""
    torch.manual_seed(derive(card.run.seed, "init", "labels"))
    return LabelSpace(card.model, info.shape, len(info.classes), prototypes).to(device)


class NoPropModel(nn.Module):
    """All blocks and the label space of a run.

    >>> model = NoPropModel.from_pretrained("runs/mine/model")
    >>> model.predict(images)  # uint8 (B, C, H, W) -> int64 (B,)
    """

    def __init__(self, card: Card, info: DataInfo) -> None:
        super().__init__()
        self.card, self.info = card, info
        self.readme: str | None = None
        """Its model card, where it has one."""
        with torch.random.fork_rng([]):
            cpu = torch.device("cpu")
            self.blocks = nn.ModuleList(fresh_block(card, info, index, cpu) for index in range(card.units))
            self.labels = fresh_labels(card, info, cpu)
        self.eval()

    def forward(self, images: Tensor, *, batch: int = 0, **inference: Any) -> Tensor:
        """Log-probabilities (B, m) of uint8 images (B, C, H, W).

        Args:
            batch: number of this batch; the stochastic chains' noise depends on it (and on run.seed) alone.
            inference: overrides of ``card.inference``: ``path`` (mean, stochastic, average), ``samples``, ``blocks``.
        """
        card = self._with(inference)
        paths, _ = self._run(self._segment(card), images, batch)
        return read_out(card, self.labels, paths)[PATHS.index(card.inference.path)]

    def predict(self, images: Tensor, **inference: Any) -> Tensor:
        """Classes, int64 (B,), of uint8 images (B, C, H, W); the same overrides as :meth:`forward`."""
        return self(images, **inference).argmax(dim=1)  # type: ignore[no-any-return]

    def evaluate(self, split: Split, **inference: Any) -> Scores:
        """Accuracies on a split, batch by batch as a run's own evaluation does it: the same weights give the same digits."""
        return self._survey(split, self._with(inference))[0]

    @torch.no_grad()
    def view(self, split: Split | None, **inference: Any) -> Viewing:
        """All that pictures of this model are made from, as a run's own evaluation sees it; without data, what there is."""
        card = self._with(inference)
        segment = self._segment(card)
        _, course, tally = self._survey(split, card) if split else (None, None, None)
        return Viewing.of(card, self.labels, schedules(card, segment.blocks), course, tally)

    def _survey(self, split: Split, card: Card) -> tuple[Scores, Course | None, Tally]:
        segment, tally, size = self._segment(card), Tally(), card.inference.batch_size
        batches = range(-(-len(split) // size))
        chosen = (test_indices(batch, size=len(split), batch_size=size) for batch in batches)
        course: Course | None = None
        for number, (images, labels) in enumerate(split.batches(chosen)):
            labels = labels.to(segment.device)
            witness = None if number else Witness(card, segment, labels)
            paths, guesses = self._run(segment, images, number, witness)
            tally.estimates(guesses, labels)
            tally.chain(read_out(card, self.labels, paths), labels)
            if witness:
                course = witness.develop(self.labels, images, labels, witness.record, paths)
        return tally.scores(segment.guessing), course, tally

    def watch(self, images: Tensor, *, batch: int = 0, **inference: Any) -> tuple[list[Moment], Tensor]:
        """What every block sees and answers on the way: the calls in order of time, and the final paths (see method.base).

        ``images`` uint8 (B, C, H, W); the arguments are :meth:`forward`'s. Where a solver tries a step before it takes it, what
        it tried is left out.
        """
        segment, moments = self._segment(self._with(inference)), list[Moment]()

        def keep(moment: Moment) -> None:
            while moments and moments[-1].time >= moment.time:
                moments.pop()
            moments.append(moment)

        paths, _ = self._run(segment, images, batch, keep)
        return [moment for moment in moments if moment.time < 1], paths

    @torch.no_grad()
    def beliefs(self, z: Tensor) -> Tensor:
        """The class probabilities (…, m) that latents or estimates (…, d) stand for, as the last z is read."""
        return logits(self.card, self.labels, z).softmax(dim=-1)

    @torch.no_grad()
    def course(self, images: Tensor, *, batch: int = 0, **inference: Any) -> Course | None:
        """Images on their way from noise to label: uint8 (B, C, H, W), the first ones where they are too many.

        The arguments are :meth:`forward`'s. None where z is too large to keep.
        """
        card = self._with(inference)
        segment = self._segment(card)
        witness = Witness(card, segment, torch.zeros(len(images), dtype=torch.int64))
        paths, _ = self._run(segment, images, batch, witness)
        return witness.develop(self.labels, images, None, witness.record, paths)

    def describe(self, summary: Mapping[str, Any] | None = None) -> None:
        """Make its model card anew; ``summary``: what its run's summary.json holds."""
        parameters = sum(parameter.numel() for parameter in self.parameters())
        self.readme = modelcard.describe(self.card, self.info, parameters, summary)

    def save(self, folder: Path | str) -> None:
        """Write model.safetensors, config.json and README.md, the model card; one that was changed by hand stays.

        Where a run was done, and on what machine, is left out. Raises UserError where writing fails.
        """
        config = {"format": 1, "card": portable(self.card), "data": self.info.to_json()}
        files.write(Path(folder) / WEIGHTS, files.pack(self.state_dict()))
        files.write(Path(folder) / CONFIG, json.dumps(config, indent=1).encode())
        if self.readme is None:
            self.describe()
        if not modelcard.write(Path(folder) / README, str(self.readme)):
            log.info("%s was changed by hand: it stays as it is", Path(folder) / README)

    def save_pretrained(
        self, folder: Path | str, *, repo_id: str | None = None, push_to_hub: bool = False, **push: Any
    ) -> str | None:
        """:meth:`save`, and on demand :meth:`push_to_hub`, with its settings, to ``repo_id``, else under the folder's name."""
        self.save(folder)
        return self.push_to_hub(repo_id or Path(folder).name, **push) if push_to_hub else None

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str = "A NoProp model",
        private: bool | None = None,
        token: bool | str | None = None,
        branch: str | None = None,
        create_pr: bool | None = None,
        **upload: Any,
    ) -> str:
        """Put the model's folder on the Hugging Face hub (extra "hub") and return the commit's URL.

        The repository is made where there is none; a model card that was changed by hand stays there too. The settings are
        those of huggingface_hub's ``ModelHubMixin.push_to_hub``; ``upload``: its patterns.

        Raises UserError where the hub refuses.
        """
        upload |= {"commit_message": commit_message, "create_pr": create_pr}
        return hub.publish(self.save, repo_id, private=private, token=token, branch=branch, **upload)

    @classmethod
    def from_pretrained(
        cls,
        name: Path | str,
        device: str = "cpu",
        *,
        revision: str | None = None,
        cache_dir: Path | str | None = None,
        force_download: bool = False,
        token: bool | str | None = None,
        local_files_only: bool = False,
    ) -> NoPropModel:
        """Read what :meth:`save` wrote.

        Args:
            name: its folder, the name of a model that comes with the program, or ``owner/name`` on the hub (``@revision``).
            revision: of the hub's: a branch, tag or commit; like all below as huggingface_hub's ``ModelHubMixin`` has it.

        Raises UserError naming the file that is missing or does not fit, or why the hub gives none.
        """
        download = {"cache_dir": cache_dir, "force_download": force_download, "token": token}
        folder = hub.locate(name, revision=revision, local_files_only=local_files_only, **download)
        path = folder / CONFIG
        try:
            config = files.read_json(path)
            model = cls(Card.model_validate(config["card"]), DataInfo.from_json(config["data"]))
        except ValidationError as error:
            raise UserError(f"{path}: not a model's config ({explain(error)}); gather the model again") from None
        except (ValueError, KeyError, TypeError, RuntimeError) as error:  # of the card, or of a network that it asks for
            raise UserError(f"{path}: not a model's config ({str(error).splitlines()[0]}); gather the model again") from None
        place = folder / WEIGHTS
        model._load(files.unpack(files.read(place), place), place)
        with contextlib.suppress(OSError):
            model.readme = (folder / README).read_text(encoding="utf-8", errors="replace")
        return model.to(device)

    @classmethod
    def from_parts(
        cls, card: Card, info: DataInfo, blocks: Mapping[int, Mapping[str, Tensor]], labels: Mapping[str, Tensor]
    ) -> NoPropModel:
        """Assemble the state dicts of every block and of the label space."""
        model = cls(card, info)
        tensors = {f"blocks.{index}.{name}": value for index, part in blocks.items() for name, value in part.items()}
        model._load(tensors | {f"labels.{name}": value for name, value in labels.items()}, "these parts")
        return model

    def _load(self, tensors: Mapping[str, Tensor], place: object) -> None:
        try:
            self.load_state_dict(tensors)
        except RuntimeError as error:
            what = textwrap.shorten(str(error).splitlines()[-1], 200, placeholder=" ...")
            raise UserError(f"{place}: weights of another model ({what}); use those of this card's own run") from None

    def _with(self, inference: Mapping[str, Any]) -> Card:
        card = self.card.model_dump()
        card["inference"] |= inference
        try:
            return Card.model_validate(card)
        except ValidationError as error:
            raise UserError(explain(error)) from None

    def _segment(self, card: Card) -> Segment:
        blocks = {index: cast(Block, block) for index, block in enumerate(self.blocks)}
        return Segment(card, blocks, self.labels.embedding, Pixels(card.data, self.info))

    @staticmethod
    def _run(segment: Segment, images: Tensor, batch: int, watch: Watch | None = None) -> tuple[Tensor, dict[int, Tensor]]:
        features = segment.encode(images.to(segment.device))
        return segment.advance(features, segment.start(len(images), batch), batch, watch)
