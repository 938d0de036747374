"""The half of `dsv4c inspect` that reads checkpoint directories; imported only when it is given one."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dsv4c.frontend.architecture import Generation, LayerKind, ModelConfig
from dsv4c.frontend.checkpoint import Checkpoint, open_checkpoint
from dsv4c.frontend.config import load_config
from dsv4c.frontend.inventory import EXTRA, flops_per_token, kv_bytes_per_token, parameters, state_bytes
from dsv4c.frontend.naming import saved_name, transformers_name
from dsv4c.frontend.table import TensorSpec, expected_tensors, ledger
from dsv4c.frontend.token_map import FILE as TOKEN_MAP

from .show import amount, section, size, table

CONTEXTS = (1 << 10, 1 << 14, 1 << 17, 1 << 20)
"""Lengths of text for which operations are counted, as far as the model reaches."""


def directory_facts(path: Path) -> dict[str, Any]:
    """What a checkpoint directory holds, or what its configuration alone asks for.

    Raises:
        ConfigError, CheckpointError: the directory is not a supported checkpoint.
    """
    config = load_config(path)
    if has_weights(path):
        checkpoint = open_checkpoint(path, scan=False)
        specs = checkpoint.specs
        found: dict[str, Any] = {"kind": "checkpoint", "path": str(path), **_files(checkpoint)}
    else:
        specs = expected_tensors(config)
        count, nbytes = ledger(config)
        found = {"kind": "config", "path": str(path), "tensors": count, "bytes": nbytes}
    return {
        **found,
        "config": _config(config),
        "parameters": _parameters(specs, config),
        "serving": _serving(specs, config),
    }


def has_weights(path: Path) -> bool:
    """Whether a directory holds tensors of a model; a stored token map is none."""
    index = any(path.glob("*.safetensors.index.json"))
    return index or any(file.name != TOKEN_MAP for file in path.glob("*.safetensors"))


def _parameters(specs: dict[str, TensorSpec], config: ModelConfig) -> dict[str, Any]:
    counts = parameters(specs, config)
    return {
        "total": sum(count.total for kind, count in counts.items() if kind not in EXTRA),
        "active_per_token": sum(count.active for count in counts.values()),
        "classes": {kind: count.total for kind, count in counts.items()},
        "active": {kind: count.active for kind, count in counts.items()},
    }


def _serving(specs: dict[str, TensorSpec], config: ModelConfig) -> dict[str, Any]:
    longest, state = config.max_position_embeddings, state_bytes(config)
    contexts = [n for n in CONTEXTS if n <= longest] or [longest]
    return {
        "kv_bytes_per_token": kv_bytes_per_token(config),
        "state_bytes": {"total": sum(state.values()), **state},
        "flops_per_token": {
            context: {"total": sum(parts.values()), **parts}
            for context, parts in flops_per_token(specs, config, contexts).items()
        },
    }


def _files(checkpoint: Checkpoint) -> dict[str, Any]:
    tensors = checkpoint.files.tensors
    dtypes: dict[str, dict[str, int]] = {}
    for raw in tensors.values():
        entry = dtypes.setdefault(raw.dtype.value, {"tensors": 0, "bytes": 0})
        entry["tensors"] += 1
        entry["bytes"] += raw.nbytes
    return {
        "naming": naming(checkpoint),
        "files": len({raw.file for raw in tensors.values()}),
        "tensors": len(tensors),
        "bytes": sum(raw.nbytes for raw in tensors.values()),
        "dtypes": dtypes,
        "tokenizer": checkpoint.tokenizer_path is not None,
    }


def naming(checkpoint: Checkpoint) -> str:
    """Which of the known spellings the files use."""
    plain = [(name, checkpoint.origins[name]) for name in checkpoint.specs]
    whole = [(name, origin.name) for name, origin in plain if not origin.stacked]
    stacked = " (stacked experts)" if len(whole) < len(plain) else ""
    if all(name == stored for name, stored in whole):
        return "published" + stacked
    if checkpoint.config.generation is Generation.V41:
        return "mixed"
    if _spelt(whole, transformers_name):
        return "transformers" + stacked
    return ("saved by transformers" if _spelt(whole, saved_name) else "mixed") + stacked


def _spelt(names: Iterable[tuple[str, str]], spell: Any) -> bool:
    try:
        return all(spell(name) == stored for name, stored in names)
    except KeyError:
        return False


def _config(c: ModelConfig) -> dict[str, Any]:
    layers = {kind.value: c.layer_kinds.count(kind) for kind in LayerKind}
    return {
        "model_type": c.generation.value,
        "layers": c.num_hidden_layers,
        **{name: count for name, count in layers.items() if count},
        "compress_ratios": sorted({r for r in c.compress_ratios if r}),
        "hash_layers": sum(c.hash_layers),
        **_parts(c),
        "mtp_blocks": c.n_mtp_layers,
        "hidden_size": c.hidden_size,
        "vocab_size": c.vocab_size,
        "heads": c.heads,
        "head_dim": c.head_dim,
        "rope_dim": c.rope_dim,
        "sliding_window": c.sliding_window,
        "routed_experts": c.n_routed_experts,
        "experts_per_token": c.experts_per_token,
        "expert_dtype": c.expert_dtype,
        "max_positions": c.max_position_embeddings,
        "eos": list(c.eos_token_ids),
    }


def _parts(c: ModelConfig) -> dict[str, Any]:
    """What only V4.1 has."""
    out: dict[str, Any] = {}
    if c.shared:
        out |= {"kv_sources": list(c.shared.kv_sources), "index_sources": list(c.shared.index_sources)}
        out["candidate_source"] = c.shared.candidate_source
    if c.engram:
        out |= {"engram_layers": list(c.engram.layers), "engram_rows": list(c.engram.rows)}
    if c.vision:
        out |= {"vision_layers": c.vision.layers, "image_token": c.vision.image_token}
    if c.drafter:
        out["draft_tokens"] = c.drafter.block
    return out


def text(facts: dict[str, Any]) -> str:
    """The same for people."""
    dtypes = [(name, e["tensors"], size(e["bytes"])) for name, e in facts.get("dtypes", {}).items()]
    config = [
        (key, ", ".join(map(str, v)) if isinstance(v, list) else v) for key, v in facts["config"].items()
    ]
    return "".join((
        _head(facts),
        section("config", table(config)),
        _parameters_text(facts["parameters"]),
        _serving_text(facts["serving"]),
        section("stored as", table(dtypes, ("dtype", "tensors", "bytes"), right=[1, 2]) if dtypes else ""),
    ))  # fmt: skip


def _parameters_text(counts: dict[str, Any]) -> str:
    title = f"parameters: {amount(counts['total'])}, {amount(counts['active_per_token'])} active per token"
    classes = sorted(counts["classes"].items(), key=lambda item: -item[1])
    rows = [(name, amount(n), amount(counts["active"][name])) for name, n in classes]
    return section(title, table(rows, ("", "all", "active"), right=[1, 2]))


def _serving_text(facts: dict[str, Any]) -> str:
    state = facts["state_bytes"]
    parts = ", ".join(f"{name} {size(n)}" for name, n in state.items() if name != "total")
    rows = [
        ("grows by", f"{facts['kv_bytes_per_token']:,.0f} B per token"),
        ("whatever its length", f"{size(state['total'])}: {parts}"),
    ]
    flops = facts["flops_per_token"]
    names = list(next(iter(flops.values())))
    columns = [(context, *(amount(parts[name]) for name in names)) for context, parts in flops.items()]
    return section("state of a sequence, as served", table(rows)) + section(
        "operations per decoded token",
        table(columns, ("context", *names), right=range(len(names) + 1)),
    )


def _head(facts: dict[str, Any]) -> str:
    if facts["kind"] == "config":
        return (
            f"{facts['path']}: a config.json without weights\n"
            f"the released format of this model: {facts['tensors']} tensors, {size(facts['bytes'])}"
        )
    files = "1 file" if facts["files"] == 1 else f"{facts['files']} files"
    tokenizer = "with" if facts["tokenizer"] else "without"
    return (
        f"{facts['path']}: checkpoint, {facts['naming']} names, {facts['tensors']} tensors, "
        f"{size(facts['bytes'])} in {files}, {tokenizer} tokenizer.json"
    )
