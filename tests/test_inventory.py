"""What a model is made of and costs to serve, against published figures; `dsv4c inspect` that prints it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from dsv4c import cli
from dsv4c.frontend.config import load_config, parse_config
from dsv4c.frontend.inventory import (
    EXTRA,
    entry_bytes,
    flops_per_token,
    index_bytes,
    kv_bytes_per_token,
    parameters,
    state_bytes,
    window_bytes,
)
from dsv4c.frontend.table import expected_tensors

DATA = Path(__file__).parent / "data"
CONFIGS = DATA / "configs"
MODELS = ("v4-flash", "v4-pro", "v41-flash")
G = 10**9


def inspect(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    capsys.readouterr()
    code = cli.main(["inspect", *map(str, argv)])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return captured.out


def facts_of(capsys: pytest.CaptureFixture[str], path: Path) -> Any:
    return json.loads(inspect(capsys, path, "--json"))


# ----------------------------------------------------------------------------------- formulas


@pytest.mark.parametrize(
    ("model", "published"), [("v4-flash", 3514), ("v4-pro", 5031), ("v41-flash", 890)]
)  # fmt: skip
def test_growth_per_token_is_the_published_one(model: str, published: int) -> None:
    assert round(kv_bytes_per_token(load_config(CONFIGS / model))) == published


def test_sizes_of_records() -> None:
    flash, v41 = (load_config(CONFIGS / model) for model in ("v4-flash", "v41-flash"))
    assert (entry_bytes(flash), window_bytes(flash), index_bytes(flash)) == (584, 584, 68)
    assert (entry_bytes(v41), window_bytes(v41), index_bytes(v41)) == (288, 528, 68)


def test_state_of_fixed_size() -> None:
    """The numbers of section 5 of V4 and section 7 of V4.1, layer by layer."""
    assert state_bytes(load_config(CONFIGS / "v4-flash")) == {
        "windows": 43 * 128 * 584,
        "groups": 21 * (65_536 + 16_384) + 20 * 524_288,
        "drafts": 128 * 584,
    }
    assert state_bytes(load_config(CONFIGS / "v41-flash")) == {
        "windows": 40 * 128 * 528,
        "groups": 3 * 4 * 2 * 512 * 2,
        "history": 3 * 4,
        "drafts": 3 * 128 * 528,
    }


@pytest.mark.parametrize(
    ("model", "total", "active"), [("v4-flash", 284, 13), ("v4-pro", 1573, 49), ("v41-flash", 749, 16)]
)  # fmt: skip
def test_parameters_are_the_published_ones(model: str, total: int, active: int) -> None:
    """284B and 13B, 1.6T and 49B, 552B with 196B of Engram and 16B."""
    c = load_config(CONFIGS / model)
    counts = parameters(expected_tensors(c), c)
    assert "other" not in counts
    assert round(sum(n.total for kind, n in counts.items() if kind not in EXTRA) / G) == total
    assert round(sum(n.active for n in counts.values()) / G) == active


def test_parts_of_v41() -> None:
    c = load_config(CONFIGS / "v41-flash")
    counts = parameters(expected_tensors(c), c)
    assert counts["vision"].total - 3 * 5120 == 485_253_120 and counts["vision"].active == 0
    assert counts["engram tables"].total == (384006168 + 384016682) * 256
    assert counts["engram tables"].active == 48 * 256
    assert counts["routed experts"].total == 40 * 384 * 3 * 5120 * 2304
    assert counts["routed experts"].active == 40 * 6 * 3 * 5120 * 2304
    assert counts["embedding"].active == 5120 and counts["MTP blocks"].active == 0
    assert counts["head"].active == counts["head"].total == 129280 * 5120


def test_operations_of_v41() -> None:
    """Every term by hand; what grows is the index of layers 2, 8, 14 and 20 only."""
    c = load_config(CONFIGS / "v41-flash")
    found = flops_per_token(expected_tensors(c), c, (64, 1000, 1 << 20))
    row, score = 4 * 64 * 512, 2 * 129 * 32
    assert found[64]["attention"] == row * (40 * 64 + 18 * 32 + 20 * 64)
    assert found[1000]["attention"] == row * (40 * 128 + 18 * 500 + 20 * 512)
    assert found[1 << 20]["attention"] == row * (40 * 128 + 38 * 512)
    assert found[1000]["index"] == score * (3 * 500 + 5 * 1000)
    assert found[1 << 20]["index"] == score * (3 * (1 << 19) + (1 << 20) + 4 * 2048 * 8)
    assert found[64]["head"] == 2 * 129280 * 5120
    assert found[64]["experts"] == 2 * 40 * 7 * 3 * 5120 * 2304
    constant = [found[n]["projections"] for n in found]
    assert len(set(constant)) == 1 and 10 * G < constant[0] < 12 * G


def test_operations_of_v4() -> None:
    c = load_config(CONFIGS / "v4-flash")
    found = flops_per_token(expected_tensors(c), c, (1000, 1 << 20))
    row, score = 4 * 64 * 512, 2 * 129 * 64
    assert found[1000]["attention"] == row * (43 * 128 + 21 * 250 + 20 * 7)
    assert found[1 << 20]["attention"] == row * (43 * 128 + 21 * 512 + 20 * 8192)
    assert found[1 << 20]["index"] == score * 21 * (1 << 18)


def test_small_projections_by_hand() -> None:
    """Of the golden model, where every matrix can be listed."""
    c = load_config(DATA / "golden" / "v41")
    d, q, width = 128, 64, 4 * 64
    attention = q * d + width * q + 64 * d + 64 * (width // 2) + d * 64
    mixes = 2 * 24 * 4 * d
    compressors, indexers = 3 * 64 * d, 2 * 32 * 64 + 3 * (64 * q + 2 * d)
    matrices = 8 * (attention + mixes + 8 * d) + compressors + indexers + 2 * 640 * 192
    found = flops_per_token(expected_tensors(c), c, (1,))[1]
    assert found["projections"] == 2 * matrices
    assert found["experts"] == 2 * 8 * 3 * 3 * 64 * d and found["head"] == 2 * 512 * d


def test_without_a_candidate_source_every_entry_is_scored() -> None:
    raw = json.loads((DATA / "golden" / "v41" / "config.json").read_text())
    bounded = parse_config(raw)
    raw["text_config"]["candidate_source_layer_id"] = -1
    free = parse_config(raw)
    score = 2 * 33 * 2
    for c, behind in ((bounded, 20), (free, 1024)):
        found = flops_per_token(expected_tensors(c), c, (1024,))[1024]
        assert found["index"] == score * (512 + 1024 + behind)


# ------------------------------------------------------------------------------------ inspect

HEADS = {
    "v4-flash": ("69187 tensors", "284.3 B, 13.27 B active", "3,514 B per token"),
    "v4-pro": ("145116 tensors", "1.573 T, 48.85 B active", "5,031 B per token"),
    "v41-flash": ("96085 tensors, 475.2 GiB", "749 B, 16.13 B active", "890 B per token"),
}


@pytest.mark.parametrize("model", MODELS)
def test_inspect_a_released_config(capsys: pytest.CaptureFixture[str], model: str) -> None:
    facts = facts_of(capsys, CONFIGS / model)
    assert facts["kind"] == "config" and f"{facts['tensors']} tensors" in HEADS[model][0]
    flops = facts["serving"]["flops_per_token"]
    assert list(flops) == ["1024", "16384", "131072", "1048576"]
    assert all(sum(parts.values()) == 2 * parts["total"] for parts in flops.values())
    state = facts["serving"]["state_bytes"]
    assert sum(state.values()) == 2 * state["total"]
    counts = facts["parameters"]
    assert sum(counts["active"].values()) == counts["active_per_token"]
    assert counts["active"].keys() == counts["classes"].keys()
    text = inspect(capsys, CONFIGS / model)
    for words in (*HEADS[model], "operations per decoded token", "1048576", "whatever its length"):
        assert words in text


def test_inspect_v41_names_its_parts(capsys: pytest.CaptureFixture[str]) -> None:
    facts = facts_of(capsys, CONFIGS / "v41-flash")
    config = facts["config"]
    assert facts["bytes"] == 510_286_023_000 and config["model_type"] == "deepseek_v41"
    assert config["kv_sources"] == [2, 8, 14, 20] and config["candidate_source"] == 20
    assert config["engram_layers"] == [1, 14] and config["vision_layers"] == 32
    assert config["shared_compressed_attention"] == 38
    text = inspect(capsys, CONFIGS / "v41-flash")
    assert "engram tables" in text and "vision" in text and "kv_sources" in text


def test_inspect_a_v41_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    facts = facts_of(capsys, DATA / "golden" / "v41")
    assert (facts["kind"], facts["naming"], facts["tensors"]) == ("checkpoint", "published", 798)
    assert facts["serving"]["kv_bytes_per_token"] == (32 + 4 + 16 + 1) * 1.5
    assert list(facts["serving"]["flops_per_token"]) == ["1024"]  # the model reaches 4,096
    assert "other" not in facts["parameters"]["classes"]


def test_a_token_map_is_no_checkpoint(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for name in ("config.json", "engram_token_map.safetensors"):
        shutil.copy(DATA / "golden" / "v41" / name, tmp_path)
    assert facts_of(capsys, tmp_path)["kind"] == "config"
