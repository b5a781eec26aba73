"""From a card to what a rank owns: a block of NoProp, or a baseline's network."""

from __future__ import annotations

from typing import cast

import torch

from noprop_dist.config import LOCAL_METHODS, Card
from noprop_dist.nets.backbones import BACKBONES
from noprop_dist.nets.baselines import BASELINES
from noprop_dist.nets.block import Block
from noprop_dist.nets.own import explained
from noprop_dist.nets.precision import autocast, lay_out


def build_network(card: Card, shape: tuple[int, int, int], classes: int, interval: tuple[float, float] = (0.0, 1.0)) -> Block:
    """With fresh weights from torch's global generator, for images (C, H, W); ``interval``: of time, see Block."""
    if card.method.name in LOCAL_METHODS:
        return Block(card, shape, classes, interval)
    return cast(Block, BASELINES[card.method.name](card, shape, classes))  # offers what the rest of the program asks of a block


def try_out(card: Card, shape: tuple[int, int, int], classes: int) -> None:
    """Take a user's own backbone through a step as training does, in its mode, precision and memory format.

    Raises UserError where it fails; ours are known to work.
    """
    name = card.model.backbone
    if name in BACKBONES:
        return
    with torch.random.fork_rng([]):
        block = lay_out(card.train, build_network(card, shape, classes)).train()
        x = lay_out(card.train, torch.zeros(card.data.batch_size, *shape))
        remedy = (
            "mend that" if not card.train.channels_last else "mend that (reshape, not view), or set --train.channels_last false"
        )
        with explained(name, "a training step", remedy):
            with autocast(card.train, x.device):
                features = block.encode(x)
            features.sum().backward()  # type: ignore[no-untyped-call]
