"""The demonstration's layer out of PyTorch's own modules: norms, linear maps with bias, convolution."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsv4c import api
from dsv4c.frontend.engram_generate import PRESETS, generate_engram_layer
from dsv4c.frontend.engram_layer import load_engram_layer
from dsv4c.frontend.safetensors import TensorFiles
from dsv4c.ir.meaning import Evaluator
from dsv4c.runtime.layer import LayerSession

pytestmark = pytest.mark.oracle


def test_the_demonstration_in_torch(tmp_path: Path) -> None:
    import torch
    from torch import nn

    config, layer = PRESETS["demo"]
    module = load_engram_layer(generate_engram_layer(tmp_path / "layer", config, layer, seed=9, table="f32"))
    files = TensorFiles.open(tmp_path / "layer")
    w = {name: torch.from_numpy(np.array(files.read(name))) for name in files.tensors}
    n, d, count = config.streams, config.hidden, 40
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, config.vocab, (1, count))
    x = rng.standard_normal((1, count, n, d)).astype(np.float32)
    inputs: dict[str, Any] = {"tokens": tokens, "n_valid": np.array([count]), "streams": x}

    evaluator = Evaluator(module)
    trace = evaluator(inputs, evaluator.fresh_state(B=1), trace=True).trace
    rows = next(r[0] for op, r in trace.items() if op.name == "ngram_rows")

    def norm(name: str, eps: float | None = None) -> nn.RMSNorm:
        made = nn.RMSNorm(d, eps=eps)
        made.weight.data = w[f"{name}.weight"]
        return made

    def linear(name: str) -> nn.Linear:
        made = nn.Linear(w[f"{name}.weight"].shape[1], d)
        made.weight.data, made.bias.data = w[f"{name}.weight"], w[f"{name}.bias"]
        return made

    with torch.no_grad():
        streams = torch.from_numpy(x)
        table = nn.Embedding.from_pretrained(w["multi_head_embedding.embedding.weight"])
        e = table(torch.from_numpy(rows.astype(np.int64))).flatten(2)
        gates = []
        for j in range(n):
            key, query = norm(f"norm1.{j}")(linear(f"key_projs.{j}")(e)), norm(f"norm2.{j}")(streams[:, :, j])
            delta = (key * query).sum(-1) / d**0.5
            gates.append(torch.sigmoid(delta.abs().clamp_min(1e-6).sqrt() * delta.sign()))
        v = torch.stack(gates, 2)[..., None] * linear("value_proj")(e)[:, :, None]
        conv = nn.Conv1d(n * d, n * d, 4, groups=n * d, bias=False, padding=9, dilation=3)
        conv.weight.data = w["short_conv.conv.weight"]
        z = torch.cat([norm(f"short_conv.norms.{j}", 1e-5)(v[:, :, j]) for j in range(n)], -1)
        y = nn.functional.silu(conv(z.transpose(1, 2))[..., :count]).transpose(1, 2).reshape(v.shape)
        want = (streams + v + y).numpy()

    artifact = api.compile(module, output=tmp_path / "layer.dsv4", golden=False)
    found = LayerSession(artifact).step(**inputs)["streams"]
    assert np.abs(found - want).max() <= 2e-6 * np.abs(want).max()
