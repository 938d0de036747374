"""The report: one page that needs nothing else, with every section its facts call for, right in a browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from dsv4c import api
from dsv4c.cli import main
from dsv4c.cli.report.ceilings import Ceilings, measure
from dsv4c.cli.report.charts import bound
from dsv4c.cli.report.markup import table
from dsv4c.cli.report.page import SECTIONS, render
from dsv4c.runtime import Artifact

CEILINGS = Ceilings(1e11, 2e10, "as given")
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def artifact(tiny_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With passes verified and memory planned; ONNX, because it compiles in a moment."""
    return api.compile(
        tiny_directory, target="cpu", format="onnx", passes="default,after(narrow_weights, plan_memory)",
        verify_passes=True, golden=False, output=tmp_path_factory.mktemp("report") / "m.dsv4",
    )  # fmt: skip


def full(artifact: Path) -> Artifact:
    """The artifact with facts for every section, as other passes and measurements leave them."""
    opened = Artifact.open(artifact)
    report = opened.meta["report"]
    report["notes"] |= {
        "prune_experts": {
            "strength": "saliency",
            "layers": [
                {"layer": n, "experts_before": 4, "kept": [0, 2, 3], "dropped": [1], "bytes_before": 4096,
                 "bytes_after": 3072, "scores": [1.0, 0.1, 2.0, None]}
                for n in range(3)
            ],
        },
        "requantise": {
            "classes": [
                {"class": "experts", "tensors": 12, "format_before": "f4e2m1x2", "format_after": "i8",
                 "bytes_before": 10, "bytes_after": 20, "max_abs": 0.1, "rel_rms": 0.01, "sqnr_db": 40.0},
                {"class": "head", "tensors": 1, "format_before": "bf16", "format_after": "f32",
                 "bytes_before": 10, "bytes_after": 20, "max_abs": 0.0, "rel_rms": 0.0, "sqnr_db": None},
            ]
        },
        "layout_engram": {
            "tables": [
                {"loc": "layers.1.engram", "rows": 1000, "record_bytes": 264, "hot_rows": 100,
                 "hot_bytes": 26400, "directory_bytes": 300, "cold_bytes": 237600, "expected_hit_rate": 0.4}
            ],
            "hit_curve": [{"bytes": 1 << 20, "hit_rate": 0.3}, {"bytes": 1 << 24, "hit_rate": 0.9}],
        },
    }  # fmt: skip
    report["quality"] = {
        "tokens": 100, "before": {"nll": 3.0, "perplexity": 20.0}, "after": {"nll": 3.1, "perplexity": 22.0},
        "kl": {"mean": 0.01, "p99": 0.1}, "top1": 0.97, "random": [23.0, 24.0, 25.0], "max_difference": 0.1,
    }  # fmt: skip
    report["error_by_layer"] = [{"layer": n, "max": 1e-3, "rms": 1e-4} for n in range(4)]
    step = {"flops": 4.2e9, "weight_bytes": 1 << 30, "data_bytes": 1 << 20, "bound": "memory"}
    report["estimate"] = {
        "device": {"name": "ascend-910c-die"}, "devices": 2, "batch": 1, "context": 4096, "prompt": 128,
        "decode": {**step, "seconds": 0.0123, "tokens_per_second": 81.3},
        "prefill": {**step, "seconds": None, "tokens_per_second": None, "bound": "unknown"},
        "assumptions": ["70% of the arithmetic", "10% of the memory stays free"],
        "published": [{
            "devices": None, "batch": 7, "context": 8192, "formats": "W8A8", "milliseconds": 27.82,
            "tokens_per_second_per_device": 4025, "source": "a guide", "caveat": "offline",
        }],
        "placement": {
            "stages": [{"layers": [0, 1], "devices": [0]}, {"layers": [2, 2], "devices": [1]}],
            "memory": [{"dense": 1 << 20, "experts": 1 << 28, "state": 4096, "total": 1 << 29}] * 2,
        },
    }  # fmt: skip
    report["bench"] = bench()
    opened.meta["plan"] = launch_plan()
    return opened


def launch_plan() -> dict[str, Any]:
    """What an artifact for two GPUs says of its kernels and its devices."""
    row = {"launches": 7, "flops": 10, "weight_bytes": 100, "data_bytes": 20, "bound": "memory"}
    kernels = [{"kernel": 0, **row, "seconds": 1.25e-05}, {"kernel": 1, **row, "seconds": None}]
    step = {"tokens": 1, "past": 1024, "program": "few", "flops": 2e9, "weight_bytes": 1e6, "data_bytes": 0}
    on_device = {"seconds": 6.1e-05, "handed_bytes": 65536, "link_seconds": 1.5e-07}
    devices = [
        {
            "layers": layers, "weight_bytes": 3 << 30, "state_bytes": 5 << 20,
            "arena_bytes": {"decode": 7 << 10, "prefill": 11 << 20},
            "handed_bytes": {"decode": 0, "prefill": 64},
        } for layers in ([0, 20], [21, 42])
    ]  # fmt: skip
    streams = {"name": "layers.20.streams", "dtype": "f32", "shape": ["B", "T"], "source": 0, "target": 1}
    memory = {"batch": 1, "context": 8192, "devices": devices, "handovers": [streams]}
    facts = {
        "registers": 168, "spilled": 0, "occupancy": 0.188, "matrix": {"HGMMA": 24}, "constants": {},
    }  # fmt: skip
    return {
        "memory": memory,
        "kernels": [
            {"name": "linear", "shared": 73728, **facts},
            {"name": "norm", "shared": 0, **facts, "matrix": {}},
        ],
        "roofline": {
            "device": {"name": "h200", "bandwidth": 4.8e12, "bf16": 9.89e14, "f32": None},
            "steps": {
                "decode": {**step, "seconds": 0.000123, "launches": [1.0] * 212, "kernels": kernels,
                           "stages": [on_device] * 2},
                "prefill": {**step, "seconds": None, "launches": [None], "kernels": [],
                            "stages": [{**on_device, "link_seconds": None}] * 2},
            },
        },
    }  # fmt: skip


def bench() -> dict[str, Any]:
    """What `dsv4c bench --profile --prefill replay=16` finds."""
    row = {"calls": 8, "flops": 4 << 20, "weight_bytes": 1 << 20, "data_bytes": 1 << 12}
    reached = {"flops_per_second": 2.5e9, "bytes_per_second": 6e8, "roof": 0.37}
    ops = [
        {"name": "expert_mlp", "seconds": 0.03, **row, **reached},
        {"name": "split_columns", "seconds": 0.01, **row, **reached, "flops": 0, "flops_per_second": 0.0},
        {"name": "advance", "seconds": 0.0, **row, **reached, "weight_bytes": 0, "data_bytes": 0},
    ]
    phase = {
        "seconds": 0.05, "plain_seconds": 0.04, "steps": 2, "kernel_seconds": 0.04, "builtin_seconds": 0.004,
        "dispatch_seconds": 0.001, "outside_seconds": 0.005, "ops": ops, "kernels": [],
        "layers": [{"name": name, "seconds": 0.02, **row, **reached} for name in ("layers.0", "head")],
    }  # fmt: skip
    ceilings = {"flops_per_second": 1e11, "bytes_per_second": 2e10, "threads": 2, "left_out": "BF16 & INT8"}
    return {
        "settings": {"prompt_tokens": 512, "decode_tokens": 64, "repeat": 5, "batch": 3, "chunk": 256},
        "tokens_per_second": {
            name: {"median": 123.4, "min": 100.0, "max": 130.0} for name in ("prefill", "decode")
        },
        "load_seconds": 1.5, "peak_rss_bytes": 3 << 20, "state_bytes": 1 << 20,
        "replay": {"tokens": 16, "exact_from": 29, "kl": 0.00123, "same_top": 0.985},
        "profile": {"ceilings": ceilings, "phases": {"prefill": phase, "decode": phase}},
    }  # fmt: skip


class _References(HTMLParser):
    """Everything an HTML page could load, and its headings."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.titles: list[str] = []
        self._in = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._in = tag
        assert tag not in ("script", "iframe", "object", "embed", "base"), tag
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "data", "poster", "action") and value:
                self.found.append(value)

    def handle_endtag(self, tag: str) -> None:
        self._in = ""

    def handle_data(self, data: str) -> None:
        if self._in == "h2":
            self.titles.append(data)


def read(text: str) -> _References:
    parser = _References()
    parser.feed(text)
    return parser


def test_the_page_loads_nothing(artifact: Path) -> None:
    text = render(full(artifact), CEILINGS)
    assert all(reference.startswith(("#", "data:image/png;base64,")) for reference in read(text).found)
    assert not re.search(r"@import|url\((?!['\"]?#)", text)


def test_sections_follow_the_facts(artifact: Path) -> None:
    plain = read(render(Artifact.open(artifact), CEILINGS)).titles
    assert plain == ["Pipeline", "Weights by class and format", "Planned memory", "Roofline of a step"]
    assert read(render(full(artifact), CEILINGS)).titles == [title for title, _ in SECTIONS]


def test_the_numbers_are_on_the_page(artifact: Path) -> None:
    opened = full(artifact)
    text = render(opened, CEILINGS)
    for p in opened.meta["report"]["passes"]:
        assert p["name"].replace('"', "&quot;") in text and f"<td class=n>{p['ops_after']}</td>" in text
    for step in opened.meta["report"]["notes"]["plan_memory"]["steps"]:
        assert f"<td class=n>{step['temporaries']}</td>" in text
    for words in (
        "22.0000",
        "97.00 %",
        "exact",
        "3 of 12 experts",
        "40.0 %",
        "100 GFLOP/s and 20 GB/s",
        "HGMMA 24",
        "<td class=n>12.5</td>",
        "h200, 4800 GB/s, 989 TFLOP/s of BF16, unknown of FP32",
        "at least 123 us in 212 launches of program few, 1 MB and 2 GFLOP",
        "<td>1</td><td>21 to 42</td><td class=n>3 GiB</td><td class=n>5 MiB</td><td class=n>7 KiB</td>",
        "<td class=n>27.82</td><td class=n>4025</td><td>W8A8</td><td>a guide: offline</td>",
        "Handed over: layers.20.streams f32[B, T].",
        "decode: 123 us in all, 0.3 us of them on links.",
        "prefill: unknown us in all, unknown us of them on links.",
    ):
        assert words in text, words


def test_what_was_measured_is_on_the_page(artifact: Path) -> None:
    text = render(full(artifact), CEILINGS)
    for words in (
        "123.4", "batch 3", "0.00123", "98.50 %", "<td class=n>29</td>", "BF16 &amp; INT8",
        "prefill: 2 steps of 25.000 ms", "+25.0 % against 20.000 ms without recording", "kernels 80.0 %",
        "Python 10.0 %", "<td>expert_mlp</td><td class=n>4</td><td class=n>15.000</td><td class=n>60.0</td>",
        "<td class=n>2.5</td><td class=n>0.6</td><td class=n>37</td>", "<td>layers.0</td>",
    ):  # fmt: skip
        assert words in text, words
    chart = text[text.index("<h2>Measured roofline") : text.index("<h2>Measured time by layer")]
    chart = chart[chart.index("<svg") : chart.index("</svg>")]
    for words in ("expert_mlp", "operations per byte", "GFLOP/s", "decode: 25 ms a step"):
        assert words in chart, words
    assert "split_columns" not in chart, "what computes nothing has no place on a roofline"


def test_a_benchmark_in_onnx_has_a_page_without_a_profile(
    artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "r.html"
    sizes = ["--prompt-tokens", "4", "--decode-tokens", "2", "--repeat", "1"]
    assert main(["bench", str(artifact), *sizes, "--html", str(page)]) == 0
    assert read(page.read_text()).titles[-1] == "Measured speed"
    capsys.readouterr()
    assert main(["bench", str(artifact), *sizes, "--profile"]) == 2
    error = capsys.readouterr().err
    assert "format onnx cannot be profiled; allowed: format tvm" in error and "times every format" in error
    assert main(["bench", str(artifact), *sizes, "--html", str(tmp_path)]) == 2
    assert "the page is a directory" in capsys.readouterr().err


def test_what_an_artifact_says_is_escaped(artifact: Path) -> None:
    opened = full(artifact)
    opened.meta["model"]["name"] = "<b>&"
    assert "<b>&" not in (text := render(opened, CEILINGS)) and "&lt;b&gt;&amp;" in text
    assert table(("<",), [("<",)], frozenset({0})).count("&lt;") == 2


def test_equal_facts_give_equal_pages(artifact: Path) -> None:
    assert render(full(artifact), CEILINGS) == render(full(artifact), CEILINGS)


def test_the_bound_is_the_larger_of_arithmetic_and_bytes() -> None:
    assert bound({"flops": 2e11, "weight_bytes": 1e9, "data_bytes": 1e9}, CEILINGS) == 2.0
    assert bound({"flops": 2e9, "weight_bytes": 3e10, "data_bytes": 1e10}, CEILINGS) == 2.0


def test_ceilings_are_measured() -> None:
    found = measure(0.01)
    assert found.flops > 1e8 and found.bandwidth > 1e8 and "measured" in found.source


def test_the_command(artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "r.html"
    assert main(["report", str(artifact), "-o", str(page), "--ceilings", "100,20"]) == 0
    assert str(page) in capsys.readouterr().out and "as given" in page.read_text()
    assert [p.name for p in tmp_path.iterdir()] == ["r.html"]


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["{artifact}", "-o", "{tmp}/none/r.html"], "the directory of the page does not exist"),
        (["{artifact}", "-o", "{tmp}"], "the page is a directory"),
        (
            ["{artifact}", "-o", "{tmp}/r.html", "--ceilings", "fast"],
            "ceilings 'fast'; allowed: two",
        ),
        (["{artifact}", "-o", "{tmp}/r.html", "--ceilings", "1,-2"], "ceilings '1,-2'"),
        (["{tmp}/no.dsv4", "-o", "{tmp}/r.html"], "cannot be read"),
    ],
)
def test_bad_input(
    arguments: list[str], what: str, artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"artifact": str(artifact), "tmp": str(tmp_path)}
    assert main(["report", *(a.format(**places) for a in arguments)]) != 0
    assert what in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.browser
@pytest.mark.skipif(BROWSER is None, reason="no Chromium on PATH")
@pytest.mark.parametrize("width", [1366, 1280])
def test_it_fits_a_laptop(artifact: Path, tmp_path: Path, width: int) -> None:
    """In headless Chromium: every section is drawn, no chart is empty, nothing is wider than the window."""
    page = tmp_path / "r.html"
    page.write_text(render(full(artifact), CEILINGS))
    probe = """<script>document.title = JSON.stringify({
      overflow: document.documentElement.scrollWidth - window.innerWidth,
      sections: [...document.querySelectorAll("section")].map(s => s.getBoundingClientRect().height),
      charts: [...document.querySelectorAll("svg")].map(s => s.getBoundingClientRect().width),
      texts: document.querySelectorAll("svg text").length,
      loaded: performance.getEntriesByType("resource").length })</script>"""
    page.write_text(page.read_text().replace("</body>", probe + "</body>"))
    assert BROWSER is not None
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},768", "--dump-dom", page.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    title = re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL)
    assert title is not None
    found: dict[str, Any] = json.loads(title.group(1).replace("&quot;", '"'))
    assert found["overflow"] <= 0 and found["loaded"] == 0
    assert len(found["sections"]) == len(SECTIONS) and min(found["sections"]) > 60
    assert len(found["charts"]) >= 8 and min(found["charts"]) > 600 and found["texts"] > 80
