"""The kernels, their lowerings and the target's table of ops name the same things, and each is tested."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dsv4c.ir.ops import OPS
from dsv4c.targets.cpu import target
from dsv4c.targets.cpu.tvm import kernels, lowering

HERE = Path(__file__).parent
NO_KERNEL = {"weight"}
"""Becomes a parameter."""


def factories() -> dict[str, Callable[..., Any]]:
    """Every public function of the kernel modules that defines a TIR function."""
    found = {}
    for info in pkgutil.iter_modules(kernels.__path__):
        module = importlib.import_module(f"{kernels.__name__}.{info.name}")
        for name, function in vars(module).items():
            own = inspect.isfunction(function) and function.__module__ == module.__name__
            if own and "prim_func" in inspect.getsource(function):
                found[f"{info.name}.{name}"] = function
    return found


def lowering_text() -> str:
    """The source of every file of lowerings."""
    files = sorted(Path(lowering.__file__).parent.glob("lowering*.py"))
    return "".join(file.read_text(encoding="utf-8") for file in files)


def test_the_target_takes_exactly_what_is_lowered() -> None:
    assert set(lowering.LOWERINGS) == target.CPU.legal("tvm") <= set(OPS)


def test_a_lowering_has_the_stem_of_its_op() -> None:
    for name, function in lowering.LOWERINGS.items():
        assert function.__name__.rstrip("_") == name


@pytest.mark.parametrize("name", factories())
def test_every_kernel_is_reached_by_a_lowering(name: str) -> None:
    assert re.search(rf"\b{re.escape(name)}\b", lowering_text())


@pytest.mark.parametrize("name", factories())
def test_every_kernel_says_what_it_takes(name: str) -> None:
    assert factories()[name].__doc__


def test_every_lowered_op_has_a_kernel_test() -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in HERE.glob("test_kernels_*.py"))
    called = set(re.findall(r'\.(?:op|multi)\(\s*"(\w+)"', text))
    assert set(lowering.LOWERINGS) - called == NO_KERNEL
