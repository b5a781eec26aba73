"""The mathematics: pure tensors, no ranks, no files, no printing."""

from noprop_dist.config import Card
from noprop_dist.method.base import Method
from noprop_dist.method.diffusion import Diffusion
from noprop_dist.method.discrete import Discrete
from noprop_dist.method.flow import Flow


def make_method(card: Card) -> Method:
    """How the card's blocks train alone; for dt, ct and fm."""
    if card.method.name == "ct":
        return Diffusion(card.method, card.inference, card.model.blocks)
    if card.method.name == "fm":
        return Flow(card.method, card.inference, card.model.blocks, anchored=card.model.embedding != "one-hot")
    return Discrete(card.method, card.model.blocks)
