"""What one block costs, found without computing: parameters, floating-point operations, memory."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from noprop_dist.config import Card
from noprop_dist.nets.build import build_network
from noprop_dist.nets.labels import embedding_size
from noprop_dist.nets.own import explained
from noprop_dist.nets.precision import autocast


@dataclass(frozen=True)
class BlockCost:
    """parameters: count. flops: multiply-adds ×2 of one training step. state: bytes that a block always holds (weights,
    optimizer, moving average). gradients, and activations (kept for the backward pass): bytes while it learns."""

    parameters: int
    flops: int
    state: int
    gradients: int
    activations: int


def block_cost(card: Card, shape: tuple[int, int, int], classes: int) -> BlockCost:
    """The cost of one block for a card's batches of images (C, H, W), by running its step on tensors without contents."""
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[id(tensor.untyped_storage())] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.random.fork_rng([]):
        block = build_network(card, shape, classes)  # with contents: some initialisers look at what they drew
    mode = FakeTensorMode(allow_non_fake_inputs=True)  # a user's own class may know tensors beside its parameters
    with FakeCopyMode(mode):
        block = copy.deepcopy(block)
    with mode, explained(card.model.backbone, "a step without contents", "train it without a dry run"):
        own = {id(parameter.untyped_storage()) for parameter in block.parameters()}
        x = torch.empty(card.data.batch_size, *shape)
        size = embedding_size(card.model, shape, classes)
        z, embedding, time = (torch.empty(each) for each in ((len(x), size), (classes, size), (len(x),)))
        with FlopCounterMode(display=False) as counter, saved_tensors_hooks(keep, lambda tensor: tensor):
            with autocast(card.train, torch.device("cpu")):
                features = block.encode(x)
                encoding = counter.get_total_flops()
                estimate = getattr(block, "velocity", block.denoise)(z, features, embedding, time)
            denoising = counter.get_total_flops() - encoding
            estimate.sum().backward()
    flops = counter.get_total_flops()
    if card.method.name == "adjoint":  # Heun, two calls a step: all forward, then again with their gradients, twice the work
        flops += (2 * card.method.ode_steps * 4 - 3) * denoising
    parameters = sum(parameter.numel() for parameter in block.parameters())
    copies = 1 + {"adamw": 2, "adam": 2, "sgd": int(card.optim.momentum > 0)}[card.optim.name] + (card.optim.ema > 0)
    activations = sum(size for storage, size in kept.items() if storage not in own)
    return BlockCost(parameters, flops, 4 * copies * parameters, 4 * parameters, activations)
