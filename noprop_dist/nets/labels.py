"""The label space: class embeddings W and the output head, both owned by the coordinator."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from noprop_dist.config import ModelCard


class LabelSpace(nn.Module):
    """W (m, d), here one-hot and fixed, and p̂_out: a linear head with softmax."""

    embedding: Tensor

    def __init__(self, card: ModelCard, classes: int) -> None:
        super().__init__()
        self.register_buffer("embedding", torch.eye(classes))
        self.head = nn.Linear(self.dim, classes)
        with torch.no_grad():  # starts as the nearest-embedding classifier, so that the head is never what a young chain lacks
            self.head.weight.copy_(self.embedding)
            self.head.bias.copy_(-self.embedding.square().sum(dim=1) / 2)

    @property
    def dim(self) -> int:
        """d."""
        return self.embedding.shape[1]

    def forward(self, z: Tensor) -> Tensor:
        """Class logits (…, m) of z_T (…, d)."""
        return cast(Tensor, self.head(z))


def nearest(estimate: Tensor, embedding: Tensor) -> Tensor:
    """The class whose row of W (m, d) is nearest (Euclid) to each estimate (B, d); int64 (B,)."""
    # ‖û−u_c‖² less ‖û‖², which is the same for every class
    return (2 * estimate @ embedding.T - embedding.square().sum(dim=1)).argmax(dim=1)
