"""Directories that `save_pretrained` of transformers writes, loaded here and by transformers itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_model_harness import TINY, TOLERANCE, within

import dsv4c
from dsv4c.frontend.generate import generate_checkpoint

pytestmark = pytest.mark.oracle

CONFIGS: dict[str, dict[str, Any]] = {
    "yarn": TINY,
    "plain": TINY | {"rope_scaling": None, "compress_ratios": [128, 4, 0, 4], "num_hash_layers": 0},
}


def saved(tmp_path: Path, name: str, dtype: str, **options: Any) -> Path:
    """A random model with lively weights, written by the library in `dtype`."""
    import torch
    from oracle_support import Oracle

    model = Oracle.open(generate_checkpoint(tmp_path / "made", CONFIGS[name], seed=3, dtype="f32")).model
    model.to(getattr(torch, dtype)).save_pretrained(tmp_path / "saved", **options)
    return tmp_path / "saved"


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("options", [{}, {"max_shard_size": "300KB"}], ids=["one file", "shards"])
def test_the_same_model_comes_back(tmp_path: Path, name: str, dtype: str, options: dict[str, Any]) -> None:
    import torch
    from oracle_support import Oracle
    from transformers import DeepseekV4ForCausalLM

    directory = saved(tmp_path, name, dtype, **options)
    assert len(list(directory.glob("*.safetensors"))) > 1 if options else True
    library = Oracle(DeepseekV4ForCausalLM.from_pretrained(directory, dtype=torch.float32))
    ids = np.random.default_rng(1).integers(2, 61, 300)
    want = library.logits(ids)
    module = dsv4c.load_checkpoint(directory)
    within(dsv4c.evaluate(module, ids), want, TOLERANCE, "evaluator")
    within(Oracle.open(directory).logits(ids), want, TOLERANCE, "the oracle's own reader")
    session = dsv4c.Session(dsv4c.compile(module, output=tmp_path / "m.dsv4", format="onnx"))
    within(session.step(ids[None])[0], want, TOLERANCE, "onnx")


def test_initial_weights_of_the_library(tmp_path: Path) -> None:
    """A model as the constructor leaves it; without hash layers, whose tables would be all zero."""
    import torch
    from oracle_support import Oracle, library_config
    from transformers import DeepseekV4ForCausalLM

    raw = {k: v for k, v in CONFIGS["plain"].items() if v is not None} | {"hc_mult": 4}
    torch.manual_seed(0)
    model = DeepseekV4ForCausalLM(library_config(raw))
    model.save_pretrained(tmp_path / "fresh")
    ids = np.random.default_rng(1).integers(2, 61, 150)
    found = dsv4c.evaluate(dsv4c.load_checkpoint(tmp_path / "fresh"), ids)
    within(found, Oracle(model).logits(ids), TOLERANCE)
