"""Checkpoints: the namings and number formats mean the same, and everything broken is refused in words."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from broken_checkpoints import CASES, INDEX, SINGLE, read, write

from dsv4c.errors import CheckpointError, ConfigError, Dsv4cError, UsageError
from dsv4c.frontend.checkpoint import Checkpoint, open_checkpoint
from dsv4c.frontend.generate import STYLES, generate_checkpoint, main
from dsv4c.frontend.naming import resolve, saved_name, transformers_name
from dsv4c.frontend.safetensors import TensorFiles
from dsv4c.frontend.table import Role, expected_tensors
from dsv4c.ir.dtypes import DType, bf16_to_f32, decode
from dsv4c.ir.weights import materialise, values

Make = Callable[..., Path]


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Generated tiny checkpoints, each written once; read only."""
    root, known = tmp_path_factory.mktemp("checkpoints"), {}

    def make(**arguments: object) -> Path:
        key = repr(sorted(arguments.items()))
        if key not in known:
            known[key] = generate_checkpoint(root / str(len(known)), "tiny", **arguments)  # type: ignore[arg-type]
        return known[key]

    return make


@pytest.fixture
def copied(made: Make, tmp_path: Path) -> Make:
    """A copy of a generated checkpoint that the test may change."""

    def copy(**arguments: object) -> Path:
        return Path(shutil.copytree(made(**arguments), tmp_path / "checkpoint"))

    return copy


def logical(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    return {name: values(checkpoint.weight(name), checkpoint.files) for name in checkpoint.specs}


def assert_same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and np.array_equal(a[name], b[name]), name


# ------------------------------------------------------------------------- what is accepted


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("dtype", ["published", "bf16", "f16", "f32"])
def test_namings_hold_identical_values(made: Make, style: str, dtype: str) -> None:
    reference = open_checkpoint(made(dtype="published" if dtype == "published" else "f32"))
    assert_same(logical(open_checkpoint(made(style=style, dtype=dtype))), logical(reference))


def test_values_do_not_depend_on_sharding(made: Make) -> None:
    whole, parts = made(), made(shards=3)
    assert not (whole / INDEX).exists() and (parts / INDEX).exists()
    assert_same(logical(open_checkpoint(parts)), logical(open_checkpoint(whole)))


def test_numbered_shards_need_no_index(copied: Make, made: Make) -> None:
    root = copied(shards=3)
    (root / INDEX).unlink()
    assert_same(logical(open_checkpoint(root)), logical(open_checkpoint(made())))


def test_another_seed_is_another_model(made: Make) -> None:
    a, b = (logical(open_checkpoint(made(seed=seed))) for seed in (0, 1))
    assert not any(np.array_equal(a[n], b[n]) for n in a if a[n].size > 200)


def test_shapes_and_dtypes_of_the_expressions(made: Make) -> None:
    c = open_checkpoint(made())
    for name, spec in c.specs.items():
        x = c.weight(name)
        assert x.shape == spec.shape
        found = materialise(x, c.files)
        assert found.shape == spec.shape and found.dtype == x.dtype.storage
    assert c.weight("layers.0.ffn.experts.0.w1.weight").op == "decode_fp4"
    assert c.weight("layers.0.attn.wq_a.weight").op == "decode_fp8"
    assert c.weight("embed.weight").dtype is DType.BF16
    assert c.weight("layers.0.ffn.gate.tid2eid").dtype is DType.I32
    assert c.stored_dtype("layers.0.ffn.experts.0.w1.weight") is DType.F4E2M1X2


def test_float_scales(made: Make) -> None:
    exact, plain = open_checkpoint(made(scale_dtype="f32")), open_checkpoint(made(dtype="f32"))
    name = "layers.0.attn.wq_a.weight"
    a, b = (values(c.weight(name), c.files) for c in (exact, plain))
    assert 0 < np.abs(a - b).max() < np.abs(b).max() / 16


def test_quantised_stacks_of_experts(copied: Make, made: Make) -> None:
    """transformers' FP8 experts: one stacked code tensor and one stacked scale, cut where tiles allow it."""
    root = copied(style="transformers", dtype="f32")
    content = read(root / SINGLE)
    rng = np.random.default_rng(0)
    for layer in range(4):
        for stack, shape in (("gate_up_proj", [4, 112, 96]), ("down_proj", [4, 96, 56])):
            name = f"model.layers.{layer}.mlp.experts.{stack}"
            tiles = [4, shape[1] // 8, shape[2] // 8]
            codes = rng.integers(0, 0x7F, shape).astype(np.uint8)
            content[name] = ("F8_E4M3", shape, codes.tobytes())
            content[f"{name}_scale_inv"] = ("F32", tiles, (rng.random(tiles, np.float32) + 0.1).tobytes())
    write(root / SINGLE, content)
    text = (root / "config.json").read_text().rstrip().removesuffix("}")
    quant = '"quantization_config": {"quant_method": "fp8", "weight_block_size": [8, 8]}'
    (root / "config.json").write_text(f"{text}, {quant}}}")
    c = open_checkpoint(root)
    stack = "model.layers.2.mlp.experts.gate_up_proj"
    codes, scale = c.files.read(stack), c.files.read(f"{stack}_scale_inv")
    for which, start in (("w1", 0), ("w3", 56)):
        tile = np.repeat(np.repeat(scale[3, start // 8 : start // 8 + 7], 8, 0), 8, 1)
        expected = decode(codes[3, start : start + 56], DType.F8E4M3) * tile
        got = values(c.weight(f"layers.2.ffn.experts.3.{which}.weight"), c.files)
        assert np.array_equal(got, expected)


@pytest.mark.parametrize("container", ["U8", "F4"])
def test_other_containers_of_packed_numbers(copied: Make, made: Make, container: str) -> None:
    root = copied()
    content = read(root / SINGLE)
    for name, (dtype, shape, blob) in content.items():
        if dtype == "I8":
            logical_shape = [shape[0], 2 * shape[1]] if container == "F4" else shape
            content[name] = (container, logical_shape, blob)
        elif dtype == "F8_E8M0":
            content[name] = ("U8", shape, blob)
    write(root / SINGLE, content)
    assert_same(logical(open_checkpoint(root)), logical(open_checkpoint(made())))


def test_short_integers_in_the_hash_table(copied: Make, made: Make) -> None:
    root, name = copied(), "layers.0.ffn.gate.tid2eid"
    content = read(root / SINGLE)
    _, shape, blob = content[name]
    content[name] = ("I32", shape, np.frombuffer(blob, np.int64).astype(np.int32).tobytes())
    write(root / SINGLE, content)
    assert_same(logical(open_checkpoint(root)), logical(open_checkpoint(made())))


def test_mtp_is_kept_and_optional(made: Make, copied: Make) -> None:
    assert open_checkpoint(made()).mtp == {}
    c = open_checkpoint(made(mtp=2))
    assert c.config.n_mtp_layers == 2 and c.config.compress_ratios == (0, 4, 16, 4)
    assert {n.split(".")[1] for n in c.mtp} == {"0", "1"}
    assert c.mtp["mtp.1.e_proj.weight"].shape == (96, 96)
    assert "mtp.0.ffn.gate.bias" in c.mtp and "mtp.0.attn.compressor.ape" not in c.mtp
    root = copied(mtp=2)
    content = read(root / SINGLE)
    write(root / SINGLE, {n: t for n, t in content.items() if not n.startswith("mtp.")})
    assert open_checkpoint(root).mtp == {}


def test_copies_of_the_embedding_in_mtp_are_ignored(copied: Make) -> None:
    root = copied(mtp=1)
    content = read(root / SINGLE)
    content["mtp.0.embed.weight"], content["mtp.0.head.weight"] = (
        content["embed.weight"],
        content["head.weight"],
    )
    write(root / SINGLE, content)
    assert "mtp.0.embed.weight" not in open_checkpoint(root).mtp


def test_tokenizer_is_found(copied: Make) -> None:
    root = copied()
    assert open_checkpoint(root).tokenizer_path is None
    (root / "tokenizer.json").write_text("{}")
    assert open_checkpoint(str(root)).tokenizer_path == root / "tokenizer.json"


def test_unknown_weight(made: Make) -> None:
    with pytest.raises(CheckpointError, match=r"no tensor 'layers\.9\.x'"):
        open_checkpoint(made()).weight("layers.9.x")


# ------------------------------------------------------------------------------ the file reader


@pytest.mark.parametrize("padding", range(8))
def test_views_are_read_only_and_may_be_unaligned(tmp_path: Path, padding: int) -> None:
    numbers = np.arange(6, dtype=np.float32).reshape(2, 3)
    content = {"pad": ("I8", [padding], bytes(padding)), "x": ("F32", [2, 3], numbers.tobytes())}
    write(tmp_path / SINGLE, content)
    files = TensorFiles.open(tmp_path)
    found = files.read("x")
    assert np.array_equal(found, numbers) and not found.flags.owndata and not found.flags.writeable
    assert files.read("pad").shape == (padding,)
    with pytest.raises(ValueError):
        found[0, 0] = 1


def test_scalars_and_empty_tensors(tmp_path: Path) -> None:
    write(tmp_path / SINGLE, {"s": ("BF16", [], b"\x80\x3f"), "e": ("F32", [0, 5], b"")})
    files = TensorFiles.open(tmp_path)
    assert bf16_to_f32(files.read("s")) == 1 and files.read("e").shape == (0, 5)
    assert str(files.tensors["e"]) == "F32[0, 5]"


def test_unknown_tensor(made: Make) -> None:
    with pytest.raises(CheckpointError, match="no tensor 'x'"):
        TensorFiles.open(made()).read("x")


def test_directory_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such directory"):
        TensorFiles.open(tmp_path / "nothing")
    with pytest.raises(ConfigError, match="no such file"):
        open_checkpoint(tmp_path / "nothing")


def test_links_of_a_model_cache_are_followed(made: Make, tmp_path: Path) -> None:
    """blobs/HASH with snapshots/ID/model.safetensors -> ../../blobs/HASH."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "id"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for file in made().iterdir():
        shutil.copy(file, blobs / f"{file.stat().st_size:x}")
        (snapshot / file.name).symlink_to(Path("../../blobs") / f"{file.stat().st_size:x}")
    assert len(open_checkpoint(snapshot).specs) == 162


# ------------------------------------------------------------------------------------- names


def test_every_published_name_has_its_aliases(made: Make) -> None:
    config = open_checkpoint(made(mtp=1)).config
    names = list(expected_tensors(config))
    for spell in (str, transformers_name, saved_name, lambda n: f"model.{n}"):
        found, unknown = resolve([spell(n) for n in names], config.n_routed_experts)
        assert not unknown and list(found) == names


@pytest.mark.parametrize(
    "stored, published",
    [
        ("model.layers.0.attn.norm.weight", "layers.0.attn.kv_norm.weight"),
        ("model.layers.7.self_attn.kv_norm.weight", "layers.7.attn.kv_norm.weight"),
        ("layers.7.self_attn.compressor.kv_norm.weight", "layers.7.attn.compressor.norm.weight"),
        ("layers.7.self_attn.compressor.indexer.kv_norm.weight",
         "layers.7.attn.indexer.compressor.norm.weight"),
        ("layers.2.self_attn.compressor.indexer.scorer.weights_proj.weight",
         "layers.2.attn.indexer.weights_proj.weight"),
        ("model.layers.12.mlp.gate.e_score_correction_bias", "layers.12.ffn.gate.bias"),
        ("model.layers.3.mlp.experts.11.up_proj.weight_scale_inv", "layers.3.ffn.experts.11.w3.scale"),
        ("model.layers.3.self_attn.o_a_proj.weight_scale_inv", "layers.3.attn.wo_a.scale"),
        ("lm_head.weight", "head.weight"),
        ("model.hc_head.hc_fn", "hc_head_fn"),
        ("mtp.0.hc_head_scale", "mtp.0.hc_head_scale"),
    ],
)  # fmt: skip
def test_names_found_in_the_wild(stored: str, published: str) -> None:
    found, unknown = resolve([stored], 4)
    assert list(found) == [published] and not unknown


# ---------------------------------------------------------------------------- what is refused

BASES: dict[str, dict[str, object]] = {
    "published": {}, "sharded": {"shards": 3}, "f32 scales": {"scale_dtype": "f32"}, "mtp": {"mtp": 1},
    "stacked": {"style": "transformers", "dtype": "f32"},
}  # fmt: skip


def stacked_fp8(root: Path) -> None:
    """Turn the experts of layer 0 into FP8 stacks whose 56 rows end inside a 128-row tile."""
    content = read(root / SINGLE)
    for stack, shape in (("gate_up_proj", [4, 112, 96]), ("down_proj", [4, 96, 56])):
        name = f"model.layers.0.mlp.experts.{stack}"
        content[name] = ("F8_E4M3", shape, bytes(int(np.prod(shape))))
        tiles = [4, 2 if stack == "gate_up_proj" else 1, 1]
        content[f"{name}_scale_inv"] = ("F32", tiles, np.ones(tiles, np.float32).tobytes())
    write(root / SINGLE, content)


@pytest.mark.parametrize("case", CASES)
def test_broken(case: str, copied: Make) -> None:
    broken = CASES[case]
    root = copied(**BASES.get(broken.base, BASES["stacked"]))
    if broken.base == "stacked fp8":
        stacked_fp8(root)
    broken.damage(root)
    with pytest.raises(Dsv4cError) as caught:
        open_checkpoint(root)
    message = str(caught.value)
    assert isinstance(caught.value, CheckpointError | ConfigError)
    assert message.startswith(str(root)), message
    assert all(part in message for part in broken.parts), message


def test_there_are_enough_broken_checkpoints() -> None:
    assert len(CASES) >= 40


def test_values_are_not_scanned_when_not_wanted(copied: Make) -> None:
    root = copied()
    CASES["e8m0 scale nan"].damage(root)
    assert open_checkpoint(root, scan=False).specs


def test_file_that_shrinks_after_opening(copied: Make) -> None:
    root = copied(dtype="f32")
    c = open_checkpoint(root, scan=False)
    (root / SINGLE).write_bytes((root / SINGLE).read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="shrank"):
        c.files.read("head.weight")


# ------------------------------------------------------------------------------- the generator


def test_generator_values(made: Make) -> None:
    v = logical(open_checkpoint(made(dtype="f32")))
    assert abs(v["layers.0.attn_norm.weight"].mean() - 1) < 0.05
    assert 0.9 < v["embed.weight"].std() < 1.1
    assert 0.9 < v["layers.0.attn.wq_b.weight"].std() * 48**0.5 < 1.1
    table = v["layers.0.ffn.gate.tid2eid"]
    assert table.min() == 0 and table.max() == 3


def test_generator_refuses(tmp_path: Path, made: Make) -> None:
    for arguments in (
        {"style": "x"},
        {"dtype": "int4"},
        {"scale_dtype": "x"},
        {"shards": 0},
        {"config": "huge"},
    ):
        with pytest.raises(UsageError):
            generate_checkpoint(tmp_path / "a", **arguments)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="holds weights already"):
        generate_checkpoint(made())
    mixed = {**json_of(made()), "compress_ratios": [0, 8, 16, 4]}
    with pytest.raises(UsageError, match="one ratio per kind"):
        generate_checkpoint(tmp_path / "b", mixed, style="saved")


def json_of(root: Path) -> dict[str, object]:
    return json.loads((root / "config.json").read_text())


def test_generator_with_experts_of_odd_width(made: Make, tmp_path: Path) -> None:
    c = open_checkpoint(generate_checkpoint(tmp_path / "c", {**json_of(made()), "moe_intermediate_size": 33}))
    assert c.weight("layers.0.ffn.experts.0.w2.weight").op == "decode_fp8"
    assert c.weight("layers.0.ffn.experts.0.w1.weight").op == "decode_fp4"
    assert all(s.shape == c.weight(n).shape for n, s in c.specs.items() if s.role is Role.EXPERT)


def test_generator_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "m"), "--dtype", "bf16", "--style", "saved"]) == 0
    assert open_checkpoint(capsys.readouterr().out.strip()).config.hidden_size == 96
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path / "m")])


# ---------------------------------------------------------------------------------- the oracle


@pytest.mark.oracle
@pytest.mark.parametrize("style, dtype", [("transformers", "f32"), ("saved", "bf16")])
def test_transformers_reads_and_writes_the_same_values(tmp_path: Path, style: str, dtype: str) -> None:
    """What we write loads in transformers, and what it saves reads here, bit for bit."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    ours = generate_checkpoint(tmp_path / "ours", "tiny", style=style, dtype=dtype)
    model, info = transformers.DeepseekV4ForCausalLM.from_pretrained(
        ours, dtype=torch.float32, output_loading_info=True, local_files_only=True
    )
    assert not any(info.values())
    model.save_pretrained(tmp_path / "theirs")
    a, b = open_checkpoint(ours), open_checkpoint(tmp_path / "theirs")
    assert a.config.layer_kinds == b.config.layer_kinds and a.config.yarn == b.config.yarn
    assert_same(logical(a), logical(b))
    state = model.state_dict()
    for name in a.specs:
        if ".experts." not in name:
            assert np.array_equal(state[transformers_name(name)].numpy(), logical(a)[name]), name
