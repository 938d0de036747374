"""Profiles: every call of the compiled code is known by op and layer, and the parts add up to the whole."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from test_cli import Built, Call, built, dsv4c, ok, ok_json
from test_model_harness import Models

from dsv4c import Session, api, load_checkpoint
from dsv4c.cli.bench_profile import against
from dsv4c.errors import ArtifactError
from dsv4c.ir.amounts import least, symbolic, tree_of
from dsv4c.ir.cost import module_cost, op_cost
from dsv4c.ir.graph import Module
from dsv4c.runtime import Artifact, profile
from dsv4c.runtime.container.costs import evaluate
from dsv4c.runtime.profile import Phase, Recorder, layer_of, measure_ceilings, summarise

__all__ = ["built", "dsv4c"]  # fixtures: pytest finds them by name

PLACES = {"shared", "head", "layers.0", "layers.1", "layers.2", "layers.3"}
NO_CALL = {"weight", "split_heads", "merge_heads"}
"""Parameters, and other views of a value."""
SMALL = ("--prompt-tokens", 20, "--chunk", 12, "--decode-tokens", 3, "--repeat", 2)


@pytest.fixture(scope="module")
def lowered(built: Built) -> Module:
    return api.lower(load_checkpoint(built.checkpoint)).module


@pytest.fixture
def session(built: Built) -> Session:
    return Session(built.artifact, context=64, threads=1)


def spent(phase: Phase, table: str) -> float:
    return sum(row.seconds for row in getattr(phase, table).values())


# ---------------------------------------------------------------------------------------- costs


def test_amounts_are_the_numbers_they_stand_for() -> None:
    x, y = symbolic("x"), symbolic("y")
    found = (3 + x * 4 - y) // 2 * (10 - x) + least(x, 7) * 1 + 100 // y + 0 * x
    for sizes in ({"x": 5, "y": 3}, {"x": 11, "y": 40}):
        a, b = sizes.values()
        want = (3 + a * 4 - b) // 2 * (10 - a) + min(a, 7) + 100 // b
        assert evaluate(tree_of(found), sizes) == want
    assert least(3, 2) == 2 and tree_of(x * 1 + 0) == "x" and tree_of(0 * x) == 0


@pytest.mark.parametrize("sizes", [(1, 1, 0, 64), (2, 12, 0, 64), (1, 1, 37, 64), (3, 300, 200, 512)])
def test_costs_of_the_manifest_are_those_of_the_graph(lowered: Module, sizes: tuple[int, ...]) -> None:
    numbers = dict(zip(("B", "T", "past", "ctx"), sizes, strict=True)) | {"L": 1}
    names = {name: symbolic(name) for name in numbers}
    checked = 0
    for op in lowered.ops:
        want, found = op_cost(op, numbers), op_cost(op, names)
        for field in ("flops", "weight_bytes", "data_bytes"):
            assert evaluate(tree_of(getattr(found, field)), numbers) == getattr(want, field), op.name
            checked += isinstance(tree_of(getattr(found, field)), list)
    assert checked > 100


def test_every_op_is_in_the_list_of_calls(built: Built, lowered: Module) -> None:
    calls = Artifact.open(built.artifact).meta["tvm"]["calls"]
    ops = [[op.name, op.loc] for op in lowered.ops if op.name not in NO_CALL]
    assert [op[:2] for op in calls["ops"]] == ops
    assert {op for op, _ in calls["order"]} == set(range(len(ops)))
    assert {function for _, function in calls["order"]} == set(range(len(calls["functions"])))
    assert {cost for *_, cost in calls["ops"]} == set(range(len(calls["costs"])))


# ------------------------------------------------------------------------------------ recording


def test_a_profile_adds_up(session: Session, lowered: Module) -> None:
    ids = np.random.default_rng(0).integers(2, 50, 24).tolist()
    with Recorder(session.backend, session.context) as recorder:
        session.prefill([ids], chunk=16)
        session.step([[7]])
    sizes = [{key: s.sizes[key] for key in ("B", "T", "L", "past", "ctx")} for s in recorder.steps]
    assert [tuple(s.values()) for s in sizes] == [(1, 16, 1, 0, 64), (1, 8, 1, 16, 64), (1, 1, 1, 24, 64)]
    phase = summarise(session.artifact, recorder.steps, 1.0)
    calls = session.artifact.meta["tvm"]["calls"]

    assert phase.steps == 3 and min(phase.kernel_seconds, phase.builtin_seconds) > 0
    around = phase.builtin_seconds + phase.dispatch_seconds + phase.outside_seconds
    assert phase.kernel_seconds + around == pytest.approx(1.0)
    for table in ("ops", "layers", "kernels"):
        assert spent(phase, table) == pytest.approx(phase.kernel_seconds)
        assert sum(row.calls for row in getattr(phase, table).values()) == 3 * len(calls["order"])
    assert set(phase.kernels) == set(calls["functions"]) and set(phase.layers) == PLACES

    for name, row in phase.ops.items():
        costs = [module_cost(lowered, s)[name][1] for s in sizes]
        assert row.flops == sum(c.flops for c in costs)
        assert row.weight_bytes == sum(c.weight_bytes for c in costs)
        assert row.data_bytes == sum(c.data_bytes for c in costs)
    for number in ("flops", "weight_bytes", "data_bytes"):
        assert sum(getattr(r, number) for r in phase.layers.values()) == sum(
            getattr(r, number) for r in phase.ops.values()
        )
    facts = phase.facts()
    assert facts["ops"] == sorted(facts["ops"], key=lambda row: -row["seconds"])
    assert {row["name"] for row in facts["ops"]} == set(phase.ops)


def test_recording_changes_no_bit_and_ends(session: Session) -> None:
    plain = session.step([[3, 4, 5]])
    session.reset()
    recorder = Recorder(session.backend, session.context)
    with recorder:
        np.testing.assert_array_equal(session.step([[3, 4, 5]]), plain)
    (step,) = recorder.steps
    session.reset()
    np.testing.assert_array_equal(session.step([[3, 4, 5]]), plain)
    assert recorder.steps == [step]
    with recorder:
        assert recorder.steps == []
        session.step([[6]])
    assert len(recorder.steps) == 1 and len(recorder.steps[0].events) <= len(step.events)


def test_a_failed_step_ends_the_recording(session: Session) -> None:
    recorder = Recorder(session.backend, session.context)
    with pytest.raises(ZeroDivisionError), recorder:
        session.step([[3]])
        raise ZeroDivisionError
    assert recorder.steps == []
    with recorder:
        session.step([[3]])
    assert len(recorder.steps) == 1


def test_a_log_is_emptied_when_it_fills(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    with Recorder(session.backend, session.context) as recorder:
        session.step([[3]])
    words = 3 * len(recorder.steps[0].events) + 8
    for room, steps in ((words, 5), (2 * words, 5), (7 * words, 5)):
        session.reset()
        monkeypatch.setattr(profile, "_WORDS", room)
        with Recorder(session.backend, session.context) as recorder:
            for token in range(steps):
                session.step([[token + 2]])
        assert [step.sizes["past"] for step in recorder.steps] == list(range(steps))
        assert summarise(session.artifact, recorder.steps, 1.0).steps == steps
    monkeypatch.setattr(profile, "_WORDS", words - 20)
    recorder = Recorder(session.backend, session.context)
    with pytest.raises(ArtifactError, match="more calls than a profile holds"), recorder:
        session.step([[3]])


def test_other_calls_than_listed_are_an_error(session: Session) -> None:
    with Recorder(session.backend, session.context) as recorder:
        session.step([[3]])
    order = session.artifact.meta["tvm"]["calls"]["order"]
    order[0], order[-1] = order[-1], order[0]
    with pytest.raises(ArtifactError, match="program 'step' makes other calls than its manifest lists"):
        summarise(session.artifact, recorder.steps, 1.0)


def test_both_halves_of_a_prefill_are_recorded(models: Models) -> None:
    session = models.session("v41", "tvm")
    ids = np.arange(2, 62).tolist()
    with Recorder(session.backend, session.context) as recorder:
        session.prefill([ids], chunk=64, replay=5)
    assert [(s.program, s.sizes["T"], s.sizes["past"]) for s in recorder.steps] == [
        ("encoder", 55, 0), ("step", 5, 55)
    ]  # fmt: skip
    phase = summarise(session.artifact, recorder.steps, 1.0)
    model = session.artifact.meta["model"]
    layers = [f"layers.{n}" for n in range(int(model["layers"]))]
    encoders = layers[: int(model["encoder_layers"])]
    alone = summarise(session.artifact, recorder.steps[:1], 1.0)
    assert phase.layers.keys() == {*layers, "engram", "head", "shared"}
    assert set(encoders) <= alone.layers.keys() and layers[-1] not in alone.layers
    assert not alone.layers["head"].weight_bytes  # the position moves on, and that is all
    assert all(phase.layers[p].calls > alone.layers[p].calls for p in encoders)


@pytest.mark.parametrize(
    ("place", "layer"),
    [("", "shared"), ("head", "head"), ("layers.12.attn.indexer", "layers.12"), ("layers.3", "layers.3")],
)
def test_layers_of_locations(place: str, layer: str) -> None:
    assert layer_of(place) == layer


def test_ceilings_are_measured_by_the_artifact(session: Session) -> None:
    found = measure_ceilings(session.backend, 1, 0.01)
    assert found["flops_per_second"] > 1e8 and found["bytes_per_second"] > 1e8 and found["threads"] == 1


def test_the_roof_is_the_larger_need() -> None:
    ceilings = {"flops_per_second": 100.0, "bytes_per_second": 10.0}
    row = {"seconds": 4.0, "flops": 200, "weight_bytes": 15, "data_bytes": 15}
    found = {"flops_per_second": 50.0, "bytes_per_second": 7.5, "roof": 0.75}
    assert against(row, ceilings) == found
    assert against(row | {"flops": 4000}, ceilings)["roof"] == 10.0
    assert against(row | {"seconds": 0.0}, ceilings)["roof"] == 0.0


# --------------------------------------------------------------------------- the command line


def test_bench_profile(dsv4c: Call, built: Built) -> None:
    facts = ok_json(dsv4c("bench", built.artifact, *SMALL, "--profile", "--json"))["profile"]
    assert set(facts) == {"ceilings", "phases"} and facts["ceilings"]["left_out"]
    assert [(name, p["steps"]) for name, p in facts["phases"].items()] == [("prefill", 2), ("decode", 3)]
    for phase in facts["phases"].values():
        assert {row["name"] for row in phase["layers"]} == PLACES
        assert {"linear", "expert_mlp", "attention"} < {row["name"] for row in phase["ops"]}
        parts = ("kernel_seconds", "builtin_seconds", "dispatch_seconds", "outside_seconds")
        assert sum(phase[part] for part in parts) == pytest.approx(phase["seconds"])
        assert phase["plain_seconds"] > 0
        for row in (*phase["ops"], *phase["layers"]):
            assert row["flops_per_second"] == pytest.approx(row["flops"] / row["seconds"])
            assert row["roof"] >= 0
    text = ok(dsv4c("bench", built.artifact, *SMALL, "--profile"))
    for words in ("ceilings", "prefill: 2 steps of", "decode, layer", "layers.3", "without recording"):
        assert words in text, words


def test_without_a_profile_there_is_none(dsv4c: Call, built: Built) -> None:
    assert "profile" not in ok_json(dsv4c("bench", built.artifact, *SMALL, "--json"))


@pytest.fixture
def old(built: Built, tmp_path: Path) -> Iterator[Path]:
    """An artifact of before the list of calls."""
    from dsv4c.runtime.container import ArtifactWriter

    source, path = Artifact.open(built.bare), tmp_path / "old.dsv4"
    with ArtifactWriter(path) as new:
        for key, value in source.meta.items():
            new.set_meta(key, {k: v for k, v in value.items() if k != "calls"} if key == "tvm" else value)
        for name in source.sections:
            new.add_section(name, source.section(name))
        for t in source.tensors.values():
            new.add_tensor(t.name, t.dtype, t.shape, source.array(t.name))
    yield path


def test_an_old_artifact_is_refused(dsv4c: Call, old: Path, tmp_path: Path) -> None:
    code, _, err = dsv4c("bench", old, *SMALL, "--profile")
    assert code == 2 and "does not say what its code calls" in err and "compile it again" in err
    page = tmp_path / "r.html"
    ok(dsv4c("bench", old, *SMALL, "--html", page))
    assert "Measured speed" in page.read_text() and "Measured roofline" not in page.read_text()


def test_the_page_of_a_benchmark(dsv4c: Call, built: Built, tmp_path: Path) -> None:
    page = tmp_path / "r.html"
    facts = ok_json(dsv4c("bench", built.artifact, *SMALL, "--html", page, "--json"))
    text = page.read_text()
    assert "Measured speed" in text and "Error of the prefill" not in text
    roofline = text[text.index("<h2>Measured roofline") : text.index("<h2>Measured time by layer")]
    assert "<svg" in roofline and "measured in this run" in roofline
    for phase in facts["profile"]["phases"].values():
        assert all(f"<td>{row['name']}</td>" in roofline for row in phase["ops"])
    layers = text[text.index("<h2>Measured time by layer") :]
    assert all(f"<td>{place}</td>" in layers for place in PLACES)
    assert [path.name for path in tmp_path.iterdir()] == ["r.html"]


def test_the_page_tells_the_error_of_a_shortened_prefill(
    dsv4c: Call, models: Models, tmp_path: Path
) -> None:
    artifact = models.artifact("v41", "tvm")
    page = tmp_path / "r.html"
    sizes = ("--prompt-tokens", 60, "--decode-tokens", 3, "--repeat", 1)
    line = ("bench", artifact, *sizes, "--prefill", "replay=5", "--html", page, "--json")
    facts = ok_json(dsv4c(*line))
    replay = facts["replay"]
    assert replay["tokens"] == 5 < replay["exact_from"] and replay["kl"] > 0
    text = page.read_text()
    section = text[text.index("<h2>Error of the prefill in two halves") :]
    for words in (f"{replay['kl']:.3g}", f"{100 * replay['same_top']:.2f} %", f">{replay['exact_from']}<"):
        assert words in section, words
    assert facts["profile"]["phases"]["prefill"]["steps"] == 2
