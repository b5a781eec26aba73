"""What happens between ranks when something is wrong, and what a rank settles for itself."""

from __future__ import annotations

import os
import re
import signal
import socket
import threading

import pytest

from noprop_dist import UserError, train
from noprop_dist.config import ParallelCard
from noprop_dist.parallel.placement import place
from noprop_dist.parallel.traffic import PeerError
from noprop_dist.parallel.world import Stopped, World, choose_device, set_threads
from noprop_dist.trainer import Trainer


@pytest.mark.parametrize("fault", ["stalled", "dead", "stuck"])
def test_a_rank_that_stops_working_is_named_with_its_blocks_and_step(small_card, on_ranks, tmp_path, fault):
    card = small_card(parallel={"timeout": 3}, train={"log_every": 1})
    step = Trainer._step

    def work(rank: int, init_method: str) -> str:
        def faulty(self: Trainer, number: int, *args: object) -> None:
            if rank == 2 and number == 3:
                (tmp_path / "victim").write_text(str(os.getpid()))
                if fault == "stuck":
                    signal.pause()  # its heart goes on beating
                os.kill(os.getpid(), signal.SIGSTOP if fault == "stalled" else signal.SIGKILL)
            step(self, number, *args)

        Trainer._step = faulty  # type: ignore[method-assign]
        try:
            train(card, init_method)
        except PeerError as error:
            return str(error)
        finally:
            if rank == 0:
                os.kill(int((tmp_path / "victim").read_text()), signal.SIGKILL)
        return "nothing noticed"

    messages = on_ranks(4, work, check=False)
    assert isinstance(messages.pop(2), ChildProcessError)
    verdict = "alive but stuck:" if fault == "stuck" else "no sign of life from"
    named = rf"{verdict} rank 2 \(block 2\), last heard of at step [0-3]; its own blocks are saved in \S+"
    for message in messages:
        assert re.fullmatch(rf"rank \d \(block \d\) at step \d waited in vain for \w+ of step \d: {named}", message), message


def test_a_stalled_host_of_the_store_holds_nobody_up(on_ranks, tmp_path):
    """Rank 0 hosts it, as under Slurm. Torch's own waits for such a store never end."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

    def work(rank: int, _: str) -> str:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        world = World(ParallelCard(timeout=2), place([1.0] * 2, 2))
        if rank == 0:
            (tmp_path / "host").write_text(str(os.getpid()))
            world.exchange("here", True)
            os.kill(os.getpid(), signal.SIGSTOP)
        try:
            world.exchange("here", True)
            world.publish("word", lambda: "never said")
        except PeerError as error:
            return str(error)
        finally:
            os.kill(int((tmp_path / "host").read_text()), signal.SIGKILL)
        return "nothing noticed"

    host, other = on_ranks(2, work, check=False)
    assert isinstance(host, ChildProcessError)
    lost = r"lost (rank 0 \(block 0\)|another rank)"
    assert re.fullmatch(rf"rank 1 \(block 1\) at step 0 waited in vain for its word on '\S+': {lost}", other), other


def test_the_others_wait_patiently_while_the_coordinator_prepares_the_data(on_ranks):
    """Longer than the timeout, but with its heart beating."""

    def work(rank: int, init_method: str) -> str:
        world = World(ParallelCard(timeout=1), place([1.0] * 2, 2), init_method)
        word = world.publish("slow", lambda: threading.Event().wait(3) or "done", patient=True)
        world.exchange("end", True)
        return word

    assert on_ranks(2, work) == ["done", "done"]


def test_a_process_can_train_twice(small_card, on_ranks):
    def work(rank: int, init_method: str) -> list[int]:
        steps = [train(small_card(train={"steps": n}, run={"name": f"{n}"}), init_method).summary for n in (3, 5)]
        return [summary.get("steps") for summary in steps]

    assert on_ranks(2, work)[0] == [3, 5]


def test_a_mistake_that_only_the_coordinator_sees_stops_every_rank(small_card, on_ranks):
    card = small_card(data={"name": "npz", "root": "no-such-file.npz"})
    first, *others = on_ranks(3, lambda rank, init_method: train(card, init_method), check=False)
    assert isinstance(first, UserError) and "no-such-file.npz" in str(first)
    assert [type(other) for other in others] == [Stopped, Stopped]


@pytest.mark.parametrize(("section", "name"), [("optim", "lr"), ("train", "steps")])
def test_ranks_with_different_cards_are_told_so(small_card, on_ranks, section, name):
    def work(rank: int, init_method: str) -> None:
        train(small_card(**{section: {name: 1 + rank}, "parallel": {"timeout": 3}}), init_method)

    waiting, other = on_ranks(2, work, check=False)
    assert isinstance(waiting, PeerError) and "rank 1 (blocks 2-3)" in str(waiting)
    assert isinstance(other, UserError)
    assert str(other).startswith(f"rank 1: its card is not rank 0's: {section}.{name}: 1")


def test_ranks_agree_at_the_store_before_any_group_is_formed(on_ranks):
    def work(rank: int, init_method: str) -> tuple[str, list[int]]:
        world = World(ParallelCard(timeout=20), place([1.0] * 3, 3), init_method)
        return world.publish("word", lambda: f"from {rank}"), world.exchange("square", rank * rank)

    assert on_ranks(3, work) == [("from 0", [0, 1, 4])] * 3


def test_threads_are_the_cards_else_omp_num_threads_else_cores_by_local_ranks(monkeypatch):
    monkeypatch.setattr("torch.set_num_threads", lambda threads: None)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: range(8))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert set_threads(ParallelCard(threads=5)) == 5
    assert set_threads(ParallelCard()) == 3
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert set_threads(ParallelCard()) == 2


def test_nccl_only_where_every_local_rank_has_a_gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.distributed.is_nccl_available", lambda: True)
    assert choose_device(ParallelCard(), 1, 2)[1] == "nccl"
    device, backend = choose_device(ParallelCard(), 3, 4)
    assert (str(device), backend) == ("cuda:1", "gloo"), "four ranks share two GPUs"
    assert str(choose_device(ParallelCard(device="cpu"), 0, 1)[0]) == "cpu"
    with pytest.raises(UserError, match="nccl needs a GPU for each of the 4 local ranks"):
        choose_device(ParallelCard(backend="nccl"), 0, 4)
