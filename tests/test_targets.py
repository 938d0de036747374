"""Targets as values: from outside the repository, listed with their tools, and what each refuses."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from onnx import TensorProto
from test_cli import Call, dsv4c, ok, ok_json
from test_ir_ops import VALID

from dsv4c import api
from dsv4c.errors import Dsv4cError, PassError, TargetError
from dsv4c.ir.graph import Builder, Module
from dsv4c.ir.levels import Level, allows
from dsv4c.ir.types import parse_type
from dsv4c.passes import PASSES, known_passes
from dsv4c.runtime import Artifact
from dsv4c.runtime.container import ArtifactWriter
from dsv4c.runtime.verify import verify
from dsv4c.targets import TARGETS, known_targets, parse_target
from dsv4c.targets.onnx.dialect import Dialect
from dsv4c.targets.onnx.emit_static import STATIC_LOWERINGS, emit_static
from dsv4c.targets.onnx.ops import HOST_OPS
from dsv4c.targets.onnx.static import StaticContext
from dsv4c.targets.toolchains import HOMES, TOOLS, Found, environment, package, program, tools_of

__all__ = ["dsv4c"]  # a fixture: pytest finds it by name

ROOT = Path(__file__).parents[1]
GUIDE = (ROOT / "docs" / "adding-a-target.md").read_text(encoding="utf-8")
(TOYBOARD,) = re.findall(r"^```python\n(# toyboard\.py\n.*?)^```$", GUIDE, re.MULTILINE | re.DOTALL)
"""The file that the guide builds."""

DIALECTS = {t.name: t.dialect() for t in TARGETS.values() if t.dialect}
OWN = {f"{t.name}:{a.name}": a.dialect() for t in TARGETS.values() for a in t.archs if a.dialect}
"""Those that archs have in place of their target's."""
ALL = {**DIALECTS, **OWN}


def plugin(folder: Path, text: str = TOYBOARD, name: str = "toyboard.py") -> Path:
    path = folder / name
    path.write_text(text)
    return path


@pytest.fixture
def toyboard(tmp_path: Path) -> Path:
    return plugin(tmp_path)


# --------------------------------------------------------------------------- targets from outside


def test_a_target_from_a_file_is_one_like_any_other(toyboard: Path, tiny_directory: Path) -> None:
    """It compiles with a pass of its own, keeps every promise, and is no part of the table after."""
    out = toyboard.with_name("toy.dsv4")
    api.compile(tiny_directory, output=out, target="toyboard:v1", plugins=[toyboard], verify_passes=True)
    artifact = Artifact.open(out)
    assert (artifact.meta["target"], artifact.meta["arch"]["name"]) == ("toyboard", "v1")
    assert "select_unscaled" in artifact.meta["report"]["pipeline"]
    checks = verify(artifact, threads=1)
    assert all(check.ok for check in checks) and "block layers.0" in {check.name for check in checks}
    assert "toyboard" not in TARGETS


def test_a_target_from_a_file_on_the_command_line(dsv4c: Call, toyboard: Path, tiny_directory: Path) -> None:
    out = toyboard.with_name("toy.dsv4")
    words = ("compile", tiny_directory, "--target", "toyboard", "-o", out, "--plugin", toyboard, "--json")
    assert ok_json(dsv4c(*words))["target"] == "toyboard:v1"
    assert ok_json(dsv4c("verify", out, "--json"))["ok"]


def test_its_values_stay_the_same_until_the_file_changes(toyboard: Path) -> None:
    first = known_targets([toyboard])["toyboard"]
    assert known_targets([toyboard, toyboard])["toyboard"] is first
    toyboard.write_text(TOYBOARD + "# changed\n")
    assert known_targets([toyboard])["toyboard"] is not first


def test_a_file_of_targets_only_brings_no_pass(tmp_path: Path, tiny_model: Module) -> None:
    text = "import dataclasses\nfrom dsv4c.targets import TARGETS\n"
    path = plugin(tmp_path, text + 'MINE = dataclasses.replace(TARGETS["ascend"], name="mine")\n')
    assert set(known_targets([path])) == {*TARGETS, "mine"}
    assert set(known_passes([path], required=False)) == set(PASSES)
    with pytest.raises(PassError, match="defines no pass"):
        known_passes([path])
    assert api.lower(tiny_model, "mine", plugins=[path]).module.level is Level.TARGET


def test_annotations_may_be_text(tmp_path: Path) -> None:
    """Dataclasses look such annotations up in the module, by its name."""
    path = plugin(tmp_path, "from __future__ import annotations\n" + TOYBOARD)
    assert "toyboard" in known_targets([path]) and "select_unscaled" in known_passes([path])


def mine(change: str) -> str:
    """A file with a target that differs from Ascend's in one field."""
    head = "import dataclasses\nfrom dsv4c.targets.ascend import ASCEND\n"
    return f"{head}MINE = dataclasses.replace(ASCEND, {change})\n"


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("import nothing_of_that_name", "my_target.py: cannot be imported: ModuleNotFoundError"),
        ("x = 1\n1 / 0", "cannot be imported: ZeroDivisionError.*\n  hint: raised at line 2 of my_target.py"),
        ("raise SystemExit(3)", "cannot be imported: SystemExit"),
        ("x = 1", "my_target.py: defines neither a pass nor a target; allowed: .*\n.*adding-a-target"),
        ("from dsv4c.targets.ascend import ASCEND", "defines neither a pass nor a target"),
        (mine('doc="another"'), "my_target.py: a target is already called 'ascend'.*\n.*dsv4c itself"),
        (mine('name="two words"'), "target 'two words': the name is no word"),
        (mine('name="a:b"'), "target 'a:b': the name is no word"),
        (mine('name="mine", ops=frozenset({"atention"})'), "unknown op 'atention'.*\n.*'attention'"),
        (mine('name="mine", numerics={"wild": ""}'), "target 'mine': numerics wild; allowed: some of exact"),
        (mine('name="mine", numerics={}'), "target 'mine': numerics of no kind"),
        (
            mine('name="mine", archs=(dataclasses.replace(ASCEND.archs[0], device="a"),)'),
            "target 'mine', arch '910c': unknown device 'a'; allowed: a100-80gb",
        ),
        (
            "from dsv4c.targets.hardware import device\nX = device('h200')",
            "defines neither a pass nor a target",
        ),
        (
            "import dataclasses\nfrom dsv4c.targets.hardware import device\n"
            "X = dataclasses.replace(device('h200'), memory=1)",
            "my_target.py: a device is already called 'h200'.*\n.*dsv4c itself",
        ),
        (mine('name="mine", archs=()'), "archs must be distinct and at least one"),
        (mine('name="mine", default_arch=lambda: "x"'), "unknown arch 'x'; allowed: 910b"),
    ],
)
def test_a_bad_target_is_refused(tmp_path: Path, text: str, what: str) -> None:
    with pytest.raises(TargetError) as caught:
        known_targets([plugin(tmp_path, text, "my_target.py")])
    assert re.search(f"(?s){what}", str(caught.value)), str(caught.value)


def test_a_clash_names_both_places(tmp_path: Path) -> None:
    one, two = plugin(tmp_path, name="one.py"), plugin(tmp_path, name="two.py")
    with pytest.raises(TargetError, match=r"two\.py: a device is already called 'toyboard-v1'.*\n.*one\.py"):
        known_targets([one, two])
    two.write_text(TOYBOARD.replace("toyboard-v1", "toyboard-v2"))
    with pytest.raises(TargetError, match=r"two\.py: a target is already called 'toyboard'.*\n.*one\.py"):
        known_targets([one, two])


@pytest.mark.parametrize(("name", "what"), [("none.py", "no such file"), ("t.txt", "is no Python file")])
def test_a_plugin_is_a_python_file(tmp_path: Path, name: str, what: str) -> None:
    (tmp_path / "t.txt").write_text(TOYBOARD)
    for known in (known_targets, known_passes):
        with pytest.raises(Dsv4cError, match=f"{name}: {what}"):
            known([tmp_path / name])


def test_an_unknown_target_lists_those_of_plugins(toyboard: Path) -> None:
    with pytest.raises(TargetError, match=r"unknown target 'toybord'; allowed: .*mlu, rocm, toyboard\n"):
        parse_target("toybord", [toyboard])
    with pytest.raises(TargetError, match="toyboard: unknown arch 'v2'; allowed: v1"):
        parse_target("toyboard:v2", [toyboard])


def installed(folder: Path, entries: str) -> None:
    """The meta data of a package that is on the path."""
    info = folder / "toys-1.0.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toys\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(entries)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder to install to."""
    plugin(tmp_path, name="toy_package.py")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("toy_package", None)


@pytest.mark.parametrize("entry", ["toy = toy_package:TOYBOARD\nv1 = toy_package:V1", "toy = toy_package"])
def test_entry_points_are_found(site: Path, tiny_model: Module, entry: str) -> None:
    own = "[dsv4c.passes]\nunscaled = toy_package:SelectUnscaled\n"
    installed(site, f"[dsv4c.targets]\n{entry}\n{own}")
    assert set(known_targets()) == {*TARGETS, "toyboard"}
    assert "select_unscaled" in {r.name for r in api.lower(tiny_model, "toyboard").records}
    with pytest.raises(TargetError, match=r"already called 'toyboard-v1'.*\n.*of entry point \w+ = toy_"):
        known_targets([plugin(site, name="other.py")])


@pytest.mark.parametrize(
    ("value", "what"),
    [
        ("toy_package:Absent", "entry point bad = toy_package:Absent: cannot be imported"),
        ("toy_package:NODES", "entry point bad = toy_package:NODES: is no target and holds none"),
        ("toy_package:SelectUnscaled", "is no target and holds none; allowed: a Target"),
    ],
)
def test_a_bad_entry_point_is_named(site: Path, value: str, what: str) -> None:
    installed(site, f"[dsv4c.targets]\nbad = {value}\n")
    with pytest.raises(TargetError, match=what):
        known_targets()


# ------------------------------------------------------------------------------------ the table


def test_targets_lists_devices_with_their_figures(dsv4c: Call) -> None:
    text = ok(dsv4c("targets"))
    (row,) = re.findall(r"^ *ascend:910c .*$", text, re.MULTILINE)
    assert row.split() == [
        "ascend:910c", "ascend-910c-die", "64", "GB", "1600", "GB/s", "?", "353.9", "353.9", "752", "?", "?",
        "default", "here",
    ]  # fmt: skip
    assert re.search(r"^ *mlu:590 +mlu590( +\?){8} +default here$", text, re.MULTILINE)
    assert re.search(r"^ *cpu:aarch64 +aarch64( +default here)?$", text, re.MULTILINE)


def test_targets_as_json(dsv4c: Call, toyboard: Path) -> None:
    facts = ok_json(dsv4c("targets", "--plugin", toyboard, "--json"))
    found = {t["name"]: t for t in facts["targets"]}
    assert set(found) == {*TARGETS, "toyboard"}
    archs = {a["name"]: a for a in found["ascend"]["archs"]}
    assert archs["910b3"]["figures"]["peaks"]["int8"] == 626e12
    assert archs["910b3"]["figures"]["peaks"]["fp8"] is None
    assert {a["device"] for a in found["cpu"]["archs"]} == {None}
    (arch,) = found["toyboard"]["archs"]
    assert arch["device"] == "toyboard-v1" and arch["figures"]["memory"] == 16e9 and arch["default"]


def test_every_arch_beside_a_host_names_a_device_of_the_table(dsv4c: Call) -> None:
    for target in ok_json(dsv4c("targets", "--json"))["targets"]:
        for arch in target["archs"]:
            assert bool(arch["machine"]) != bool(arch["figures"]), f"{target['name']}:{arch['name']}"


def test_check_says_what_is_here_and_how_to_get_the_rest(
    dsv4c: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # the environment of the Ascend compiler is looked for from here
    for name in HOMES:
        monkeypatch.delenv(name, raising=False)
    text = ok(dsv4c("targets", "--check"))
    assert "ascend: artifacts can be compiled here" in text and "mlu: artifacts can be compiled" in text
    assert re.search(r"^ *atc +not found +convert an artifact's models", text, re.MULTILINE)
    assert re.search(r"^ *to get hivmc, bisheng: the CANN toolkit", text, re.MULTILINE)
    assert re.search(r"^ *to get triton-ascend, ascendnpu-ir: python -m dsv4c\.", text, re.MULTILINE)
    assert re.search(r"^ *ASCEND_HOME_PATH +not set$", text, re.MULTILINE)


def test_check_as_json(dsv4c: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "bin" / "cncc"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\necho cncc v9.9\n")
    tool.chmod(0o755)
    monkeypatch.setenv("NEUWARE_HOME", str(tmp_path))
    facts = ok_json(dsv4c("targets", "--check", "--plugin", plugin(tmp_path), "--json"))
    tools = {(t["name"], x["name"]): x for t in facts["targets"] for x in t["tools"]}
    assert tools["mlu", "cncc"]["found"] == {"where": str(tool), "version": "cncc v9.9"}
    assert facts["homes"]["NEUWARE_HOME"] == str(tmp_path)
    onnx = tools["toyboard", "onnx"]
    assert onnx["compiling"] and onnx["found"]["version"] == importlib.metadata.version("onnx")
    assert tools["cpu", "ziglang"]["instead_of"] == "cc"
    compiling = {name for (target, name), x in tools.items() if target != "cpu" and x["compiling"]}
    assert compiling == {"onnx", "triton"}


def test_a_missing_tool_of_the_compiler_is_said_first(dsv4c: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of two that do the same is enough."""
    cc, zig = (next(t for t in TOOLS["cpu"] if t.name == name) for name in ("cc", "ziglang"))
    for where, text in (("cc", "can be compiled"), ("ziglang", "can be compiled"), ("", "cc, ziglang is")):
        pair = tuple(
            dataclasses.replace(
                t, find=lambda name=t.name, here=where: Found("", "1") if name == here else None
            )
            for t in (cc, zig)
        )
        monkeypatch.setattr("dsv4c.targets.toolchains.TOOLS", {**TOOLS, "cpu": pair})
        assert text in ok(dsv4c("targets", "--check")).splitlines()[0]


def test_looking_for_tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert package("nothing_of_that_name", "nothing")() is None
    assert program("nothing-of-that-name", home="NOWHERE")() is None
    for name, code in (("good", "echo good 1; echo more"), ("bad", "exit 3")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{code}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("MY_CC", "good")
    assert program("$NOT_SET", "$MY_CC")() == Found(str(tmp_path / "good"), "good 1")
    assert program("bad")() == Found(str(tmp_path / "bad"), "?")
    assert program("good", says_version=False)() == Found(str(tmp_path / "good"), "?")
    site = tmp_path / "env" / "lib" / "python3.11" / "site-packages"
    site.mkdir(parents=True)
    assert environment("toys", tmp_path / "env")() is None
    installed(site, "")
    assert environment("toys", tmp_path / "env")() == Found(str(tmp_path / "env"), "1.0")


def test_every_target_has_its_tools() -> None:
    """Its table holds the packages of its formats, and each says what for and how to get it."""
    assert TOOLS.keys() == TARGETS.keys()
    for target in TARGETS.values():
        tools = tools_of(target)
        needed = {name for form in target.formats for name in form.packages.values()}
        assert needed <= {tool.name for tool in tools if tool.compiling}, target.name
        assert all(tool.purpose and tool.get for tool in tools)
        assert len({tool.name for tool in tools}) == len(tools)


# ------------------------------------------------------------------------------------- legality


def test_a_format_that_lacks_an_op_names_one_that_has_it() -> None:
    """Convolutions of Engram have kernels and no nodes of fixed shapes; tables on disk have neither."""
    for target in (TARGETS["cuda"], TARGETS["rocm"]):
        assert "short_conv" not in target.legal("onnx")
        assert target.elsewhere("short_conv") == "--format plan takes it"
        assert target.elsewhere("engram_fetch") == target.elsewhere("no such op") == ""
        assert target.elsewhere("engram_fetch", target.format("plan")).startswith("leave out layout_engram")


def fused(name: str, loc: str) -> Module:
    """A module at level FUSED with one op."""
    types, attrs, _ = VALID[name]
    module = Module("m", Level.FUSED)
    builder = Builder(module)
    builder.loc = loc
    op = builder.multi(name, *(builder.input(f"x{i}", parse_type(t)) for i, t in enumerate(types)), **attrs)
    module.outputs = {f"y{i}": value for i, value in enumerate(op.results)}
    return module


def illegal() -> list[tuple[str, str]]:
    """(target, op) for every op of level FUSED that a device does not take."""
    ops = [op for op in VALID if allows(Level.FUSED, op)]
    return [(name, op) for name in DIALECTS for op in ops if op not in TARGETS[name].legal("onnx")]


@pytest.mark.parametrize(("target", "op"), illegal())
def test_an_op_outside_the_table_is_refused_where_it_stands(target: str, op: str) -> None:
    with pytest.raises(TargetError) as caught:
        api.lower(fused(op, "layers.3.attn.odd"), target, "onnx", passes=[])
    assert str(caught.value).startswith(f"{target}, layers.3.attn.odd: {op} is not legal here; allowed: ")
    assert ", ".join(sorted(TARGETS[target].legal("onnx"))) in caught.value.allowed


@pytest.mark.parametrize("target", DIALECTS)
def test_what_is_legal_has_a_lowering(target: str) -> None:
    assert TARGETS[target].legal("onnx") <= {*STATIC_LOWERINGS, *HOST_OPS, "weight"}
    assert len([op for name, op in illegal() if name == target]) > 10


@pytest.mark.parametrize("dialect", ALL.values(), ids=ALL)
def test_an_op_without_a_lowering_is_refused_by_the_emitter(dialect: Dialect) -> None:
    module = fused("dispatch", "layers.3.ffn")
    module.meta["static_shapes"] = {"batch": 1, "context": 8, "tokens": [1], "stages": 1}
    with pytest.raises(TargetError, match=f"layers.3.ffn: {dialect.name} has no dispatch; allowed: add, "):
        emit_static(module, cast(Any, None), cast(ArtifactWriter, None), dialect)


@pytest.mark.parametrize("dialect", ALL.values(), ids=ALL)
def test_a_node_outside_the_dialect_is_refused(dialect: Dialect) -> None:
    """At a version that the consumer lacks, under a name near one it has, and under none it knows."""
    with pytest.raises(TargetError) as caught:
        dialect.check("", "ReduceSumOfAll", "layers.3.attn")
    assert caught.value.where == "layers.3.attn"
    assert "ai.onnx::ReduceSum" in caught.value.allowed and "let a pass replace" in caught.value.hint
    with pytest.raises(TargetError, match=f"allowed: the {len(dialect.nodes)} nodes of its table"):
        dialect.check("com.example", "Qqq", "layers.3.attn")
    old = dataclasses.replace(dialect, nodes={**dialect.nodes, "ai.onnx::Tile": ((1, 5), (8, 9))})
    with pytest.raises(TargetError) as caught:
        old.check("", "Tile", "layers.3.attn")
    assert str(caught.value) == (
        f"layers.3.attn: {dialect.name} has no ai.onnx::Tile at opset {dialect.opset}; "
        "allowed: opset 1 to 5, 8 to 9"
    )
    dialect.check("", "Add", "layers.3.attn")


@pytest.mark.parametrize("dialect", ALL.values(), ids=ALL)
def test_an_element_type_or_a_rank_outside_the_dialect_is_refused(dialect: Dialect) -> None:
    g = StaticContext(dialect)
    g.where = "layers.3.attn"
    with pytest.raises(TargetError, match=f"layers.3.attn: x is of type 11, which {dialect.name} lacks"):
        g.declare("x", TensorProto.DOUBLE, (2, 3))
    with pytest.raises(TargetError, match=f"layers.3.attn: x has 9 axes; allowed: {dialect.max_rank}"):
        g.declare("x", TensorProto.FLOAT, (1,) * 9)
    for name, element in (("u8", TensorProto.UINT8), ("bf16", TensorProto.BFLOAT16)):
        if name not in dialect.elements:
            with pytest.raises(TargetError, match=f"x is of {name}, .*allowed: bool, .*f32, i32"):
                dialect.check_type(element, 2, "x", "layers.3.attn")


@pytest.mark.parametrize("dialect", ALL.values(), ids=ALL)
def test_the_graph_holds_every_node_to_the_dialect(dialect: Dialect) -> None:
    """Nodes, and the types and ranks of what they give, when they are made."""
    g = StaticContext(dialect)
    g.where = "layers.3.ffn.gate"
    x = g.declare("x", TensorProto.FLOAT, (2, 3))
    with pytest.raises(TargetError, match=r"layers.3.ffn.gate: .* has no ai.onnx::Swish"):
        g.op("Swish", x)
    with pytest.raises(TargetError, match=r"layers.3.ffn.gate: .* is of type 11.*allowed: "):
        g.op("Cast", x, to=TensorProto.DOUBLE)
    with pytest.raises(TargetError, match=r"layers.3.ffn.gate: .* has 9 axes; allowed: 8"):
        g.op("Reshape", x, [1] * 7 + [2, 3])
