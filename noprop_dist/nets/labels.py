"""The label space: class embeddings W and the output head, both owned by the coordinator."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn

from noprop_dist.config import ModelCard

HIDDEN = 256
"""Features of the mlp head's hidden layer."""


def embedding_size(card: ModelCard, shape: tuple[int, int, int], classes: int) -> int:
    """d, the size of an embedding and of z, for images (C, H, W)."""
    return {"one-hot": classes, "learned": card.embedding_dim, "prototype": math.prod(shape)}[card.embedding]


class LabelSpace(nn.Module):
    """W (m, d) and p̂_out, the head.

    W is fixed for one-hot embeddings and a parameter else. ``prototypes`` (m, d) are the starting values of that kind; without
    them the rows stand at 0 until a state dict is loaded.
    """

    embedding: Tensor

    def __init__(self, card: ModelCard, shape: tuple[int, int, int], classes: int, prototypes: Tensor | None = None) -> None:
        super().__init__()
        size = embedding_size(card, shape, classes)
        if card.embedding == "one-hot":
            self.register_buffer("embedding", torch.eye(classes))
        elif card.embedding == "learned":
            rows = torch.empty(classes, size)
            self.embedding = nn.Parameter(
                nn.init.orthogonal_(rows) if classes <= size else nn.init.normal_(rows, std=size**-0.5)
            )
        else:
            self.embedding = nn.Parameter(torch.zeros(classes, size) if prototypes is None else prototypes.clone())
        self._kind, self._sigma = card.head, card.head_sigma
        if card.head == "mlp":
            self.head: nn.Module = nn.Sequential(nn.Linear(size, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, classes))
        else:
            self.head = linear = nn.Linear(size, classes)
            # starts as the nearest-embedding classifier, so that the head is never what a young chain lacks
            with torch.no_grad():
                linear.weight.copy_(self.embedding)
                linear.bias.copy_(-self.embedding.square().sum(dim=1) / 2)

    @property
    def learned(self) -> bool:
        """Whether W changes while training."""
        return isinstance(self.embedding, nn.Parameter)

    def forward(self, z: Tensor) -> Tensor:
        """Class logits (…, m) of z_T (…, d)."""
        logits = cast(Tensor, self.head(z))
        if self._kind == "radial":  # ỹ = softmax(linear(z))·W, logits_c = −‖ỹ−u_c‖²/(2σ²) (eqs 15-16)
            logits = squared_distances(logits.softmax(dim=-1) @ self.embedding, self.embedding) / (-2 * self._sigma**2)
        return logits

    def spread(self) -> float:
        """The smallest distance (Euclid) between two rows of W: 0 would be a collapse."""
        return float(nn.functional.pdist(self.embedding.detach()).min())


def squared_distances(points: Tensor, embedding: Tensor) -> Tensor:
    """‖p − u_c‖² of points (…, d) to every row of W (m, d); (…, m)."""
    return points.square().sum(dim=-1, keepdim=True) - 2 * points @ embedding.T + embedding.square().sum(dim=1)


def nearest(estimate: Tensor, embedding: Tensor) -> Tensor:
    """The class whose row of W (m, d) is nearest (Euclid) to each estimate (…, d); int64 (…)."""
    return (embedding.square().sum(dim=1) - estimate @ (2 * embedding).T).argmin(dim=-1)  # ‖estimate‖² is the same for all
