"""Other ways to train a network on several ranks, by torch.distributed's own means: what layer-parallel NoProp is measured
against. Nothing else of the program uses them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.nn.parallel import DistributedDataParallel

SCHEDULES: dict[str, Any] = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}


def join(init_method: str, rank: int, ranks: int, device: torch.device, timeout: float) -> None:
    """Form the one process group that a rival has: nccl for GPUs, else gloo."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=init_method, rank=rank, world_size=ranks, timeout=timedelta(seconds=timeout))


def data_parallel(module: nn.Module) -> nn.Module:
    """DDP at its best: gradients lie in the buckets that are sent, and every rank keeps its own batch norm statistics."""
    return DistributedDataParallel(module, gradient_as_bucket_view=True, static_graph=True, broadcast_buffers=False)


def unsynchronised(module: nn.Module) -> AbstractContextManager[None]:
    """In which backward passes of what :func:`data_parallel` gave send nothing."""
    return cast(DistributedDataParallel, module).no_sync()


def pipeline(
    schedule: Literal["gpipe", "1f1b"],
    module: nn.Module,
    rank: int,
    ranks: int,
    device: torch.device,
    microbatches: int,
    shapes: tuple[tuple[int, int], tuple[int, int]],
    loss: Callable[[Tensor, Tensor], Tensor],
) -> Callable[[Tensor, Tensor, Tensor], None]:
    """Forward and backward passes of a whole batch through all ranks' parts of a network, by torch.distributed.pipelining.

    Args:
        module: this rank's part, called with (z (B, d), images (B, C, H, W)). Only z travels: every rank has the images.
        shapes: of a microbatch, what this part is given and what it gives. (Finding out for itself, the stage would run a
            microbatch of whatever lies in memory, which batch norm remembers.)
        loss: of (the last part's output, labels (B,)), a mean over the batch.

    Returns the function to call with (z, images, labels) of a whole batch; gradients are then those of the batch's mean loss.
    """
    given, gives = (torch.empty(shape, device=device, requires_grad=True) for shape in shapes)
    given.requires_grad_(rank > 0)  # the first part's has no gradient to send back
    stage = PipelineStage(module, rank, ranks, device, input_args=given, output_args=gives)
    made = SCHEDULES[schedule](stage, microbatches, loss_fn=loss)

    def run(z: Tensor, images: Tensor, labels: Tensor) -> None:
        first = (z,) if rank == 0 else ()
        last = {"target": labels} if rank == ranks - 1 else {}
        made.step(*first, **last, images=images, return_outputs=False)

    return run


def tiny_sum(device: torch.device) -> Callable[[], object]:
    """An all-reduce of one number, at each call."""
    number = torch.zeros((), device=device)
    return lambda: dist.all_reduce(number)
