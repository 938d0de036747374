"""BANG C kernels: the very sources, run on the CPU under strict checks, against the meaning of their ops."""

from __future__ import annotations

import functools
import importlib.util
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
from support import Arr, B, Case, T, assert_close, ints, normal, poison, valid_rows

from dsv4c.errors import TargetError, ToolchainError
from dsv4c.ir.dtypes import DType
from dsv4c.targets.mlu.bang import build, toolchain
from dsv4c.targets.mlu.bang.host import Machine, routes

ARCHS = sorted(build.ARCHS)
CLOSE = 5e-6
"""Of the range of a result: float32 sums in another order than NumPy's."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Keeps compiled kernels, so that tests of one size share them."""
    return tmp_path_factory.mktemp("bang")


@pytest.fixture(params=ARCHS)
def machine(request: pytest.FixtureRequest, folder: Path) -> Machine:
    return Machine(request.param, folder)


# ---------------------------------------------------------------------------------------- experts

EXPERTS, LIMIT = 5, 1.5
ROUTING = ["any", "one expert takes every token", "two experts, the others empty", "nothing is routed"]


@functools.cache
def experts(d: int, inner: int, k: int) -> Case:
    c = Case()
    x, ids, g = c.f32("x", B, T, d), c.i32("ids", B, T, k), c.f32("g", B, T, k)
    w13, w2 = c.weight("w13", EXPERTS, 2 * inner, d, scale=0.3), c.weight("w2", EXPERTS, d, inner)
    c.op("expert_mlp", x, ids, g, c.i32("n_valid", B), w13, w2, limit=LIMIT)
    return c


def routed(kind: str, rng: np.random.Generator, t: int, k: int) -> Arr:
    match kind:
        case "one expert takes every token":
            return np.full((2, t, k), 3, np.int32)
        case "two experts, the others empty":
            return np.tile(np.array([4, 0] * k, np.int32)[:k], (2, t, 1))
        case _:
            return rng.permuted(np.tile(np.arange(EXPERTS), (2, t, 1)), axis=-1)[..., :k].astype(np.int32)


def expert_call(kind: str, t: int, d: int, k: int) -> dict[str, Arr]:
    rng = np.random.default_rng(t * k)
    n_valid = ints(0, 0) if kind == "nothing is routed" else ints(t, t // 2)
    return {
        "x": poison(normal(rng, 2, t, d), n_valid), "ids": routed(kind, rng, t, k), "n_valid": n_valid,
        "g": poison(rng.uniform(0, 1, (2, t, k)).astype(np.float32), n_valid),
    }  # fmt: skip


def on_machine(machine: Machine, inputs: dict[str, Arr], w13: Arr, w2: Arr, *scales: Arr) -> Arr:
    """[2, t, d]; padding is what the kernel knows as "no expert"."""
    shape = inputs["x"].shape
    real = valid_rows(inputs["n_valid"], shape[1]).reshape(-1)
    ids = inputs["ids"].reshape(len(real), -1)
    y = machine.grouped_experts(
        inputs["x"].reshape(len(real), -1), np.where(real[:, None], ids, -1), inputs["g"].reshape(ids.shape),
        w13, w2, LIMIT, (scales[0], scales[1]) if scales else None,
    )  # fmt: skip
    return y.reshape(shape)


@pytest.mark.parametrize("kind", ROUTING)
@pytest.mark.parametrize(("d", "inner", "k", "t"), [(97, 33, 2, 7), (64, 129, 3, 70)])
def test_experts(machine: Machine, kind: str, d: int, inner: int, k: int, t: int) -> None:
    """Odd widths; 70 tokens of one expert are more than one tile of routes."""
    case, inputs = experts(d, inner, k), expert_call(kind, t, d, k)
    found = on_machine(machine, inputs, case.store.tensors["w13"], case.store.tensors["w2"])
    assert_close("y", found, case.meaning(inputs)["expert_mlp"], CLOSE)
    assert not found[~valid_rows(inputs["n_valid"], t)].any(), "padding gets 0"


def int8_rows(weights: Arr) -> tuple[Arr, Arr]:
    scales = np.abs(weights).max(axis=-1) / np.float32(127)
    return np.rint(weights / scales[..., None]).astype(np.int8), scales


@pytest.mark.parametrize("kind", ROUTING[:2])
def test_experts_of_int8(machine: Machine, kind: str) -> None:
    case, inputs = experts(97, 33, 2), expert_call(kind, 7, 97, 2)
    (w13, s13), (w2, s2) = (int8_rows(case.store.tensors[name]) for name in ("w13", "w2"))
    found = on_machine(machine, inputs, w13, w2, s13, s2)
    plain = on_machine(machine, inputs, w13 * s13[..., None], w2 * s2[..., None])
    assert_close("y", found, plain, CLOSE)


def test_experts_do_not_depend_on_the_tasks(folder: Path) -> None:
    case, inputs = experts(97, 33, 2), expert_call("any", 7, 97, 2)
    weights = case.store.tensors["w13"], case.store.tensors["w2"]
    one, *others = (on_machine(Machine(ARCHS[0], folder, n), inputs, *weights) for n in (1, 3, 64))
    assert all(np.array_equal(one, other) for other in others)


def test_experts_of_the_published_width(machine: Machine) -> None:
    """d = 4096 and I = 2048: the depth is cut into several tiles on either arch."""
    rng = np.random.default_rng(1)
    d, inner = 4096, 2048
    x, ids = normal(rng, 3, d), ints(0, 0, 1)[:, None]
    weights = rng.uniform(0.1, 1, (3, 1)).astype(np.float32)
    w13 = rng.standard_normal((2, 2 * inner, d), np.float32) / np.float32(64)
    w2 = rng.standard_normal((2, d, inner), np.float32) / np.float32(64)
    found = machine.grouped_experts(x, ids, weights, w13, w2, LIMIT)
    want = np.zeros((3, d), np.float32)
    for t, e in enumerate(ids[:, 0]):
        gate, up = np.split(w13[e] @ x[t], 2)
        gate = np.minimum(gate, LIMIT)
        want[t] = w2[e] @ (gate / (1 + np.exp(-gate)) * np.clip(up, -LIMIT, LIMIT) * weights[t])
    assert_close("y", found, want, 2e-5)


def test_routes() -> None:
    found = routes(ints(2, 0, -1, 2, 0, 2).reshape(3, 2), np.arange(6).reshape(3, 2), 4)
    assert found.first.tolist() == [0, 2, 2, 5, 5]
    assert found.tokens.tolist() == [0, 2, 0, 1, 2]
    assert found.weights.tolist() == [1, 4, 0, 3, 5]
    assert found.slots.tolist() == [[0, 2], [3, -1], [1, 4]]
    with pytest.raises(TargetError, match="expert 4; allowed: ids below 4, -1 for none"):
        routes(ints(4)[:, None], ints(1)[:, None], 4)


# -------------------------------------------------------------------------------------- attention

WINDOW, RATIO, CHOSEN, CAPACITY = 8, 4, 3, 16


@functools.cache
def attention(heads: int, d: int) -> Case:
    c = Case()
    _, pos, n_valid = c.step()
    operands = [c.f32("q", B, T, heads, d), c.f32("kv", B, T, d), c.f32("ring", B, WINDOW, d)]
    operands += [c.weight("sinks", heads), pos, n_valid, c.f32("entries", B, CAPACITY, d)]
    operands += [c.i32("selected", B, T, CHOSEN)]
    c.op("attention", *operands, scale=d**-0.5, window=WINDOW, ratio=RATIO)
    return c


def key_list(pos: int, t: int, tokens: int, selected: Arr) -> list[int]:
    """Rows of kv, ring and entries put one after another that token t sees: -1 where there is none."""
    here = pos + t
    window = [here - ago for ago in range(WINDOW)]
    rows = [p - pos if p >= pos else tokens + p % WINDOW if p >= 0 else -1 for p in window]
    return rows + [tokens + WINDOW + int(e) if e >= 0 else -1 for e in selected]


def attention_call(rng: np.random.Generator, heads: int, d: int, pos: int, t: int) -> dict[str, Arr]:
    chosen = np.full((1, t, CHOSEN), -1, np.int32)
    for i in range(t):
        visible = rng.permutation((pos + i + 1) // RATIO)[:CHOSEN]
        chosen[0, i, : len(visible)] = visible
    return {
        "tokens": np.zeros((1, t)), "pos": ints(pos), "n_valid": ints(t), "selected": chosen,
        "q": normal(rng, 1, t, heads, d) * 2, "kv": normal(rng, 1, t, d),
        "ring": normal(rng, 1, WINDOW, d), "entries": normal(rng, 1, CAPACITY, d),
    }  # fmt: skip


def test_attention_at_every_offset_of_the_window(machine: Machine) -> None:
    heads, d, t = 5, 40, 3
    case, rng = attention(heads, d), np.random.default_rng(2)
    for pos in range(2 * WINDOW + 3):
        call = attention_call(rng, heads, d, pos, t)
        rows = np.concatenate([call["kv"][0], call["ring"][0], call["entries"][0]])
        lists = np.array([key_list(pos, i, t, call["selected"][0, i]) for i in range(t)])
        found = machine.sparse_attention(call["q"][0], rows, lists, case.store.tensors["sinks"], d**-0.5)
        assert_close(f"pos {pos}", found, case.meaning(call)["attention"][0], CLOSE)


def dense_attention(q: Arr, rows: Arr, lists: Arr, sinks: Arr, scale: float) -> Arr:
    """The definition, in float64 and one token at a time."""
    out = np.zeros(q.shape)
    for t, ids in enumerate(lists):
        keys = rows[ids[ids >= 0]].astype(np.float64)
        logits = q[t] @ keys.T * scale
        top = np.maximum(logits.max(axis=1, initial=-np.inf), sinks)[:, None]
        p = np.exp(logits - top)
        out[t] = p @ keys / (p.sum(axis=1, keepdims=True) + np.exp(sinks[:, None] - top))
    return out


@pytest.mark.parametrize(("heads", "d", "size"), [(64, 512, 640), (65, 576, 131), (1, 40, 1)])
def test_attention_sizes(machine: Machine, heads: int, d: int, size: int) -> None:
    """V4-Flash's heads and width; one head more than a group, another width; the smallest of all."""
    rng = np.random.default_rng(d)
    q, rows, sinks = normal(rng, 2, heads, d), normal(rng, 700, d), normal(rng, heads)
    lists = rng.integers(0, 700, (2, size)).astype(np.int32)
    lists[rng.random(lists.shape) < 0.2] = -1
    found = machine.sparse_attention(q, rows, lists, sinks, d**-0.5)
    assert_close("out", found, dense_attention(q, rows, lists, sinks, d**-0.5), CLOSE)


def test_attention_of_nothing_is_zero(machine: Machine) -> None:
    """Rows that no list names may hold anything; the sink takes all of the probability."""
    rng = np.random.default_rng(3)
    q, rows = normal(rng, 2, 5, 40), np.full((3, 40), np.nan, np.float32)
    rows[1] = 1
    lists = np.full((2, 300), -1, np.int32)
    lists[1, 299] = 1
    found = machine.sparse_attention(q, rows, lists, normal(rng, 5), 0.1)
    assert not found[0].any() and np.isfinite(found[1]).all() and found[1].any()


def test_attention_with_extreme_logits(machine: Machine) -> None:
    """Logits of thousands neither overflow nor vanish, whichever block of rows they come in."""
    rng = np.random.default_rng(4)
    q, rows = normal(rng, 2, 3, 40) * 300, normal(rng, 200, 40) * 3
    lists = np.stack([rng.permutation(200), rng.permutation(200)]).astype(np.int32)
    sinks = np.array([-1e4, 0, 1e4], np.float32)
    found = machine.sparse_attention(q, rows, lists, sinks, 1.0)
    assert_close("out", found, dense_attention(q, rows, lists, sinks, 1.0), 2e-3)


# ----------------------------------------------------------------------------------------- engram


@functools.cache
def table(width: int, groups: int) -> Case:
    c, rng = Case(), np.random.default_rng(3)
    codes, scales = rng.integers(0, 256, (37, width)), rng.integers(0, 247, (37, groups))
    codes[0] = np.resize(np.arange(256), width)
    codes[codes % 128 == 127] = 1  # NaN
    scales[0], scales[1, 0], scales[2, 0], scales[3] = 127, 0, 1, 246
    stored = c.b.weight(c.store.add("codes", DType.F8E4M3, codes.astype(np.uint8)), "codes")
    scale = c.b.weight(c.store.add("scales", DType.F8E8M0, scales.astype(np.uint8)), "scales")
    c.op("engram_rows", c.i32("rows", B, T, 3), stored, scale)
    return c


@pytest.mark.parametrize(("width", "groups"), [(256, 8), (96, 3)])
def test_engram_rows_are_exact(machine: Machine, width: int, groups: int) -> None:
    """Every code, the smallest and the largest scales; tokens that do not fill a tile, and none but -1."""
    case, rng = table(width, groups), np.random.default_rng(5)
    codes, scales = case.store.tensors["codes"], case.store.tensors["scales"]
    for rows in (rng.integers(-1, 37, (1, 41, 3)), np.full((1, 2, 3), -1), ints(0, 1, 2)[None, None]):
        want = case.meaning({"rows": rows}, np.float32)["engram_rows"][0]
        np.testing.assert_array_equal(machine.engram_gather(rows[0], codes, scales), want)
        real = np.ldexp(np.float32(1), scales.astype(np.int32) - 127)
        np.testing.assert_array_equal(machine.engram_gather(rows[0], codes, real), want)


# ------------------------------------------------------------------------------- tiles and tools

SIZES = [
    ("grouped_experts", {"tokens": 3, "d": 4096, "inner": 2048}),
    ("grouped_experts", {"tokens": 140, "d": 64, "inner": 129}),
    ("sparse_attention", {"d": 512}),
    ("sparse_attention", {"d": 576}),
    ("engram_gather", {"width": 256, "groups": 8}),
]


@pytest.mark.parametrize(("name", "sizes"), SIZES)
def test_budgets_are_what_the_source_declares(folder: Path, name: str, sizes: dict[str, int]) -> None:
    found = build.emulate(name, "mtp_592", sizes, folder)
    kernel, room = build.kernel(name), build.memory("mtp_592")
    assert found.declared() == (kernel.nram(dict(found.tile)), kernel.wram(dict(found.tile)))
    assert found.declared()[0] <= room.nram and found.declared()[1] <= room.wram


def test_more_memory_is_used() -> None:
    small, large = (build.tiling("sparse_attention", arch, {"d": 512}) for arch in ("mtp_592", "mtp_372"))
    assert (small["KEYS"], large["KEYS"]) == (32, 64)


@pytest.mark.parametrize(
    ("name", "arch", "sizes", "message"),
    [
        ("sparse_attention", "mtp_592", {"d": 640},
         "sparse_attention on mtp_592: sizes {'d': 640} need 344832 bytes of NRAM .* allowed: 327680 bytes"),
        ("engram_gather", "mtp_592", {"width": 256, "groups": 32}, "256 codes in 32 groups .* of 16 codes"),
        ("sparse_attention", "mtp_592", {"width": 3}, "allowed: positive d"),
        ("sparse_attention", "mtp_590", {"d": 3}, "unknown arch 'mtp_590'; allowed: mtp_372, mtp_592"),
        ("dense_attention", "mtp_592", {"d": 3}, "unknown kernel .* did you mean 'sparse_attention'"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(name: str, arch: str, sizes: dict[str, int], message: str) -> None:
    with pytest.raises(TargetError, match=f"(?s){message}"):
        build.tiling(name, arch, sizes)


def test_the_command_line_of_the_vendor() -> None:
    line = " ".join(build.cncc_command("sparse_attention", "mtp_592", {"d": 512}))
    assert line == (
        "cncc sparse_attention.mlu -c -o sparse_attention.o --bang-mlu-arch=mtp_592 -I$NEUWARE_HOME/include "
        "-O3 -std=c++11 -DNRAM_BYTES=327680 -DWRAM_BYTES=524288 -DKEYS=32 -DWIDTH=512"
    )


def test_every_source_is_a_kernel_of_the_table() -> None:
    stems = {path.stem for path in build.sources() if path.suffix == ".mlu"}
    assert stems == set(build.TABLE)
    for name in stems:
        text = (build.KERNELS / f"{name}.mlu").read_text()
        assert all(f"__mlu_entry__ void {entry}(" in text for entry in build.kernel(name).entries)
        assert text.count("__mlu_entry__") == len(build.kernel(name).entries)


def test_a_machine_without_a_compiler_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ToolchainError, match=r"(?s)no C\+\+ compiler found.*dsv4c\[link\]"):
        toolchain.find_compiler(lambda name: None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert toolchain.find_compiler(lambda name: None)[1:] == ("-m", "ziglang", "c++")


# -------------------------------------------------------------------- what the emulation catches

BROKEN = {
    "past the end": ("__bang_add(a, a, a + 64, 128);", r"512 bytes from byte 256 of a, which holds 512"),
    "misaligned": ("__bang_add_scalar(a + 1, a + 1, 1.0f, 64);", r"byte 4 of a is not a multiple of 128"),
    "odd count": ("__bang_mul_scalar(a, a, 2.0f, 65);", r"65 elements, allowed: multiples of 64"),
    "not on chip": ("__bang_mul(gdram, a, a, 64);", r"not in a declared NRAM array"),
    "wrong memory": ("__bang_pow2(w, a, 64);", r"not in a declared NRAM array"),
    "wrong direction": ("__memcpy(a, b, 256, GDRAM2NRAM);", r"the direction says GDRAM"),
    "copy past the end": ("__memcpy(b, gdram, 16, GDRAM2NRAM, 512, 16, 1);", r"528 bytes from byte 0 of b"),
    "half overlap": ("__bang_sub(a + 32, a, b, 64);", r"the result overlaps an operand at a distance of 128"),
    "transpose": ("__bang_transpose(a, b, 8, 8);", r"8 by 8, allowed: multiples of 16"),
    "filters": ("__bang_reshape_filter(a, b, 32, 1, 1, 4);", r"32 filters, allowed: multiples of 64"),
    "weights in NRAM": ("__bang_matmul(a, b, a, 1, 16, 64);", r"not in a declared WRAM array"),
}  # fmt: skip


@pytest.fixture(scope="module")
def broken(folder: Path) -> Path:
    """A program that runs one broken line, by number; 0 is a sound one."""
    cases = "".join(f"    case {i}: {line} break;\n" for i, (line, _) in enumerate(BROKEN.values(), 1))
    arrays = "NRAM_ARRAY(float, a, 128);\nNRAM_ARRAY(float, b, 128);\nWRAM_ARRAY(float, w, 64);\n"
    source = folder / "broken.cpp"
    source.write_text(
        f'#include "tiling.h"\n{arrays}'
        "static float gdram[64];\nint main(int, char **argv) {\n  switch (std::atoi(argv[1])) {\n"
        f"    case 0: __bang_add(a, a, b, 128); break;\n{cases}  }}\n}}\n"
    )
    options = [f"-I{build.EMULATION}", f"-I{build.KERNELS}", "-DNRAM_BYTES=1024", "-DWRAM_BYTES=1024"]
    toolchain.compile_shared(source, folder / "broken", options, kind="")
    return folder / "broken"


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_rule_aborts(broken: Path, name: str) -> None:
    number = list(BROKEN).index(name) + 1
    run = subprocess.run([broken, str(number)], capture_output=True, text=True, check=False)
    assert run.returncode != 0
    # after three arrays, an include, `gdram`, `main`, `switch` and the sound case
    assert re.search(rf"broken.cpp:{number + 8}: \w+: .*{BROKEN[name][1]}", run.stderr), run.stderr


def test_a_sound_program_ends_well(broken: Path) -> None:
    assert subprocess.run([broken, "0"], check=False).returncode == 0


def test_a_kernel_that_breaks_a_rule_is_named(folder: Path) -> None:
    """Less memory than the tiles need, and arrays in the order of another width."""
    tile = build.tiling("sparse_attention", "mtp_592", {"d": 40}) | {"NRAM_BYTES": 4096}
    library = build.compile_emulation("sparse_attention", tile, folder)
    with pytest.raises(TargetError, match=r"NRAM: \d+ bytes declared \(sums 16384, tile .*capacity 4096"):
        build.Emulated("sparse_attention", library, tile).launch("sparse_attention", *[0] * 9, 1.0)
    kernel = build.emulate("sparse_attention", "mtp_592", {"d": 40}, folder)
    q = np.zeros((1, 1, 512), np.float32)
    with pytest.raises(
        TargetError, match=r"tiling.h:\d+: __memcpy: 18176 bytes from byte 0 of sums, which holds 16384"
    ):
        kernel.launch("sparse_attention", q, q, ints(0), q, q, 1, 64, 1, 512, 1.0)
    with pytest.raises(TargetError, match="unknown entry"):
        kernel.launch("attention")
