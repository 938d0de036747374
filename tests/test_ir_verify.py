"""Every rule of the verifier, each broken once."""

from __future__ import annotations

import pytest
from support import B, T

from dsv4c.errors import IRError, VerifyError
from dsv4c.ir.graph import Builder, Module, Value
from dsv4c.ir.levels import Level
from dsv4c.ir.types import f32, i32
from dsv4c.ir.verify import verify


def module() -> tuple[Module, Builder, Value, Value]:
    """A ring that is read, then written; (module, builder, the rows, the ring)."""
    m = Module("m")
    b = Builder(m)
    b.loc = "here"
    x, pos, n_valid = b.input("x", f32(B, T, 6)), b.input("pos", i32(B)), b.input("n_valid", i32(B))
    ring = b.state("ring", f32(B, 8, 6))
    m.outputs["y"] = b.op("unit_norm", ring, eps=1e-6)
    m.outputs["ring"] = b.op("ring_write", ring, x, pos, n_valid)
    return m, b, x, ring


def test_a_sound_module_passes() -> None:
    verify(module()[0])


def test_use_before_definition() -> None:
    m, b, x, _ = module()
    b.op("scale", b.op("scale", x, factor=2.0), factor=2.0)
    m.ops[-1], m.ops[-2] = m.ops[-2], m.ops[-1]
    with pytest.raises(VerifyError, match="here: scale: reads a value before it is made"):
        verify(m)


def test_use_of_another_modules_value() -> None:
    m, b, _, _ = module()
    b.op("scale", module()[2], factor=2.0)
    with pytest.raises(VerifyError, match="before it is made"):
        verify(m)


def test_stale_use() -> None:
    m, b, x, _ = module()
    y = b.op("scale", x, factor=2.0)
    z = b.op("scale", y, factor=2.0)
    m.ops.remove(z.producer)  # type: ignore[arg-type]  # without drop()
    with pytest.raises(VerifyError, match="scale: has a stale use by <scale @here>"):
        verify(m)


def test_missing_use_entry() -> None:
    m, b, x, _ = module()
    op = b.multi("scale", x, factor=2.0)
    del x.uses[op, 0]
    with pytest.raises(VerifyError, match="operand 0 lacks its use entry"):
        verify(m)


def test_reading_a_consumed_state() -> None:
    m, b, _, ring = module()
    b.op("scale", ring, factor=2.0)
    with pytest.raises(VerifyError, match="reads a state that ring_write @here has overwritten"):
        verify(m)


def test_consuming_a_state_twice() -> None:
    m, b, x, ring = module()
    b.op("ring_write", ring, x, m.inputs["pos"], m.inputs["n_valid"])
    with pytest.raises(VerifyError, match="ring_write: reads a state that ring_write"):
        verify(m)


def test_an_overwritten_output() -> None:
    m, _, _, ring = module()
    m.outputs["old"] = ring
    with pytest.raises(VerifyError, match="output 'old' has been overwritten"):
        verify(m)


def test_an_output_made_elsewhere() -> None:
    m = module()[0]
    m.outputs["y"] = module()[0].outputs["y"]
    with pytest.raises(VerifyError, match="output 'y' is not made by the module"):
        verify(m)


def test_a_state_without_output() -> None:
    m = module()[0]
    del m.outputs["ring"]
    with pytest.raises(VerifyError, match=r"state 'ring' needs an output of its own type f32\[B, 8, 6\]"):
        verify(m)


def test_a_state_whose_output_has_another_type() -> None:
    m, _, x, _ = module()
    m.outputs["ring"] = x
    with pytest.raises(VerifyError, match="state 'ring' needs an output of its own type"):
        verify(m)


def test_a_wrong_result_type() -> None:
    m = module()[0]
    m.outputs["y"].type = f32(B, 8, 7)
    with pytest.raises(VerifyError, match=r"unit_norm: has results \['f32\[B, 8, 7\]'\]"):
        verify(m)


def test_operands_that_no_longer_fit() -> None:
    m, b, x, _ = module()
    b.op("add", x, x)
    m.ops[-1].set_operand(1, m.outputs["y"])
    with pytest.raises(IRError, match="here: add needs equal shapes"):
        verify(m)


def test_levels() -> None:
    m, b, x, _ = module()
    b.op("clamped_swiglu", x, x, limit=10.0)
    with pytest.raises(VerifyError, match="here: clamped_swiglu: is not legal at level MODEL"):
        verify(m)
    m.level = Level.FUSED
    verify(m)
    m.level = Level.TARGET
    verify(m, frozenset({"unit_norm", "ring_write", "clamped_swiglu"}))
    with pytest.raises(VerifyError, match="ring_write: is not legal at level TARGET"):
        verify(m, frozenset({"unit_norm", "clamped_swiglu"}))
