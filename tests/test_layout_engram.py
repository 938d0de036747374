"""`layout_engram`: what it chooses and refuses, and that a laid out layer is the same to the bit.

What it does to the graph is in `filetests/layout_engram.ir`.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import Arr, normal

from dsv4c import api
from dsv4c.errors import PassError, SessionError
from dsv4c.frontend.engram_generate import PRESETS, generate_engram_layer
from dsv4c.frontend.engram_layer import load_engram_layer
from dsv4c.ir.clone import clone
from dsv4c.ir.graph import Builder, Module
from dsv4c.passes import run_pipeline
from dsv4c.passes.fuse_elementwise import FuseSwiglu
from dsv4c.passes.layout_engram import LayoutEngram
from dsv4c.passes.row_counts import looked_up_rows, row_counts
from dsv4c.passes.statistics import Statistics
from dsv4c.runtime.container import Artifact
from dsv4c.runtime.container.tables import BLOCK, PAGE, TableLayout
from dsv4c.runtime.engram import TableOptions
from dsv4c.runtime.layer import LayerSession

TABLE = "layers.3.engram.embed"
ROWS, RECORD = 6332, 48
"""Of the reduced DeepSeek-V4.1 model: 32 codes, a scale, a seal."""


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    here = Path(__file__).parents[1] / "build"
    here.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=here) as name:
        yield Path(name)


@pytest.fixture(scope="module")
def layer(folder: Path) -> Module:
    return load_engram_layer(generate_engram_layer(folder / "layer", *PRESETS["prod"], seed=3))


def text(seed: int, count: int) -> Arr:
    """Tokens with the frequencies of a language."""
    found: Arr = np.minimum(np.random.default_rng(seed).zipf(1.3, count), 509).astype(np.int32)
    return found


def save(folder: Path, counts: dict[str, Arr], name: str = "s.npz") -> Path:
    Statistics("here", 512, 1000, {}, counts).save(folder / name)
    return folder / name


@pytest.fixture(scope="module")
def statistics(folder: Path, layer: Module) -> Path:
    return save(folder, row_counts(layer, [text(1, 700), text(2, 300)]))


def laid(module: Module, **options: Any) -> dict[str, Any]:
    copy = clone(module)
    run_pipeline(copy, (FuseSwiglu(), LayoutEngram(**options)))
    notes: dict[str, Any] = copy.notes["layout_engram"]
    return notes


# ------------------------------------------------------------------------------------ choices


def test_counts_are_those_of_the_text(layer: Module) -> None:
    """Against a count made by hand from the row ids; a text's rows do not depend on how it is fed."""
    whole = looked_up_rows(layer, text(1, 700))[TABLE]
    assert whole.shape == (700, 6) and whole.min() >= 0 and whole.max() < ROWS
    counts = row_counts(layer, [text(1, 700), text(1, 700)])[f"engram.{TABLE}"]
    assert counts.dtype == np.int64 and (np.diff(counts[0]) > 0).all()
    for at in (0, 17, -1):
        assert counts[1, at] == 2 * (whole == counts[0, at]).sum()
    assert counts[1].sum() == 2 * whole.size


def test_the_most_wanted_rows_are_hot(layer: Module, folder: Path, statistics: Path) -> None:
    ids, counts = Statistics.load(statistics).extra[f"engram.{TABLE}"]
    directory = -(-ROWS // BLOCK) * (BLOCK // 8 + 4)
    notes = laid(layer, stats=str(statistics), hot_bytes=directory + 100 * RECORD + 47, cache_bytes=50_000)
    (table,) = notes["tables"]
    assert (table["loc"], table["rows"], table["record_bytes"]) == (TABLE, ROWS, RECORD)
    assert (table["hot_rows"], table["hot_bytes"]) == (100, 100 * RECORD)
    assert table["directory_bytes"] == directory and table["cache_bytes"] == 50_000
    assert table["cold_bytes"] == -(-(ROWS - 100) // (PAGE // RECORD)) * PAGE
    best = np.sort(counts)[::-1][:100].sum() / counts.sum()
    assert table["expected_hit_rate"] == pytest.approx(best, abs=1e-6) and 0.1 < best < 1
    assert notes["budget"] == {"hot_bytes": directory + 4847, "cache_bytes": 50_000, "tier": "disk"}
    curve = notes["hit_curve"]
    assert [p["bytes"] for p in curve[:-1]] == [PAGE << n for n in range(len(curve) - 1)]
    assert curve[-1] == {"bytes": RECORD * len(ids), "hit_rate": 1.0} and len(curve) > 2
    for point in curve:  # by sorting, which the pass does by its own order of worth
        best = np.sort(counts)[::-1][: point["bytes"] // RECORD].sum() / counts.sum()
        assert point["hit_rate"] == pytest.approx(best, abs=1e-6)
    assert "hit_curve" not in laid(layer)
    everything = laid(layer, stats=str(statistics), hot_bytes=10**9)["tables"][0]
    assert everything["hot_rows"] == len(ids) and everything["expected_hit_rate"] == 1.0  # no unseen row


def test_pass_and_runtime_agree_on_sizes(layer: Module, statistics: Path, folder: Path) -> None:
    options = f'stats="{statistics}", hot_bytes=9000, cache_bytes=50000'
    passes = f"with(layout_engram{{{options}}})"
    path = api.compile(layer, output=folder / "sizes.dsv4", passes=passes, golden=False)
    artifact = Artifact.open(path, check="full")
    (note,) = laid(layer, stats=str(statistics), hot_bytes=9000, cache_bytes=50_000)["tables"]
    layout = TableLayout(**artifact.meta["tables"][TABLE]["layout"])
    assert (layout.hot_rows, layout.directory_bytes) == (note["hot_rows"], note["directory_bytes"])
    assert layout.hot_rows * layout.record == note["hot_bytes"] == artifact.tensors[f"{TABLE}.hot"].nbytes
    assert layout.pages * layout.page == note["cold_bytes"] == artifact.tensors[f"{TABLE}.cold"].nbytes
    assert artifact.tensors[f"{TABLE}.cold"].offset % PAGE == 0
    assert not any("embed" in name for name in artifact.meta["tvm"]["weights"])  # the table is no parameter


# ------------------------------------------------------------------------------------ refusals


def test_a_hot_budget_that_holds_no_row(layer: Module, statistics: Path) -> None:
    with pytest.raises(PassError, match=r"hot_bytes = 900 holds no row .*; allowed: 932 or more, or 0"):
        laid(layer, stats=str(statistics), hot_bytes=900)
    assert laid(layer, stats=str(statistics), hot_bytes=932)["tables"][0]["hot_rows"] == 1


@pytest.mark.parametrize(
    ("counts", "what"),
    [
        ({}, "have nothing on engram.layers.3.engram.embed; allowed: no table"),
        ({"engram.other": np.ones((2, 3), np.int64)}, "have nothing on .*; allowed: engram.other"),
        ({f"engram.{TABLE}": np.array([[3, ROWS], [1, 1]])}, "of another table: row 6332 .* has 6332"),
        ({f"engram.{TABLE}": np.array([[5, 3], [1, 1]])}, r"is int64\[2, 2\]; allowed: int64\[2, n\]"),
        ({f"engram.{TABLE}": np.ones((2, 3), np.int32)}, r"is int32\[2, 3\]"),
        ({f"engram.{TABLE}": np.ones(3, np.int64)}, r"is int64\[3\]"),
    ],
)
def test_statistics_of_another_table(layer: Module, folder: Path, counts: dict[str, Arr], what: str) -> None:
    with pytest.raises(PassError, match=what):
        laid(layer, stats=str(save(folder, counts, "bad.npz")), hot_bytes=5000)


def test_several_tables_share_the_budgets(layer: Module, folder: Path) -> None:
    """The hot region goes where rows are wanted most per byte, the cache where lookups miss it."""
    module = clone(layer)
    first = next(op for op in module.ops if op.name == "engram_rows")
    codes, scales = (op.weight for op in module.ops if op.loc.startswith(TABLE))
    assert codes is not None and scales is not None
    b = Builder(extra := Module("extra"))
    table = [b.weight(codes, "second"), b.weight(scales, "second.scale")]
    b.loc = "second"
    module.outputs["second"] = b.op("engram_rows", first.operands[0], *table)
    at = module.ops.index(first)
    module.ops[at + 1 : at + 1] = extra.ops
    counts = {
        f"engram.{TABLE}": np.array([[1, 2, 3], [50, 1, 1]]),
        "engram.second": np.array([[7, 8, 9], [30, 20, 102]]),
    }
    directories = 2 * 13 * 68
    stats = save(folder, counts, "two.npz")
    notes = laid(module, stats=str(stats), hot_bytes=directories + 3 * RECORD, cache_bytes=2 * PAGE + 1100)
    one, two = notes["tables"]
    assert (one["hot_rows"], two["hot_rows"]) == (1, 2)  # 102, 50, 30
    assert (one["cache_bytes"], two["cache_bytes"]) == (PAGE + 100, PAGE + 1000)  # 2 and 20 lookups miss


# ------------------------------------------------------------------------------------ the layer, run


@pytest.fixture(scope="module")
def paths(layer: Module, folder: Path, statistics: Path) -> tuple[Path, Path]:
    """The layer with its table among the weights, and laid out."""
    options = f'stats="{statistics}", hot_bytes=9000, cache_bytes=30000'
    passes = f"with(layout_engram{{{options}}})"
    plain = api.compile(layer, output=folder / "plain.dsv4", golden=False)
    return plain, api.compile(
        layer, output=folder / "laid.dsv4", passes=passes, golden=False, verify_passes=True
    )


FORMS = {
    "resident": TableOptions(tier="resident"), "prefetched": TableOptions(),
    "synchronous": TableOptions(synchronous=True), "page cache": TableOptions(direct=False),
    "no cache": TableOptions(cache_bytes=0),
}  # fmt: skip


def feed(seed: int, count: int, batch: int = 2) -> dict[str, Arr]:
    rng, config = np.random.default_rng(seed), PRESETS["prod"][0]
    tokens = np.stack([text(seed + b, count) for b in range(batch)])
    tokens[rng.random(tokens.shape) < 0.1] = 510  # of an image
    streams = normal(rng, batch, count, config.streams, config.hidden)
    return {"tokens": tokens, "streams": streams, "n_valid": np.array([count, count // 2], np.int32)[:batch]}


def test_all_forms_give_the_same_bits(paths: tuple[Path, Path]) -> None:
    plain, forms = LayerSession(paths[0], batch=2), {
        name: LayerSession(paths[1], batch=2, tables=options) for name, options in FORMS.items()
    }  # fmt: skip
    for seed, count in enumerate((1, 5, 1, 300, 1)):
        inputs = feed(seed, count)
        want = plain.step(**inputs)["streams"]
        for name, session in forms.items():
            found = session.step(**inputs)["streams"]
            for b, valid in enumerate(inputs["n_valid"]):
                np.testing.assert_array_equal(found[b, :valid], want[b, :valid], err_msg=name)
            for state, array in plain.state.items():
                np.testing.assert_array_equal(session.state[state], array, err_msg=f"{name}: {state}")
    for name, session in forms.items():
        (store,) = session.backend.tables.stores.values()  # type: ignore[attr-defined]
        assert store.tier == ("resident" if name == "resident" else "disk")
        assert store.statistics.hot > 0 and (store.statistics.pages > 0) == (name != "resident")


def test_a_read_that_fails_leaves_the_session_as_it_was(paths: tuple[Path, Path], folder: Path) -> None:
    """A damaged page: the step fails, the state is that before it; repaired, the step is right."""
    path = folder / "fault.dsv4"
    path.write_bytes(paths[1].read_bytes())
    session, healthy = LayerSession(path, batch=2), LayerSession(paths[1], batch=2)
    for s in (session, healthy):
        s.step(**feed(0, 30))
    (store,) = session.backend.tables.stores.values()  # type: ignore[attr-defined]
    before = {name: array.copy() for name, array in session.state.items()}
    size = store.layout.pages * store.layout.page
    with path.open("r+b", buffering=0) as file:
        fd = file.fileno()
        good = os.pread(fd, size, store.cold_offset)
        os.pwrite(fd, bytes(b ^ 255 for b in good), store.cold_offset)
        for _ in range(3):
            with pytest.raises(SessionError, match=f"{path}, table {TABLE}, offset .* does not match its"):
                session.step(**feed(5, 40))
            for name, array in session.state.items():
                np.testing.assert_array_equal(array, before[name], err_msg=name)
        os.pwrite(fd, good, store.cold_offset)
    found, want = (s.step(**feed(5, 40))["streams"] for s in (session, healthy))
    np.testing.assert_array_equal(found[0], want[0])
    np.testing.assert_array_equal(found[1, :20], want[1, :20])


def test_sessions_of_one_process_share_a_store(paths: tuple[Path, Path]) -> None:
    a, b = (LayerSession(paths[1], batch=2, tables=TableOptions(cache_bytes=10**6)) for _ in range(2))
    a.step(**feed(1, 50))
    (store,) = a.backend.tables.stores.values()  # type: ignore[attr-defined]
    pages = store.statistics.pages
    b.step(**feed(1, 50))
    assert store is b.backend.tables.stores[TABLE]  # type: ignore[attr-defined]
    assert store.statistics.pages == pages > 0  # the second found everything in the cache
