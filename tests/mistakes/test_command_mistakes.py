"""Command lines and environments: the commands in this process, a few in real ones."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from noprop_dist import compare
from noprop_dist.bench import main as bench
from noprop_dist.demo import main as demo
from noprop_dist.predict import main as predict
from noprop_dist.train import main as train

PYTHON = [sys.executable, "-m"]
TORCHRUN = [*PYTHON, "torch.distributed.run", "--nproc_per_node=2"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--dry-run", "--ranks", "0"], ("0 ranks are none; give at least 1",)),
        (["--dry-run", "--ranks", "-3"], ("-3 ranks are none; give at least 1",)),
        (["--dry-run", "--ranks", "11"], ("11 ranks for 10 blocks", "raise --model.blocks")),
        (["--dry-run", "--ranks", "many"], ("--ranks", "'many'")),
        (["--dry-run", "--ranks", "2", "--method.name", "cnn"], ("method.name: cnn", "on one rank")),
        (["--ranks", "4"], ("--ranks goes with --dry-run", "torchrun")),
        (["\u2013\u2013model.blocks", "3"], ("'3' belongs to no setting",)),
        (["--model.blocks"], ("model.blocks", "expected one argument")),
        (["--train", "{epochs: 3"], ("train",)),
        (["--model.backbone", "paper-cnn"], ("paper-cnn needs images of at least 14 pixels", "use small-cnn")),
        (["--model.backbone", "gone.from.here:Net"], ("model.backbone", "No module named 'gone'")),
        (["--model.backbone", "..:Net"], ("model.backbone", "..:Net")),
        (["--parallel.device", "cuda"], ("torch sees no GPU", "use cpu or auto")),
        (["--parallel.backend", "nccl"], ("nccl needs a GPU", "use gloo or auto")),
        (["--parallel.cuda_graphs", "true"], ("parallel.cuda_graphs: there is no GPU", "leave it out")),
    ],
)
def test_command_lines(told, arguments, words):
    if {"cuda", "nccl", "--parallel.cuda_graphs"} & set(arguments) and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    told(words, train, *arguments)


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"WORLD_SIZE": "two"}, ("WORLD_SIZE is 'two'", "start ranks with torchrun")),
        ({"WORLD_SIZE": "0"}, ("WORLD_SIZE is '0'",)),
        ({"WORLD_SIZE": "2", "RANK": "5"}, ("RANK 5 is none of WORLD_SIZE 2", "start ranks with torchrun")),
        ({"WORLD_SIZE": "2", "RANK": "-1"}, ("RANK is '-1'",)),
        ({"WORLD_SIZE": "2", "RANK": "0"}, ("MASTER_ADDR", "start ranks with torchrun")),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "here", "MASTER_PORT": "http"}, ("http", "start ranks with torchrun")),
        ({"LOCAL_WORLD_SIZE": ""}, ("LOCAL_WORLD_SIZE is ''",)),
    ],
)
def test_environments_that_no_launcher_makes(told, monkeypatch, environment, words):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    told(("environment: ", *words), train)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["a/x.yaml", "missing.yaml"], ("missing.yaml: cannot read this card",)),
        (["a/x.yaml", "a"], ("a: cannot read this card",)),
        (["a/x.yaml", "a/x.yaml"], ("a/x.yaml is given twice",)),
        (["a/x.yaml", "b/a/x.yaml"], ("b/a/x.yaml: another card is called a/x too",)),
        (["a/x.yaml", "a/large.yaml"], ("a/large.yaml: model.backbone: paper-cnn needs images",)),
        (["a/x.yaml", "a/wrong.yaml"], ("a/wrong.yaml: train.epochs",)),
        (["a/x.yaml", "--train.epohcs", "3"], ("unknown setting train.epohcs; did you mean train.epochs?",)),
        (["a/x.yaml", "--optim.lr", "fast"], ("command line: optim.lr",)),
        (["a/x.yaml", "--seeds", "0", "0"], ("--seeds: 0 0 are not different numbers",)),
        (["a/x.yaml", "--seeds", "-1"], ("--seeds",)),
        (["a/x.yaml", "--seeds", "one"], ("--seeds: invalid int value: 'one'",)),
        (["a/x.yaml", "--ranks", "0"], ("a/x.yaml: 0 ranks are none; give at least 1",)),
        (["a/x.yaml", "--run.seed", "3"], ("use --out DIR and --seeds",)),
        (["a/x.yaml", "--data.name", "npz"], ("a/x.yaml: data.root",)),
        ([], ("required: cards",)),
    ],
)
def test_comparisons(told, tmp_path, monkeypatch, arguments, words):
    for name, card in {
        "a/x": {},
        "a/large": {"model": {"backbone": "paper-cnn"}},
        "a/wrong": {"train": {"epochs": "many"}},
    }.items():
        for folder in (tmp_path, tmp_path / "b"):
            path = folder / f"{name}.yaml"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(yaml.safe_dump(card))
    monkeypatch.delenv("NOPROP_DATA", raising=False)
    told(words, compare.main, *arguments)


def test_a_comparison_started_under_torchrun(told, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    told(("compare: it starts ranks itself; start it plainly", "--ranks N"), compare.main, "x.yaml")


def run(*command: str, cwd: Path, expect: int) -> str:
    result = subprocess.run(command, cwd=cwd, env=os.environ, capture_output=True, text=True, timeout=240)
    assert result.returncode == expect, f"exit {result.returncode}\n{result.stdout}\n{result.stderr}"
    return result.stderr


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("train --modle.blocks 3", "command line: unknown setting modle.blocks; did you mean model.blocks?"),
        (
            "evaluate nowhere",
            "nowhere: no such folder; name a run's folder, its model's, one of digits, mnist, or the hub's owner/name",
        ),
        ("compare missing.yaml", "missing.yaml: cannot read this card (No such file or directory); name a YAML file"),
    ],
)
def test_a_command_ends_with_one_line_and_exit_code_2(tmp_path, command, message):
    module, *arguments = command.split()
    assert run(*PYTHON, f"noprop_dist.{module}", *arguments, cwd=tmp_path, expect=2) == f"error: {message}\n"
    assert not list(tmp_path.iterdir()), "something was half-written"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--model.blocks 1", "2 ranks for 1 block: every rank owns at least one; start at most 1 rank"),
        ("--data.name npz --data.root none.npz", "data.root: none.npz does not exist; name an .npz file with --data.root"),
    ],
    ids=["every rank sees it", "the coordinator sees it"],
)
def test_of_several_ranks_only_the_one_that_explains_speaks(tmp_path, arguments, message):
    said = run(*TORCHRUN, "-m", "noprop_dist.train", *arguments.split(), cwd=tmp_path, expect=1)  # torchrun's own exit code
    assert re.findall("^.*error: .*$", said, re.MULTILINE) == [next(line for line in said.splitlines() if message in line)]
    assert f"error: {message}" in said and not re.search(r"File .*noprop_dist", said), "a traceback of ours"
    assert not list(tmp_path.iterdir()), "something was half-written"


def test_a_mistake_of_one_rank_alone_is_told_with_its_number(tmp_path):
    script = tmp_path / "start.sh"
    script.write_text(f'exec {sys.executable} -m noprop_dist.train $([ "$RANK" = 1 ] && echo --model.bloks 4)')
    said = run(*TORCHRUN, "--no-python", "bash", str(script), cwd=tmp_path, expect=1)
    assert "error: rank 1: command line: unknown setting model.bloks" in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--ranks", "0"], ("--ranks: 0", "give a positive number")),
        (["--ranks", "9"], ("--ranks: 9 for 8 blocks", "raise --model.blocks")),
        (["--rounds", "-1"], ("--rounds: -1", "give a positive number")),
        (["--seconds", "0"], ("--seconds: 0", "give a positive number")),
        (["--target", "95"], ("--target: 95", "below 1")),
        (["--only", "NoProp; DDP backprop"], ("--only: no contender 'NoProp'", "there are: ", "DDP backprop")),
        (["--link", "fast"], ("--link", "'fast' is no bandwidth such as 100Mbit")),
        (["--sweep", "model.blocks"], ("--sweep", "is no NAME=V1,V2")),
        (["--sweep", "model.blocks=4,none"], ("model.blocks", "integer")),
        (["--sweep", "model.block=4"], ("unknown setting model.block; did you mean model.blocks?",)),
        (["--sweep", "model.blocks=1"], ("--ranks: 2 for 1 blocks",)),
        (["--method.name", "cnn", "--model.blocks", "1"], ("method.name: cnn", "give dt, ct or fm")),
        (["--model.embedding", "learned"], ("model.embedding", "leave it out")),
        (["--out", "file"], ("file", "choose another --out")),
        (["--data.batch_size", "127"], ("--ranks: 2 cannot share 127 images", "a multiple of it")),
        (["gone.yaml"], ("gone.yaml",)),
    ],
)
def test_benchmarks(told, arguments, words):
    if "file" in arguments:
        Path("file").write_text("")
    told(words, bench, *arguments)


def test_blocks_are_not_balanced_where_there_are_none(told):
    told(("parallel.balance", "not to cnn"), train, "--method.name", "cnn", "--parallel.balance", "measured")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ("required: model, PICTURE",)),
        (["digits"], ("required: PICTURE",)),
        (["nowhere", "x.png"], ("nowhere: no such folder", "one of digits, mnist")),
        ([".", "x.png"], ("neither a model nor a checkpoint here", "name a run's folder or its model's")),
        (["digits", "x.png", "--top", "0"], ("--top: '0' is no number from 1 on",)),
        (["digits", "x.png", "--explain", "out.gif"], ("--explain: 'out.gif' does not end in .png or .svg",)),
        (["digits", "x.png", "--jsno"], ("unrecognized arguments: --jsno",)),
    ],
)
def test_pictures_to_be_named(told, arguments, words):
    told(words, predict, *arguments)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], ("nowhere: no such folder", "one of digits, mnist")),
        (["digits", "mnist"], ("unrecognized arguments: mnist",)),
        (["--port", "many"], ("--port: 'many' is no port from 1024 to 65535",)),
        (["--port", "80"], ("--port: '80' is no port from 1024 to 65535",)),
        (["--port", "65536"], ("--port: '65536' is no port from 1024 to 65535",)),
    ],
)
def test_pages(told, arguments, words):
    told(words, demo, *arguments)


def test_a_page_without_its_extra(told, monkeypatch):
    keep_the_environment(monkeypatch)
    monkeypatch.setitem(sys.modules, "gradio", None)
    told(("demo: it needs gradio; pip install 'noprop_dist[demo]'",), demo, "digits")


def test_a_page_at_a_port_that_is_taken(told, monkeypatch):
    pytest.importorskip("gradio")
    keep_the_environment(monkeypatch)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        told((f"--port: {port} is taken; name another one",), demo, "digits", "--port", port)


def keep_the_environment(monkeypatch):
    """The page's command sets these for its own process, which here is that of all tests."""
    for name in ("GRADIO_ANALYTICS_ENABLED", "GRADIO_TEMP_DIR", "NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "")
