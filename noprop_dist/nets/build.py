"""From a card to what a rank owns: a block of NoProp, or a baseline's network."""

from __future__ import annotations

from typing import cast

from noprop_dist.config import LOCAL_METHODS, Card
from noprop_dist.nets.baselines import BASELINES
from noprop_dist.nets.block import Block


def build_network(card: Card, shape: tuple[int, int, int], classes: int, interval: tuple[float, float] = (0.0, 1.0)) -> Block:
    """With fresh weights from torch's global generator, for images (C, H, W); ``interval``: of time, see Block."""
    if card.method.name in LOCAL_METHODS:
        return Block(card, shape, classes, interval)
    return cast(Block, BASELINES[card.method.name](card, shape, classes))  # offers what the rest of the program asks of a block
