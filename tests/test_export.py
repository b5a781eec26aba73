"""Exported graphs are the model: in every format, for every method and image path, for any number of images."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from noprop_dist import Card, NoPropModel
from noprop_dist.command import answer
from noprop_dist.data import DataInfo
from noprop_dist.export import main
from noprop_dist.exporting import difference, exportable, open_onnx, to_onnx, to_torch, trace
from noprop_dist.nets.block import Block
from noprop_dist.trained import load, open_its_data

onnx = pytest.importorskip("onnx", reason="the extra export is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="the extra export is not installed")
pytest.importorskip("onnxscript", reason="the extra export is not installed")

WITHIN = 1e-4
BATCHES = (1, 2, 7, 100)


def untrained(shape=(1, 8, 8), **sections) -> NoPropModel:
    """Its answers differ from picture to picture: so does that of no fresh model, whose last layers are small."""
    channels = shape[0]
    info = DataInfo("npz", shape, ("a", "b", "c"), 9, 9, (0.3,) * channels, (0.4,) * channels)
    model = NoPropModel(Card.model_validate({"data": {"name": "npz"}} | sections), info).requires_grad_(False)
    torch.manual_seed(0)
    for name, tensor in model.named_parameters():
        if name.startswith("labels."):
            tensor.copy_(torch.randn_like(tensor))
        elif tensor.ndim > 1 and ("fuse" in name or "last" in name):
            tensor.mul_(4)
    model.card = exportable(model.card)
    return model


def same(run, model) -> None:
    for count in BATCHES:
        images = torch.randint(256, (count, *model.info.shape)) * torch.rand(count, 1, 1, 1)  # some brighter, some darker
        images = images.to(torch.uint8)
        expected = model(images)
        assert expected.isfinite().all()
        assert count == 1 or expected.std(dim=0).max() > 10 * WITHIN, "else this tests nothing"
        assert difference(run(images), expected) <= WITHIN


CASES = {
    "dt paper-cnn": {"model": {"blocks": 2, "backbone": "paper-cnn"}},
    "dt early exit": {"model": {"blocks": 3, "backbone": "strided-cnn"}, "inference": {"blocks": 2}},
    "dt bf16 radial": {"model": {"blocks": 1, "backbone": "small-cnn", "head": "radial"}, "train": {"precision": "bf16"}},
    "dt vit-tiny learned nearest": {
        "model": {"blocks": 1, "backbone": "vit-tiny", "embedding": "learned", "embedding_dim": 5, "head": "mlp"},
        "inference": {"readout": "nearest"},
    },
    "dt prototypes": {"model": {"blocks": 2, "backbone": "mlp", "embedding": "prototype"}},
    "ct": {"method": {"name": "ct"}, "model": {"backbone": "mlp"}, "inference": {"steps": 3}},
    "ct learned": {
        "method": {"name": "ct", "schedule": "learned"},
        "model": {"blocks": 2, "backbone": "mlp"},
        "inference": {"steps": 3},
    },
    "ct learned heun": {
        "method": {"name": "ct", "schedule": "learned"},
        "model": {"blocks": 2, "backbone": "mlp"},
        "inference": {"steps": 2, "solver": "heun"},
    },
    "fm prototypes": {
        "method": {"name": "fm"},
        "model": {"backbone": "small-cnn", "embedding": "prototype"},
        "inference": {"steps": 2},
    },
    "fm rk4": {
        "method": {"name": "fm"},
        "model": {"backbone": "mlp"},
        "inference": {"steps": 1, "solver": "rk4"},
    },
    "backprop resnet18": {"method": {"name": "backprop"}, "model": {"blocks": 1, "backbone": "resnet18"}},
    "cnn": {"method": {"name": "cnn"}, "model": {"backbone": "small-cnn"}},
    "adjoint": {"method": {"name": "adjoint", "ode_steps": 3}, "model": {"backbone": "mlp"}},
    "liquid": {"method": {"name": "liquid"}},
}
AS_ONNX = ("dt vit-tiny learned nearest", "ct learned heun")


@pytest.mark.parametrize("name", CASES)
def test_every_method_and_image_path_as_one_graph(name):
    model = untrained((3, 14, 16), **CASES[name])
    program = trace(model)
    same(program.module(), model)
    work = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    if name.startswith("ct"):
        assert all(each.startswith("aten.") for each in work), "what differentiates a schedule is for PyTorch alone"
    assert not {"aten.sin.default", "aten.linspace.default", "aten.softplus.default"} & work, "times are numbers"
    if name in AS_ONNX:
        same(open_onnx(to_onnx(program, model)), model)


def test_the_mean_path_alone_is_walked(monkeypatch):
    """No stochastic chain beside it, which would double the work."""
    rows, denoise = [], Block.denoise

    def watched(self, z, *rest):
        rows.append(z.shape[0])
        return denoise(self, z, *rest)

    monkeypatch.setattr(Block, "denoise", watched)
    model = untrained(model={"blocks": 3})
    program = trace(model)
    assert [int(each.node.hint) for each in rows] == [2, 2, 2], "rows of two images"
    work = [str(node.target) for node in program.graph.nodes]
    assert not [name for name in work if "rand" in name or "argmin" in name], "neither noise nor each block's own guess"


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> tuple[Path, NoPropModel, torch.Tensor]:
    """A folder with every format of the shipped model, that model, and 1,000 pictures."""
    folder = tmp_path_factory.mktemp("digits")

    def kept(program, model) -> bytes:
        (folder / "digits.onnx").write_bytes(to_onnx(program, model))
        (folder / "digits.pt2").write_bytes(to_torch(program, model))
        return (folder / "digits.onnx").read_bytes()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("noprop_dist.export.to_onnx", kept)
        assert answer(main, ["digits", "--to", "onnx", "--int8", "--out", str(folder)]) == 0
    model = load("digits")
    data = open_its_data(model)
    return folder, model, torch.cat([data.test.load()[0], data.train.load()[0]])[:1000]


def session_of(path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def test_digits_as_onnx_on_a_thousand_pictures(digits):
    folder, model, images = digits
    session = session_of(folder / "digits.onnx")
    found = session.run(["log_probabilities"], {"images": images.numpy()})[0]
    assert found.dtype == np.float32
    assert np.abs(found - model(images).detach().numpy()).max() < WITHIN
    for count in BATCHES:
        some = session.run(None, {"images": images[:count].numpy()})[0]
        assert np.abs(some - found[:count]).max() < WITHIN, "an image's answer is its own"


def test_digits_as_torch_export_on_a_thousand_pictures(digits):
    folder, model, images = digits
    facts = {"noprop.json": ""}
    network = torch.export.load(folder / "digits.pt2", extra_files=facts).module()
    assert (network(images) - model(images)).abs().max() < WITHIN
    for count in BATCHES:
        assert (network(images[:count]) - model(images[:count])).abs().max() < WITHIN
    facts = json.loads(facts["noprop.json"])
    assert facts["classes"] == list(model.info.classes)
    assert "uint8 (batch, 1, 8, 8)" in facts["input"]


def test_digits_in_int8_are_smaller_and_as_good(digits):
    """The shipped model names all 360 test pictures; int8 may miss one in a hundred."""
    folder, model, _ = digits
    images, labels = open_its_data(model).test.load()
    plain, small = folder / "digits.onnx", folder / "digits-int8.onnx"
    found = session_of(small).run(None, {"images": images.numpy()})[0]
    assert (found.argmax(1) == labels.numpy()).mean() >= 0.99
    assert small.stat().st_size < plain.stat().st_size / 2
    weights = [each for each in onnx.load(small).graph.initializer if len(each.dims) > 1]
    numbers = {kind: sum(np.prod(each.dims) for each in weights if (each.data_type == kind)) for kind in (1, 3)}
    assert numbers[onnx.TensorProto.INT8] > 20 * numbers[onnx.TensorProto.FLOAT]
    kernels = [each for each in weights if len(each.dims) == 4 and each.data_type == onnx.TensorProto.INT8]
    assert len(kernels) == 2 * len(model.blocks), "convolutions too"


@pytest.mark.parametrize("name", ["digits.onnx", "digits-int8.onnx"])
def test_a_file_is_whole_and_says_what_it_is(digits, name):
    folder, model, _ = digits
    assert sorted(path.name for path in folder.iterdir()) == ["digits-int8.onnx", "digits.onnx", "digits.pt2"]
    onnx.checker.check_model(folder / name, full_check=True)
    assert {each.domain: each.version for each in onnx.load(folder / name).opset_import}[""] == 18
    session = session_of(folder / name)
    (given,), (result,) = session.get_inputs(), session.get_outputs()
    assert (given.name, given.type, given.shape) == ("images", "tensor(uint8)", ["batch", 1, 8, 8])
    assert (result.name, result.type, result.shape) == ("log_probabilities", "tensor(float)", ["batch", 10])
    facts = session.get_modelmeta().custom_metadata_map
    assert json.loads(facts["classes"]) == list(model.info.classes)
    assert "normalised within" in facts["input"] and "logarithms" in facts["output"]


@pytest.mark.skipif(not (Path(os.environ.get("NOPROP_DATA", "")) / "MNIST").exists(), reason="no MNIST in NOPROP_DATA")
def test_mnist_as_onnx_on_a_thousand_pictures():
    model = load("mnist")
    images = open_its_data(model).test.load()[0][:1000]
    assert (open_onnx(to_onnx(trace(model), model))(images) - model(images)).abs().max() < WITHIN


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """Folder of an untrained ct model whose data are nowhere."""
    folder = tmp_path_factory.mktemp("saved") / "mine"
    untrained(method={"name": "ct"}, model={"backbone": "mlp"}, inference={"steps": 2}).save(folder)
    return folder


def test_the_command_says_what_it_did_and_nothing_else(saved, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    Path("mine.pt2").write_text("an older one")
    assert answer(main, [str(saved), "--to", "torch-export", "--inference.steps", "3"]) == 0
    told = capfd.readouterr()
    assert told.err == ""
    assert [path.name for path in tmp_path.iterdir()] == ["mine.pt2"]
    for words in ("1,000 pictures of random pixels", "No accuracy", "torch.export", 'torch.export.load("mine.pt2"'):
        assert words in told.out
    code = told.out[told.out.rindex("    import json") :].replace("\n    ", "\n").strip()
    exec(code, {})
    assert capfd.readouterr().out.strip().startswith("['"), "the snippet runs as it is printed"


def test_comparing_writes_nothing(saved, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert answer(main, [str(saved), "--compare"]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in ("PyTorch", "ONNX", "torch.export"))
    assert "int8" not in said, "there is nothing to calibrate it by"
    assert not any(tmp_path.iterdir())


def test_a_graph_that_differs_is_not_written(saved, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("noprop_dist.export.open_torch", lambda blob: lambda images: torch.zeros(len(images), 3))
    assert answer(main, [str(saved), "--to", "torch-export", "--out", str(tmp_path)]) == 2
    assert "torch.export: differs from PyTorch by" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["gone", "--to", "onnx"], "gone: no such folder"),
        (["digits"], "one of the arguments --to --compare is required"),
        (["digits", "--to", "tflite"], "invalid choice: 'tflite'"),
        (["digits", "--to", "onnx", "--inference.path", "stochastic"], "inference.path: stochastic draws noise"),
        (["digits", "--to", "onnx", "--inference.path", "average"], "inference.path: average draws noise"),
        (["MINE", "--to", "onnx", "--inference.solver", "dopri5"], "use heun or rk4"),
        (["digits", "--to", "onnx", "--inference.samples", "5"], "inference.samples: only stochastic chains"),
        (["digits", "--to", "onnx", "--model.blocks", "3"], "cannot be exported with model.blocks: 4 there, 3 here"),
        (["digits", "--to", "onnx", "--inference.blocks", "9"], "inference.blocks: 9 is more than model.blocks 4"),
        (["digits", "--to", "torch-export", "--int8"], "use --to onnx --int8"),
        (["digits", "--compare", "--int8"], "leave --int8 and --out out"),
        (["digits", "--compare", "--out", "x"], "leave --int8 and --out out"),
        (["MINE", "--to", "onnx", "--int8"], "--int8: training pictures are needed"),
        (["MINE", "--to", "onnx", "--data.root", "nowhere.npz"], "data.root: nowhere.npz does not exist"),
        (["digits", "--to", "onnx", "--out", "x.pt2"], "x.pt2 does not end in .onnx"),
        (["digits", "--to", "onnx", "--out", "file/x.onnx"], "file: is a file, where a folder belongs"),
        (["digits", "--to", "onnx", "--out", "folder"], "is a folder, where a file belongs"),
    ],
)
def test_mistakes(saved, tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("folder/digits.onnx").mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    assert answer(main, [str(saved) if word == "MINE" else word for word in arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and words in lines[0]
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_extra_is_named(saved, tmp_path, monkeypatch, capsys, name):
    monkeypatch.setitem(sys.modules, name, None)
    assert answer(main, [str(saved), "--to", "onnx", "--out", str(tmp_path)]) == 2
    assert f"ONNX needs {name}, an extra; pip install 'noprop_dist[export]'" in capsys.readouterr().err


def test_a_backbone_that_cannot_be_traced_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("odd.py").write_text(
        "from torch import nn\n\nclass Net(nn.Module):\n    def __init__(self, shape, dropout):\n        super().__init__()\n"
        "    def forward(self, x):\n        return x.flatten(1) * (2.0 if x.sum() > 0 else 1.0)\n"
    )
    untrained(model={"blocks": 1, "backbone": "odd:Net"}).save("mine")
    assert answer(main, ["mine", "--to", "torch-export"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "model.backbone: odd:Net: torch.export raised" in lines[0]
