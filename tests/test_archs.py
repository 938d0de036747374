"""One artifact with code for several processors: how archs are named together, what the file holds, and which
code a machine takes.

Every processor below this machine's own is tried for real; of others, e.g. aarch64 on x86-64, the code is
compiled and looked at.
"""

from __future__ import annotations

import platform
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import Arr, B, Case, T, normal
from test_cli import Call, dsv4c, ok, ok_json
from test_model_harness import Models

import dsv4c as package
from dsv4c import api
from dsv4c.cli.report.ceilings import Ceilings
from dsv4c.cli.report.page import render
from dsv4c.errors import ArtifactError, TargetError
from dsv4c.ir import weights as w
from dsv4c.ir.levels import Level
from dsv4c.runtime import Artifact, archs, cpu, tvm_backend
from dsv4c.runtime.archs import archs_of, lacks, select, taken
from dsv4c.runtime.container import ArtifactWriter, amend_meta
from dsv4c.runtime.container.several import facts_of, share
from dsv4c.runtime.layer import LayerSession
from dsv4c.runtime.verify import failures, verify
from dsv4c.targets import parse_target
from dsv4c.targets.cpu.target import ARCHS, CPU, PORTABLE
from dsv4c.targets.cpu.tvm.emit import build_programs, simd_of

__all__ = ["dsv4c"]  # a fixture: pytest finds it by name

HERE = [a.name for a in ARCHS if not lacks(a.machine, a.requires)]
"""Archs that this machine can run, the best first."""
FOREIGN = next(a.name for a in ARCHS if a.machine != platform.machine())
MACHINES = {62: "x86_64", 183: "aarch64"}
"""e_machine of an ELF file."""

# ------------------------------------------------------------------------------------- names


def names(target: str) -> list[str]:
    return [a.name for a in parse_target(target)[1].each()]


def test_archs_are_named_together_the_best_first() -> None:
    assert names("cpu:aarch64+x86-64-v3+x86-64-v4-amx") == ["x86-64-v4-amx", "x86-64-v3", "aarch64"]
    assert parse_target("cpu:aarch64+x86-64-v3")[1].name == "x86-64-v3+aarch64"
    assert names("cpu:x86-64-v3") == ["x86-64-v3"] and parse_target("cpu:x86-64-v3")[1].members == ()


def test_portable_is_every_arch_but_the_oldest() -> None:
    assert names("cpu:portable") == [a.name for a in ARCHS if a.name != "x86-64-v2"]
    assert parse_target("cpu:portable")[1].name == "portable"
    assert names("cpu:portable+x86-64-v2") == [a.name for a in ARCHS]


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("cpu:x86-64-v3+x86-64-v5", "cpu: unknown arch 'x86-64-v5'; allowed: .*portable"),
        ("cpu:x86-64-v3+", "cpu: unknown arch ''; allowed: "),
        ("cpu:x86-64-v3+aarch64+x86-64-v3", "cpu: arch x86-64-v3 stands twice in .*; allowed: each arch on"),
        ("cpu:portable+aarch64", "cpu: arch aarch64 stands twice in portable"),
        ("cuda:sm_80+sm_90a", "cuda: several archs: sm_80.sm_90a; allowed: one, as .*\n.*artifact for each"),
        ("cuda:portable", "cuda: unknown arch 'portable'; allowed: sm_"),
    ],
)
def test_impossible_names(target: str, message: str) -> None:
    with pytest.raises(TargetError, match=message):
        parse_target(target)


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        ({"all": ("x86-64-v3", "x")}, "unknown arch 'x'"),
        ({"aarch64": ("x86-64-v3", "x86-64-v2")}, "archs must be distinct"),
    ],
)
def test_a_target_checks_its_sets(sets: dict[str, tuple[str, ...]], message: str) -> None:
    with pytest.raises(TargetError, match=message):
        replace(CPU, sets=sets)


# ------------------------------------------------------------------------- what the file holds


def test_shared_facts_come_back_whole() -> None:
    """What most have stands once; nothing of one arch leaks into another, also where it lacks a fact."""
    each: dict[str, dict[str, Any]] = {
        "a": {"calls": [1], "one": {"n": 1}, "probes": 3}, "b": {"calls": [2], "one": {"n": 1}, "probes": 3},
        "c": {"calls": [2], "probes": 4},
    }  # fmt: skip
    tree = share(each)
    assert (tree["calls"], tree["probes"], tree["archs"]["b"]) == ([2], 3, {"one": {"n": 1}})
    assert {name: facts_of(tree, name) for name in each} == each


def product() -> Case:
    """Rows rounded to BF16 times a BF16 matrix: what archs multiply by instructions of their own."""
    case = Case()
    case.module.level, case.module.store = Level.MODEL, case.store
    rows = case.b.op("round_values", case.f32("x", B, T, 70), rule="bf16")
    case.op("linear", rows, case.weight("w", 50, 70, bf16=True), out="y", inputs="bf16")
    return case


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The product for every arch there is."""
    path = tmp_path_factory.mktemp("archs") / "several.dsv4"
    api.compile(product().module, output=path, target="cpu:portable+x86-64-v2", golden=False)
    amend_meta(path, {"model": {"name": "product", "max_positions": 1}})  # `inspect` counts its state
    return path


def test_weights_stand_once(several: Path) -> None:
    """The file has the tensors that an arch alone would have, and code of its own machine for each."""
    artifact = Artifact.open(several, check="full")
    module = api.lower(product().module, "cpu").module
    for arch in archs_of(artifact):
        alone, _ = build_programs({"step": module}, simd_of(CPU.arch(arch["name"])))
        assert set(alone["step"].packed) == set(artifact.tensors)
        (machine,) = struct.unpack_from("<H", artifact.section(f"code.{arch['name']}"), 18)
        assert MACHINES[machine] == arch["machine"]
    assert f"tvm_runtime.{platform.machine()}" in artifact.sections


def test_a_layout_that_another_arch_does_not_read_is_packed_once_more() -> None:
    module = api.lower(product().module, "cpu").module
    (first,) = build_programs({"step": module}, simd_of(ARCHS[0]))[0].values()
    ((name, (_, expr)),) = first.packed.items()
    for other, wanted in ((expr, name), (w.reshape(expr, (*expr.shape, 1)), name + "'")):
        claimed = {name: other}
        (built,) = build_programs({"step": module}, simd_of(ARCHS[-1]), claimed)[0].values()
        assert list(built.packed) == [wanted] and claimed[wanted].same(expr)


@pytest.mark.parametrize("arch", HERE)
def test_every_arch_of_this_machine_computes_the_product(several: Path, arch: str) -> None:
    x: Arr = normal(np.random.default_rng(4), 1, 19, 70)
    session = LayerSession(several, threads=1, arch=arch)
    assert session.artifact.meta["arch"]["name"] == arch
    want = product().meaning({"x": x})["y"]
    assert np.abs(session.step(x=x)["y"] - want).max() <= 2e-6 * np.abs(want).max()


def test_inspect_shows_what_runs_here(dsv4c: Call, several: Path) -> None:
    rows = {a["name"]: a for a in ok_json(dsv4c("inspect", several, "--json"))["code"]}
    assert list(rows) == [a.name for a in ARCHS]
    assert [name for name, row in rows.items() if row["taken"]] == [HERE[0]]
    assert rows[FOREIGN]["lacks"] == f"this machine is {platform.machine()}" and rows[FOREIGN]["bytes"] > 1000
    text = ok(dsv4c("inspect", several))
    assert "code for several processors" in text and "taken here" in text
    assert "(x86_64, aarch64)" in text and "code for x86-64-v4-amx, " in page(Artifact.open(several))


def page(artifact: Artifact) -> str:
    return render(artifact, Ceilings(1e9, 1e9, "made up"))


def test_an_arch_on_the_command_line(dsv4c: Call, models: Models) -> None:
    """Of an artifact for one there is nothing else to ask for."""
    path = models.artifact("ratio16", "tvm")
    assert ok_json(dsv4c("verify", path, "--arch", HERE[0], "--json"))["arch"] == HERE[0]
    words = ("--ids", "1,2,3", "--max-new-tokens", "1", "--json")
    assert ok_json(dsv4c("run", path, *words, "--arch", HERE[0]))["arch"] == HERE[0]
    for command in (("run", path, *words), ("verify", path), ("bench", path)):
        code, out, err = dsv4c(*command, "--arch", "x86-64-v5")
        assert code == 2 and f"unknown arch 'x86-64-v5'; allowed: {HERE[0]}" in out + err


# ------------------------------------------------------------------------- which code is taken


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes this machine look like another: its kind, then what its processor can do."""

    def be(kind: str, *flags: str) -> None:
        monkeypatch.setattr(platform, "machine", lambda: kind)
        for module in (archs, cpu):
            monkeypatch.setattr(module, "cpu_flags", lambda: frozenset(flags))

    return be


@pytest.fixture
def portable(tmp_path: Path) -> Artifact:
    """An artifact as `cpu:portable` has it, but for its code."""
    path, arch = tmp_path / "portable.dsv4", parse_target("cpu:portable")[1]
    with ArtifactWriter(path) as writer:
        for each in arch.members:
            writer.add_section(f"code.{each.name}", each.name.encode())
        writer.add_section("tvm_runtime.x86_64", b"runtime")
        writer.add_section("tokenizer", b"{}")
        for key, value in {"format": "tvm", "arch": arch.facts()}.items():
            writer.set_meta(key, value)
        writer.set_meta("tvm", share({a.name: {"calls": a.name, "weights": ["w"]} for a in arch.members}))
    return Artifact.open(path)


def flags(arch: str) -> tuple[str, ...]:
    return CPU.arch(arch).requires or ("asimd",)


@pytest.mark.parametrize("arch", PORTABLE)
def test_a_machine_takes_the_best_that_it_has(
    portable: Artifact, machine: Callable[..., None], arch: str
) -> None:
    """And sees an artifact for that arch alone: its code, its facts, the runtime for its kind of machine."""
    machine(CPU.arch(arch).machine, "one more", *flags(arch))
    found = select(portable)
    assert taken(portable) == found.meta["arch"]["name"] == arch
    assert found.section("code") == arch.encode()
    assert found.meta["tvm"] == {"calls": arch, "weights": ["w"]}
    runtime = {"tvm_runtime"} if arch != "aarch64" else set()
    assert set(found.sections) == {"code", "tokenizer"} | runtime
    assert set(portable.sections) == {f"code.{a}" for a in PORTABLE} | {"tvm_runtime.x86_64", "tokenizer"}


def test_lesser_code_may_be_asked_for(portable: Artifact, machine: Callable[..., None]) -> None:
    machine("x86_64", *flags("x86-64-v4-amx"))
    assert select(portable, "x86-64-v3").section("code") == b"x86-64-v3"


def test_a_machine_that_tells_nothing_takes_what_needs_least(
    portable: Artifact, machine: Callable[..., None]
) -> None:
    machine("x86_64")
    assert select(portable).section("code") == b"x86-64-v3"


@pytest.mark.parametrize(
    ("kind", "wanted", "message"),
    [
        ("x86_64", "", r"none of its code runs here \(x86-64-v4-amx: this CPU lacks amx_bf16, .*"
         r"x86-64-v3: this CPU lacks avx2; aarch64: this machine is x86_64\)\n  hint: name this machine's"),
        ("riscv64", "", r"none of its code runs here \(x86-64-v4-amx: this machine is riscv64; "),
        ("x86_64", "x86-64-v3", "does not run here as x86-64-v3: this CPU lacks avx2; allowed: no other "),
        ("aarch64", "x86-64-v3", "as x86-64-v3: this machine is aarch64; allowed: aarch64"),
        ("x86_64", "x86-64-v2", "unknown arch 'x86-64-v2'; allowed: aarch64, x86-64-v3"),
    ],
)  # fmt: skip
def test_code_that_does_not_run_here(
    portable: Artifact, machine: Callable[..., None], kind: str, wanted: str, message: str
) -> None:
    machine(kind, *(f for f in flags("x86-64-v3") if f != "avx2"))
    with pytest.raises(ArtifactError, match=f"portable.dsv4: .*{message}"):
        select(portable, wanted)
    if not wanted:
        assert taken(portable) == ""


# ------------------------------------------------------------------- TVM's runtime of another kind


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Artifact:
    """An artifact without TVM's runtime, in a process that has none yet."""
    monkeypatch.setattr(tvm_backend, "_loaded", {})
    monkeypatch.setattr(tvm_backend.tvm_ffi, "get_global_func", lambda name, allow_missing: None)
    with ArtifactWriter(tmp_path / "bare.dsv4") as writer:
        writer.set_meta("tvm", {"version": "1.2.3"})
    return Artifact.open(tmp_path / "bare.dsv4")


@pytest.mark.parametrize("version", ["1.2.4", None])
def test_no_runtime_of_the_version_that_compiled(
    bare: Artifact, monkeypatch: pytest.MonkeyPatch, version: str | None
) -> None:
    def found(name: str) -> str:
        if version is None:
            raise tvm_backend.importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(tvm_backend.importlib.metadata, "version", found)
    with pytest.raises(ArtifactError, match=r'carries no TVM runtime.*\n.*pip install "apache-tvm==1\.2\.3"'):
        tvm_backend._load_runtime(bare)


def test_the_runtime_of_an_installed_tvm_will_do(bare: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []
    monkeypatch.setattr(tvm_backend.importlib.metadata, "version", lambda name: "1.2.3")
    monkeypatch.setattr(tvm_backend.ctypes, "CDLL", lambda path, mode: loaded.append(Path(path).name))
    tvm_backend._load_runtime(bare)
    assert loaded == ["libtvm_runtime.so"]


# ----------------------------------------------------------------------------------- whole models


@pytest.mark.matrix
@pytest.mark.parametrize("numerics", ["exact", "bf16"])
def test_a_whole_model_is_verified_by_every_arch(models: Models, dsv4c: Call, numerics: str) -> None:
    path = models.artifact("ratio16", "tvm", target="cpu:portable+x86-64-v2", numerics=numerics)
    alone = models.artifact("ratio16", "tvm", target=f"cpu:{HERE[0]}", numerics=numerics)
    several, one = Artifact.open(path), Artifact.open(alone)
    assert {n: t.sha256 for n, t in several.tensors.items()} == {n: t.sha256 for n, t in one.tensors.items()}
    for arch in HERE:
        assert not failures(verify(several, threads=1, arch=arch)), arch
        assert f"by the code for {arch}" in ok(dsv4c("verify", path, "--arch", arch))
    found = ok_json(dsv4c("run", path, "--ids", "1,2,3", "--json", "--arch", HERE[-1]))
    best = package.Session(path, context=8).artifact.meta["arch"]["name"]
    assert (found["arch"], best) == (HERE[-1], HERE[0])
