"""What tests of the compiler share: weights from a dictionary, ops run by their kernels and by meaning."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from dsv4c.ir import weights as w
from dsv4c.ir.dims import Dim, sym
from dsv4c.ir.dtypes import DType, f32_to_bf16
from dsv4c.ir.graph import Builder, Module, Op, Value
from dsv4c.ir.levels import Level
from dsv4c.ir.meaning import Evaluator
from dsv4c.ir.types import TensorType, f32, i32
from dsv4c.ir.weights import WeightExpr
from dsv4c.runtime.buffers import zeros

Arr = npt.NDArray[Any]
B, T, L, CTX = sym("B"), sym("T"), sym("L"), sym("ctx")


class DictStore:
    """Checkpoint tensors from a dictionary, in raw storage."""

    def __init__(self, tensors: Mapping[str, Arr] | None = None) -> None:
        self.tensors = dict(tensors or {})

    def read(self, name: str) -> Arr:
        return self.tensors[name]

    def add(self, name: str, dtype: DType, array: Arr) -> WeightExpr:
        """Keep raw storage under `name` and return its `source` expression."""
        self.tensors[name] = np.ascontiguousarray(array, dtype.storage)
        return w.source(name, dtype, array.shape)


class Case:
    """A module under construction at level TARGET together with its weights; `target` compiles it.

    `tuning` is a `dsv4c.targets.cpu.tuning.Tuning`; None is the default.
    """

    def __init__(self, target: str = "cpu", tuning: Any = None) -> None:
        self.target, self.tuning = target, tuning
        self.module = Module("case", level=Level.TARGET)
        self.b, self.store = Builder(self.module), DictStore()
        self.b.loc = "case"
        self.rng = np.random.default_rng(7)
        self._compiled: Any = None

    def f32(self, name: str, *shape: Dim | int) -> Value:
        return self.b.input(name, f32(*shape))

    def i32(self, name: str, *shape: Dim | int) -> Value:
        return self.b.input(name, i32(*shape))

    def step(self) -> tuple[Value, Value, Value]:
        """The inputs `tokens` [B,T], `pos` [B] and `n_valid` [B]."""
        return self.i32("tokens", B, T), self.i32("pos", B), self.i32("n_valid", B)

    def state(self, name: str, *shape: Dim | int, dtype: DType = DType.F32) -> Value:
        return self.b.state(name, TensorType(dtype, shape))

    def weight(self, name: str, *shape: int, bf16: bool = False, scale: float = 1.0) -> Value:
        """A random weight; the numbers of a BF16 one are those that BF16 holds."""
        array = (self.rng.standard_normal(shape) * scale).astype(np.float32)
        return self.weight_of(name, array, bf16)

    def weight_of(self, name: str, array: Arr, bf16: bool = False) -> Value:
        dtype = DType.BF16 if bf16 else DType.I32 if array.dtype.kind == "i" else DType.F32
        return self.b.weight(self.store.add(name, dtype, f32_to_bf16(array) if bf16 else array), name)

    def op(self, name: str, *operands: Value, out: str = "", **attrs: Any) -> Value:
        """Append an op; its first result becomes output `out`, by default the op's name."""
        op = self.multi(name, *operands, outs=(out or name,), **attrs)
        return op.results[0]

    def multi(self, name: str, *operands: Value, outs: tuple[str, ...], **attrs: Any) -> Op:
        op = self.b.multi(name, *operands, **attrs)
        self.module.outputs.update(zip(outs, op.results, strict=False))
        return op

    def meaning(self, inputs: Mapping[str, Arr], precision: npt.DTypeLike = np.float64) -> dict[str, Arr]:
        """Every output by the evaluator; states are taken from `inputs` as well."""
        step = Evaluator(self.module, self.store, precision)(inputs, inputs)
        return step.outputs | step.state

    def run(self, inputs: Mapping[str, Arr]) -> dict[str, Arr]:
        """Every output by the compiled kernels."""
        if self._compiled is None:
            self._compiled = _Compiled(self)
        found: dict[str, Arr] = self._compiled(inputs)
        return found

    def stored(self) -> dict[str, DType]:
        """Parameter name -> element type of every weight as the kernels read it."""
        if self._compiled is None:
            self._compiled = _Compiled(self)
        found: dict[str, DType] = self._compiled.stored
        return found

    def check(
        self, inputs: Mapping[str, Arr], tolerance: float = 2e-5, only: Arr | None = None
    ) -> dict[str, Arr]:
        """Kernels against meaning: integers equal, floats within `tolerance` of the expected range.

        `only` [B,T] is the mask of the rows to compare, for outputs that start with those axes.
        """
        expected, found = self.meaning(inputs), self.run(inputs)
        for name, want in expected.items():
            got = found[name]
            assert got.shape == want.shape, f"{name}: {got.shape} instead of {want.shape}"
            if only is not None and want.shape[:2] == only.shape:
                got, want = got[only], want[only]
            assert_close(name, got, want, tolerance)
        return found


def assert_close(name: str, got: Arr, want: Arr, tolerance: float) -> None:
    if want.dtype.kind == "i":
        np.testing.assert_array_equal(got, want, err_msg=name)
        return
    known = ~np.isnan(want)
    np.testing.assert_array_equal(~np.isnan(got), known, err_msg=f"{name}: NaN in other places")
    got, want = got[known], want[known]
    span = max(float(np.abs(want).max(initial=0)), 1e-30)
    worst = float(np.abs(got.astype(np.float64) - want).max(initial=0)) / span
    assert worst <= tolerance, f"{name} is off by {worst:.3g} of its range, allowed {tolerance:.3g}"


def valid_rows(n_valid: Arr, tokens: int) -> npt.NDArray[np.bool_]:
    """[B,T]: which tokens of a call are real."""
    mask: npt.NDArray[np.bool_] = np.arange(tokens)[None] < np.asarray(n_valid)[:, None]
    return mask


def poison(array: Arr, n_valid: Arr) -> Arr:
    """A copy of [B,T,...] whose padding is NaN and infinity."""
    out = array.copy()
    for b, count in enumerate(n_valid):
        out[b, count:] = np.nan
        out[b, count + 1 :: 2] = -np.inf
    return out


def usual_of(cases: Iterable[tuple[Any, ...]], usual: Callable[..., bool]) -> list[Any]:
    """Parameters of a test: those that are not `usual` are left to `make test-targets`."""
    return [pytest.param(*c, marks=() if usual(*c) else pytest.mark.matrix) for c in cases]


def ints(*values: int) -> Arr:
    return np.array(values, np.int32)


def normal(rng: np.random.Generator, *shape: int) -> Arr:
    return rng.standard_normal(shape).astype(np.float32)


class _Compiled:
    """The ops of a case lowered to kernels, compiled in memory. Imports TVM only when used."""

    def __init__(self, case: Case) -> None:
        import tvm
        from tvm import relax

        from dsv4c.targets import parse_target
        from dsv4c.targets.cpu.tuning import default_for
        from dsv4c.targets.cpu.tvm.context import Context
        from dsv4c.targets.cpu.tvm.emit import cross_attributes, machine_code, simd_of
        from dsv4c.targets.cpu.tvm.lowering import LOWERINGS

        module = case.module
        shapes = [v.type.shape for v in module.arguments().values()]
        bound = frozenset(d.name for s in shapes for d in s if isinstance(d, Dim) and d.op == "sym")
        arch = parse_target(case.target)[1]
        context = Context(relax.BlockBuilder(), bound, simd_of(arch), case.tuning or default_for(arch.name))
        for name, value in module.arguments().items():
            context.values[value] = relax.Var(name, context.tensor(value.type))
        if "tokens" in module.inputs:
            context.shared["tokens"] = context.values[module.inputs["tokens"]]
        arguments = [context.values[v] for v in module.arguments().values()]
        with context.builder.function("step"):
            for op in module.ops:
                LOWERINGS[op.name](context, op)
            results = relax.Tuple([context.values[v] for v in module.outputs.values()])
            weights = [var for var, _ in context.packed.values()]
            context.builder.emit_func_output(results, params=[*arguments, *weights])
        self.names, self.outputs = list(module.arguments()), list(module.outputs)
        self.types = {name: v.type for name, v in module.arguments().items()}
        executable = machine_code(context.builder.get(), cross_attributes(arch))
        self.step = relax.VirtualMachine(executable, tvm.cpu())["step"]
        self.stored = {name: expr.dtype for name, (_, expr) in context.packed.items()}
        packed = [w.materialise(expr, case.store) for _, expr in context.packed.values()]
        self.weights = [self._tensor(array) for array in packed]

    @staticmethod
    def _tensor(array: Arr) -> Any:
        """An aligned copy as a TVM tensor that shares its memory."""
        import tvm_ffi

        copy = zeros(array.shape, array.dtype)
        copy[...] = array
        return tvm_ffi.from_dlpack(copy)

    def __call__(self, inputs: Mapping[str, Arr]) -> dict[str, Arr]:
        given = [self._tensor(np.asarray(inputs[n], self.types[n].dtype.storage)) for n in self.names]
        results = self.step(*given, *self.weights)
        return {name: np.array(np.from_dlpack(results[i])) for i, name in enumerate(self.outputs)}
