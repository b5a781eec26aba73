"""A run under Ray Train: what its workers do, and what its driver waits for."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import secrets
import shutil
import socket
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train.collective
from cluster import share, storage
from pyarrow.fs import FileType
from ray import cloudpickle
from ray.train import (
    Checkpoint,
    CheckpointConfig,
    ControllerError,
    FailureConfig,
    LoggingConfig,
    RunConfig,
    ScalingConfig,
    TrainingFailedError,
    UserCallback,
    WorkerGroupError,
)
from ray.train.backend import Backend
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from noprop_dist import UserError, train
from noprop_dist.checkpoint import newest_whole
from noprop_dist.config import Card
from noprop_dist.interruption import Interruption
from noprop_dist.parallel.traffic import PeerError
from noprop_dist.parallel.world import Stopped
from noprop_dist.runs import Progress, RunFolder

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers need not have this file


@dataclass(frozen=True)
class Outcome:
    """What is left of a run: its summary, empty where it was stopped before its end, and the folder of Ray's copies."""

    summary: dict[str, Any]
    stopped: bool
    storage: str


def fit(card: Card, arguments: argparse.Namespace) -> Outcome:
    """Train a settled card on the workers of the cluster. SIGTERM and SIGINT stop it, saved.

    Raises UserError for a mistake that a worker found, PeerError when it failed too often.
    """
    fewest, most = arguments.workers
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)  # no worker's node that may go
    bell = ray.remote(num_cpus=0, max_restarts=-1, scheduling_strategy=here)(Bell).remote()
    trainer = TorchTrainer(
        work,
        train_loop_config={"card": card.model_dump(mode="json"), "bell": bell},
        torch_config=Environment(),
        scaling_config=ScalingConfig(
            num_workers=most if fewest == most else (fewest, most),
            use_gpu=arguments.gpus,
            resources_per_worker=share(arguments),
        ),
        run_config=RunConfig(
            name=card.run.name,
            storage_path=storage(arguments, card.run.dir),
            checkpoint_config=CheckpointConfig(num_to_keep=card.train.keep_checkpoints),
            failure_config=FailureConfig(max_failures=arguments.max_failures),
            callbacks=[Failures()],
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )
    wish = Wish(bell)
    with wish.listening(), ThreadPoolExecutor(1) as thread:  # in the main one Ray would take Ctrl-C for itself
        try:
            result = thread.submit(trainer.fit).result()
        except TrainingFailedError as error:
            if isinstance(error, ControllerError) and isinstance(error.controller_failure, UserError):
                raise error.controller_failure from None
            raise PeerError(f"{told(error)}; to go on, start it again with --run.name {card.run.name}") from None
    return Outcome(**result.return_value, storage=result.path)


def work(config: dict[str, Any]) -> dict[str, Any]:
    """What every worker does."""
    card, interruption = Card.model_validate(config["card"]), Interruption()
    folder = RunFolder(card.run.dir / str(card.run.name))
    resume = card.train.resume
    try:
        if ray.train.get_context().get_world_rank() == 0:
            threading.Thread(target=hear, args=(config["bell"], interruption), daemon=True).start()
            find_storage()
            fetch(folder)
            if resume == "never" and newest_whole(folder.checkpoints)[0]:  # started again after a failure
                resume = "auto"
        resume = ray.train.collective.broadcast_from_rank_zero(resume)
        card = card.model_copy(update={"train": card.train.model_copy(update={"resume": resume})})
        result = train(card, listener=report, interruption=interruption)
    except (UserError, PeerError, Stopped) as error:
        logging.disable()  # else Ray logs a traceback of what is told in a line
        if isinstance(error, Stopped):
            time.sleep(60)  # the coordinator's error is the one to tell
        raise
    return {"summary": result.summary, "stopped": result.stopped}


def find_storage() -> None:
    """Raise UserError where the driver's storage is not on this node."""
    place = ray.train.get_context().get_storage()
    if place.storage_filesystem.get_file_info(place.experiment_fs_path).type == FileType.NotFound:
        raise UserError(
            f"--storage: {place.storage_fs_path} is not there on {socket.gethostname()}, where rank 0 is; "
            "name a folder that all nodes share, or a URI such as s3://BUCKET/PATH"
        )


def fetch(folder: RunFolder) -> None:
    """Bring Ray's copy of the run here where it is ahead: the coordinator was on another node, or this one lost its disk."""
    copy = ray.train.get_checkpoint()
    newest = newest_whole(folder.checkpoints)[0]
    if copy and (newest is None or newest.name < Path(copy.path).name):
        with copy.as_directory() as there:
            shutil.copytree(there, folder.path, dirs_exist_ok=True)


def report(progress: Progress) -> None:
    """Tell Ray, and give it a copy of the run's folder, with its newest checkpoint alone, when there is a new one."""
    figures = dict(progress.figures)
    if not progress.checkpoint or ray.train.get_context().get_world_rank():
        ray.train.report(figures)
        return
    with tempfile.TemporaryDirectory() as view:
        newest = Path(view) / progress.folder.checkpoints.name
        newest.mkdir()
        (newest / progress.checkpoint.name).symlink_to(progress.checkpoint.absolute())
        for part in progress.folder.path.absolute().iterdir():
            if part.name != newest.name:
                (newest.parent / part.name).symlink_to(part)
        name = f"{progress.checkpoint.name}-{secrets.token_hex(2)}"  # Ray deletes old ones by name
        ray.train.report(figures, Checkpoint.from_directory(view), checkpoint_dir_name=name)


class Environment(TorchConfig):
    """Tells the workers where and as whom to meet, as torchrun does; the process groups are noprop_dist's own."""

    @property
    def backend_cls(self) -> type[Backend]:
        return _Environment


class _Environment(Backend):
    share_cuda_visible_devices = True  # a rank takes the GPU of its local number

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        worker_group.execute(set_environment, *worker_group.execute_single(0, free_address))


def free_address() -> tuple[str, int]:
    """Of this worker, a port that nobody uses."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return ray.util.get_node_ip_address(), probe.getsockname()[1]


def set_environment(address: str, port: int) -> None:
    """This worker's, as torchrun's workers have it."""
    context = ray.train.get_context()
    os.environ |= {
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
        "RANK": str(context.get_world_rank()),
        "WORLD_SIZE": str(context.get_world_size()),
        "LOCAL_RANK": str(context.get_local_rank()),
        "LOCAL_WORLD_SIZE": str(context.get_local_world_size()),
    }


class Failures(UserCallback):
    """Says which workers failed. A mistake of the user's ends the run: another try would find it too."""

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        for error in worker_exceptions.values():
            if isinstance(error, UserError):
                logging.disable()
                raise error
        for rank, error in worker_exceptions.items():
            print(f"rank {rank} failed: {told(error)}", flush=True)


def told(error: Exception) -> str:
    """A line that says why."""
    if isinstance(error, WorkerGroupError):
        causes = (f"rank {rank}: {told(cause)}" for rank, cause in error.worker_failures.items())
        return f"the workers failed once too often; {'; '.join(causes)}"
    cause = getattr(error, "health_check_failure", error)  # of a process that is gone
    return str(cause).strip().partition("\n")[0] or type(cause).__name__


class Bell:
    """By which the driver wishes the run to stop: an actor."""

    def __init__(self) -> None:
        self._rung, self._reason = asyncio.Event(), ""

    async def ring(self, reason: str) -> None:
        self._reason = reason
        self._rung.set()

    async def heard(self) -> str:
        await self._rung.wait()
        return self._reason


class Wish(Interruption):
    """A signal to the driver rings the bell."""

    def __init__(self, bell: Any) -> None:
        super().__init__()
        self._bell = bell

    def ask(self, reason: str) -> None:
        super().ask(reason)
        print(f"{reason}: the workers finish their step and save; a second signal stops at once", flush=True)
        self._bell.ring.remote(reason)


def hear(bell: Any, interruption: Interruption) -> None:
    """Pass the driver's wish on to the coordinator."""
    with contextlib.suppress(ray.exceptions.RayError):
        interruption.ask(ray.get(bell.heard.remote()))
