"""Random arguments and weights that fit any graph, for judging passes by evaluation.

What an integer argument may hold is read off the operands it feeds: a token id is bounded by the tables it
indexes, a count of real tokens by the tokens there are. Knows no pass and no particular model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

import numpy as np

from .dims import Dim
from .dtypes import Array, DType, f32_to_bf16
from .graph import Module, Op, Value

Rng = np.random.Generator
SIZES = {"B": 2, "T": 9, "L": 2, "ctx": 64}
"""What a symbol stands for unless the caller says otherwise; any other symbol is `OTHER`."""
OTHER = 3


def symbols(module: Module) -> list[str]:
    """The symbols in the types of the arguments, in order of appearance."""
    found: dict[str, None] = {}
    for value in module.arguments().values():
        for dim in value.type.shape:
            if isinstance(dim, Dim):
                found |= dict.fromkeys(dim.symbols())
    return list(found)


def sample_sizes(module: Module, sizes: Mapping[str, int] | None = None) -> dict[str, int]:
    """A number for every symbol of the arguments."""
    chosen = {**SIZES, **(sizes or {})}
    return {name: chosen.get(name, OTHER) for name in symbols(module)}


def sample_inputs(
    module: Module, sizes: Mapping[str, int], rng: Rng, vocabulary: Sequence[int] | None = None
) -> dict[str, Array]:
    """One value for every input; states are left to `Evaluator.fresh_state`.

    Args:
        sizes: symbol -> number.
        vocabulary: the token ids to draw from; None is every id the graph's tables hold.
    """
    out: dict[str, Array] = {}
    longest = sizes.get("T") or max((s for n, s in sizes.items() if n not in ("B", "ctx")), default=1)
    for name, value in module.inputs.items():
        shape = value.type.concrete(sizes)
        if value.type.dtype.is_float:
            out[name] = rng.standard_normal(shape).astype(np.float32)
        elif value.type.dtype is DType.BOOL:
            out[name] = rng.random(shape) < 0.5
        else:
            out[name] = _integers(value, name, shape, longest, rng, vocabulary).astype(np.int32)
    if "rows" in out and "n_valid" in out:  # rows of padding are unspecified
        out["rows"] = np.minimum(out["rows"], np.maximum(out["n_valid"][:, None] - 1, 0)).astype(np.int32)
    return out


def roles(value: Value) -> set[str]:
    """The operand names under which ops read `value`."""
    found = set()
    for op, index in value.uses:
        operands = op.definition.operands
        found.add(operands[min(index, len(operands) - 1)].rstrip("?*"))
    return found


def _integers(
    value: Value, name: str, shape: tuple[int, ...], longest: int, rng: Rng, vocabulary: Sequence[int] | None
) -> Array:
    read_as = roles(value) | {name}
    if "n_valid" in read_as:
        counts = rng.integers(1, longest + 1, shape)
        counts.reshape(-1)[:1] = longest
        return counts
    if "tokens" in read_as:
        return rng.choice(vocabulary if vocabulary is not None else token_count(value), shape)
    if "pos" in read_as:
        return np.zeros(shape, np.int64)
    if "rows" in read_as:
        return rng.integers(0, longest, shape)
    if "ids" in read_as:  # distinct along the last axis
        bound = max(shape[-1], min((n for op in value.users() if (n := expert_count(op))), default=4))
        return np.argsort(rng.random((*shape[:-1], bound)), axis=-1)[..., : shape[-1]]
    return rng.integers(0, 3, shape)


def token_count(tokens: Value) -> int:
    """The smallest table that the token ids index; 16 when none does."""
    sizes = []
    for op, index in tokens.uses:
        names = op.definition.operands
        indexed = index + 1 < len(op.operands) and names[index + 1] in ("table", "map")
        table = op.operands[index + 1].producer if indexed else None
        if table is not None and table.weight is not None:
            sizes.append(table.weight.shape[0])
    return min(sizes, default=16)


def expert_count(op: Op) -> int:
    """How many experts the ids an op reads or gives choose among; 0 where it does not say."""
    if op.name == "dispatch":
        return int(op.attrs["experts"])  # type: ignore[arg-type]
    if op.name == "add_route":
        return int(op.attrs["expert"])  # type: ignore[arg-type]
    if op.name in ("route_weights", "route_topk"):
        count = op.operands[0].type.shape[-1]
    elif op.name == "expert_mlp":
        count = op.operands[4].type.shape[0]
    else:
        return 0
    return count if isinstance(count, int) else 0


class RandomStore:
    """Made-up bytes for every source of a graph that was read from text; the same for the same seed.

    Codes are never NaN, scales lie near one, and the rows of integer tables are distinct ids of experts.
    """

    def __init__(self, module: Module, seed: int = 0) -> None:
        self.seed = seed
        self._sources = {
            str(s.attr("name")): s for op in module.weights() if op.weight for s in op.weight.sources()
        }
        self._bounds = _table_bounds(module)

    def read(self, name: str) -> Array:
        x = self._sources[name]
        rng = np.random.default_rng([self.seed, *name.encode()])
        match x.dtype:
            case DType.F32 | DType.F16:
                numbers: Array = 0.5 * rng.standard_normal(x.shape)
                return numbers.astype(x.dtype.storage)
            case DType.BF16:
                return f32_to_bf16((0.5 * rng.standard_normal(x.shape)).astype(np.float32))
            case DType.F8E8M0:
                return rng.integers(122, 128, x.shape).astype(np.uint8)
            case DType.F8E4M3 | DType.F8E4M3FNUZ:  # magnitudes up to 30 in either reading, no NaN
                codes: Array = rng.integers(1, 0x5F, x.shape) | rng.choice([0, 0x80], x.shape)
                return codes.astype(np.uint8)
            case DType.I32 | DType.I64:
                bound = max(self._bounds.get(name, 4), x.shape[-1])
                order = np.argsort(rng.random((prod(x.shape[:-1]), bound)), axis=-1)
                return order[:, : x.shape[-1]].reshape(x.shape).astype(x.dtype.storage)
            case _:
                return rng.integers(-127, 128, x.shape).astype(np.int8).view(x.dtype.storage)


def _table_bounds(module: Module) -> dict[str, int]:
    """Source of a hash table -> how many experts its ids choose among."""
    out: dict[str, int] = {}
    for op in module.ops:
        if op.name != "route_hash" or op.operands[1].producer is None:
            continue
        counts = [n for user in op.result.users() if (n := expert_count(user))]
        expr = op.operands[1].producer.weight
        for leaf in expr.sources() if expr else ():
            out[str(leaf.attr("name"))] = min(counts, default=4)
    return out
