"""Builds ONNX nodes, constants, loops and branches by name; knows ONNX, not the ops of dsv4c.

Every integer tensor in the graph is INT64 and every float FLOAT, so that two constants of a kind are all a
lowering ever needs. Names are unique over the whole model: a sub-graph sees the names around it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NewType

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

V = NewType("V", str)
"""The name of a tensor in the ONNX graph."""

Arg = V | int | float | Sequence[int] | None
"""An input of a node: a tensor, a constant (a scalar, or a list as INT64 [n]), or nothing."""

Body = Callable[[V, V | None], tuple[V | None, V | None]]
"""(iteration INT64 [], carried) -> (carried', scanned), one of the pair."""

Infos = Sequence[ValueInfoProto]
OPSET = 23
IR_VERSION = 11
CONTRIB = "com.microsoft"


class Graph:
    """A model under construction.

    Attributes:
        where: prefix of the names of new tensors, so that ONNX Runtime's messages name a layer.
        index: element type of the integers that are computed with.
    """

    def __init__(self) -> None:
        self.where = ""
        self._scopes: list[list[NodeProto]] = [[]]
        self._constants: dict[tuple[str, object], TensorProto] = {}
        self._tensors: dict[str, TensorProto] = {}
        self.index = TensorProto.INT64
        self._count = 0

    # ------------------------------------------------------------------------------- nodes

    def op(self, kind: str, *inputs: Arg, domain: str = "", **attrs: object) -> V:
        """Append a node with one output and return that."""
        return self.multi(kind, 1, *inputs, domain=domain, **attrs)[0]

    def multi(self, kind: str, count: int, *inputs: Arg, domain: str = "", **attrs: object) -> list[V]:
        """Append a node with `count` outputs."""
        outputs = [self._fresh(kind) for _ in range(count)]
        names = [self._name(i) for i in inputs]
        node = helper.make_node(kind, names, outputs, name=outputs[0], domain=domain, **attrs)
        self._scopes[-1].append(node)
        return outputs

    def alias(self, value: V, name: str) -> None:
        """Give `value` the name `name` at the model's border."""
        self._scopes[-1].append(helper.make_node("Identity", [value], [name], name=name))

    def matmul_t(self, x: V, w: V, alpha: float = 1.0) -> V:
        """alpha x w^T over the last two axes; w is read as it lies (a transposed copy would double it)."""
        return self.op("FusedMatMul", x, w, domain=CONTRIB, transB=1, alpha=alpha)

    def cast_index(self, x: V) -> V:
        """Integers of any type as those that are computed with."""
        return self.op("Cast", x, to=self.index)

    def top_k(self, x: V, k: Arg) -> tuple[V, V]:
        """The k largest of the last axis, descending, and where they are; ties go to the lower index."""
        values, places = self.multi("TopK", 2, x, [k] if isinstance(k, int) else k, axis=-1)
        return values, places

    def rms_norm(self, x: V, weight: V | None, eps: float, width: int = 0) -> V:
        """x / sqrt(mean(x^2) + eps) over the last axis, times `weight` [D] where given."""
        ones = weight or self.op("Expand", 1.0, [width])  # times 1 is exact
        return self.op("RMSNormalization", x, ones, axis=-1, epsilon=eps)

    def rotate(self, x: V, cos: V, sin: V, width: int, heads: int | None, halves: bool = False) -> V:
        """x [B,N,H,R] or, without heads, [B,N,R]: pairs of channels turned by the angles [B,N,R/2].

        Neighbouring channels are a pair or, with `halves`, channels i and i + R/2.
        """
        flat = x if heads is None else self.reshape(x, 0, 0, heads * width)
        turned = self.op("RotaryEmbedding", flat, cos, sin, interleaved=int(not halves), num_heads=heads or 1)
        return turned if heads is None else self.reshape(turned, 0, 0, heads, width)

    def dim(self, x: V, axis: int) -> V:
        """INT64 [1]: the size of one axis."""
        return self.op("Shape", x, start=axis, end=axis + 1)

    def shape(self, *dims: Arg) -> V:
        """INT64 [n] from sizes, each a number or INT64 [1]."""
        return self.op("Concat", *(([d] if isinstance(d, int) else d) for d in dims), axis=0)

    def reshape(self, x: V, *dims: Arg) -> V:
        """As ONNX Reshape: 0 keeps the size of that place, -1 infers it."""
        if all(isinstance(d, int) for d in dims):
            return self.op("Reshape", x, [d for d in dims if isinstance(d, int)])
        return self.op("Reshape", x, self.shape(*dims))

    def iota(self, count: V, *dims: int) -> V:
        """INT64 0 .. count-1 (count is INT64 [1]), reshaped to `dims` where given."""
        run = self.op("Range", 0, self.op("Squeeze", count), 1)
        return self.op("Reshape", run, list(dims)) if dims else run

    def gather_rows(self, x: V, index: V) -> V:
        """x [B,N,D] at index [B,...] -> [B,...,D]."""
        return self.op("GatherND", x, self.op("Unsqueeze", index, [-1]), batch_dims=1)

    # -------------------------------------------------------------------------- sub-graphs

    def loop(self, trips: V, carried: V | None, body: Body, scan: int = TensorProto.FLOAT) -> V:
        """`body` for i in 0 .. trips-1 (trips INT64 [1]).

        Returns the last carried FLOAT tensor, or the scanned tensors, of element type `scan`, joined along a
        new leading axis: a loop has one of the two.
        """
        with self._scope() as nodes:
            i, keep, state = self._fresh("i"), self._fresh("keep"), self._fresh("state")
            after, scanned = body(i, state if carried else None)
            out = after or scanned
            assert out is not None
            go, result = self.op("Identity", keep), self.op("Identity", out)
        inputs = [_info(i, TensorProto.INT64, []), _info(keep, TensorProto.BOOL, [])]
        if carried:
            inputs.append(_info(state, TensorProto.FLOAT))
        outputs = [_info(go, TensorProto.BOOL, []), _info(result, TensorProto.FLOAT if after else scan)]
        graph = helper.make_graph(nodes, self._fresh("body"), inputs, outputs)
        operands = [self.op("Squeeze", trips), None] + ([carried] if carried else [])
        return self.op("Loop", *operands, body=graph)

    def branch(self, condition: V, then: Callable[[], V], other: Callable[[], V]) -> V:
        """One of two FLOAT tensors; only its side is computed. `condition` is BOOL [] or [1]."""
        sides: list[GraphProto] = []
        for side in (then, other):
            with self._scope() as nodes:
                result = self.op("Identity", side())
            outputs = [_info(result, TensorProto.FLOAT)]
            sides.append(helper.make_graph(nodes, self._fresh("side"), [], outputs))
        return self.op("If", condition, then_branch=sides[0], else_branch=sides[1])

    @contextmanager
    def _scope(self) -> Iterator[list[NodeProto]]:
        self._scopes.append([])
        try:
            yield self._scopes[-1]
        finally:
            self._scopes.pop()

    # ------------------------------------------------------------------------------- model

    def model(self, inputs: Infos, outputs: Infos, weights: Sequence[TensorProto]) -> ModelProto:
        """The finished model."""
        initializers = [*self._constants.values(), *weights]
        graph = helper.make_graph(self._scopes[0], "step", inputs, outputs, initializers)
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="dsv4c")

    # ----------------------------------------------------------------------------- private

    def _fresh(self, kind: str) -> V:
        self._count += 1
        return V(f"{self.where}/{kind}.{self._count}")

    def _name(self, arg: Arg) -> str:
        if arg is None:
            return ""
        if isinstance(arg, str):
            return arg
        dtype = np.float32 if isinstance(arg, float) else np.int64
        array = np.array(arg, dtype)
        key = (array.dtype.str, array.tobytes() + bytes(array.ndim))
        if key not in self._constants:
            self._constants[key] = numpy_helper.from_array(array, f"constant.{len(self._constants)}")
        return str(self._constants[key].name)


def _info(name: str, dtype: int, shape: Sequence[Any] | None = None) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, dtype, shape)
