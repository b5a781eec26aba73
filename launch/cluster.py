"""What the Ray commands share: joining a cluster or starting one here, whether it has room, and a card that fits it."""

from __future__ import annotations

import argparse
import contextlib
import ipaddress
import os
import secrets
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

from noprop_dist.config import LOCAL_METHODS, Card, UserError, default_root
from noprop_dist.data import describe
from noprop_dist.launcher import check_baseline, resolve
from noprop_dist.nets.build import try_out

SETTINGS = {
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # seconds; a report may wait for so long
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # a card may name a module of the current directory
    "RAY_DEDUP_LOGS_SKIP_REGEX": "State API may be temp|class name: 'PreemptionWatcher'|Reporting training result",  # chatter
}
LOCAL = "local"
CURRENT = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()) / "ray" / "ray_current_cluster"  # what Ray calls auto
FREED_WITHIN = 15.0  # seconds that a cluster may take to notice what an earlier job has left
OWN_FILES = ("npz", "imagefolder")


def add_arguments(parser: argparse.ArgumentParser, unit: str) -> None:
    """Where to run, and what each ``unit`` gets."""
    parser.add_argument("card", nargs="?", type=Path, help="a YAML card; settings on the command line stand above it")
    parser.add_argument(
        "--address", help="a Ray cluster: auto, HOST:PORT or ray://HOST:10001; default: $RAY_ADDRESS, else one started here"
    )
    parser.add_argument("--gpus", action="store_true", help=f"a GPU for each {unit}")
    parser.add_argument("--cpus", type=float, default=1.0, help=f"CPUs for each {unit}, and its threads (default: 1)")
    parser.add_argument("--max-failures", type=int, default=3, help="how often Ray starts again what failed (default: 3)")
    parser.add_argument("--wait", action="store_true", help="wait for CPUs and GPUs that the cluster does not have (free) yet")
    parser.add_argument("--storage", help="a folder that all nodes share, or a URI such as s3://BUCKET/PATH, for Ray's copies")


def where(address: str | None) -> str:
    """The cluster's address: the given one, else $RAY_ADDRESS, else ``local``: started on this machine for this command."""
    address = address or os.environ.get("RAY_ADDRESS") or LOCAL
    if address == "auto" and CURRENT.exists():
        return CURRENT.read_text().strip()
    return address


def prepare(address: str | None) -> str:
    """Set up this process for Ray, which reads its environment when it is imported. Returns the cluster's address.

    Raises UserError where nothing answers there, or Ray is not installed.
    """
    address = where(address)
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    if on_loopback(address):  # whatever the name says: with it Ray takes 127.0.0.1 for this node's address
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    if address == "auto":
        os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", "2")  # not for a quarter of an hour
    if address == LOCAL:  # other clusters ask for a token where whoever started them has set this
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    try:
        import ray  # noqa: F401
    except ImportError:
        raise UserError("ray is not installed; pip install 'noprop_dist[ray]'") from None
    return address


def on_loopback(address: str) -> bool:
    """Whether the cluster is, or will be, one of this machine alone. Raises UserError where nothing answers."""
    if address in (LOCAL, "auto"):
        return address == LOCAL
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        with socket.create_connection((host, int(port)), timeout=10) as there:  # Ray itself would try for many minutes
            return ipaddress.ip_address(there.getpeername()[0]).is_loopback
    except (OSError, ValueError, OverflowError) as error:
        raise UserError(
            f"--address {address}: nothing answers there ({error}); give auto, HOST:PORT or ray://HOST:PORT"
        ) from None


@contextlib.contextmanager
def joined(address: str | None, *, logs: bool = True) -> Iterator[None]:
    """Be connected to the cluster at ``address`` (see :func:`where`); one of this machine is on loopback, and ends with it.

    ``logs``: print what the workers print. Raises UserError where there is no cluster.
    """
    address = prepare(address)
    import ray

    own = {"include_dashboard": False} if address == LOCAL else {}
    try:
        ray.init(address=address, logging_level="WARNING", log_to_driver=logs, **own)
    except (ConnectionError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--address {address}: no Ray cluster there ({reason}); start one with ray start --head") from None
    try:
        yield
    finally:
        ray.shutdown()


def storage(arguments: argparse.Namespace, folder: Path) -> str:
    """Where Ray keeps its copies: ``--storage``, else below ``folder``. Raises UserError where nothing can be written there."""
    from pyarrow.fs import FileSystem

    path = arguments.storage or str(folder / "ray")
    path = path if "://" in path else str(Path(path).expanduser().absolute())
    try:
        place, inner = FileSystem.from_uri(path)
        place.create_dir(inner)
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"--storage {path}: cannot be written to ({reason}); name a folder or a URI that can") from None
    return path


def check_card(card: Card, workers: int, arguments: argparse.Namespace) -> None:
    """Raise UserError for what can be known to be wrong here, before anything starts."""
    check_baseline(card, workers)
    if card.method.name in LOCAL_METHODS and workers > card.units:
        raise UserError(
            f"--workers: {workers} for {card.units} block{'s' * (card.units > 1)}: every worker owns at least one; "
            f"use at most {card.units} or raise --model.blocks"
        )
    if arguments.cpus <= 0 or arguments.max_failures < -1:
        raise UserError("command line: --cpus is more than 0, --max-failures at least 0, or -1 for no limit; mend them")
    if arguments.gpus and card.parallel.device == "cpu":
        raise UserError("--gpus: the card's parallel.device is cpu; leave one of the two out")
    if not arguments.gpus and card.parallel.device == "cuda":
        raise UserError("parallel.device: cuda needs GPUs from Ray; add --gpus")
    if card.train.resume == "never":
        raise UserError("train.resume: never would refuse the run's own checkpoints after a failure; give a new --run.name")
    if where(arguments.address) == LOCAL or card.data.name not in OWN_FILES:  # elsewhere only a worker sees them
        info = _describe(card.data)
        try_out(resolve(card, info), info.shape, len(info.classes))


_describe = cache(describe)


def settle(card: Card, arguments: argparse.Namespace) -> Card:
    """The card as all workers are to have it: absolute paths, a fixed name, a device, threads."""
    name = card.run.name or f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(2)}"
    root = None if card.data.name == "digits" else (card.data.root or default_root()).expanduser().absolute()
    threads = card.parallel.threads or max(1, int(arguments.cpus))
    device = "cuda" if arguments.gpus else "cpu"
    return card.model_copy(
        update={
            "run": card.run.model_copy(update={"dir": card.run.dir.absolute(), "name": name}),
            "data": card.data.model_copy(update={"root": root}),
            "parallel": card.parallel.model_copy(update={"threads": threads, "device": device}),
        }
    )


def refuse_fleeting(folder: Path, option: str) -> None:
    """Raise UserError for a folder that will be gone with the job."""
    if not folder.is_absolute() and "working_dir_files" in Path.cwd().parts:
        raise UserError(
            f"{option}: {folder} lies in the job's copy of the working directory, which Ray deletes; make it absolute"
        )


def share(arguments: argparse.Namespace) -> dict[str, float]:
    """What Ray is to set aside for each worker or trial."""
    return {"CPU": arguments.cpus} | ({"GPU": 1.0} if arguments.gpus else {})


def require(count: int, unit: str, each: Mapping[str, float], *, wait: bool) -> None:
    """Raise UserError where the cluster has no room for ``count`` units with ``each`` of its resources, all free.

    ``wait``: say it, and let Ray wait.
    """
    import ray
    from ray._private.state import available_resources_per_node  # ray.available_resources() does not tell the nodes apart

    deadline = time.monotonic() + FREED_WITHIN
    while True:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        free = list(available_resources_per_node().values())
        room = sum(_fitting(node, each) for node in nodes)
        if min(room, sum(_fitting(node, each) for node in free)) >= count:
            return
        if room < count or time.monotonic() > deadline:
            break
        time.sleep(0.5)
    has = ", ".join(
        f"{sum(node.get(name, 0) for node in nodes):g} {name} ({sum(node.get(name, 0) for node in free):g} free)"
        for name in each
    )
    wanted = " and ".join(f"{amount:g} {name}" for name, amount in each.items())
    missing = (
        f"the cluster lacks room for {count} {unit}{'s' * (count > 1)} of {wanted} each: "
        f"it has {has} on {len(nodes)} node{'s' * (len(nodes) > 1)}"
    )
    if not wait:
        raise UserError(f"{missing}; ask for less, add nodes, or --wait for them")
    print(f"{missing}; waiting", flush=True)


def _fitting(resources: Mapping[str, float], each: Mapping[str, float]) -> int:
    return min(int(resources.get(name, 0) / amount) for name, amount in each.items())
