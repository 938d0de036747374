"""Compiled code is made once: what finds it again, what does not, and what a broken cache costs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import B, Case, T

from dsv4c import api
from dsv4c.ir.levels import Level
from dsv4c.runtime import Artifact
from dsv4c.runtime.layer import LayerSession
from dsv4c.targets import parse_target
from dsv4c.targets.cpu.tvm import cache, emit
from dsv4c.targets.cpu.tvm.cache import kept, key_of
from dsv4c.targets.cpu.tvm.link import Linker

LINK = Linker(("cc",))


def product(factor: float = 2.0, columns: int = 24) -> Case:
    case = Case()
    case.module.level, case.module.store = Level.MODEL, case.store
    x = case.op("linear", case.f32("x", B, T, columns), case.weight("w", 20, columns))
    case.op("scale", x, out="y", factor=factor)
    return case


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setattr(cache, "default_cache", lambda: tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One word for every module that really was compiled."""
    made, compile_module = list[str](), emit.compile_module

    def count(*args: Any) -> bytes:
        made.append("compiled")
        return compile_module(*args)

    monkeypatch.setattr(emit, "compile_module", count)
    return made


def test_equal_code_is_compiled_once(folder: Path, compiled: list[str], tmp_path: Path) -> None:
    """Other weights are the same code; another size, number or processor is another."""
    one, other = product(), product()
    other.store.tensors["w"] = -one.store.tensors["w"]
    paths = [tmp_path / "one.dsv4", tmp_path / "other.dsv4"]
    for case, path in zip((one, other), paths, strict=True):
        api.compile(case.module, output=path, golden=False)
    assert len(compiled) == len(list(folder.iterdir())) == 1
    assert len({Artifact.open(path).section("code") for path in paths}) == 1
    x = np.ones((1, 3, 24), np.float32)
    first, second = (LayerSession(path, threads=1).step(x=x)["y"] for path in paths)
    np.testing.assert_array_equal(first, -second)
    assert np.abs(first).max() > 1
    for case, target in ((product(3.0), "cpu"), (product(columns=25), "cpu"), (one, "cpu:x86-64-v2")):
        before = len(compiled)
        api.compile(case.module, output=tmp_path / "m.dsv4", golden=False, target=target)
        assert len(compiled) == before + 1


def relax_of(constant: float) -> Any:
    from tvm import relax

    builder = relax.BlockBuilder()
    with builder.function("f", []):
        builder.emit_func_output(relax.const(np.full(3, constant, np.float32)))
    return builder.get()


def test_what_a_key_covers() -> None:
    cpu = dict(parse_target("cpu:x86-64-v3")[1].attributes)
    key = key_of(relax_of(1), cpu, LINK)
    assert key == key_of(relax_of(1), cpu, LINK)
    others = [
        key_of(relax_of(2), cpu, LINK),  # what a constant holds is not in the text of a module
        key_of(relax_of(1), cpu | {"mattr": ["+avx512f"]}, LINK),
        key_of(relax_of(1), cpu, Linker(("clang",))),
    ]  # fmt: skip
    assert len({key, *others}) == 4


def test_a_damaged_entry_is_made_again(tmp_path: Path) -> None:
    assert kept("k", lambda: b"code", tmp_path) == b"code"
    assert kept("k", lambda: b"never asked", tmp_path) == b"code"
    (path,) = tmp_path.iterdir()
    for broken in (path.read_bytes()[:-1], b"", b"x" * 40):
        path.write_bytes(broken)
        assert kept("k", lambda: b"code", tmp_path) == b"code"
        assert kept("k", lambda: b"never asked", tmp_path) == b"code"
    assert [p.name for p in tmp_path.iterdir()] == ["k.so"]


def test_without_a_place_to_write_code_is_made_each_time(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    for code in (b"one", b"two"):
        assert kept("k", lambda code=code: code, tmp_path / "file") == code  # type: ignore[misc]


def test_a_failed_compilation_keeps_nothing(tmp_path: Path) -> None:
    def fail() -> bytes:
        raise ValueError("no code")

    with pytest.raises(ValueError, match="no code"):
        kept("k", fail, tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_was_not_asked_for_the_longest_goes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "LIMIT", 300)
    for i, key in enumerate("abc"):
        kept(key, lambda: bytes(60))
        os.utime(folder / f"{key}.so", (i, i))
    assert kept("a", lambda: b"made anew") == bytes(60)  # so it is no longer the oldest
    kept("d", lambda: bytes(60))
    assert {p.stem for p in folder.iterdir()} == {"a", "c", "d"}
    kept("e", lambda: bytes(400))  # alone beyond the limit: the newest stays
    assert {p.stem for p in folder.iterdir()} == {"e"}
