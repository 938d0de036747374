"""What differs between processors: the files it stands in, the search, and that no result depends on it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import Arr, B, Case, T, normal
from test_kernels_packed import HOST, matrix, weight
from test_model_harness import Models

from dsv4c import cli
from dsv4c.errors import TargetError
from dsv4c.ir.formats import SCHEMES
from dsv4c.runtime import Artifact
from dsv4c.runtime.cpu import cpu_model, model_of
from dsv4c.targets import parse_target
from dsv4c.targets.cpu import tuning as tunings
from dsv4c.targets.cpu.target import ARCHS
from dsv4c.targets.cpu.tuning import ALLOWED, DEFAULT, Tuning

INTEL = "processor\t: 0\nvendor_id\t: GenuineIntel\ncpu family\t: 6\nmodel\t\t: 207\nmodel name\t: Xeon\n"
ARM = "processor\t: 0\nBogoMIPS\t: 50.00\nCPU implementer\t: 0x41\nCPU architecture: 8\nCPU part\t: 0xd40\n"
FOREIGN = "x86-64-v2" if HOST[0] == "aarch64" else "aarch64"
ENDS = [
    Tuning(**{name: values[i] for name, values in ALLOWED.items()})  # the least of all, and the most
    for i in (0, -1)
]


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], Path]:
    """Writes the user's file."""

    def write(content: Any) -> Path:
        path = tmp_path / "tuning.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        monkeypatch.setenv(tunings.VARIABLE, str(path))
        return path

    return write


def test_names_of_processors() -> None:
    assert model_of(INTEL + "\n" + INTEL.replace("207", "1")) == "GenuineIntel-6-207"
    assert model_of(ARM) == "0x41-0xd40"
    assert model_of("") == model_of("processor : 0\nmodel name : what\n") == ""


def test_what_is_known_is_taken(file: Callable[[Any], Path], tmp_path: Path) -> None:
    """The user's numbers, then those that are shipped, then the default."""
    shipped = tunings.read(tunings.SHIPPED)
    file({"a-1": {"x86-64-v3": {"ahead": 64}}})
    assert tunings.tuning_for("x86-64-v3", "a-1") == Tuning(ahead=64)
    assert tunings.tuning_for("x86-64-v2", "a-1") == tunings.tuning_for("x86-64-v3", "a-2") == DEFAULT
    assert tunings.tuning_for("x86-64-v4-amx", "a-1").few < DEFAULT.few
    file({"a-1": {"x86-64-v4-amx": {"ahead": 64}}})
    of_arch = tunings.default_for("x86-64-v4-amx")
    assert tunings.tuning_for("x86-64-v4-amx", "a-1") == replace(of_arch, ahead=64)
    for model, archs in shipped.items():
        for arch, known in archs.items():
            assert tunings.tuning_for(arch, model) == known
            assert arch in {a.name for a in ARCHS}


def test_without_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(tunings.VARIABLE, str(tmp_path / "none.json"))
    assert tunings.tuning_for("x86-64-v3", "a-1") == DEFAULT
    monkeypatch.setenv(tunings.VARIABLE, "")
    assert tunings.user_file() is None
    monkeypatch.delenv(tunings.VARIABLE)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert tunings.user_file() == tmp_path / "dsv4c" / "tuning.json"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read"),
        ([], "is no table of processors"),
        ({"a-1": []}, "is no table of processors"),
        ({"a-1": {"x86-64-v3": 7}}, "a-1: x86-64-v3: is no table of numbers"),
        ({"a-1": {"x86-64-v3": {"ahed": 64}}}, "unknown number 'ahed'"),
        ({"a-1": {"x86-64-v3": {"ahead": 65}}}, "ahead is 65; allowed: 0, 64"),
        ({"a-1": {"x86-64-v3": {"few": True}}}, "few is True"),
    ],
)
def test_broken_files(file: Callable[[Any], Path], content: Any, message: str) -> None:
    path = file(content)
    with pytest.raises(TargetError, match=message) as caught:
        tunings.tuning_for("x86-64-v3", "a-1")
    assert str(path) in str(caught.value)


def test_other_entries_stay(file: Callable[[Any], Path]) -> None:
    path = file({"a-1": {"x86-64-v3": {"ahead": 64}}})
    table = json.loads(tunings.merged(path, "a-1", "x86-64-v4", Tuning(few=1)))
    assert table["a-1"]["x86-64-v3"]["ahead"] == 64
    assert table["a-1"]["x86-64-v4"] == {"ahead": 192, "strip": 256, "few": 1}
    assert json.loads(tunings.merged(path.with_name("new.json"), "b", "x86-64-v2", DEFAULT)).keys() == {"b"}


def test_an_artifact_says_how_it_was_tuned(models: Models) -> None:
    found = Artifact.open(models.artifact("v4", "tvm")).meta["tvm"]["tuning"]
    assert found.keys() == ALLOWED.keys()


# ------------------------------------------------------------------------------ the search


def test_what_is_chosen() -> None:
    """The geometric mean over products decides, and only where it is beyond the scatter."""
    from dsv4c.targets.cpu.tvm.search import chosen, mean_ratios

    ratios = mean_ratios({"a": {1: 4.0, 2: 2.0, 3: 1.0}, "b": {1: 1.0, 2: 1.0, 3: 4.0}}, 1)
    assert ratios == pytest.approx({1: 1.0, 2: 0.5**0.5, 3: 1.0})
    assert chosen(ratios, 1) == 2
    assert chosen({1: 1.0, 2: 0.99}, 1) == 1


def test_a_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every value of every number is tried, with products that run."""
    from dsv4c.targets.cpu.tvm import search

    few = {"ahead": (64, 192), "strip": (128, 256), "few": (1, 2, 8)}
    monkeypatch.setattr(search, "ALLOWED", few)
    monkeypatch.setattr(search, "SCHEMES", ("mxfp4",))
    monkeypatch.setattr(search, "SIZE", (64, 256))
    seen: list[str] = []
    found, trials = search.search(parse_target("cpu")[1], 1, lambda what, *_: seen.append(what), 1 << 16)
    assert {(t.name, t.value) for t in trials} == {(n, v) for n, values in few.items() for v in values}
    assert all(t.ratio > 0 for t in trials)
    assert found.ahead in few["ahead"] and found.few in few["few"] and seen[-1] == "done"


@pytest.mark.parametrize(("scheme", "inputs"), [("mxfp4", "int8"), ("fp8", "bf16"), ("int8", "bf16")])
def test_no_result_depends_on_it(scheme: str, inputs: str) -> None:
    """With the least and the most of everything, for one row and for many, bit for bit."""

    def case(tuning: Tuning) -> Case:
        c = Case(f"cpu:{HOST[0]}", tuning)
        w = weight(c, "w", matrix(c, "w", SCHEMES[scheme], 70, 520))
        rule = {"rule": inputs, "block": 32 if inputs == "int8" else 0}
        c.op("linear", c.b.op("round_values", c.f32("x", B, T, 520), **rule), w, out="y", inputs=inputs)
        return c

    cases = [case(tuning) for tuning in (DEFAULT, *ENDS)]
    for tokens in (1, 2, 3, 5, 7, 13, 14, 40):
        x: Arr = normal(np.random.default_rng(tokens), 1, tokens, 520)
        first, *others = (c.run({"x": x})["y"] for c in cases)
        for other in others:
            np.testing.assert_array_equal(other, first)


@pytest.mark.parametrize("name", ALLOWED)
def test_kernels_take_every_number(name: str) -> None:
    """What is tuned is in the code: without that, results would not depend on it either."""
    from dsv4c.ir.dtypes import DType
    from dsv4c.targets.cpu.tvm.kernels.dense import grouped_linear
    from dsv4c.targets.cpu.tvm.kernels.packing import Packing, Simd

    def text(value: int) -> str:
        form = Packing(DType.F4E2M1X2, DType.F8E8M0, 32, simd=Simd.AMX, coded=True)
        return str(grouped_linear(None, 1, 1024, 64, replace(form, tuning=Tuning(**{name: value}))).script())

    assert len({text(value) for value in ALLOWED[name]}) == len(ALLOWED[name])


# ------------------------------------------------------------------------------ the command


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def run(*argv: object) -> tuple[int, str, str]:
        code = cli.main([str(a) for a in argv])
        return (code, *capsys.readouterr())

    return run


def test_the_command(
    call: Callable[..., tuple[int, str, str]], file: Callable[[Any], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was found stands beside what was there, and is what compiling takes from then on."""
    from dsv4c.targets.cpu.tvm import search

    trial = search.Trial("ahead", 64, 0.9)
    monkeypatch.setattr(search, "search", lambda arch, rounds, progress: (Tuning(ahead=64), [trial]))
    path = file({"a-1": {"x86-64-v3": {"few": 1}}})
    code, out, err = call("tune", "--target", f"cpu:{HOST[0]}", "--json")
    assert code == 0, err
    facts = json.loads(out)
    assert facts["path"] == str(path) and facts["found"]["ahead"] == 64 and facts["processor"] == cpu_model()
    assert tunings.tuning_for(HOST[0], cpu_model()) == Tuning(ahead=64)
    assert tunings.tuning_for("x86-64-v3", "a-1") == Tuning(few=1)
    assert "0.900" in call("tune", "--target", f"cpu:{HOST[0]}")[1]
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_refusals(
    call: Callable[..., tuple[int, str, str]], file: Callable[[Any], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for words, message in (
        (("--target", "ascend"), "allowed: cpu, cpu:ARCH"),
        (("--target", f"cpu:{FOREIGN}"), "this machine is"),
        (("--target", "cpu:portable"), "one at a time"),
        (("--rounds", "0"), "is not an integer of at least 1"),
    ):
        code, _, err = call("tune", *words)
        assert code == 2 and message in err
    file("{")
    assert "cannot be read" in call("tune")[2]
    monkeypatch.setenv(tunings.VARIABLE, "")
    assert "name a file with -o" in call("tune")[2]
