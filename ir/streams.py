"""Which values of a model are the residual streams between its layers."""

from __future__ import annotations

from dsv4c.errors import EvalError

from .graph import Module, Value


def stream_values(module: Module) -> dict[str, Value]:
    """Layer -> the value of the residual streams after its last sub-layer.

    A stream is known by its shape, that of what the head reads. Where every layer makes two, one per
    sub-layer, their order says whose they are: a pass may have moved the second into an op of the next layer.
    Else the location of the op does.

    Raises:
        EvalError: no op of the head reads streams.
    """
    heads = [op for op in module.ops if op.loc == "head" and op.operands]
    shape = next((op.operands[0].type.shape for op in heads if op.operands[0].type.rank == 4), None)
    if shape is None:
        raise EvalError("no op of the head reads streams", where=module.name, hint="is this a whole model?")
    streams, last, layers = list[Value](), dict[int, Value](), set[int]()
    for op in module.ops:
        match op.loc.split("."):
            case ["layers", layer, part, *_] if layer.isdigit() and part != "engram":
                layers.add(int(layer))
                made = [v for v in op.results if v.type.shape == shape]
                streams += made
                if made:
                    last[int(layer)] = made[-1]
    if len(streams) == 2 * len(layers):
        last = dict(zip(sorted(layers), streams[1::2], strict=True))
    return {f"layers.{layer}": last[layer] for layer in sorted(last)}
