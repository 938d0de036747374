"""What the runtime says of the processor, and what it asks the system for."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path

import pytest

from dsv4c.runtime import cpu

FLAGS = "processor\t: 0\nflags\t\t: fpu sse2 avx512f amx_tile amx_bf16 amx_int8\nbugs\t\t: none\n"


class System:
    """In place of the C library: answers every system call with `result` and notes it."""

    def __init__(self, result: int) -> None:
        self.result, self.calls = result, list[tuple[int, ...]]()

    def syscall(self, *arguments: int) -> int:
        self.calls.append(arguments)
        return self.result


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    cpu.cpu_flags.cache_clear()
    yield
    cpu.cpu_flags.cache_clear()


def flags_of(monkeypatch: pytest.MonkeyPatch, text: str, result: int = 0) -> tuple[frozenset[str], System]:
    system = System(result)
    monkeypatch.setattr(Path, "read_text", lambda *_: text)
    monkeypatch.setattr(ctypes, "CDLL", lambda _: system)
    monkeypatch.setattr("platform.system", lambda: "Linux")
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    return cpu.cpu_flags(), system


def test_tile_registers_are_asked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    found, system = flags_of(monkeypatch, FLAGS)
    assert found == {"fpu", "sse2", "avx512f", "amx_tile", "amx_bf16", "amx_int8"}
    assert cpu.cpu_flags() is found and system.calls == [(158, 0x1023, 18)]


def test_a_refusal_takes_them_off_the_list(monkeypatch: pytest.MonkeyPatch) -> None:
    assert flags_of(monkeypatch, FLAGS, -1)[0] == {"fpu", "sse2", "avx512f"}


def test_machines_without_them_are_asked_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    found, system = flags_of(monkeypatch, "Features\t: fp asimd\n")
    assert found == {"fp", "asimd"} and not system.calls


def test_a_system_that_does_not_say(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", missing)
    assert cpu.cpu_flags() == frozenset()
