"""The example with fewer experts, exported: loaded in transformers and held against the compiled artifact."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from test_example import windows
from test_model_harness import FORMATS, ROOT, TINY, TOLERANCE, within

import dsv4c
from dsv4c.frontend.export import export_checkpoint
from dsv4c.frontend.generate import generate_checkpoint
from dsv4c.ir.clone import clone
from dsv4c.passes import run_pipeline
from dsv4c.passes.prune_experts import PruneExperts
from dsv4c.runtime.text import tokenizer_of

pytestmark = pytest.mark.oracle

CHECKPOINT = ROOT / "examples" / "kjv" / "checkpoint"


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_the_exported_checkpoint_is_the_pruned_artifact(tmp_path: Path, scope: str, form: str) -> None:
    """`global` leaves layers of different size, so the files hold padding experts with a bias of -inf."""
    from oracle_support import Oracle

    original = dsv4c.load_checkpoint(CHECKPOINT)
    module = clone(original)
    run_pipeline(module, (PruneExperts("random", keep=0.75, scope=scope, seed=3),))
    done = export_checkpoint(module, tmp_path / "checkpoint")
    assert bool(done.padded) == (scope == "global")
    config = json.loads((tmp_path / "checkpoint" / "config.json").read_text())
    assert config["n_routed_experts"] == done.experts

    path = dsv4c.compile(module, output=tmp_path / "pruned.dsv4", format=form, golden=False)
    session = dsv4c.Session(path, batch=4, context=1024, threads=1)
    given, _ = windows(tokenizer_of(session.artifact))[0]
    found = session.step(given)
    oracle = Oracle.open(tmp_path / "checkpoint")
    want = np.stack([oracle.logits(row) for row in given])
    within(found, want, TOLERANCE)
    assert (found.argmax(-1) == want.argmax(-1)).mean() > 0.999
    unpruned = Oracle.open(CHECKPOINT).logits(given[0])
    assert np.abs(unpruned - want[0]).max() > 100 * TOLERANCE * np.ptp(unpruned), "nothing was pruned"


def test_transformers_opens_an_export_by_itself(tmp_path: Path) -> None:
    """Plain floats, which it reads without our help: no key is missing, none is left over."""
    import torch
    from transformers import DeepseekV4ForCausalLM

    config = TINY | {"n_routed_experts": 8}
    source = generate_checkpoint(tmp_path / "source", config, seed=4, style="saved", dtype="bf16")
    module = dsv4c.load_checkpoint(source)
    run_pipeline(module, (PruneExperts("random", keep=0.6, scope="global", seed=2),))
    assert export_checkpoint(module, tmp_path / "out").padded
    model, info = DeepseekV4ForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, output_loading_info=True, local_files_only=True
    )
    assert not any(info.values()), info
    ids = np.random.default_rng(0).integers(2, 61, 60)
    model.config._attn_implementation = model.config._experts_implementation = "eager"
    with torch.no_grad():
        want = model.eval()(torch.from_numpy(ids[None]), use_cache=False).logits[0].numpy()
    within(dsv4c.evaluate(module, ids), want, TOLERANCE)
