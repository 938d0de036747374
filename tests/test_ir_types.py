"""Dimensions, tensor types and attributes: values and their one spelling in text."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv4c.errors import EvalError, ParseError
from dsv4c.ir.attrs import Attr, AttrKind, parse_scalar, print_attr, print_attrs
from dsv4c.ir.dims import Dim, evaluate, parse_dim, sym
from dsv4c.ir.dtypes import DType
from dsv4c.ir.lexer import Cursor
from dsv4c.ir.types import TensorType, f32, i32, parse_type

T, CTX = sym("T"), sym("ctx")
ENV = {"B": 3, "T": 11, "ctx": 4097, "R.0": 5}

OPERATIONS: tuple[Callable[[Dim, Dim | int], Dim | int], ...] = (
    lambda a, b: a + b, lambda a, b: a - b, lambda a, b: a * b, lambda a, b: a // b,
)  # fmt: skip


def dims() -> st.SearchStrategy[Dim | int]:
    """Expressions as the operators build them: the left side always holds a symbol."""
    symbols = st.sampled_from([sym(name) for name in ENV])
    numbers = st.integers(1, 999)

    def extend(inner: st.SearchStrategy[Dim | int]) -> st.SearchStrategy[Dim | int]:
        left = inner.filter(lambda d: isinstance(d, Dim))
        return st.builds(lambda f, a, b: f(a, b), st.sampled_from(OPERATIONS), left, inner)

    return st.recursive(symbols | numbers, extend, max_leaves=8)


@given(dims())
def test_dimensions_round_trip(dim: Dim | int) -> None:
    assert parse_dim(str(dim)) == dim


@given(dims())
def test_a_dimension_is_worth_what_python_says(dim: Dim | int) -> None:
    try:
        expected = eval(str(dim).replace("R.0", "R0"), {}, {**ENV, "R0": ENV["R.0"]})
    except ZeroDivisionError:
        return
    assert evaluate(dim, ENV) == expected


def test_dimensions_fold_constants_and_neutral_elements() -> None:
    assert parse_dim("(2+3)*4") == 20
    assert T + 0 == T and T * 1 == T and T // 1 == T and T - 0 == T
    assert (T + 3) // 4 == parse_dim("(T+3)//4") == parse_dim(" ( T + 3 ) // 4 ")
    assert (T + 3) // 4 != T + 3 // 4
    assert list(((T + 3) // 4 * CTX).symbols()) == ["T", "ctx"]  # type: ignore[union-attr]


def test_evaluation_names_what_is_missing() -> None:
    assert evaluate((T + 3) // 4, {"T": 5}) == 2
    with pytest.raises(EvalError, match="dimension 'T' has no value; allowed: B"):
        evaluate(T + 1, {"B": 1})


@pytest.mark.parametrize(
    "text", ["", "+", "T+", "(T", "T)", "T T", "4 4", "T+ctx//4", "T//4+1", "T?", "T/2", ")"]
)
def test_what_is_no_dimension(text: str) -> None:
    with pytest.raises(ParseError):
        parse_dim(text)


@given(st.sampled_from(list(DType)), st.lists(dims(), max_size=5))
def test_types_round_trip(dtype: DType, shape: list[Dim | int]) -> None:
    type_ = TensorType(dtype, tuple(shape))
    assert parse_type(str(type_)) == type_
    assert type_.rank == len(shape)


def test_types_become_concrete() -> None:
    type_ = f32(sym("B"), (T + 3) // 4, 7)
    assert str(type_) == "f32[B, (T+3)//4, 7]"
    assert type_.concrete({"B": 2, "T": 9}) == (2, 3, 7)
    assert type_.with_shape(1) == f32(1) != i32(1)


@pytest.mark.parametrize("text", ["f32", "f32[", "f32 B]", "f33[B]", "[B]", "f32[B,]", "f32[B]]"])
def test_what_is_no_type(text: str) -> None:
    with pytest.raises(ParseError):
        parse_type(text)


ATTRS = st.one_of(
    st.integers(), st.floats(allow_nan=False), st.booleans(), st.text(), st.sampled_from(list(DType)),
    st.lists(st.integers(), max_size=4).map(tuple),
)  # fmt: skip


@given(ATTRS)
def test_attributes_round_trip(value: Attr) -> None:
    found = Cursor(f"{{a = {print_attr(value)}}}").attrs()["a"]
    assert found == value and type(found) is type(value)
    if isinstance(value, float):
        assert math.copysign(1, value) == math.copysign(1, found)  # type: ignore[arg-type]


@given(st.dictionaries(st.from_regex(r"[a-z_]\w{0,5}", fullmatch=True), ATTRS, max_size=4))
def test_attribute_lists_round_trip(attrs: dict[str, Attr]) -> None:
    cursor = Cursor(print_attrs(tuple(attrs.items())))
    assert cursor.attrs() == attrs
    cursor.done()


def test_every_kind_admits_its_own_values_only() -> None:
    samples: dict[AttrKind, Attr] = {
        AttrKind.INT: 3, AttrKind.FLOAT: 3.0, AttrKind.BOOL: True, AttrKind.STR: "3",
        AttrKind.DTYPE: DType.F32,
        AttrKind.INTS: (3, 4),
    }  # fmt: skip
    for kind in AttrKind:
        assert [other for other in AttrKind if kind.admits(samples[other])] == [kind]
    assert not AttrKind.INTS.admits((3, True))


def test_words_that_are_no_attribute() -> None:
    assert parse_scalar("bf16") is DType.BF16 and parse_scalar("true") is True
    assert parse_scalar("-inf") == -math.inf
    with pytest.raises(ParseError, match="'maybe' is not an attribute value"):
        parse_scalar("maybe")
