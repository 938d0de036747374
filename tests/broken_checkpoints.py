"""Checkpoints with exactly one thing wrong, each with the words its error must contain.

Every case starts from a copy of a small generated checkpoint and damages it with code that shares nothing
with the reader under test.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

Tensors = dict[str, tuple[str, list[int], bytes]]
Damage = Callable[[Path], object]
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


# ------------------------------------------------------------------------- reading and writing


def split(file: Path) -> tuple[dict[str, dict[str, object]], bytes]:
    """(header, data) of one safetensors file."""
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def join(file: Path, header: object, data: bytes, length: int | None = None) -> None:
    """Write a file with any header, also one that is no JSON when `header` is bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)


def read(file: Path) -> Tensors:
    header, data = split(file)
    header.pop("__metadata__", None)
    out = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]  # type: ignore[misc]
        out[name] = (entry["dtype"], entry["shape"], data[begin:end])
    return out  # type: ignore[return-value]


def write(file: Path, tensors: Tensors) -> None:
    header, data = {}, b""
    for name, (dtype, shape, blob) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(blob)]}
        data += blob
    join(file, header, data)


def tensors(edit: Callable[[Tensors], object]) -> Damage:
    """Damage by editing the tensors of the single file."""

    def damage(root: Path) -> None:
        content = read(root / SINGLE)
        edit(content)
        write(root / SINGLE, content)

    return damage


def header(edit: Callable[[dict[str, dict[str, object]]], object]) -> Damage:
    """Damage by editing the header, the data as they are."""

    def damage(root: Path) -> None:
        content, data = split(root / SINGLE)
        edit(content)
        join(root / SINGLE, content, data)

    return damage


def index(edit: Callable[[dict[str, str]], object]) -> Damage:
    """Damage by editing the weight map of the index."""

    def damage(root: Path) -> None:
        content = json.loads((root / INDEX).read_text())
        edit(content["weight_map"])
        (root / INDEX).write_text(json.dumps(content))

    return damage


def config(**changes: object) -> Damage:
    """Damage by changing what config.json says."""

    def damage(root: Path) -> None:
        content = json.loads((root / "config.json").read_text())
        (root / "config.json").write_text(json.dumps(content | changes))

    return damage


def put(name: str, dtype: str, shape: list[int], itemsize: int) -> Damage:
    """Replace or add one tensor, all bytes zero."""
    return tensors(lambda t: t.update({name: (dtype, shape, bytes(int(np.prod(shape)) * itemsize))}))


def poke(name: str, values: np.ndarray, offset: int = 0) -> Damage:
    """Overwrite bytes of one tensor."""

    def edit(t: Tensors) -> None:
        dtype, shape, blob = t[name]
        new = values.tobytes()
        t[name] = (dtype, shape, blob[:offset] + new + blob[offset + len(new) :])

    return tensors(edit)


def drop(*names: str) -> Damage:
    return tensors(lambda t: [t.pop(name) for name in names])


def resize(by: int) -> Damage:
    """Cut bytes off the end of the file, or append zeros."""

    def damage(root: Path) -> None:
        raw = (root / SINGLE).read_bytes()
        (root / SINGLE).write_bytes(raw[:by] if by < 0 else raw + bytes(by))

    return damage


def raw_header(text: bytes, length: int | None = None) -> Damage:
    return lambda root: join(root / SINGLE, text, b"", length)


# -------------------------------------------------------------------------------------- cases


@dataclass(frozen=True)
class Case:
    """One damage and the parts its message must have.

    Attributes:
        base: which checkpoint is damaged: "published", "sharded" (no MTP, three files), "f32 scales", "mtp",
            "stacked" or "stacked fp8".
    """

    damage: Damage
    parts: tuple[str, ...]
    base: str = "published"


def _entry(name: str, **changes: object) -> Damage:
    return header(lambda h: h[name].update(changes))


def _escape(root: Path) -> None:
    """Put the last shard outside, with a link to it in its place."""
    shard = root / "model-00003-of-00003.safetensors"
    outside = root.parent / "outside.safetensors"
    shard.rename(outside)
    shard.symlink_to(outside)


def _two_shards(root: Path) -> None:
    first, second = (root / f"model-0000{i}-of-00003.safetensors" for i in (1, 2))
    both = read(first)
    name = next(iter(both))
    write(second, {**read(second), name: both[name]})


def _without_index(then: Damage) -> Damage:
    def damage(root: Path) -> None:
        (root / INDEX).unlink()
        then(root)

    return damage


def _transpose(t: Tensors) -> None:
    dtype, shape, blob = t["layers.0.ffn.gate.weight"]
    t["layers.0.ffn.gate.weight"] = (dtype, shape[::-1], blob)


def _six(t: Tensors) -> None:
    for expert in range(3):
        for matrix in ("w1", "w3"):
            del t[f"layers.0.ffn.experts.{expert}.{matrix}.weight"]
            del t[f"layers.0.ffn.experts.{expert}.{matrix}.scale"]


QA, QA_SCALE = "layers.0.attn.wq_a.weight", "layers.0.attn.wq_a.scale"
W1, W1_SCALE = "layers.1.ffn.experts.2.w1.weight", "layers.1.ffn.experts.2.w1.scale"
TABLE, BIAS = "layers.0.ffn.gate.tid2eid", "layers.1.ffn.gate.bias"
STACK = "model.layers.1.mlp.experts.gate_up_proj"
I64, F32 = np.int64, np.float32

FILES: dict[str, Case] = {
    "no config": Case(lambda r: (r / "config.json").unlink(), ("config.json", "no such file")),
    "no weights": Case(lambda r: (r / SINGLE).unlink(), ("no weights", "config.json", SINGLE)),
    "empty file": Case(lambda r: (r / SINGLE).write_bytes(b""), (SINGLE, "0 bytes", "too few")),
    "seven bytes": Case(lambda r: (r / SINGLE).write_bytes(bytes(7)), ("7 bytes", "too few")),
    "header length zero": Case(raw_header(b"", 0), ("header length 0", "2 to 100000000")),
    "header length insane": Case(raw_header(b"{}", 1 << 63), (f"header length {1 << 63}",)),
    "header longer than file": Case(raw_header(b"{}", 50), ("truncated", "58 bytes expected", "10 found")),
    "header no json": Case(raw_header(b"{broken"), ("not valid JSON",)),
    "header no utf-8": Case(raw_header(b'{"\xff": 1}'), ("not UTF-8",)),
    "header a list": Case(raw_header(b"[1, 2]"), ("holds a list", "one JSON object")),
    "header key twice": Case(raw_header(b'{"a": {}, "a": {}}'), ("'a' appears twice",)),
    "entry no object": Case(header(lambda h: h.update({QA: 7})), (QA, "7", "dtype, shape")),
    "entry without shape": Case(header(lambda h: h[QA].pop("shape")), (QA, "data_offsets, dtype, shape")),
    "entry with more": Case(_entry(QA, strides=[1]), (QA, "strides")),
    "dtype unknown": Case(_entry(QA, dtype="F64"), (QA, "dtype 'F64'", "BF16")),
    "dtype no text": Case(_entry(QA, dtype=3), (QA, "dtype 3")),
    "shape negative": Case(_entry(QA, shape=[-48, -96]), (QA, "shape [-48, -96]", "not negative")),
    "shape of floats": Case(_entry(QA, shape=[48.0, 96]), (QA, "shape [48.0, 96]")),
    "offsets backwards": Case(_entry(QA, data_offsets=[10, 5]), (QA, "[10, 5]", "begin <= end")),
    "offsets three": Case(_entry(QA, data_offsets=[0, 1, 2]), (QA, "[0, 1, 2]")),
    "bytes do not fit shape": Case(_entry(QA, shape=[48, 95]), (QA, "4608 bytes", "4560 bytes")),
    "shape overflows": Case(_entry(QA, shape=[1 << 62, 1 << 62]), (QA, "4608 bytes for", str(1 << 124))),
    "overlap": Case(
        lambda r: join(
            r / SINGLE,
            {
                "a": {"dtype": "I8", "shape": [4], "data_offsets": [0, 4]},
                "b": {"dtype": "I8", "shape": [4], "data_offsets": [2, 6]},
            },
            bytes(6),
        ),
        ("'b' overlaps tensor 'a'",),
    ),
    "hole": Case(
        lambda r: join(
            r / SINGLE,
            {
                "a": {"dtype": "I8", "shape": [4], "data_offsets": [0, 4]},
                "b": {"dtype": "I8", "shape": [2], "data_offsets": [6, 8]},
            },
            bytes(8),
        ),
        ("2 bytes between tensor 'a' and tensor 'b'",),
    ),
    "hole at the start": Case(
        lambda r: join(r / SINGLE, {"a": {"dtype": "I8", "shape": [4], "data_offsets": [3, 7]}}, bytes(7)),
        ("3 bytes between the header and tensor 'a'",),
    ),
    "bytes behind": Case(resize(5), ("5 bytes after tensor", "belong to no tensor")),
    "truncated": Case(resize(-9), ("truncated", "bytes expected", "found", "download this file again")),
    "tensor in two shards": Case(
        _without_index(_two_shards),
        ("model-00001-of-00003", "model-00002-of-00003", "each tensor once"),
        "sharded",
    ),
    "index names no file": Case(
        index(lambda m: m.update({QA: "model-00009-of-00003.safetensors"})),
        (INDEX, "'model-00009-of-00003.safetensors' is missing"),
        "sharded",
    ),
    "index leaves upwards": Case(
        index(lambda m: m.update({QA: "../outside.safetensors"})),
        ("outside the directory", "plain file name"),
        "sharded",
    ),
    "index dots only": Case(
        index(lambda m: m.update({QA: ".."})), ("'..'", "outside the directory"), "sharded"
    ),
    "index absolute": Case(
        index(lambda m: m.update({QA: "/etc/passwd"})),
        ("'/etc/passwd'", "outside the directory"),
        "sharded",
    ),
    "index names a directory": Case(
        lambda r: ((r / "x").mkdir(), index(lambda m: m.update({QA: "x"}))(r)),
        ("'x' is not a file",),
        "sharded",
    ),
    "link escapes": Case(_escape, ("model-00003-of-00003", "link that leaves the directory"), "sharded"),
    "link escapes without index": Case(_without_index(_escape), ("link that leaves",), "sharded"),
    "index lists too much": Case(
        index(lambda m: m.update({"ghost": "model-00001-of-00003.safetensors"})),
        ("'ghost' is not in model-00001-of-00003", "stale"),
        "sharded",
    ),
    "index names wrong shard": Case(
        index(lambda m: m.update({"embed.weight": "model-00003-of-00003.safetensors"})),
        ("'embed.weight' is not in model-00003",),
        "sharded",
    ),
    "index lists too little": Case(index(lambda m: m.pop(QA)), (QA, "is not listed"), "sharded"),
    "index without map": Case(lambda r: (r / INDEX).write_text("{}"), (INDEX, "weight_map"), "sharded"),
    "index of numbers": Case(
        lambda r: (r / INDEX).write_text('{"weight_map": {"a": 1}}'), ("malformed",), "sharded"
    ),
    "index key twice": Case(
        lambda r: (r / INDEX).write_text('{"weight_map": {"a": "b", "a": "c"}}'),
        ("'a' appears twice",),
        "sharded",
    ),
    "shard lost": Case(
        _without_index(lambda r: (r / "model-00002-of-00003.safetensors").unlink()),
        ("shard 2 of 3 is missing",),
        "sharded",
    ),
    "shards of two sets": Case(
        _without_index(
            lambda r: (r / "model-00003-of-00003.safetensors").rename(r / "model-00003-of-00007.safetensors")
        ),
        ("several sets", "[3, 7]"),
        "sharded",
    ),
}

CONTENT: dict[str, Case] = {
    "missing": Case(
        drop("layers.2.ffn_norm.weight"), ("1 tensors", "layers.2.ffn_norm.weight is missing", "[96]")
    ),
    "six missing": Case(tensors(_six), ("6 tensors", "layers.0.ffn.experts.0.w1.weight", "and 1 more")),
    "unknown name": Case(put("layers.0.attn.wq_c.weight", "BF16", [2], 2), ("wq_c.weight is not a name",)),
    "layer too many": Case(
        put("layers.4.attn_norm.weight", "BF16", [96], 2), ("layers.4.attn_norm", "no use")
    ),
    "expert too many": Case(
        put("layers.0.ffn.experts.4.w1.weight", "BF16", [56, 96], 2), ("experts.4", "no use")
    ),
    "leading zero": Case(
        put("layers.00.attn_norm.weight", "BF16", [96], 2), ("layers.00.attn_norm", "not a name")
    ),
    "mtp beyond config": Case(put("mtp.0.norm.weight", "BF16", [96], 2), ("mtp.0.norm.weight", "no use")),
    "mtp in part": Case(drop("mtp.0.enorm.weight"), ("mtp.0.enorm.weight is missing",), "mtp"),
    "misshaped": Case(put("norm.weight", "BF16", [95], 2), ("norm.weight is BF16[95]", "BF16[96]")),
    "transposed": Case(tensors(_transpose), ("gate.weight is BF16[96, 4]", "BF16[4, 96]")),
    "packed width": Case(put(W1, "I8", [56, 96], 1), (W1, "I8[56, 96]", "I8[56, 48]")),
    "mistyped": Case(
        put("norm.weight", "I32", [96], 4), ("norm.weight is I32[96]", "f32 or bf16 or f16 [96]")
    ),
    "fp8 embedding": Case(put("embed.weight", "F8_E4M3", [61, 96], 1), ("embed.weight is F8_E4M3", "bf16")),
    "fp4 attention": Case(put(QA, "I8", [48, 48], 1), (QA, "I8[48, 48]", "f8e4m3")),
    "float table": Case(put(TABLE, "F32", [61, 2], 4), (TABLE, "F32", "i64 or i32 [61, 2]")),
    "scale missing": Case(drop(QA_SCALE), (f"{QA_SCALE} is missing", "F8_E4M3", "f8e8m0 or f32 [1, 1]")),
    "fp4 scale missing": Case(drop(W1_SCALE), (f"{W1_SCALE} is missing", "[56, 3]")),
    "scale misshaped": Case(put(W1_SCALE, "F8_E8M0", [56, 4], 1), (W1_SCALE, "[56, 4]", "[56, 3]")),
    "scale mistyped": Case(put(QA_SCALE, "BF16", [1, 1], 2), (QA_SCALE, "BF16[1, 1]", "f8e8m0 or f32")),
    "scale of a float": Case(
        put(QA, "BF16", [48, 96], 2), (QA_SCALE, "no use", "neither FP8 nor packed FP4")
    ),
    "two namings": Case(
        put("model.layers.0.input_layernorm.weight", "BF16", [96], 2),
        ("model.layers.0.input_layernorm.weight", "both are 'layers.0.attn_norm.weight'"),
    ),
    "hash layers wrong": Case(
        config(num_hash_layers=0), ("layers.0.ffn.gate.bias is missing", "tid2eid", "no use")
    ),
    "layer kinds wrong": Case(config(compress_ratios=[0, 4, 4, 4]), ("layers.2.attn.indexer.wq_b",)),
    "stack of other count": Case(
        put(STACK, "F32", [3, 112, 96], 4), (STACK, "[3, 112, 96]", "[4, 112, 96]"), "stacked"
    ),
    "stack of one half": Case(put(STACK, "F32", [4, 56, 96], 4), ("[4, 56, 96]", "[4, 112, 96]"), "stacked"),
    "tile spans the halves": Case(
        lambda r: None, ("gate_up_proj_scale_inv", "multiple of 128"), "stacked fp8"
    ),
    "e8m0 scale nan": Case(poke(W1_SCALE, np.uint8(255), 5), (W1_SCALE, "255", "NaN")),
    "f32 scale nan": Case(poke(QA_SCALE, F32(np.nan)), (QA_SCALE, "not finite and positive"), "f32 scales"),
    "f32 scale infinite": Case(poke(QA_SCALE, F32(np.inf)), (QA_SCALE, "not finite"), "f32 scales"),
    "f32 scale zero": Case(poke(QA_SCALE, F32(0)), (QA_SCALE, "not finite and positive"), "f32 scales"),
    "f32 scale negative": Case(poke(QA_SCALE, F32(-1)), (QA_SCALE, "not finite and positive"), "f32 scales"),
    "norm nan": Case(poke("norm.weight", np.uint16(0x7FC0), 4), ("norm.weight", "NaN or infinite")),
    "sink infinite": Case(poke("layers.0.attn.attn_sink", F32(-np.inf)), ("attn_sink", "NaN or infinite")),
    "bias nan": Case(poke(BIAS, F32(np.nan)), (BIAS, "NaN or infinite", "-inf for no choice")),
    "bias infinite": Case(poke(BIAS, F32(np.inf)), (BIAS, "NaN or infinite", "-inf for no choice")),
    "bias leaves too few": Case(
        poke(BIAS, np.full(3, -np.inf, F32)), (BIAS, "choose among 1 experts", "at least 2")
    ),
    "expert id too large": Case(poke(TABLE, I64(4), 16), (TABLE, "token 1 to expert 4", "0 to 3")),
    "expert id negative": Case(poke(TABLE, I64(-1)), (TABLE, "token 0 to expert -1")),
    "expert twice": Case(poke(TABLE, np.array([3, 3], I64), 32), (TABLE, "token 2 to one expert twice")),
}

CASES = FILES | CONTENT
