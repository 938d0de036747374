"""Expert pruning: which experts go, that what stays computes what it should, and every refusal.

The judge of the rewrite is the unpruned graph over edited tensors: a bias of -inf takes an expert out of the
choice, and hash tables are edited here, token by token, by other code than the pass has.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from broken_checkpoints import SINGLE, read, write
from test_model_harness import FORMATS, TINY, TOLERANCE, Arr, Models, within

import dsv4c
from dsv4c.api import lower
from dsv4c.errors import PassError
from dsv4c.frontend.generate import generate_checkpoint
from dsv4c.ir.clone import clone
from dsv4c.ir.graph import Builder, Module, Op
from dsv4c.ir.meaning import Evaluator
from dsv4c.ir.text import parse_module, print_module
from dsv4c.ir.verify import verify
from dsv4c.ir.weights import TensorStore, values
from dsv4c.passes import EXACT, parse_pipeline, run_pipeline
from dsv4c.passes.moe_layers import find_layers
from dsv4c.passes.prune_experts import PruneExperts, best_together
from dsv4c.passes.statistics import ExpertUsage, Statistics
from dsv4c.runtime.container import Artifact

E, K, VOCAB = 8, 2, 61
CONFIG = TINY | {"n_routed_experts": E, "num_hash_layers": 1}
HASHED, SCORED = "layers.0.ffn", ("layers.1.ffn", "layers.2.ffn", "layers.3.ffn")
LAYERS = (HASHED, *SCORED)
TABLE, BIAS = f"{HASHED}.gate.tid2eid", f"{SCORED[1]}.gate.bias"


class Edited:
    """The tensors of a store, some replaced."""

    def __init__(self, store: TensorStore, tensors: Mapping[str, Arr]) -> None:
        self.store, self.tensors = store, tensors

    def read(self, name: str) -> Arr:
        return self.tensors[name] if name in self.tensors else self.store.read(name)


@pytest.fixture(scope="session")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return generate_checkpoint(tmp_path_factory.mktemp("prune") / "checkpoint", CONFIG, seed=11)


@pytest.fixture
def module(directory: Path) -> Module:
    return dsv4c.load_checkpoint(directory)


def edited(module: Module, tensors: Mapping[str, Arr]) -> Module:
    assert module.store is not None
    copy = clone(module)
    copy.store = Edited(module.store, tensors)
    return copy


def tensor(module: Module, name: str) -> Arr:
    assert module.store is not None
    return np.array(module.store.read(name))


def pruned(module: Module, *passes: PruneExperts) -> Module:
    copy = clone(module)
    run_pipeline(copy, passes)
    return copy


def notes(module: Module) -> dict[str, Any]:
    found: dict[str, Any] = module.notes["prune_experts"]
    assert json.loads(json.dumps(found)) == found, "JSON values only"
    return found


def kept(module: Module) -> dict[str, list[int]]:
    return {n["layer"]: n["kept"] for n in notes(module)["layers"]}


def logits(module: Module, tokens: Arr | None = None) -> Arr:
    """float64, over a batch of two calls, so that state matters."""
    ids = np.random.default_rng(2).integers(0, VOCAB, (2, 40)) if tokens is None else tokens
    evaluator = Evaluator(module, precision=np.float64)
    state, out = evaluator.fresh_state(B=len(ids), ctx=ids.shape[1]), []
    for part in (ids[:, :29], ids[:, 29:]):
        rows = np.tile(np.arange(part.shape[1]), (len(ids), 1))
        step = evaluator({"tokens": part, "n_valid": np.full(len(ids), part.shape[1]), "rows": rows}, state)
        state = step.state
        out.append(step.outputs["logits"])
    return np.concatenate(out, axis=1)


def counted(path: Path, usage: Mapping[str, tuple[list[int], list[float]]] | None = None) -> str:
    """A statistics file: expert -> tokens and sums of saliency; layers that are not named count 1 each."""
    even = ([1] * E, [1.0] * E)
    experts = {}
    for layer in LAYERS:
        tokens, saliency = (usage or {}).get(layer, even)
        experts[layer] = ExpertUsage(np.array(tokens, np.int64), np.array(tokens) * 0.5, np.array(saliency))
    Statistics("the tiny model", VOCAB, 100, experts).save(path)
    return str(path)


# ---------------------------------------------------------------------- what is left computes as before


def reroute(table: Arr, gate: Arr, keep: list[int]) -> Arr:
    """[V,k] old ids: tokens of a dropped expert go to the nearest kept row that they do not have yet."""
    unit = gate / np.linalg.norm(gate, axis=1, keepdims=True)
    out = table.copy()
    for row in out:
        held = [e for e in row if e in keep]
        for slot, old in enumerate(row):
            if old not in keep:
                near = sorted(keep, key=lambda e, old=old: (-float(unit[e] @ unit[old]), e))
                row[slot] = next(e for e in near if e not in held)
                held.append(row[slot])
    return out


def without(module: Module, keep: Mapping[str, list[int]]) -> Module:
    """The unpruned graph in which only the experts of `keep` can be chosen."""
    tensors = {}
    for layer in find_layers(module)[0]:
        if layer.hashed:
            gate = values(layer.gate, module.store).astype(np.float64)
            tensors[TABLE] = reroute(tensor(module, TABLE), gate, keep[layer.loc])
        else:
            name = f"{layer.loc}.gate.bias"
            stays = np.isin(np.arange(E), keep[layer.loc])
            tensors[name] = np.where(stays, tensor(module, name), -np.inf)
    return edited(module, tensors)


@pytest.mark.parametrize("keep", [0.9, 0.5, 0.25])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_what_stays_is_the_model_without_the_others(module: Module, keep: float, scope: str) -> None:
    small = pruned(module, PruneExperts("random", keep=keep, scope=scope, seed=6))
    want = logits(without(module, kept(small)))
    within(logits(small), want, 1e-12)
    if keep < 0.9:
        assert np.abs(logits(module) - want).max() > 1e-3 * np.ptp(want), "nothing was taken away"


def test_non_uniform_layers_print_parse_and_verify(module: Module) -> None:
    small = pruned(module, PruneExperts("random", keep=0.6, scope="global", seed=2))
    counts = {loc: len(ids) for loc, ids in kept(small).items()}
    assert len(set(counts.values())) > 1 and min(counts.values()) >= K
    text = print_module(small)
    again = parse_module(text)
    assert print_module(again) == text and "reroute(" in text
    again.store = small.store
    np.testing.assert_array_equal(logits(again), logits(small))
    assert small.meta["experts"] == max(counts.values())
    assert {layer.loc: layer.count for layer in find_layers(small)[0]} == counts


def test_locations_are_the_names_in_the_smaller_model(module: Module) -> None:
    small = pruned(module, PruneExperts("random", keep=0.5, seed=3))
    names = {op.loc for op in small.weights()}
    for loc, ids in kept(small).items():
        for new, old in enumerate(ids):
            name = f"{loc}.experts.{new}.w1.weight"
            (weight,) = [op.weight for op in small.weights() if op.loc == name]
            assert weight and next(weight.sources()).attr("name") == f"{loc}.experts.{old}.w1.weight"
        assert f"{loc}.experts.{len(ids)}.w1.weight" not in names


def test_the_rest_of_the_pipeline_takes_it(module: Module) -> None:
    small = pruned(module, PruneExperts("random", keep=0.6, scope="global", seed=2))
    lowered = lower(small).module
    verify(lowered)
    within(logits(lowered), logits(small), 1e-12)
    fused = [op for op in lowered.ops if op.name == "expert_mlp"]
    assert [op.operands[5].type.shape[0] for op in fused] == [len(ids) for ids in kept(small).values()]


def weight_bytes(path: Path) -> int:
    """What is kept to verify itself not counted."""
    tensors = Artifact.open(path).tensors.values()
    return sum(t.nbytes for t in tensors if not t.name.startswith("golden."))


@pytest.mark.parametrize("form", FORMATS)
def test_the_example_compiles_with_layers_of_different_size(
    models: Models, tmp_path: Path, form: str
) -> None:
    example = models.module("kjv")
    small = pruned(example, PruneExperts("random", keep=0.75, scope="global", seed=3))
    assert len({len(ids) for ids in kept(small).values()}) > 1
    path = dsv4c.compile(small, output=tmp_path / "small.dsv4", format=form, golden=False)
    assert weight_bytes(path) < weight_bytes(models.artifact("kjv", form))
    ids = np.random.default_rng(0).integers(2, 2048, 70)
    session = dsv4c.Session(path, context=128, threads=1)
    found = np.concatenate([session.step(part[None])[0] for part in np.split(ids, [41, 42])])
    within(found, dsv4c.evaluate(small, ids), TOLERANCE)


def test_an_artifact_of_a_pruning_pipeline_verifies_itself(directory: Path, tmp_path: Path) -> None:
    """Its golden vectors are those of the pruned graph."""
    from dsv4c.runtime.verify import verify as check

    prune = 'prune_experts{strength = "random", keep = 0.5, seed = 2}'
    path = dsv4c.compile(directory, output=tmp_path / "m.dsv4", passes=f"{prune},default")
    checks = check(dsv4c.Session(path, threads=1).artifact, threads=1)
    assert all(c.ok for c in checks), [c for c in checks if not c.ok]


# -------------------------------------------------------------------------------------- unreachable


def test_experts_that_nothing_can_choose_go_without_a_trace(module: Module) -> None:
    bias = tensor(module, BIAS)
    bias[[1, 6]] = -np.inf
    table = tensor(module, TABLE)
    table[:] = np.where(table == 3, 0, table)  # the row may now name 0 twice:
    table[table[:, 0] == table[:, 1], 1] = 7
    changed = edited(module, {BIAS: bias, TABLE: table})
    small = pruned(changed, PruneExperts())
    want = {loc: list(range(E)) for loc in LAYERS}
    want[HASHED].remove(3)
    want[SCORED[1]] = [0, 2, 3, 4, 5, 7]
    assert kept(small) == want
    within(logits(small), logits(changed), 1e-12)
    assert PruneExperts().effect() == EXACT


def test_the_checkpoint_itself_may_hold_such_a_bias(directory: Path, tmp_path: Path) -> None:
    root = tmp_path / "checkpoint"
    root.mkdir()
    (root / "config.json").write_bytes((directory / "config.json").read_bytes())
    content = read(directory / SINGLE)
    dtype, shape, _ = content[BIAS]
    gone = np.array([0, -np.inf] * 3 + [0, 0], np.float32)
    write(root / SINGLE, content | {BIAS: (dtype, shape, gone.tobytes())})
    found = dsv4c.load_checkpoint(root)
    assert np.isfinite(logits(found)).all()
    assert kept(pruned(found, PruneExperts()))[SCORED[1]] == [0, 2, 4, 6, 7]


@pytest.mark.parametrize("form", FORMATS)
def test_kernels_take_a_bias_of_minus_infinity(module: Module, tmp_path: Path, form: str) -> None:
    """As in an exported checkpoint that nobody pruned again."""
    bias = np.full(E, -np.inf, np.float32)
    bias[[3, 6]] = [-50.0, 0.0]
    changed = edited(module, {BIAS: bias})
    path = dsv4c.compile(changed, output=tmp_path / "m.dsv4", format=form, golden=False)
    ids = np.random.default_rng(4).integers(0, VOCAB, 40)
    found = dsv4c.Session(path, context=64, threads=1).step(ids[None])[0]
    within(found, dsv4c.evaluate(changed, ids), TOLERANCE)


def test_a_full_model_loses_nothing(module: Module) -> None:
    before = print_module(module)
    (record,) = run_pipeline(module, (PruneExperts(),))
    assert record.changes == 0 and print_module(module) == before
    assert all(not n["dropped"] and n["bytes_before"] == n["bytes_after"] for n in notes(module)["layers"])


def test_of_a_vocabulary_only_what_its_tokens_name_stays(module: Module, tmp_path: Path) -> None:
    table, ids = tensor(module, TABLE), [5, 9, 17, 60]
    (tmp_path / "ids.txt").write_text("60 9\n5\n17\n 9\n")
    p = PruneExperts(vocabulary=str(tmp_path / "ids.txt"))
    small = pruned(module, p)
    named = sorted(set(table[ids].reshape(-1).tolist()))
    assert kept(small)[HASHED] == named and len(named) < E
    assert all(kept(small)[loc] == list(range(E)) for loc in SCORED)
    assert p.effect().vocabulary == (5, 9, 17, 60) and not p.effect().changes
    inside = np.random.default_rng(1).choice(ids, (2, 40))
    within(logits(small, inside), logits(module, inside), 1e-12)


def test_too_few_finite_biases_keep_a_layer_whole(module: Module) -> None:
    """The front end refuses such a checkpoint; a graph from elsewhere is left alone."""
    bias = np.full(E, -np.inf, np.float32)
    bias[4] = 0
    small = pruned(edited(module, {BIAS: bias}), PruneExperts())
    assert kept(small)[SCORED[1]] == list(range(E))


# ---------------------------------------------------------------------------------------- by scores

TOKENS = [9, 0, 4, 4, 7, 1, 0, 5]
SALIENCY = [9.0, 0.0, 8.0, 2.0, 0.7, 3.0, 0.0, 10.0]
"""Means: 1, 0, 2, 0.5, 0.1, 3, 0, 2."""


def chosen(module: Module, tmp_path: Path, strength: str, keep: float = 1.0) -> list[int]:
    stats = counted(tmp_path / "s.npz", {SCORED[0]: (TOKENS, SALIENCY)})
    return kept(pruned(module, PruneExperts(strength, keep=keep, stats=stats)))[SCORED[0]]


def test_unused_experts_are_those_without_a_token(module: Module, tmp_path: Path) -> None:
    assert chosen(module, tmp_path, "unused") == [0, 2, 3, 4, 5, 7]


@pytest.mark.parametrize(
    ("strength", "keep", "want"),
    [
        ("frequency", 0.5, [0, 2, 4, 7]),  # 4 tokens for 2 and for 3: the lower id stays
        ("saliency", 0.5, [0, 2, 5, 7]),
        ("saliency", 0.3, [2, 5, 7]),  # 2.4 experts are three
        ("saliency", 0.625, [0, 2, 3, 5, 7]),
        ("frequency", 1.0, list(range(8))),
        ("saliency", 0.25, [2, 5]),
    ],
)
def test_the_least_of_a_layer_go(
    module: Module, tmp_path: Path, strength: str, keep: float, want: list[int]
) -> None:
    assert chosen(module, tmp_path, strength, keep) == want


def test_an_expert_that_cannot_be_chosen_goes_first(module: Module, tmp_path: Path) -> None:
    bias = tensor(module, f"{SCORED[0]}.gate.bias")
    bias[[0, 7]] = -np.inf
    changed = edited(module, {f"{SCORED[0]}.gate.bias": bias})
    assert chosen(changed, tmp_path, "frequency", 0.5) == [2, 3, 4, 5]
    for seed in range(9):
        small = pruned(changed, PruneExperts("random", keep=0.75, seed=seed))
        assert kept(small)[SCORED[0]] == [1, 2, 3, 4, 5, 6]


def test_all_layers_together_by_share_of_the_layer() -> None:
    """Scores over the layer's mean: 0.5 1 1.5 1 and 0.4 0.4 2 1.2; two of each layer are safe."""
    scores = [np.array([1.0, 2, 3, 2]), np.array([20.0, 20, 100, 60])]
    assert best_together(scores, [2, 2], 5 / 8) == [[1, 2, 3], [2, 3]]
    assert best_together(scores, [2, 2], 6 / 8) == [[0, 1, 2, 3], [2, 3]]
    assert best_together(scores, [2, 2], 7 / 8) == [[0, 1, 2, 3], [0, 2, 3]]
    assert best_together(scores, [1, 3], 4 / 8) == [[2], [0, 2, 3]]
    with pytest.raises(PassError, match=r"3 of 8 experts would remain in all layers together; .* at least 4"):
        best_together(scores, [2, 2], 0.3)


def test_a_layer_that_counts_nothing_is_no_special_case() -> None:
    assert best_together([np.zeros(3), np.array([1.0, 1, 1])], [1, 1], 0.66) == [[0], [0, 1, 2]]


def test_random_follows_the_seed(module: Module) -> None:
    one, same, other = (pruned(module, PruneExperts("random", keep=0.5, seed=s)) for s in (1, 1, 2))
    assert print_module(one) == print_module(same) and kept(one) != kept(other)
    assert len({tuple(ids) for ids in kept(one).values()}) > 1, "layers are drawn apart"


def test_only_the_layers_that_are_named(module: Module) -> None:
    small = pruned(module, PruneExperts("random", keep=0.5, layers="layers.[13].ffn"))
    assert {loc: len(ids) for loc, ids in kept(small).items()} == {SCORED[0]: 4, SCORED[2]: 4}
    left = {"reason": "not named by the option layers"}
    assert notes(small)["skipped"] == [{"layer": HASHED, **left}, {"layer": SCORED[1], **left}]
    assert small.meta["experts"] == E


def test_statistics_of_the_whole_model_serve_after_a_first_pruning(module: Module, tmp_path: Path) -> None:
    bias = tensor(module, f"{SCORED[0]}.gate.bias")
    bias[[0, 3]] = -np.inf
    changed = edited(module, {f"{SCORED[0]}.gate.bias": bias})
    stats = counted(tmp_path / "s.npz", {SCORED[0]: (TOKENS, SALIENCY)})
    small = pruned(changed, PruneExperts(), PruneExperts("saliency", keep=0.5, stats=stats))
    assert kept(small)[SCORED[0]] == [1, 3, 5], "2, 5 and 7 under the numbers the first pruning gave"
    assert notes(small)["earlier"]["strength"] == "unreachable"


def test_lossy_strengths_say_so() -> None:
    effect = PruneExperts("saliency", keep=0.5, stats="s.npz").effect()
    assert effect.changes == ("*",) and "held-out" in effect.measure


def test_notes(module: Module, tmp_path: Path) -> None:
    stats = counted(tmp_path / "s.npz", {SCORED[0]: (TOKENS, SALIENCY)})
    p = PruneExperts("saliency", keep=0.5, stats=stats)
    found = notes(pruned(module, p))
    assert found["strength"] == "saliency" and found["of"] == "the tiny model"
    assert parse_pipeline(found["options"]) == (p,)
    one = found["layers"][1]
    assert one["layer"] == SCORED[0] and one["experts_before"] == E
    assert one["kept"] == [0, 2, 5, 7] and one["dropped"] == [1, 3, 4, 6]
    assert one["scores"] == [1.0, 0.0, 2.0, 0.5, 0.1, 3.0, 0.0, 2.0]
    # packed FP4 with a scale per 32 columns, a BF16 router and an F32 bias
    expert = 2 * 56 * (96 // 2 + 3) + 96 * (56 // 2 + 2)
    assert one["bytes_before"] == E * (expert + 96 * 2 + 4)
    assert one["bytes_after"] == 4 * (expert + 96 * 2 + 4)


# ------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"strength": "salient"}, r"unknown strength 'salient'; allowed: .*\n.*'saliency'"),
        ({"strength": "random", "scope": "model"}, "unknown scope 'model'; allowed: global, layer"),
        ({"strength": "random", "keep": 0.0}, "option keep = 0.0; allowed: more than 0, at most 1"),
        ({"strength": "random", "keep": 1.1}, "option keep = 1.1; allowed: more than 0, at most 1"),
        ({"strength": "random", "keep": float("nan")}, "option keep = nan; allowed: more than 0"),
        ({"strength": "saliency", "keep": 0.5}, "option stats = ''; allowed: a file of calibration statis"),
        ({"strength": "unused"}, "option stats = ''; allowed: a file of calibration statistics"),
        ({"keep": 0.5}, "option keep = 0.5; allowed: vocabulary with strength 'unreachable'"),
        ({"strength": "random", "vocabulary": "x"}, "option vocabulary = 'x'; allowed: keep, scope, seed"),
        ({"strength": "random", "keep": 0.1}, f"1 of 8 experts would remain in {HASHED}; .*: at least 2"),
        ({"strength": "random", "keep": 0.2, "scope": "global"}, "7 of 32 experts would remain .* least 8"),
        ({"strength": "random", "layers": "x"}, f"option layers = 'x'; .*{HASHED}, {SCORED[0]}"),
        ({"strength": "saliency", "stats": "no.npz"}, r"no\.npz: no such file"),
        ({"vocabulary": "no.txt"}, r"no\.txt: cannot be read"),
    ],
)
def test_options_that_do_not_fit(module: Module, options: dict[str, Any], what: str) -> None:
    before = print_module(module)
    with pytest.raises(PassError, match=what):
        run_pipeline(module, (PruneExperts(**options),))
    assert print_module(module) == before, "a refusal changes nothing"


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("3 61", "token id 61; allowed: 0 to 60"),
        ("-1 3", "token id -1; allowed: 0 to 60"),
        ("3, 4", "invalid literal .* '3,'; allowed: token ids apart by white space"),
        ("\n", "holds no token id"),
    ],
)
def test_vocabularies_that_are_none(module: Module, tmp_path: Path, text: str, what: str) -> None:
    (tmp_path / "ids.txt").write_text(text)
    with pytest.raises(PassError, match=f"ids.txt: {what}"):
        pruned(module, PruneExperts(vocabulary=str(tmp_path / "ids.txt")))


def test_statistics_of_another_model(module: Module, tmp_path: Path) -> None:
    usage = ExpertUsage(np.ones(5, np.int64), np.ones(5), np.ones(5))
    path = tmp_path / "other.npz"
    Statistics("elsewhere", 7, 3, {loc: usage for loc in LAYERS}).save(path)
    with pytest.raises(PassError, match=r"5 experts in layers\.0\.ffn of elsewhere, the module has 8"):
        pruned(module, PruneExperts("saliency", stats=str(path)))
    Statistics("elsewhere", 7, 3, {}).save(path)
    with pytest.raises(PassError, match=r"have nothing on layers\.0\.ffn"):
        pruned(module, PruneExperts("saliency", stats=str(path)))


def test_statistics_of_no_text_leave_no_expert(module: Module, tmp_path: Path) -> None:
    stats = counted(tmp_path / "s.npz", {SCORED[2]: ([0] * E, [0.0] * E)})
    with pytest.raises(PassError, match=f"no of 8 experts would remain in {SCORED[2]}"):
        pruned(module, PruneExperts("unused", stats=stats))


def test_only_at_level_model(module: Module) -> None:
    with pytest.raises(PassError, match="prune_experts: does not take level FUSED"):
        run_pipeline(module, parse_pipeline("fuse_swiglu,prune_experts"))


# ------------------------------------------------------------------- layers that are left as they are


def first(module: Module, name: str) -> Op:
    return next(op for op in module.ops if op.name == name)


def after(module: Module, op: Op, make: Callable[[Builder], Any]) -> None:
    """Insert what `make` builds behind `op`; an output keeps it alive."""
    builder = Builder(Module(""))
    made = make(builder)
    at = module.ops.index(op) + 1
    module.ops[at:at] = builder.module.ops
    module.outputs["extra"] = made


def swapped(m: Module) -> None:
    combine = first(m, "combine")
    a, b = combine.operands[2:4]
    combine.set_operand(2, b)
    combine.set_operand(3, a)


def scores_elsewhere(m: Module) -> None:
    scores = first(m, "sqrt_softplus")
    after(m, scores, lambda b: b.op("scale", scores.result, factor=2.0))


def ids_elsewhere(m: Module) -> None:
    topk = first(m, "route_topk")
    after(m, topk, lambda b: b.op("route_weights", topk.operands[0], topk.result, factor=1.0, eps=0.0))


def weights_elsewhere(m: Module) -> None:
    weights = first(m, "route_weights")
    after(m, weights, lambda b: b.op("scale", weights.result, factor=2.0))


def ids_are_an_output(m: Module) -> None:
    m.outputs["ids"] = first(m, "route_topk").result


def an_expert_is_an_output(m: Module) -> None:
    m.outputs["rows"] = first(m, "scale_rows").result


def scaled_scores(m: Module) -> None:
    weights = first(m, "route_weights")
    builder = Builder(Module(""))
    scaled = builder.op("scale", weights.operands[0], factor=2.0)
    m.ops.insert(m.ops.index(weights), builder.module.ops[0])
    weights.set_operand(0, scaled)


REFUSED: dict[str, tuple[Callable[[Module], None], str]] = {
    "scores elsewhere": (scores_elsewhere, "something else reads its scores"),
    "ids are an output": (ids_are_an_output, "its routing is an output"),
    "an expert is an output": (an_expert_is_an_output, "expert 0 makes an output"),
    "experts swapped": (swapped, "the rows of expert 0 reach another place of the combine"),
    "ids elsewhere": (ids_elsewhere, "something else reads its scores"),
    "weights elsewhere": (weights_elsewhere, "something else reads its ids or routing weights"),
    "scaled scores": (scaled_scores, "its scores are not those of a linear router: expected sqrt_softplus"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_layers_that_are_left_alone_say_why(module: Module, case: str) -> None:
    change, reason = REFUSED[case]
    change(module)
    small = pruned(module, PruneExperts("random", keep=0.5))
    skipped = notes(small)["skipped"]
    assert len(skipped) == 1 and skipped[0]["reason"].startswith(reason), skipped
    assert skipped[0]["layer"] not in kept(small) and len(kept(small)) == len(LAYERS) - 1
