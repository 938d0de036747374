"""Prefill in two halves: the encoder layers over a whole prompt, all layers over its end (V4.1, section 5).

Decoder layers own no compressed entries, so only their windows miss what they have not seen. A token's logits
are exact once its windows, and the windows of all they are made of, were run: `exact_tokens` before it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from dsv4c.errors import SessionError, UsageError

from .backends import Backend
from .container import Artifact
from .images.rows import ImageFeed

Ints = npt.NDArray[np.int32]
START = "replay.start"
"""The state with the first position that decoder layers have seen."""


def exact_tokens(artifact: Artifact) -> int:
    """From how many replayed tokens on the last one's logits, and all that follow, are exact.

    Raises:
        SessionError: the artifact has no encoder half.
    """
    model = artifact.meta["model"]
    if "encoder" not in artifact.meta.get("parts", []):
        raise SessionError(
            "the artifact cannot prefill in two halves", where=str(artifact.path),
            allowed="DeepSeek-V4.1, format tvm, compiled with allow_replay", hint="use --prefill full",
        )  # fmt: skip
    first = int(model["encoder_layers"])
    window = int(artifact.meta["step"]["states"][f"layers.{first}.window"]["shape"][1])
    return (int(model["layers"]) - first) * (window - 1) + 1


def run_encoder(
    backend: Backend, state: dict[str, npt.NDArray[Any]], ids: Ints, lengths: Ints, replay: int, chunk: int,
    feed: ImageFeed | None, progress: Callable[[int, int], None] | None,
) -> tuple[Ints, Ints]:  # fmt: skip
    """Feed all but the last `replay` tokens of every row to the encoder layers.

    Args:
        ids, lengths: the prompts, int32 [B,T] and [B].

    Returns:
        What is left of them, as `ids` and `lengths`.
    """
    if replay < 1:
        raise UsageError(f"replay = {replay}", where="prefill", allowed="1 or more tokens")
    early = np.maximum(lengths - replay, 0).astype(np.int32)
    if not early.any():
        return ids, lengths
    for start in range(0, int(early.max()), chunk):
        part = np.ascontiguousarray(ids[:, start : min(start + chunk, int(early.max()))])
        valid = np.clip(early - start, 0, part.shape[1]).astype(np.int32)
        images = feed.take(part, valid) if feed else None
        _encode(backend)(part, valid, state, images)
        if progress:
            progress(min(start + chunk, int(early.max())), ids.shape[1])
    state[START][early > 0] = state["pos"][early > 0]
    rest = (lengths - early).astype(np.int32)
    left = np.zeros((len(ids), int(rest.max())), np.int32)
    for row, (tokens, skip, count) in enumerate(zip(ids, early, rest, strict=True)):
        left[row, :count] = tokens[skip : skip + count]
    return left, rest


def _encode(backend: Backend) -> Callable[..., None]:
    """The backend's encoder half."""
    found: Callable[..., None] | None = getattr(backend, "encode", None)
    if found is None:
        raise SessionError("this backend cannot prefill in two halves", allowed="format tvm")
    return found


def parse_prefill(text: str, artifact: Artifact) -> int | None:
    """`full`, `replay` or `replay=N` -> None, or how many tokens to replay; without N as many as are exact.

    Raises:
        UsageError: another word or number.
        SessionError: see `exact_tokens`.
    """
    if text == "full":
        return None
    word, equals, number = text.partition("=")
    if word != "replay" or (equals and not (number.isascii() and number.isdigit() and int(number) > 0)):
        raise UsageError(f"--prefill {text}", allowed="full, replay, or replay=N with N of 1 or more")
    exact = exact_tokens(artifact)
    return int(number) if equals else exact


def describe(replay: int | None, artifact: Artifact, prompt: int) -> str:
    """What a prefill leaves out, in words."""
    if replay is None or replay >= prompt:
        return "every layer over every token"
    exact = exact_tokens(artifact)
    how = "exact" if replay >= exact else f"approximate, exact from {exact} tokens on"
    return f"decoder layers over the last {replay} of {prompt} tokens: {how}"
