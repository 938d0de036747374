"""The pass manager: edited pipelines, passes held to their word, the errors of strangers' passes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from dsv4c import api
from dsv4c.errors import PassError
from dsv4c.ir.compare import difference
from dsv4c.ir.graph import Builder, Module, Op
from dsv4c.ir.sample import RandomStore, sample_inputs, sample_sizes
from dsv4c.ir.text import parse_module, print_module
from dsv4c.passes import (
    EXACT,
    PASSES,
    Effect,
    Pass,
    known_passes,
    parse_pipeline,
    print_pipeline,
    run_pipeline,
)
from dsv4c.passes.check import ResultCheck
from dsv4c.targets import TARGETS
from dsv4c.testing import assert_preserves

TEXT = """
module "m" level MODEL {
  input %tokens : i32[B, T]
  input %n_valid : i32[B]
  state %pos : i32[B]
  %table = weight source{name = "t", dtype = bf16, shape = [11, 8]} : bf16[11, 8] @embed
  %w = weight source{name = "w", dtype = f32, shape = [6, 8]} : f32[6, 8] @first.w
  %x = embed(%tokens, %table) : f32[B, T, 8] @embed
  %y = linear(%x, %w) : f32[B, T, 6] @first
  %z = scale(%y) {factor = 2.0} : f32[B, T, 6] @second
  %after = advance(%pos, %n_valid) : i32[B]
  output logits = %z
  output pos = %after
}
"""

# --------------------------------------------------------------------------------- editing pipelines

OWN = "fuse_swiglu,fuse_index_select,narrow_weights"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("default", "fuse_swiglu,fuse_index_select,narrow_weights"),
        ("without(fuse_index_select)", "fuse_swiglu,narrow_weights"),
        ("eliminate_dead_code", "eliminate_dead_code"),
        ("eliminate_dead_code,default", "eliminate_dead_code,fuse_swiglu,fuse_index_select,narrow_weights"),
        (
            "before(fuse_swiglu, eliminate_dead_code),without(narrow_weights)",
            "eliminate_dead_code,fuse_swiglu,fuse_index_select",
        ),
        (
            "after(fuse_index_select, fuse_expert_gemms)",
            "fuse_swiglu,fuse_index_select,fuse_expert_gemms,narrow_weights",
        ),
        (
            'with(narrow_weights{storage="f32"})',
            'fuse_swiglu,fuse_index_select,narrow_weights{storage="f32"}',
        ),
        ("default,without(narrow_weights),narrow_weights", "fuse_swiglu,fuse_index_select,narrow_weights"),
    ],
)
def test_edits_of_the_default(text: str, wanted: str) -> None:
    found = print_pipeline(parse_pipeline(text, default=OWN))
    assert found == print_pipeline(parse_pipeline(wanted))
    assert print_pipeline(parse_pipeline(found, default=OWN)) == found, "what is printed names no default"


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("without(fuse_swigl)", "without.fuse_swigl.: unknown pass 'fuse_swigl'; allowed: fuse_index_select"),
        ("before(fuse_expert_gemms, fuse_swiglu)", "before.fuse_expert_gemms.: unknown pass"),
        ("after(fuse_swiglu)", "expected ','"),
        ("with(fuse_swiglu{rate=1})", "fuse_swiglu: unknown option 'rate'"),
        ("with(fuse_swiglu", "expected '\\)'"),
    ],
)
def test_edits_that_cannot_be(text: str, what: str) -> None:
    with pytest.raises(Exception, match=what):
        parse_pipeline(text, default=OWN)


def test_python_mixes_texts_and_passes() -> None:
    form = TARGETS["cpu"].format("tvm")
    found = api.choose_pipeline(form, ["eliminate_dead_code", Doubler(), "default"])
    assert [p.name for p in found[:2]] == ["eliminate_dead_code", "doubler"]
    assert found[2:] == parse_pipeline(form.passes)


# --------------------------------------------------------------------------------- results are kept


@dataclass(frozen=True)
class Doubler(Pass):
    name: ClassVar[str] = "doubler"
    doc: ClassVar[str] = "doubles the factor of every scale"
    by: float = 2.0
    says: str = ""

    def run(self, module: Module) -> int:
        found = [op for op in module.ops if op.name == "scale"]
        for op in found:
            op.attrs["factor"] = self.by * float(op.attrs["factor"])  # type: ignore[arg-type]
        return len(found)

    def effect(self) -> Effect:
        return Effect(changes=(self.says,), measure="by eye") if self.says else EXACT


def test_a_pass_that_changes_a_result_is_stopped_at_the_op() -> None:
    with pytest.raises(PassError) as caught:
        run_pipeline((m := parse_module(TEXT)), (Doubler(),), check=ResultCheck(m))
    assert "doubler: changes output 'logits' by 1 of its range, first at scale @second" in str(caught.value)
    assert "> %7 = scale(%6) {factor = 4.0} : f32[B, T, 6] @second" in caught.value.hint


def test_a_change_below_the_tolerance_passes_and_is_recorded() -> None:
    m = parse_module(TEXT)
    (record,) = run_pipeline(m, (Doubler(1 + 1e-12),), check=ResultCheck(m))
    assert 0 < record.changed["logits"] < 2e-12 and record.changed["pos"] == 0 and record.measure == ""
    with pytest.raises(PassError, match="changes output 'logits'"):
        run_pipeline(m, (Doubler(1 + 1e-7),), check=ResultCheck(m))


def test_a_declared_change_is_measured_not_refused() -> None:
    m = parse_module(TEXT)
    (record,) = run_pipeline(m, (Doubler(2.0, "log*"),), check=ResultCheck(m))
    assert record.changed["logits"] == pytest.approx(1.0) and record.measure == "by eye"
    with pytest.raises(PassError, match="changes output 'logits'"):
        run_pipeline(m, (Doubler(2.0, "other"),), check=ResultCheck(m))


def test_an_effect_needs_a_measure() -> None:
    with pytest.raises(PassError, match="without a measure"):
        Effect(changes=("*",))


@dataclass(frozen=True)
class Vocabulary(Pass):
    """Right for tokens below 5 only."""

    name: ClassVar[str] = "vocabulary"
    doc: ClassVar[str] = "swaps the table"
    promised: int = 5

    def run(self, module: Module) -> int:
        from dsv4c.ir import weights as w

        (table,) = (op for op in module.weights() if op.loc == "embed")
        assert table.weight is not None
        rows = w.rows(table.weight, 0, 5), w.rows(table.weight, 0, 5), w.rows(table.weight, 0, 1)
        table.weight = w.concat(rows)
        return 1

    def effect(self) -> Effect:
        return Effect(vocabulary=tuple(range(self.promised)))


def test_a_promise_for_some_tokens_is_checked_on_those() -> None:
    m = parse_module(TEXT)
    run_pipeline(m, (Vocabulary(),), check=ResultCheck(m))
    m = parse_module(TEXT)
    with pytest.raises(PassError, match="vocabulary: changes output 'logits'"):
        run_pipeline(m, (Vocabulary(11),), check=ResultCheck(m))


def test_a_lost_output_is_an_error() -> None:
    @dataclass(frozen=True)
    class Loser(Doubler):
        def run(self, module: Module) -> int:
            del module.outputs["logits"]
            return 1

    m = parse_module(TEXT)
    with pytest.raises(PassError, match="output 'logits' is gone"):
        run_pipeline(m, (Loser(),), check=ResultCheck(m))


def test_state_and_padding_are_part_of_the_check(tiny_model: Module) -> None:
    """Every pass of the default pipeline keeps its word on a model with every kind of layer."""
    form = TARGETS["cpu"].format("tvm")
    lowered = api.lower(tiny_model, verify_passes=True)
    assert [r.name for r in lowered.records] == [str(p) for p in parse_pipeline(form.passes)]
    for record in lowered.records:
        assert set(record.changed) == {*tiny_model.outputs}, "every output and state was compared"
        assert max(record.changed.values()) <= 1e-9
    assert lowered.reference is tiny_model, "nothing was meant to change"


def test_assert_preserves_takes_text_and_modules() -> None:
    assert assert_preserves(PASSES["merge_common_subexpressions"](), TEXT).changes == 0
    with pytest.raises(PassError, match="first at scale @second"):
        assert_preserves(Doubler(), parse_module(TEXT))
    assert "factor = 2.0" in print_module(parse_module(TEXT)), "the module itself stays as it was"


def test_random_arguments_fit() -> None:
    m = parse_module(TEXT)
    sizes = sample_sizes(m, {"T": 4})
    assert sizes == {"B": 2, "T": 4}
    found = sample_inputs(m, sizes, np.random.default_rng(0))
    assert found["tokens"].shape == (2, 4) and found["tokens"].max() < 11
    assert found["n_valid"].tolist()[0] == 4 and 1 <= found["n_valid"][1] <= 4
    store = RandomStore(m)
    assert np.array_equal(store.read("w"), RandomStore(m).read("w"))
    assert not np.array_equal(store.read("w"), RandomStore(m, 1).read("w"))


@pytest.mark.parametrize(
    ("want", "got", "size"),
    [
        ([1.0, -4.0], [1.0, -4.0], 0.0),
        ([1.0, -4.0], [2.0, -4.0], 0.25),
        ([1.0, np.nan], [1.0, 2.0], np.inf),
        ([np.inf, 2.0], [np.inf, 1.0], 0.5),
        ([1.0], [1.0, 1.0], np.inf),
        ([3, 4], [3, 5], np.inf),
        ([], [], 0.0),
    ],
)
def test_difference(want: list[Any], got: list[Any], size: float) -> None:
    assert difference(np.array(want), np.array(got)) == size


# --------------------------------------------------------------------------------- strangers' passes


def broken(run: Callable[[Module], Any]) -> Pass:
    @dataclass(frozen=True)
    class Broken(Pass):
        name: ClassVar[str] = "broken"
        doc: ClassVar[str] = "does something wrong"

        def run(self, module: Module) -> int:
            return run(module)  # type: ignore[no-any-return]

    return Broken()


def _divide(module: Module) -> int:
    for op in module.ops:
        if op.name == "linear":
            return 1 // len(op.results[1:])
    return 0


def test_a_foreign_exception_names_pass_op_and_graph() -> None:
    with pytest.raises(PassError) as caught:
        run_pipeline(parse_module(TEXT), (broken(_divide),))
    text = str(caught.value)
    assert "broken: raised ZeroDivisionError at linear @first: integer division" in text
    assert " of test_pass_manager.py; the graph around it:" in text
    assert "> %6 = linear(%5, %4) {inputs = \"any\"} : f32[B, T, 6] @first" in text
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_an_error_of_the_ir_names_the_pass() -> None:
    def wrong(module: Module) -> int:
        op = next(op for op in module.ops if op.name == "linear")
        Builder(module).op("add", op.result, op.operands[0])
        return 1

    with pytest.raises(PassError, match="broken: raised IRError at linear @first: add: add needs"):
        run_pipeline(parse_module(TEXT), (broken(wrong),))


def test_run_must_return_a_count() -> None:
    for value in (None, True, "3"):
        with pytest.raises(PassError, match=r"broken: run returned .*; allowed: how many places"):
            run_pipeline(parse_module(TEXT), (broken(lambda module, v=value: v),))  # type: ignore[misc]


def test_a_broken_graph_is_shown_around_the_op() -> None:
    def wrong(module: Module) -> int:
        op: Op = next(op for op in module.ops if op.name == "scale")
        module.ops.remove(op)
        module.ops.insert(0, op)
        return 1

    with pytest.raises(PassError) as caught:
        run_pipeline(parse_module(TEXT), (broken(wrong),))
    assert "broken: left a broken graph: second: scale: reads a value before it is made" in str(caught.value)
    assert "> " in caught.value.hint and "scale(" in caught.value.hint


# --------------------------------------------------------------------------------- plug-ins

PLUGIN = """
from dataclasses import dataclass
from typing import ClassVar
from dsv4c.passes import Pass

@dataclass(frozen=True)
class Stranger(Pass):
    name: ClassVar[str] = "stranger"
    doc: ClassVar[str] = "counts ops"
    most: int = 9

    def run(self, module):
        return min(self.most, len(module.ops))
"""


def plugin(tmp_path: Path, text: str, name: str = "my_pass.py") -> Path:
    path = tmp_path / name
    path.write_text(text)
    return path


def test_a_plugin_is_a_pass_like_any_other(tmp_path: Path) -> None:
    known = known_passes([plugin(tmp_path, PLUGIN)])
    assert set(known) == {*PASSES, "stranger"}
    (p,) = parse_pipeline("stranger{most=2}", known)
    assert str(p) == "stranger{most=2}"
    (record,) = run_pipeline(parse_module(TEXT), (p,))
    assert record.changes == 2
    assert "stranger" not in PASSES


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("import nothing_of_that_name", "cannot be imported: ModuleNotFoundError.*nothing_of_that_name"),
        ("1 +", "cannot be imported: SyntaxError"),
        ("raise SystemExit(3)", "cannot be imported: SystemExit"),
        ("x = 1", "defines no pass"),
        ("from dsv4c.passes.cleanup import EliminateDeadCode", "defines no pass"),
        (PLUGIN.replace('"stranger"', '"fuse_swiglu"'), "a pass is already called 'fuse_swiglu'"),
        (PLUGIN.replace("@dataclass(frozen=True)", "@dataclass"), "cannot be imported: TypeError"),
        (PLUGIN.replace("@dataclass(frozen=True)", ""), "Stranger is not a frozen dataclass"),
        (PLUGIN.replace("doc: ClassVar", "text: ClassVar"), "Stranger has no `doc`"),
        (PLUGIN.replace('"stranger"', '"two words"'), "Stranger has name 'two words'"),
        (PLUGIN.replace("def run", "def walk"), "Stranger does not implement run"),
    ],
)
def test_a_bad_plugin_is_refused(tmp_path: Path, text: str, what: str) -> None:
    with pytest.raises(PassError, match=f"(?s){what}"):
        known_passes([plugin(tmp_path, text)])


def test_plugins_clash_with_each_other_and_must_exist(tmp_path: Path) -> None:
    one, two = plugin(tmp_path, PLUGIN, "one.py"), plugin(tmp_path, PLUGIN, "two.py")
    with pytest.raises(
        PassError, match=r"two\.py: a pass is already called 'stranger'.*\n.*dsv4c_plugin_one"
    ):
        known_passes([one, two])
    with pytest.raises(PassError, match=r"none\.py: no such file"):
        known_passes([tmp_path / "none.py"])


def test_entry_points_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As an installed package would bring them: its metadata on the path."""
    plugin(tmp_path, PLUGIN, "strange_package.py")
    info = tmp_path / "strange-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: strange\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[dsv4c.passes]\nstranger = strange_package:Stranger\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "stranger" in known_passes()
    (info / "entry_points.txt").write_text("[dsv4c.passes]\nbad = strange_package:Absent\n")
    with pytest.raises(PassError, match="entry point bad = strange_package:Absent: cannot be imported"):
        known_passes()
