"""A block's part in its training step: the forward pass in the card's precision, on a GPU as a CUDA graph where that is asked
for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from noprop_dist.config import TrainCard, UserError
from noprop_dist.nets.block import Block
from noprop_dist.nets.precision import autocast


class Pass(nn.Module):
    """From z (B, d), images (B, C, H, W), W (m, d) and, for blocks that know it, time (B,): the block's output (B, d), and its
    features (B, width) to look at."""

    def __init__(self, card: TrainCard, block: Block) -> None:
        super().__init__()
        self._card, self.block = card, block

    def forward(self, z: Tensor, x: Tensor, embedding: Tensor, *time: Tensor) -> tuple[Tensor, Tensor]:
        with autocast(self._card, x.device):
            features = self.block.encode(x)
            return self.block.denoise(z, features, embedding, *time), features.detach()

    def capture(self, pool: Any, *inputs: Tensor) -> None:
        """From now on launch this and its backward pass as CUDA graphs, for inputs like these; ``pool``: their memory.

        Leaves the block as it is, but draws random numbers. Raises UserError for a block that cannot be captured.
        """
        before = [buffer.clone() for buffer in self.buffers()]  # batch norm notes the warm-up
        samples = tuple(each.detach().clone().requires_grad_(each.requires_grad) for each in inputs)
        try:
            torch.cuda.make_graphed_callables(self, samples, allow_unused_input=True, pool=pool)
        except RuntimeError as error:
            why = str(error).splitlines()[0]
            raise UserError(f"parallel.cuda_graphs: this block cannot be captured ({why}); leave it out") from None
        for buffer, value in zip(self.buffers(), before, strict=True):
            buffer.copy_(value)
