"""Number format and memory format of the computation."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

from noprop_dist.config import TrainCard

T = TypeVar("T", bound=Tensor | nn.Module)


def autocast(card: TrainCard, device: torch.device) -> torch.autocast:
    """bf16 autocast where the card asks for it; otherwise a context that does nothing."""
    return torch.autocast(device.type, torch.bfloat16, enabled=card.precision == "bf16")


def lay_out(card: TrainCard, thing: T) -> T:
    """A module, or images (B, C, H, W), in the card's memory format."""
    return thing.to(memory_format=torch.channels_last) if card.channels_last else thing  # type: ignore[return-value, call-overload]
