"""A model's mean path as one graph: pixels in, log-probabilities out. ONNX, also in int8, and torch.export.

onnx, onnxscript and onnxruntime are imported where they are used: they are an extra.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import logging
import operator
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from noprop_dist.chain import Segment, logits
from noprop_dist.config import Card, UserError, default_root
from noprop_dist.data import DataSet, Pixels
from noprop_dist.data.vision import SOURCES
from noprop_dist.model import NoPropModel
from noprop_dist.nets.block import Block
from noprop_dist.nets.own import explained
from noprop_dist.trained import open_its_data

INPUT, OUTPUT, FACTS = "images", "log_probabilities", "noprop.json"
OPSET, ROUNDS = 18, 21
QUANTISED = ["Conv", "Gemm", "MatMul", "MaxPool", "Relu", "Transpose", "Reshape"]
"""What int8 is for: the products, and what only passes their numbers on."""
Run = Callable[[Tensor], Tensor]
"""From uint8 images (B, C, H, W) to log-probabilities (B, m)."""


class Graph(nn.Module):
    """What :meth:`NoPropModel.forward` computes on the mean path, and nothing beside it."""

    def __init__(self, model: NoPropModel) -> None:
        super().__init__()
        self.model, self._card = model, model.card
        blocks = {index: cast(Block, block) for index, block in enumerate(model.blocks)}
        self._segment = Segment(model.card, blocks, model.labels.embedding, Pixels(model.card.data, model.info))

    def forward(self, images: Tensor) -> Tensor:
        """Log-probabilities (B, m) of uint8 images (B, C, H, W)."""
        labels = self.model.labels
        paths = torch.zeros(2, images.shape[0], labels.embedding.shape[1])  # no stochastic chain between the two
        paths, _ = self._segment.advance(self._segment.encode(images), paths, 0)
        return logits(self._card, labels, paths[0]).log_softmax(dim=-1)


def exportable(card: Card) -> Card:
    """The card as it is exported: in float32. Raises UserError for what no graph can hold."""
    path, solver = card.inference.path, card.inference.solver
    if path != "mean":
        raise UserError(
            f"inference.path: {path} draws noise, and a graph has none to draw from; export --inference.path mean,"
            f" or use NoPropModel for {path}"
        )
    if solver == "dopri5":
        raise UserError(
            "inference.solver: dopri5 chooses its steps as it goes, a graph's are fixed; use heun or rk4, and --inference.steps"
        )
    return card.model_copy(update={"train": card.train.model_copy(update={"precision": "fp32"})})


def facts(model: NoPropModel) -> dict[str, Any]:
    """What a file says of itself: the classes' names, and what goes in and comes out, in words."""
    shape = ", ".join(map(str, model.info.shape))
    return {
        "classes": list(model.info.classes),
        "input": f"{INPUT}: uint8 (batch, {shape}), pixels 0 to 255 of pictures like {model.info.name}'s; normalised within",
        "output": f"{OUTPUT}: float32 (batch, {len(model.info.classes)}), natural logarithms of the classes' probabilities",
        "method": f"NoProp, {model.card.method.name}, mean path",
    }


def trace(model: NoPropModel) -> torch.export.ExportedProgram:
    """The graph, for any number of images. Raises UserError where a user's own backbone cannot be traced."""
    images = torch.zeros(2, *model.info.shape, dtype=torch.uint8)
    graph: nn.Module = Graph(model).eval().requires_grad_(False)
    with quiet(), torch.no_grad(), explained(model.card.model.backbone, "torch.export", "make it traceable"):
        for _ in range(2):  # once as it is written, once without what need not be computed again
            program = torch.export.export(graph, (images,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
            graph = fold(program.module(check_guards=False))
    return program


def fold(graph: fx.GraphModule) -> fx.GraphModule:
    """Put numbers in the place of all that no image decides: a solver's times, what blocks make of them, the schedule.

    The slope of γ has to be: what differentiates it is understood by no other format.
    """
    known: dict[fx.Node, Any] = {}
    for node in graph.graph.nodes:
        if node.op == "get_attr":
            known[node] = operator.attrgetter(str(node.target))(graph)
        elif node.op == "call_function" and all(each in known for each in node.all_input_nodes):
            args, kwargs = (fx.map_arg(given, known.__getitem__) for given in (node.args, node.kwargs))
            known[node] = cast(Callable[..., Any], node.target)(*args, **kwargs)
    for number, node in enumerate(reversed(known)):  # users first
        if node.op == "call_function" and node.users and isinstance(known[node], Tensor):
            name = f"known_{number}"
            graph.register_buffer(name, known[node].detach().clone())
            with graph.graph.inserting_before(node):
                node.replace_all_uses_with(graph.graph.get_attr(name))
        if not node.users:
            graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code()  # such as each block's own guess
    graph.recompile()
    return graph


def to_torch(program: torch.export.ExportedProgram, model: NoPropModel) -> bytes:
    """A .pt2 file's bytes; the facts are its extra file FACTS."""
    buffer = io.BytesIO()
    with quiet():
        torch.export.save(program, buffer, extra_files={FACTS: json.dumps(facts(model))})
    return buffer.getvalue()


def open_torch(blob: bytes) -> Run:
    """What a .pt2 file computes."""
    with quiet():
        return cast(Run, torch.export.load(io.BytesIO(blob)).module())


def to_onnx(program: torch.export.ExportedProgram, model: NoPropModel) -> bytes:
    """An .onnx file's bytes, with the facts in its metadata. Raises UserError beyond what one file holds."""
    import onnx

    if sum(part.nbytes for part in model.state_dict().values()) > 2**31 - 2**20:
        raise UserError("--to onnx: these weights are more than the 2 GB that an ONNX file can hold; use --to torch-export")
    with quiet(), torch.no_grad():
        exported = torch.onnx.export(
            program, input_names=[INPUT], output_names=[OUTPUT], opset_version=OPSET, external_data=False, verbose=False
        )
    assert exported is not None
    proto = exported.model_proto
    graph = proto.graph
    for part in (*graph.node, *graph.input, *graph.output, *graph.initializer, graph):
        del part.metadata_props[:]  # of each node, where in the sources it came from: a third of the file
    del graph.value_info[:]
    for value in (*graph.input, *graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    words = {key: value if isinstance(value, str) else json.dumps(value) for key, value in facts(model).items()}
    onnx.helper.set_model_props(proto, words)
    onnx.checker.check_model(proto, full_check=True)
    return cast(bytes, proto.SerializeToString())


def to_int8(blob: bytes, images: Tensor) -> bytes:
    """An .onnx file's bytes with int8 weights and uint8 activations, in the ranges of uint8 ``images`` (N, C, H, W)."""
    import onnx
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
        rows = iter(torch.split(images, 100))

        def get_next(self) -> dict[str, Any] | None:
            return next(({INPUT: some.numpy()} for some in self.rows), None)

    with tempfile.TemporaryDirectory() as folder, quiet():
        path = Path(folder) / "model.onnx"
        quant_pre_process(onnx.load_from_string(blob), path)
        quantization.quantize_static(
            path, path, Reader(), per_channel=True, op_types_to_quantize=QUANTISED,
            activation_type=quantization.QuantType.QUInt8, weight_type=quantization.QuantType.QInt8,
        )  # fmt: skip
        proto = onnx.load(path)
    onnx.helper.set_model_props(proto, {each.key: each.value for each in onnx.load_from_string(blob).metadata_props})
    onnx.checker.check_model(proto, full_check=True)
    return cast(bytes, proto.SerializeToString())


def open_onnx(blob: bytes) -> Run:
    """What an .onnx file computes, on one thread of the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    session = onnxruntime.InferenceSession(blob, options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {INPUT: images.numpy()})[0])


def difference(found: Tensor, expected: Tensor) -> float:
    """The largest between log-probabilities, relative where they are beyond 1."""
    return float(((found - expected).abs() / expected.abs().clamp(min=1)).max())


@torch.no_grad()
def latencies(runs: Mapping[str, Run], batches: Sequence[Tensor]) -> dict[str, list[tuple[float, float, float]]]:
    """Of each format and batch the quartiles of its seconds; the formats take turns, ROUNDS times."""
    times: dict[str, list[list[float]]] = {name: [[] for _ in batches] for name in runs}
    for _ in range(ROUNDS + 1):  # the first warms up
        for place, images in enumerate(batches):
            for name, run in runs.items():
                begin = time.perf_counter()
                run(images)
                times[name][place].append(time.perf_counter() - begin)
    return {name: [tuple(statistics.quantiles(each[1:], n=4)) for each in rows] for name, rows in times.items()}  # type: ignore[misc]


def data_at_hand(model: NoPropModel, root: Path | None) -> DataSet | None:
    """The model's data, if it lies where ``root`` says, else if it happens to be there: nothing is fetched.

    Raises UserError where ``root`` does not hold it.
    """
    card = model.card.data
    if root or card.name == "digits":
        return open_its_data(model, root)
    place = (card.root or default_root()).expanduser()
    parts = SOURCES[card.name].places if card.name in SOURCES else ("",)
    if not any((place / part).exists() for part in parts):
        return None
    try:
        return open_its_data(model)
    except UserError:
        return None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what torch and onnxruntime say about themselves."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)


def check_extra() -> None:
    """Raises UserError where a library for ONNX is missing."""
    try:
        for name in ("onnx", "onnxscript", "onnxruntime"):  # torch.onnx needs the second
            importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"ONNX needs {error.name}, an extra; pip install 'noprop_dist[export]'") from None
