"""Number formats of a published DeepSeek-V4 checkpoint, as tensor functions.

Routed experts are stored as FP4 (E2M1, one power-of-two scale per 32 inputs), the other
large linears as FP8 (E4M3, one power-of-two scale per 128 x 128 tile), the rest as BF16 or
F32. `round_trip` gives the value a reader of the checkpoint will see; `encode_fp4` and
`encode_fp8` give the stored bytes.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

FP4_BLOCK = 32
FP8_TILE = 128
FP4_MAX = 6.0
FP8_MAX = 448.0
MIN_EXPONENT = -60  # scale of an all-zero block, far from the ends of E8M0

_FP4 = re.compile(r"\.mlp\.experts\.(gate_up_proj|down_proj)$")
_FP8 = re.compile(
    r"\.self_attn\.(q_a_proj|q_b_proj|kv_proj|o_a_proj|o_b_proj)\.weight$"
    r"|\.compressor\.indexer\.q_b_proj\.weight$"
    r"|\.mlp\.shared_experts\.(gate_proj|up_proj|down_proj)\.weight$"
)
_F32 = re.compile(r"\.(attn_hc|ffn_hc|hc_head)\.|\.sinks$|\.position_bias$|\.e_score_correction_bias$")


def storage_of(name: str) -> str:
    """The storage format ("fp4", "fp8", "f32", "i64" or "bf16") of a transformers parameter name."""
    if _FP4.search(name):
        return "fp4"
    if _FP8.search(name):
        return "fp8"
    if _F32.search(name):
        return "f32"
    return "i64" if name.endswith("tid2eid") else "bf16"


def _ceil_exponent(amax: Tensor, largest: float) -> Tensor:
    """Smallest integer e with amax <= largest * 2**e."""
    mantissa, exponent = torch.frexp(amax / largest)  # mantissa in [0.5, 1)
    exponent = exponent - (mantissa == 0.5).to(exponent.dtype)
    return torch.where(amax > 0, exponent, MIN_EXPONENT).clamp_(min=MIN_EXPONENT)


def _round_e2m1(x: Tensor) -> Tensor:
    """Nearest E2M1 magnitude of x >= 0 (ties to the even code), saturating at 6."""
    fine = torch.round(x * 2) * 0.5
    coarse = torch.where(x < 4, torch.round(x), torch.round(x * 0.5) * 2)
    return torch.where(x < 2, fine, coarse).clamp_(max=FP4_MAX)


def _fp4_parts(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Signed E2M1 values [..., blocks, 32] and scale exponents [..., blocks, 1].

    Two exponents are tried per block, the smallest that avoids saturation and the one
    below it; the one with the smaller squared error wins.
    """
    blocks = weight.unflatten(-1, (-1, FP4_BLOCK))
    magnitude = blocks.abs()
    exponent = _ceil_exponent(magnitude.amax(-1, keepdim=True), FP4_MAX)
    scale = torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), exponent)
    safe = _round_e2m1(magnitude / scale)
    tight = _round_e2m1(magnitude * (2 / scale))
    error_safe = (safe * scale - magnitude).square_().sum(-1, keepdim=True)
    error_tight = (tight * (scale * 0.5) - magnitude).square_().sum(-1, keepdim=True)
    use_tight = error_tight < error_safe
    values = torch.where(use_tight, tight, safe)
    return torch.copysign(values, blocks), exponent - use_tight.to(exponent.dtype)


def _tiles(weight: Tensor) -> Tensor:
    """A matrix padded with zeros and viewed as [row tiles, 128, column tiles, 128]."""
    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight, (0, -columns % FP8_TILE, 0, -rows % FP8_TILE))
    return padded.view(padded.shape[0] // FP8_TILE, FP8_TILE, padded.shape[1] // FP8_TILE, FP8_TILE)


def _fp8_parts(weight: Tensor) -> tuple[Tensor, Tensor]:
    """E4M3 tensor of the weight's shape and scale exponents [row tiles, column tiles]."""
    tiles = _tiles(weight)
    exponent = _ceil_exponent(tiles.abs().amax((1, 3)), FP8_MAX)
    scale = torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), exponent)
    scaled = (tiles / scale[:, None, :, None]).flatten(2).flatten(0, 1)
    return scaled[: weight.shape[0], : weight.shape[1]].to(torch.float8_e4m3fn), exponent


def _e8m0(exponent: Tensor) -> Tensor:
    return (exponent + 127).to(torch.uint8).view(torch.float8_e8m0fnu)


def encode_fp4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Packed I8 bytes (even input in the low nibble) and E8M0 scales of a weight [rows, inputs]."""
    values, exponent = _fp4_parts(weight.float())
    magnitude = values.abs()
    levels = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    codes = torch.searchsorted(levels, magnitude).to(torch.uint8)
    codes = (codes | (torch.signbit(values).to(torch.uint8) << 3)).flatten(-2)
    packed = codes[..., 0::2] | (codes[..., 1::2] << 4)
    return packed.view(torch.int8), _e8m0(exponent.squeeze(-1))


def encode_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """E4M3 weight and its E8M0 tile scales."""
    stored, exponent = _fp8_parts(weight.float())
    return stored.contiguous(), _e8m0(exponent)


def round_trip(name: str, weight: Tensor) -> Tensor:
    """The F32 value of `weight` after storing it in the format that `name` has on disk."""
    kind = storage_of(name)
    if kind == "fp4":
        values, exponent = _fp4_parts(weight)
        return torch.ldexp(values, exponent).flatten(-2)
    if kind == "fp8":
        stored, exponent = _fp8_parts(weight)
        rows, columns = weight.shape
        spread = exponent.repeat_interleave(FP8_TILE, 0)[:rows].repeat_interleave(FP8_TILE, 1)[:, :columns]
        return torch.ldexp(stored.float(), spread)
    return weight.bfloat16().float() if kind == "bf16" else weight
