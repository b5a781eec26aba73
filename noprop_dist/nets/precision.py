"""Number format and memory format of the computation."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch
from torch import Tensor, nn

from noprop_dist.config import TrainCard

T = TypeVar("T", bound=Tensor | nn.Module)


def autocast(card: TrainCard, device: torch.device) -> AbstractContextManager[object]:
    """bf16 autocast where the card asks for it; otherwise float32."""
    return torch.autocast(device.type, torch.bfloat16) if card.precision == "bf16" else full(device)


def full(device: torch.device) -> AbstractContextManager[object]:
    """float32, also within an autocast."""
    return torch.autocast(device.type, enabled=False) if torch.is_autocast_enabled(device.type) else nullcontext()


def lay_out(card: TrainCard, thing: T) -> T:
    """A module, or images (B, C, H, W), in the card's memory format."""
    return thing.to(memory_format=torch.channels_last) if card.channels_last else thing  # type: ignore[return-value, call-overload]
