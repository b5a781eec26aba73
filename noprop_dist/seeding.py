"""Every random number is a pure function of the run's seed and of what it is for."""

from __future__ import annotations

import hashlib

import torch


def derive(seed: int, *purpose: str | int) -> int:
    """A 63-bit seed for one purpose, e.g. ``derive(seed, "block", t, step)``: the same on every rank and machine."""
    text = "/".join(map(str, (seed, *purpose)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def reseed(device: torch.device, seed: int, *purpose: str | int) -> None:
    """Seed torch's global generators, the CPU's and that of ``device``, with :func:`derive`.

    torch.manual_seed would seed those of all kinds of devices, which takes longer than a small layer.
    """
    number = derive(seed, *purpose)
    torch.default_generator.manual_seed(number)
    if device.type == "cuda":
        torch.cuda.manual_seed(number)


def generator(seed: int, *purpose: str | int) -> torch.Generator:
    """A CPU generator seeded with :func:`derive`."""
    return torch.Generator().manual_seed(derive(seed, *purpose))
