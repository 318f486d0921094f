"""Writes a float32 ONNX file with its weights in 8 or 4 bits.

Only weights are quantised. Activations stay float32, so every processor and every browser computes the same
outputs up to float32 rounding. If activations were quantised at run time, rounding would differ between
processors, and the differences would grow over the layers to the size of the quantisation error (measured in
docs/web.md). The graph has only standard operators. A runtime that folds constants, as ONNX Runtime does,
expands the weights of matrix products when it loads the file, and is as fast as in float32.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

FLOAT16_RANGE = (2.0**-14, 65504.0)
"""Smallest and largest number that float16 stores with full precision."""
CLIPPING = np.linspace(0.6, 1.0, 9)
"""With 4 bits, a row is clipped to that of these fractions of its largest value that has the least error."""


def quantise(source: str, target: str, embedding_bits: int = 8) -> None:
    """Writes the ONNX file ``source`` to ``target`` with int8 weights.

    There is one scale per output of a matrix product and one per row of an embedding table. With
    ``embedding_bits=4`` the largest embedding table, the word embeddings, has 4 bits per weight.
    """
    import onnx

    model = onnx.load(source)
    quantise_embeddings(model, embedding_bits)
    quantise_products(model)
    onnx.save(model, target)


def quantise_embeddings(model: Any, bits: int = 8) -> None:
    """Changes, in place, every ``Gather(table, ids)`` so that it gathers quantised rows and their scales."""
    tables = _tables(model.graph)
    gathers = [node for node in model.graph.node if node.op_type == "Gather" and node.input[0] in tables]
    names = list(dict.fromkeys(node.input[0] for node in gathers))
    largest = max(names, key=lambda name: tables[name].size, default=None)
    for name in names:
        four_bits = bits == 4 and name == largest and tables[name].shape[1] % 2 == 0
        values, scales = pack_rows(tables[name]) if four_bits else quantise_rows(tables[name])
        if FLOAT16_RANGE[0] <= scales.min() and scales.max() <= FLOAT16_RANGE[1]:
            # the rounding error, at most 1/2,000 of a value, is less than a tenth of a quantisation step
            scales = scales.astype(np.float16)
        _add_tensors(model.graph, {f"{name}_quantised": values, f"{name}_scales": scales})
        for node in gathers:
            if node.input[0] == name:
                _replace(model.graph, node, _four_bit_rows if four_bits else _eight_bit_rows)
    _remove_unused(model.graph, tables)


def quantise_products(model: Any) -> None:
    """Replaces, in place, the matrix of every ``MatMul`` and ``Gemm`` by ``Cast(int8 matrix) * scales``."""
    from onnx import TensorProto, helper

    graph, tables = model.graph, _tables(model.graph)
    products = [node for node in graph.node if node.op_type in ("MatMul", "Gemm") and node.input[1] in tables]
    for node in products:
        name = node.input[1]
        transposed = any(item.name == "transB" and item.i for item in node.attribute)  # one row per output
        values, scales = quantise_rows(tables[name] if transposed else tables[name].T)
        if not transposed:
            values, scales = values.T.copy(), scales.T.copy()
        _add_tensors(graph, {f"{name}_quantised": values, f"{name}_scales": scales})
        index = list(graph.node).index(node)
        node.input[1] = f"{name}_scaled"
        if not any(node.input[1] in other.output for other in graph.node):  # two products may share a matrix
            cast = helper.make_node("Cast", [f"{name}_quantised"], [f"{name}_float"], to=TensorProto.FLOAT)
            scale = helper.make_node("Mul", [f"{name}_float", f"{name}_scales"], [f"{name}_scaled"])
            graph.node.insert(index, scale)
            graph.node.insert(index, cast)
    _remove_unused(graph, tables)


def quantise_rows(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float32 [V, D] -> int8 [V, D] and scales float32 [V, 1]; symmetric: value = int8 * scale."""
    largest = np.abs(table).max(axis=1, keepdims=True)
    scales = np.where(largest > 0, largest / 127, 1).astype(np.float32)
    return np.rint(table / scales).astype(np.int8), scales


def pack_rows(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float32 [V, D] -> uint8 [V, D / 2] and scales float32 [V, 1]; value = (4 bits of a byte - 8) * scale.

    The low 4 bits of a row's bytes are its first D / 2 values, the high 4 bits the other values.
    """
    largest = np.abs(table).max(axis=1, keepdims=True)
    smallest_error = np.full(largest.shape, np.inf, np.float32)
    scales = np.ones_like(largest)
    for fraction in CLIPPING:
        scale = np.where(largest > 0, largest * fraction / 7, 1).astype(np.float32)
        error = ((np.clip(np.rint(table / scale), -8, 7) * scale - table) ** 2).sum(axis=1, keepdims=True)
        scales = np.where(error < smallest_error, scale, scales)
        smallest_error = np.minimum(error, smallest_error)
    halves = (np.clip(np.rint(table / scales), -8, 7) + 8).astype(np.uint8)
    low, high = np.split(halves, 2, axis=1)
    return low | (high << 4), scales.astype(np.float32)


def _eight_bit_rows(name: str, ids: str, out: str) -> list[Any]:
    from onnx import TensorProto, helper

    return [
        helper.make_node("Gather", [f"{name}_quantised", ids], [f"{out}_rows"], axis=0),
        helper.make_node("Cast", [f"{out}_rows"], [f"{out}_float"], to=TensorProto.FLOAT),
        *_times_scales(name, ids, out),
    ]


def _times_scales(name: str, ids: str, out: str) -> list[Any]:
    """Multiplies the rows of ``ids`` by their scales, with output ``out``.

    All scales are cast to float32 before any are gathered, because some GPUs have no float16.
    """
    from onnx import TensorProto, helper

    return [
        helper.make_node("Cast", [f"{name}_scales"], [f"{out}_all_scales"], to=TensorProto.FLOAT),
        helper.make_node("Gather", [f"{out}_all_scales", ids], [f"{out}_scales"], axis=0),
        helper.make_node("Mul", [f"{out}_float", f"{out}_scales"], [out]),
    ]


def _four_bit_rows(name: str, ids: str, out: str) -> list[Any]:
    """Unpacks the 4-bit values by float arithmetic, which every runtime has: high = floor(byte / 16)."""
    from onnx import TensorProto, helper

    numbers = {"sixteen": 16.0, "eight": 8.0}
    constants = [
        helper.make_node(
            "Constant", [], [f"{out}_{key}"], value=helper.make_tensor(key, TensorProto.FLOAT, [], [value])
        )
        for key, value in numbers.items()
    ]
    return [
        *constants,
        helper.make_node("Gather", [f"{name}_quantised", ids], [f"{out}_rows"], axis=0),
        helper.make_node("Cast", [f"{out}_rows"], [f"{out}_bytes"], to=TensorProto.FLOAT),
        helper.make_node("Div", [f"{out}_bytes", f"{out}_sixteen"], [f"{out}_shifted"]),
        helper.make_node("Floor", [f"{out}_shifted"], [f"{out}_high"]),
        helper.make_node("Mul", [f"{out}_high", f"{out}_sixteen"], [f"{out}_upper"]),
        helper.make_node("Sub", [f"{out}_bytes", f"{out}_upper"], [f"{out}_low"]),
        helper.make_node("Concat", [f"{out}_low", f"{out}_high"], [f"{out}_halves"], axis=-1),
        helper.make_node("Sub", [f"{out}_halves", f"{out}_eight"], [f"{out}_float"]),
        *_times_scales(name, ids, out),
    ]


def _tables(graph: Any) -> dict[str, np.ndarray]:
    """Returns name -> float32 matrix of the graph."""
    from onnx import TensorProto, numpy_helper

    return {
        item.name: numpy_helper.to_array(item)
        for item in graph.initializer
        if item.data_type == TensorProto.FLOAT and len(item.dims) == 2
    }


def _add_tensors(graph: Any, tensors: dict[str, np.ndarray]) -> None:
    from onnx import numpy_helper

    existing = {item.name for item in graph.initializer}
    new = [numpy_helper.from_array(array, name) for name, array in tensors.items() if name not in existing]
    graph.initializer.extend(new)


def _replace(graph: Any, gather: Any, rows: Callable[[str, str, str], list[Any]]) -> None:
    """Replaces a ``Gather`` by the nodes that ``rows(table name, name of ids, name of output)`` returns."""
    index = list(graph.node).index(gather)
    graph.node.remove(gather)
    for offset, new in enumerate(rows(gather.input[0], gather.input[1], gather.output[0])):
        graph.node.insert(index + offset, new)


def _remove_unused(graph: Any, tables: dict[str, np.ndarray]) -> None:
    used = {name for node in graph.node for name in node.input}
    for item in [item for item in graph.initializer if item.name in tables and item.name not in used]:
        graph.initializer.remove(item)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppresses the libraries' hints and deprecation warnings, about which a user can do nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)
