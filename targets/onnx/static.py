"""The graph of a step whose every size is a number: sizes fold, loops unroll, and nothing has two forms.

For consumers that compile ahead of time for fixed shapes and take few nodes. Every node is held to the
dialect when it is made, so an error names the layer. Shapes inside the graph are what ONNX itself infers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from onnx import FunctionProto, ModelProto, TensorProto, ValueInfoProto, defs, helper, numpy_helper, parser
from onnx.shape_inference import infer_node_outputs

from dsv4c.errors import TargetError
from dsv4c.ir.formats import Scheme
from dsv4c.ir.graph import Op, Value

from . import static_codes, static_norms
from .dialect import INTEGERS, LATER, Dialect, VendorNode
from .folding import fold
from .graph import Arg, Body, Infos
from .lowering import Context, V
from .stored import Stored

if TYPE_CHECKING:
    from .static_int8 import Quantised

Arr = npt.NDArray[Any]
Type = tuple[int, tuple[int, ...]]
"""TensorProto code and sizes."""

_SIZES = {
    "Reshape": (1,), "Expand": (1,), "Unsqueeze": (1,), "Squeeze": (1,), "Split": (1,), "Slice": (1, 2, 3, 4),
    "TopK": (1,), "ReduceSum": (1,), "ReduceMax": (1,), "ReduceMean": (1,), "ReduceSumSquare": (1,),
}  # fmt: skip
"""Inputs that are sizes or axes, which ONNX wants as INT64 whatever the indices are."""

_COMPARISONS = frozenset({"GreaterOrEqual", "LessOrEqual"})
"""ONNX declares these by a function, and infers no shape for them."""

_AXES_BY_ATTRIBUTE = frozenset({"ReduceMax", "ReduceMean", "ReduceSumSquare"})
"""Reductions whose axes are an attribute before opset 18."""


class StaticContext(Context):
    """A graph under construction in one dialect.

    Attributes:
        inputs, outputs: the border of the model, in order.
        probes: layer -> the tensor of its residual streams, for checks.
        quantised: numbers that came from INT8 codes -> those.
        halves: FLOAT numbers that came from BFLOAT16 or FLOAT16 -> those.
    """

    def __init__(self, dialect: Dialect) -> None:
        super().__init__()
        self.dialect = dialect
        self.index = INTEGERS[dialect.index]
        self.inputs: list[ValueInfoProto] = []
        self.outputs: list[ValueInfoProto] = []
        self.probes: dict[str, V] = {}
        self.quantised: dict[V, Quantised] = {}
        self.halves: dict[V, V] = {}
        later = [helper.make_opsetid(LATER, dialect.runs_as)] if dialect.runs_as else []
        self._opsets = [helper.make_opsetid("", dialect.opset), *later]
        self._types: dict[str, Any] = {}
        self._known: dict[str, Arr] = {}
        self._stored: dict[Value, Stored] = {}
        self._scales: dict[Value, tuple[Stored, Scheme]] = {}
        self._declared: dict[str, TensorProto] = {}
        self._functions: dict[str, FunctionProto] = {}

    # -------------------------------------------------------------------------- what there is

    def declare(self, name: str, element: int, shape: Sequence[int]) -> V:
        """A tensor that comes from outside: an argument or a weight."""
        self.dialect.check_type(element, len(shape), name, self.where)
        self._types[name] = helper.make_tensor_type_proto(element, list(shape))
        return V(name)

    def holds(
        self, value: Value, stored: Stored, scales: Stored | None = None, scheme: Scheme | None = None
    ) -> None:
        """Say where the bytes of a weight lie, or its codes and scales; declared when something reads it."""
        self._stored[value] = stored
        if scales and scheme:
            self._scales[value] = scales, scheme

    def tensor(self, op: Op, index: int) -> V:
        """Operand `index` as FLOAT numbers, or the integers it is; decoded where it stands."""
        value = op.operands[index]
        if value not in self._stored:
            return super().tensor(op, index)
        held, scheme = self.view(op, index), self.scheme(op, index)
        if scheme is not None:
            return static_codes.decoded(self, held, self.scales(op, index), scheme)
        return self.op("Cast", held, to=TensorProto.FLOAT) if self.is_half(op, index) else held

    def scheme(self, op: Op, index: int) -> Scheme | None:
        """How a weight operand that is held as codes and scales is; None for one that is held as numbers."""
        found = self._scales.get(op.operands[index])
        return found[1] if found else None

    def is_half(self, op: Op, index: int) -> bool:
        """Whether a weight operand is held as FLOAT16 numbers."""
        stored = self._stored.get(op.operands[index])
        return stored is not None and stored.element == TensorProto.FLOAT16

    def scales(self, op: Op, index: int, *shape: int) -> V:
        """The scales of a weight operand that is held as codes, as they lie or under another shape."""
        return self._view(self._scales[op.operands[index]][0], shape)

    def view(self, op: Op, index: int, *shape: int) -> V:
        """A weight operand, numbers or codes, its bytes seen under another shape where one is given."""
        return self._view(self._stored[op.operands[index]], shape)

    def _view(self, stored: Stored, shape: tuple[int, ...]) -> V:
        dims = shape or stored.shape
        name = stored.name if dims == stored.shape else f"{stored.name}:{'x'.join(map(str, dims))}"
        if name not in self._declared:
            self._declared[name] = stored.declare(name, dims)
            self.declare(name, stored.element, dims)
        return V(name)

    def known(self, x: V) -> Arr | None:
        """The number or numbers behind a tensor that was folded."""
        return self._known.get(x)

    def shape_of(self, x: V) -> tuple[int, ...]:
        """The sizes of a tensor."""
        if x in self._known:
            return self._known[x].shape
        return tuple(d.dim_value for d in self._types[x].tensor_type.shape.dim)

    def element_of(self, x: V) -> int:
        """The TensorProto code of a tensor's elements; of a folded one, what it will have as an operand."""
        if x in self._known:
            kind: int = TensorProto.FLOAT if self._known[x].dtype.kind == "f" else self.index
            return kind
        element: int = self._types[x].tensor_type.elem_type
        return element

    # ------------------------------------------------------------------------------- nodes

    def multi(self, kind: str, count: int, *inputs: Arg, domain: str = "", **attrs: object) -> list[V]:
        if kind == "Shape":
            assert isinstance(inputs[0], str)
            sizes = np.array(self.shape_of(inputs[0]), np.int64)
            return [self._constant(sizes[slice(attrs.get("start"), attrs.get("end"))])]
        values = [self._value(i) for i in inputs]
        if self._changes_nothing(kind, inputs, values):
            assert isinstance(inputs[0], str)
            return [V(inputs[0])]
        if all(v is not None for v in values) and count == 1:
            folded = fold(kind, values, attrs)
            if folded is not None:
                return [self._constant(folded)]
        return self._node(kind, count, inputs, values, domain, attrs)

    def _node(
        self, kind: str, count: int, inputs: Sequence[Arg], values: list[Arr | None], domain: str,
        attrs: dict[str, object],
    ) -> list[V]:  # fmt: skip
        if kind in _AXES_BY_ATTRIBUTE and self.dialect.opset < 18 and len(inputs) > 1:
            assert values[1] is not None
            attrs, inputs, values = {**attrs, "axes": values[1].tolist()}, inputs[:1], values[:1]
        self.dialect.check(domain, kind, self.where)
        operands = enumerate(zip(inputs, values, strict=True))
        names = [self._operand(kind, i, x, v) for i, (x, v) in operands]
        outputs = [self._fresh(kind) for _ in range(count)]
        node = helper.make_node(kind, names, outputs, name=outputs[0], domain=domain, **attrs)
        self._scopes[-1].append(node)
        if not domain:
            self._infer(node, names)
        return outputs

    def _changes_nothing(self, kind: str, inputs: Sequence[Arg], values: list[Arr | None]) -> bool:
        """Whether a tensor would only be given the shape it has, or be cut where it ends."""
        if kind not in ("Reshape", "Expand", "Slice") or values[0] is not None or values[1] is None:
            return False
        assert isinstance(inputs[0], str)
        sizes = self.shape_of(V(inputs[0]))
        if kind != "Slice":
            return tuple(values[1].tolist()) == sizes
        assert values[2] is not None and values[3] is not None
        rest = zip(values[3].tolist(), values[1].tolist(), values[2].tolist(), strict=True)
        return all(start == 0 and stop >= sizes[axis] for axis, start, stop in rest)

    def _infer(self, node: Any, names: Sequence[str]) -> None:
        if node.op_type in _COMPARISONS:
            sizes = np.broadcast_shapes(*(self.shape_of(V(n)) for n in names))
            self._types[node.output[0]] = helper.make_tensor_type_proto(TensorProto.BOOL, list(sizes))
            return
        schema = defs.get_schema(node.op_type, self.dialect.runs_as or self.dialect.opset, "")
        data = {n: self._tensors[n] for n in names if n in self._tensors}
        types = {n: self._types[n] for n in names if n}
        found = infer_node_outputs(
            schema, node, types, data, opset_imports=self._opsets[:1], ir_version=self.dialect.ir_version
        )
        for name, type_ in found.items():
            dims = type_.tensor_type.shape.dim
            if not type_.tensor_type.HasField("shape") or any(not d.HasField("dim_value") for d in dims):
                raise TargetError(f"{node.op_type} has no static shape", where=self.where)
            self.dialect.check_type(type_.tensor_type.elem_type, len(dims), node.op_type, self.where)
            self._types[name] = type_

    def _value(self, arg: Arg) -> Arr | None:
        if arg is None:
            return None
        if isinstance(arg, str):
            return self._known.get(arg)
        return np.array(arg, np.float32 if isinstance(arg, float) else np.int64)

    def constant(self, value: Arr) -> V:
        """Numbers that are known, as a tensor of the graph where something reads them."""
        return self._constant(value)

    def _constant(self, value: Arr) -> V:
        name = self._fresh("constant")
        self._known[name] = value
        return name

    def _operand(self, kind: str, position: int, arg: Arg, value: Arr | None) -> str:
        """The name of an input; a constant becomes a tensor of the type that its place asks for."""
        if arg is None:
            return ""
        if value is None:
            assert isinstance(arg, str)
            return arg
        if value.dtype.kind == "f":
            element = TensorProto.FLOAT
        elif value.dtype.kind == "b":
            element = TensorProto.BOOL
        elif position in _SIZES.get(kind, ()):
            element = TensorProto.INT64
        else:
            element = self.index
        return self._tensor_of(value, element)

    def _tensor_of(self, value: Arr, element: int) -> str:
        array = np.ascontiguousarray(value, helper.tensor_dtype_to_np_dtype(element)).reshape(value.shape)
        key = (array.dtype.str, array.tobytes() + bytes(array.shape.__repr__(), "ascii"))
        if key not in self._constants:
            tensor = numpy_helper.from_array(array, f"constant.{len(self._constants)}")
            self._constants[key] = self._tensors[tensor.name] = tensor
            self.declare(tensor.name, element, array.shape)
        return str(self._constants[key].name)

    # ------------------------------------------------------------------------ what has two forms

    def matmul_t(self, x: V, w: V, alpha: float = 1.0) -> V:
        """alpha x w^T; a stored matrix stays as it lies, by Gemm over the rows of x."""
        sizes, (n, k) = self.shape_of(x), self.shape_of(w)[-2:]
        if len(self.shape_of(w)) == 2 and w in self._declared:
            flat = self.op("Reshape", x, [prod(sizes[:-1]), k])
            y = self.op("Gemm", flat, w, transB=1, alpha=alpha)
            return self.op("Reshape", y, [*sizes[:-1], n])
        order = [*range(len(self.shape_of(w)) - 2), len(self.shape_of(w)) - 1, len(self.shape_of(w)) - 2]
        y = self.op("MatMul", x, self.op("Transpose", w, perm=order))
        return y if alpha == 1.0 else self.op("Mul", y, alpha)

    def cast_index(self, x: V) -> V:
        return x if self.element_of(x) == self.index else self.op("Cast", x, to=self.index)

    def top_k(self, x: V, k: Arg) -> tuple[V, V]:
        values, places = self.multi("TopK", 2, x, k if not isinstance(k, int) else [k], axis=-1)
        return values, self.cast_index(places)

    def rms_norm(self, x: V, weight: V | None, eps: float, width: int = 0) -> V:
        return static_norms.rms_norm(self, x, weight, eps, width)

    def rotate(self, x: V, cos: V, sin: V, width: int, heads: int | None, halves: bool = False) -> V:
        if halves:
            raise TargetError("rotary of halves has no fixed shapes", where=self.where, allowed="pairs")
        return static_norms.rotate(self, x, cos, sin, width, heads or 1)

    def gather_rows(self, x: V, index: V) -> V:
        """x [B,N,D] at index [B,...] -> [B,...,D], by plain Gather over the joined rows."""
        b, n, d = self.shape_of(x)
        if b > 1:
            base = [i * n for i in range(b)]
            ones = [1] * (len(self.shape_of(index)) - 1)
            index = self.op("Add", index, self.op("Reshape", base, [b, *ones]))
        return self.op("Gather", self.op("Reshape", x, [b * n, d]), index, axis=0)

    def token_blocks(
        self, tokens: V, per_token: V, cap: int, body: Callable[[V, V], V], integers: bool = False
    ) -> V:
        known = self.known(tokens), self.known(per_token)
        assert known[0] is not None and known[1] is not None
        count, held = int(known[0].item()), int(known[1].item())
        step = max(1, min(self.dialect.held // max(held, 1), cap, count))
        parts = []
        for start in range(0, count, step):
            length = min(step, count - start)
            parts.append(body(self._constant(np.array([start])), self._constant(np.array([length]))))
        return parts[0] if len(parts) == 1 else self.op("Concat", *parts, axis=1)

    def loop(self, trips: V, carried: V | None, body: Body, scan: int = TensorProto.FLOAT) -> V:
        raise TargetError(f"{self.dialect.name} has no loops", where=self.where)

    def branch(self, condition: V, then: Callable[[], V], other: Callable[[], V]) -> V:
        """Always `then`: a choice at run time would need a second form of everything behind it."""
        return then()

    def vendor(
        self, role: str, inputs: Sequence[V | None], types: Sequence[Type | None], **attrs: object
    ) -> list[V]:
        """A node of the dialect's own, which carries its meaning as a function.

        Args:
            types: element type and sizes per output; None for one that nobody reads.
        """
        node = self.dialect.vendor[role]
        self.dialect.check(node.domain, node.name, self.where)
        names = [self._operand(node.name, i, x, self._value(x)) for i, x in enumerate(inputs)]
        outputs = [self._fresh(node.name) if t else V("") for t in types]
        self._scopes[-1].append(
            helper.make_node(node.name, names, outputs, name=outputs[0], domain=node.domain, **attrs)
        )
        for name, type_ in zip(outputs, types, strict=True):
            if type_:
                self.declare(name, *type_)
        if node.body:
            self._functions.setdefault(f"{node.domain}::{node.name}", self._function(node))
        return outputs

    def _function(self, node: VendorNode) -> FunctionProto:
        return parser.parse_function(node.text(self.dialect.opset))

    # ------------------------------------------------------------------------------- model

    def model(self, inputs: Infos, outputs: Infos, weights: Sequence[TensorProto] = ()) -> ModelProto:
        initializers = [*self._constants.values(), *self._declared.values(), *weights]
        graph = helper.make_graph(self._live_nodes(outputs), "step", inputs, outputs, initializers)
        domains = sorted({f.domain for f in self._functions.values()})
        versions = [helper.make_opsetid(d, self.dialect.version_of(d)) for d in domains]
        return helper.make_model(
            graph,
            opset_imports=[*self._opsets, *versions],
            ir_version=self.dialect.ir_version,
            producer_name="dsv4c",
            functions=list(self._functions.values()),
        )

    def _live_nodes(self, outputs: Infos) -> list[Any]:
        """The nodes that an output or a probe depends on, in order."""
        wanted, kept = {o.name for o in outputs} | set(self.probes.values()), []
        for node in reversed(self._scopes[0]):
            if not wanted.isdisjoint(node.output):
                kept.append(node)
                wanted.update(node.input)
        return kept[::-1]

    def border(self) -> dict[str, Any]:
        """Names of the inputs; name, NumPy dtype and sizes of the outputs."""
        outputs = []
        for info in self.outputs:
            type_ = info.type.tensor_type
            dtype = np.dtype(helper.tensor_dtype_to_np_dtype(type_.elem_type)).name
            outputs.append([info.name, dtype, [d.dim_value for d in type_.shape.dim]])
        return {"inputs": [info.name for info in self.inputs], "outputs": outputs}

    def info(self, name: str, x: V) -> ValueInfoProto:
        """The declaration of a border tensor with the type of `x`."""
        return helper.make_tensor_value_info(name, self.element_of(x), self.shape_of(x))
