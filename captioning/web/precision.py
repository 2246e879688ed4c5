"""Smaller files for the models of a page, where they write the same captions.

Large weights are stored in half precision, or in 8 bits with one scale per row or column, and converted to float32 when
the model is loaded: onnxruntime folds the conversion into the weights. So every browser computes in float32, at the
speed of float32, and what is compared here is what the page runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from onnx import NodeProto, TensorProto

PRECISIONS = ("int8", "float16", "float32")
MIN_WEIGHTS = 1024  # smaller tensors, such as biases, stay float32
ENCODER, DECODER = ("encoder",), ("begin", "step")  # parts that share a precision

Models = Mapping[str, bytes]  # encoder, begin and step as ONNX files
Search = Callable[[Models], list[list[str]]]  # captions, as words, of the compared photos


class Choice(NamedTuple):
    """Models that were compared with the run, and the result."""

    precisions: dict[str, str]  # of encoder, begin and step
    models: dict[str, bytes]
    changed: float  # fraction of the captions that differ from the run's

    def __str__(self) -> str:
        size = sum(map(len, self.models.values())) / 1e6
        encoder, decoder = self.precisions["encoder"], self.precisions["step"]
        return f"encoder {encoder}, decoder {decoder}: {size:,.1f} MB, {self.changed:.1%} of the captions change"


def choices(models: Models, expected: Sequence[list[str]], search: Search) -> Iterator[Choice]:
    """Compare combinations of precisions with the captions `expected` of the run, the smallest files first."""
    stored = {precision: {name: store(model, precision) for name, model in models.items()} for precision in PRECISIONS}
    combinations = []
    for encoder, decoder in product(PRECISIONS, PRECISIONS):
        precisions = dict.fromkeys(ENCODER, encoder) | dict.fromkeys(DECODER, decoder)
        combinations.append((precisions, {name: stored[precisions[name]][name] for name in models}))
    for precisions, candidate in sorted(combinations, key=lambda pair: sum(map(len, pair[1].values()))):
        differs = [one != other for one, other in zip(expected, search(candidate), strict=True)]
        yield Choice(precisions, candidate, float(np.mean(differs)))


def store(model: bytes, precision: str) -> bytes:
    """An ONNX file whose large weights are stored in this precision, and converted to float32 when it is loaded."""
    if precision == "float32":
        return model
    from onnx import helper, load_model_from_string, numpy_helper

    program = load_model_from_string(model)
    write = _store_int8 if precision == "int8" else _store_float16
    initializers, conversions = [], []
    for weights in program.graph.initializer:
        values = numpy_helper.to_array(weights)
        if values.dtype == np.float32 and values.size >= MIN_WEIGHTS:
            tensors, nodes = write(weights.name, values)
            initializers += tensors
            conversions += nodes
        else:
            initializers.append(weights)
    old = program.graph
    graph = helper.make_graph([*conversions, *old.node], old.name, old.input, old.output, initializers)
    small = helper.make_model(graph, opset_imports=program.opset_import, ir_version=program.ir_version)
    return small.SerializeToString()


def _store_float16(name: str, values: np.ndarray) -> tuple[list[TensorProto], list[NodeProto]]:
    from onnx import TensorProto, helper, numpy_helper

    limit = np.finfo(np.float16).max
    half = values.clip(-limit, limit).astype(np.float16)
    cast = helper.make_node("Cast", [f"{name}.float16"], [name], to=TensorProto.FLOAT)
    return [numpy_helper.from_array(half, f"{name}.float16")], [cast]


def _store_int8(name: str, values: np.ndarray) -> tuple[list[TensorProto], list[NodeProto]]:
    from onnx import TensorProto, helper, numpy_helper

    codes, scales = quantize(values)
    tensors = [numpy_helper.from_array(codes, f"{name}.int8"), numpy_helper.from_array(scales, f"{name}.scales")]
    cast = helper.make_node("Cast", [f"{name}.int8"], [f"{name}.codes"], to=TensorProto.FLOAT)
    return tensors, [cast, helper.make_node("Mul", [f"{name}.codes", f"{name}.scales"], [name])]


def quantize(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weights -> codes int8 and scales float32, with weights = codes * scales up to rounding.

    One scale per index of the axis, the first or the second, along which the rounding errors are smaller.
    """
    best: tuple[np.ndarray, np.ndarray] | None = None
    smallest = np.inf
    for axis in range(min(2, values.ndim)):
        others = tuple(i for i in range(values.ndim) if i != axis)
        scales = np.maximum(np.abs(values).max(others, keepdims=True), 1e-12).astype(np.float32) / np.float32(127)
        codes = np.rint(values / scales)
        error = float(np.square(codes * scales - values).mean())
        if best is None or error < smallest:
            best, smallest = (codes.astype(np.int8), scales), error
    assert best is not None  # weights have at least one axis
    return best
