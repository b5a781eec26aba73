"""What one block costs, found without computing: parameters, floating-point operations, memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from noprop_dist.config import Card
from noprop_dist.nets.block import build_block
from noprop_dist.nets.precision import autocast


@dataclass(frozen=True)
class BlockCost:
    """parameters: count. flops: multiply-adds ×2 of one training step. state: bytes that a block always holds (weights,
    gradients, optimizer, moving average). activations: bytes kept for its backward pass, which one block at a time needs."""

    parameters: int
    flops: int
    state: int
    activations: int


def block_cost(card: Card, shape: tuple[int, int, int], classes: int) -> BlockCost:
    """The cost of one block for a card's batches of images (C, H, W), by running its step on tensors without contents."""
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[id(tensor.untyped_storage())] = tensor.untyped_storage().nbytes()
        return tensor

    with FakeTensorMode():
        block = build_block(card.model, shape, dim=classes, classes=classes)
        own = {id(parameter.untyped_storage()) for parameter in block.parameters()}
        x = torch.empty(card.data.batch_size, *shape)
        z, embedding = torch.empty(card.data.batch_size, classes), torch.empty(classes, classes)
        with FlopCounterMode(display=False) as counter, saved_tensors_hooks(keep, lambda tensor: tensor):
            with autocast(card.train, torch.device("cpu")):
                estimate = block.denoise(z, block.encode(x), embedding)
            estimate.sum().backward()  # type: ignore[no-untyped-call]
    parameters = sum(parameter.numel() for parameter in block.parameters())
    copies = 2 + {"adamw": 2, "adam": 2, "sgd": int(card.optim.momentum > 0)}[card.optim.name] + (card.optim.ema > 0)
    activations = sum(size for storage, size in kept.items() if storage not in own)
    return BlockCost(parameters, counter.get_total_flops(), 4 * copies * parameters, activations)
