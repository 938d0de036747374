"""Checkpoints of zeros as holes, and zeros through every storage scheme and a compilation."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from support import DictStore

from dsv4c import api
from dsv4c.errors import UsageError
from dsv4c.frontend.checkpoint import open_checkpoint
from dsv4c.frontend.generate import generate_checkpoint, main
from dsv4c.ir import quantised as q
from dsv4c.ir import weights as w
from dsv4c.ir.dtypes import DType, decode
from dsv4c.ir.encode import decode_matrix, encode
from dsv4c.ir.formats import SCHEMES, Scheme
from dsv4c.runtime import Artifact

FLASH = Path(__file__).parent / "data" / "configs" / "v4-flash" / "config.json"


def on_disk(directory: Path) -> tuple[int, int]:
    """(bytes that files look as long as, bytes that they take)."""
    stats = [file.stat() for file in directory.glob("*.safetensors")]
    return sum(s.st_size for s in stats), sum(512 * s.st_blocks for s in stats)


# -------------------------------------------------------------------------------- generation


@pytest.mark.parametrize("style", ["published", "saved", "transformers"])
@pytest.mark.parametrize("dtype", ["published", "bf16"])
def test_a_sparse_checkpoint_has_the_tensors_of_a_full_one(tmp_path: Path, style: str, dtype: str) -> None:
    """Names, shapes, formats and expert ids are the same; every number is zero."""
    full, sparse = (
        open_checkpoint(generate_checkpoint(tmp_path / str(s), style=style, dtype=dtype, sparse=s, shards=3))
        for s in (False, True)
    )
    assert [(t.name, t.dtype, t.shape) for t in full.files.tensors.values()] == [
        (t.name, t.dtype, t.shape) for t in sparse.files.tensors.values()
    ]
    tables = 0
    for name, tensor in sparse.files.tensors.items():
        raw = sparse.files.read(name)
        if tensor.dtype is DType.I64:
            assert np.array_equal(raw, full.files.read(name))
            tables += 1
        else:
            assert not raw.any(), name
    assert tables == 1


def test_f32_scales_are_one_because_zero_is_refused(tmp_path: Path) -> None:
    made = open_checkpoint(generate_checkpoint(tmp_path / "c", scale_dtype="f32", sparse=True))
    scales = [n for n, t in made.files.tensors.items() if n.endswith(".scale") and t.dtype is DType.F32]
    assert scales and all((made.files.read(n) == 1).all() for n in scales)
    assert made.files.read("layers.0.hc_attn_scale").tolist() == [0, 0, 0], "no scale of codes"


def test_v4_flash_in_its_real_shape_takes_no_room(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "c"), "--config", str(FLASH), "--layers", "1", "--sparse"]) == 0
    apparent, taken = on_disk(tmp_path / "c")
    assert apparent > 5e9
    config = json.loads((tmp_path / "c" / "config.json").read_text())
    assert (config["num_hidden_layers"], config["compress_ratios"], config["num_hash_layers"]) == (1, [0], 1)
    checkpoint = open_checkpoint(tmp_path / "c", scan=False)
    assert checkpoint.weight("layers.0.ffn.experts.255.w2.weight").shape == (4096, 2048)
    assert not checkpoint.files.read("head.weight")[-1].any(), "a hole at the end of the file"
    if taken > apparent / 2:
        pytest.skip("this file system knows no holes")
    assert taken < 30e6  # a table of 129280 x 6 expert ids


def test_arguments_are_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for layers in (-1, 5):
        with pytest.raises(UsageError, match=f"{layers} layers.*") as caught:
            generate_checkpoint(tmp_path / "a", "tiny", layers=layers)
        assert "1 to 4" in str(caught.value)
    for text, what in (("[1]", "holds a list"), ("{", "not valid JSON"), (None, "cannot be read")):
        file = tmp_path / "config.json"
        file.unlink(missing_ok=True)
        if text is not None:
            file.write_text(text)
        with pytest.raises(SystemExit, match="2"):
            main([str(tmp_path / "b"), "--config", str(file)])
        assert what in capsys.readouterr().err
    assert not (tmp_path / "a").exists() and not (tmp_path / "b").exists()


@pytest.mark.parametrize("layers", [1, 2, 4])
def test_the_first_layers_are_those_of_the_whole_model(tmp_path: Path, layers: int) -> None:
    whole = open_checkpoint(generate_checkpoint(tmp_path / "whole", "tiny", seed=5))
    part = open_checkpoint(generate_checkpoint(tmp_path / "part", "tiny", seed=5, layers=layers))
    assert {n.split(".")[1] for n in part.specs if n.startswith("layers.")} == set(map(str, range(layers)))
    for name, tensor in part.files.tensors.items():
        assert np.array_equal(part.files.read(name), whole.files.read(name)), name
        assert tensor.shape == whole.files.tensors[name].shape


# --------------------------------------------------------------------------------- zero rows

SCALED = [s for s in SCHEMES.values() if not s.plain]


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=lambda s: s.name)
@pytest.mark.parametrize("zero", ["all", "a row", "all but one"])
@pytest.mark.parametrize("search", [False, True])
def test_zeros_stay_zeros_in_every_scheme(scheme: Scheme, zero: str, search: bool) -> None:
    if search and (scheme.plain or scheme.block[0] != 1):
        pytest.skip("has no scale per row to search for")
    x = np.random.default_rng(2).standard_normal((5, 64)).astype(np.float32)
    rows = {"all": slice(0, 5), "a row": slice(3, 4), "all but one": slice(1, 5)}[zero]
    x[rows] = 0
    x[3, ::2] *= -1  # -0 is zero too
    with np.errstate(all="raise", under="ignore"):
        made = encode(x, scheme, search)
        if scheme.plain:
            back = np.asarray(decode(made.codes, scheme.code))
        else:
            back = decode_matrix(made.codes, made.scales, made.tensor_scale, scheme)
    assert np.isfinite(back).all() and not back[rows].any()
    assert zero == "all" or back.any()
    if scheme.name == "int8":
        assert not made.codes[rows].any() and (made.scales[rows] == 1).all()


@pytest.mark.parametrize("scheme", SCALED, ids=lambda s: s.name)
@pytest.mark.parametrize("stored", ["fp4", "fp8", "fp8 with f32 scales"])
def test_zero_codes_and_scales_of_a_checkpoint_requantise_to_zeros(scheme: Scheme, stored: str) -> None:
    """E8M0 scale 0 is 2^-127; an F32 scale of 0 never gets past the front end, but would mean zeros."""
    store = DictStore()
    codes = store.add("c", DType.F8E4M3, np.zeros((6, 64)))
    if stored == "fp4":
        packed, scales = np.zeros((6, 32)), np.zeros((6, 2))
        x = w.decode_fp4(store.add("p", DType.F4E2M1X2, packed), store.add("s", DType.F8E8M0, scales))
    else:
        kind = DType.F8E8M0 if stored == "fp8" else DType.F32
        x = w.decode_fp8(codes, store.add("s", kind, np.zeros((1, 1))), (128, 128))
    with np.errstate(all="raise", under="ignore"):
        parts = [q.encode_codes(x, scheme=scheme), q.encode_scales(x, scheme=scheme)]
        tensor = [q.encode_tensor_scale(x, scheme=scheme)] if scheme.tensor_scale else []
        values = w.values(q.decode(*parts, *tensor, scheme=scheme), store)
    assert not values.any() and np.isfinite(values).all()


def test_the_smallest_scale_takes_no_code_out_of_range() -> None:
    """Codes of the checkpoint times 2^-127 are below what a float32 scale can resolve: zeros, not NaN."""
    store = DictStore()
    codes = store.add("c", DType.F4E2M1X2, np.full((2, 32), 0x7F))
    x = w.decode_fp4(codes, store.add("s", DType.F8E8M0, np.zeros((2, 2))))
    with np.errstate(all="raise", under="ignore"):
        made = w.encoded(q.encode_codes(x, scheme="int8"), store)
    assert not made.codes.any() and (made.scales == 1).all()


# ------------------------------------------------------------------------------- compilation


@pytest.mark.parametrize("target", ["ascend:910c", "mlu:590"])
def test_a_sparse_checkpoint_compiles(tmp_path: Path, target: str) -> None:
    checkpoint = generate_checkpoint(tmp_path / "c", "tiny", sparse=True)
    passes = 'with(bind_shapes{stages=2, tokens="1", context=64})'
    made = api.compile(checkpoint, output=tmp_path / "m", target=target, passes=passes, golden=False)
    artifact = Artifact.open(made, check="full")
    assert "golden" not in artifact.meta
    codes = [t.name for t in artifact.tensors.values() if t.dtype == "i8"]
    assert {f"layers.{i}.ffn.experts.{x}" for i in range(4) for x in ("w13", "w2")} <= set(codes)
    for name in codes:
        assert not artifact.array(name).any() and (artifact.array(name + ".scales") == 1).all(), name
