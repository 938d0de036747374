"""A session: one artifact, one batch of sequences, their state, and text generation over it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dsv4c.errors import SessionError, UsageError

from . import buffers, snapshot
from .archs import select
from .backends import Backend, Logits, Resident, dimension, load_backend
from .container import Artifact
from .engram.options import TableOptions
from .images import ImagePlan, ImageRules, expand, load_patches
from .images.load import Source as ImageSource
from .images.rows import ImageFeed
from .images.tower import tower_inputs
from .replay import exact_tokens, run_encoder
from .sampling import Sampler, SamplingParams

DEFAULT_CONTEXT = 4096
DEFAULT_CHUNK = 256
"""Prompt tokens per step: enough to reuse weights over many rows, few enough to bound temporaries."""


class Session:
    """A loaded artifact with its state.

    Args:
        path: an artifact file, or an open `Artifact`.
        batch: sequences run side by side.
        context: positions to make room for; up to the checkpoint's maximum. None is the smaller of that
            and 4096.
        threads: worker threads; None takes every core.
        tables: how looked-up tables are read; None keeps what the artifact says.
        backend: who executes steps; None is what the artifact's format says.
        arch: which code to take where the artifact has some for several processors; "" is the best that
            this machine has.

    Attributes:
        artifact: the opened artifact, with the code that was taken.

    Raises:
        ArtifactError: the file is damaged or does not fit this machine.
        UsageError: batch or context out of range.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | Artifact,
        batch: int = 1,
        context: int | None = None,
        threads: int | None = None,
        tables: TableOptions | None = None,
        backend: Backend | None = None,
        arch: str = "",
    ) -> None:
        self.artifact = select(path if isinstance(path, Artifact) else Artifact.open(path), arch)
        self.model: dict[str, Any] = self.artifact.meta["model"]
        longest = int(self.model["max_positions"])
        if batch < 1:
            raise UsageError(f"batch = {batch}", where="Session", allowed="1 or more")
        if context is not None and not 1 <= context <= longest:
            raise UsageError(f"context = {context}", where="Session", allowed=f"1 to {longest}")
        fixed = self.artifact.meta.get("onnx", {}).get("static")
        if fixed and (batch != fixed["batch"] or (context or 1) > fixed["context"]):
            raise UsageError(
                f"batch = {batch}, context = {context}", where="Session",
                allowed=f"a batch of {fixed['batch']}, a context of {fixed['context']} at most, as compiled",
                hint="compile with bind_shapes{batch=..., context=...} for others",
            )  # fmt: skip
        standard = fixed["context"] if fixed else min(longest, DEFAULT_CONTEXT)
        self.batch, self.context = batch, context or standard
        self._room = fixed["context"] if fixed else self.context
        self.backend = backend or load_backend(self.artifact, threads, tables)
        self.state = self._fresh()

    def _fresh(self) -> dict[str, npt.NDArray[Any]]:
        sizes = {"B": self.batch, "ctx": self._room}
        return {
            name: buffers.zeros(tuple(dimension(d, sizes) for d in s["shape"]), np.dtype(s["dtype"]))
            for name, s in self.artifact.meta["step"]["states"].items()
        }

    @property
    def position(self) -> npt.NDArray[np.int32]:
        """[batch] tokens seen so far."""
        return np.array(self.state["pos"])

    @property
    def state_bytes(self) -> int:
        """Bytes of state at full context."""
        return sum(a.nbytes for a in self.state.values())

    # ------------------------------------------------------------------------- stepping

    def step(
        self,
        tokens: npt.ArrayLike,
        n_valid: npt.ArrayLike | None = None,
        images: Sequence[npt.ArrayLike] | None = None,
    ) -> Logits:
        """Feed tokens and get the logits after each.

        Args:
            tokens: integers [B,T], or [T] when batch is 1.
            n_valid: [B] how many tokens of each row are real; None takes all.
            images: per sequence float32 [n,d], the embeddings of its image tokens, see `encode_image`.

        Returns:
            float32 [B,T,vocab]; rows of padding are unspecified.

        Raises:
            SessionError: wrong shape, ids outside the vocabulary, no room left in the context, or images
                that are not one row for every image token.
        """
        ids, valid = self._inputs(tokens, n_valid, "step")
        rows = np.ascontiguousarray(np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape))
        feed = self._feed(images, ids, valid)
        return self.backend.step(ids, valid, rows, self.state, *([feed.take(ids, valid)] if feed else []))

    def _feed(
        self, images: Sequence[npt.ArrayLike] | None, ids: npt.NDArray[np.int32], valid: npt.NDArray[np.int32]
    ) -> ImageFeed | None:
        """What steps over these tokens take as images; None for text alone."""
        vision = self.model.get("vision")
        if vision is None:
            if images is not None:
                raise SessionError("the model takes no images", where="images", allowed="text")
            return None
        token, width = int(vision["placeholder"]), int(self.model["hidden_size"])
        if images is None:
            real = np.arange(ids.shape[1]) < valid[:, None]
            count = int((real & (ids == token)).sum())
            if count:
                raise SessionError(
                    f"{count} tokens are of images (id {token}), and no images are given", where="images",
                    hint="give the images: Session.with_images, or dsv4c run --image",
                )  # fmt: skip
            return None
        return ImageFeed(images, ids, valid, token, width)

    def table_statistics(self) -> dict[str, dict[str, Any]]:
        """Looked-up table -> its tier and counts since the session was opened; see `TableStatistics`."""
        tables = getattr(self.backend, "tables", None)
        stores = tables.stores if tables is not None else {}
        return {
            name: {"tier": s.tier, **asdict(s.statistics), "hit_rate": s.statistics.hit_rate}
            for name, s in stores.items()
        }

    @property
    def image_token(self) -> int:
        """The id of image positions; a prompt holds one where an image belongs.

        Raises:
            SessionError: the artifact takes no images.
        """
        self._check_encodes_images()
        return int(self.model["vision"]["placeholder"])

    def _check_encodes_images(self) -> None:
        """SessionError where no program of the artifact makes rows of an image."""
        if "vision" not in self.artifact.meta.get("parts", []):
            if "vision" in self.model:
                raise SessionError(
                    "the artifact takes rows of images but encodes none", where=str(self.artifact.path),
                    hint="encode_image of an artifact for cpu makes the rows; give them to steps as images",
                )  # fmt: skip
            raise SessionError(
                "the artifact takes no images", where=str(self.artifact.path),
                hint="compile a model with a vision tower",
            )  # fmt: skip

    def with_images(
        self, ids: Sequence[int], images: Sequence[ImageSource]
    ) -> tuple[list[int], list[npt.NDArray[np.float32]]]:
        """A prompt with one image token per image -> ids with room for them, and `images` for `prefill`.

        Raises:
            SessionError: the artifact takes no images.
            UsageError, ToolchainError: an image cannot be read, or there is not one token for each.
        """
        token = self.image_token
        encoded = [self.encode_image(image) for image in images]
        expanded = expand(ids, token, [sizes for sizes, _ in encoded])
        width = int(self.model["hidden_size"])
        rows = [np.zeros((0, width), np.float32), *(rows for _, rows in encoded)]
        return expanded.tokens.tolist(), [np.concatenate(rows)]

    def encode_image(self, image: ImageSource) -> tuple[ImagePlan, npt.NDArray[np.float32]]:
        """An image through the vision tower: how it is cut up, and its rows float32 [span,d].

        Raises:
            SessionError: the artifact takes no images.
            UsageError, ToolchainError: the image cannot be read; Pillow is missing.
        """
        self._check_encodes_images()
        loaded = load_patches(image, ImageRules.from_meta(self.model["vision"]))
        rows = self.backend.call_part("vision", tower_inputs(loaded, int(self.model["vision"]["downsample"])))
        return loaded.plan, rows["rows"][0]

    def _inputs(
        self, tokens: npt.ArrayLike, n_valid: npt.ArrayLike | None, where: str
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        try:
            ids = np.asarray(tokens)
        except ValueError:  # rows of different lengths
            ids = np.empty(0, object)
        ids = ids[None] if ids.ndim == 1 and self.batch == 1 else ids
        if ids.ndim != 2 or ids.shape[0] != self.batch or not ids.shape[1] or ids.dtype.kind not in "iu":
            raise SessionError(
                f"tokens are {ids.dtype}{list(ids.shape)}",
                where=where,
                allowed=f"integers [{self.batch}, T], T >= 1",
            )
        valid = np.full(self.batch, ids.shape[1]) if n_valid is None else np.asarray(n_valid)
        counts = valid.shape == (self.batch,) and valid.dtype.kind in "iu"
        if not counts or valid.min() < 0 or valid.max() > ids.shape[1]:
            raise SessionError(
                f"n_valid = {valid.tolist()}", where=where, allowed=f"[{self.batch}] of 0..{ids.shape[1]}"
            )
        real = np.arange(ids.shape[1]) < valid[:, None]
        vocab = int(self.model["vocab_size"])
        if real.any() and (ids[real].min() < 0 or ids[real].max() >= vocab):
            raise SessionError("a token id is outside the vocabulary", where=where, allowed=f"0..{vocab - 1}")
        need = int((self.position + valid).max())
        if need > self.context:
            raise SessionError(
                f"the context is full: {need} positions are needed",
                where=where,
                allowed=f"at most {self.context}",
                hint=f"open the session with a larger context, up to {self.model['max_positions']}",
            )
        return np.where(real, ids, 0).astype(np.int32), valid.astype(np.int32)

    def prefill(
        self,
        prompts: Sequence[Sequence[int]],
        chunk: int = DEFAULT_CHUNK,
        progress: Callable[[int, int], None] | None = None,
        images: Sequence[npt.ArrayLike] | None = None,
        replay: int | None = None,
    ) -> Logits:
        """Feed prompts of any lengths in chunks; returns each one's last logits, float32 [B,vocab].

        `images` are, per prompt, the embeddings float32 [n,d] of its image tokens. With `replay` the decoder
        layers see only so many tokens at the end, see `replay.exact_tokens`; DeepSeek-V4.1 only.

        A prompt that does not fit is refused before any of it is fed.
        """
        if chunk < 1:
            raise UsageError(f"chunk = {chunk}", where="prefill", allowed="1 or more")
        ids, lengths = self._prompts(prompts, "prefill")
        feed = self._feed(images, ids, lengths)
        last = np.zeros((self.batch, int(self.model["vocab_size"])), np.float32)
        if replay is not None:
            exact_tokens(self.artifact)  # refuses an artifact that cannot
        with self.backend.undo.guard(self.state, lengths) if self.backend.undo else nullcontext():
            if replay is not None:
                ids, lengths = run_encoder(
                    self.backend, self.state, ids, lengths, replay, chunk, feed, progress
                )
            longest = ids.shape[1]
            for start in range(0, longest, chunk):
                part = np.ascontiguousarray(ids[:, start : start + chunk])
                valid = np.clip(lengths - start, 0, part.shape[1]).astype(np.int32)
                rows = np.maximum(valid - 1, 0)[:, None].astype(np.int32)
                more = [feed.take(part, valid)] if feed else []
                logits = self.backend.step(part, valid, rows, self.state, *more)[:, 0]
                ends = (start < lengths) & (lengths <= start + chunk)
                last[ends] = logits[ends]
                if progress:
                    progress(min(start + chunk, longest), longest)
        return last

    def _prompts(
        self, prompts: Sequence[Sequence[int]], where: str
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """Prompts padded to one length, and their lengths; checked as a whole."""
        lengths = [len(p) for p in prompts]
        if len(prompts) != self.batch or not all(lengths):
            raise SessionError(
                f"{len(prompts)} prompts of lengths {lengths}",
                where=where,
                allowed=f"{self.batch} prompts of at least one token",
            )
        longest = max(lengths)
        return self._inputs([[*p, *[0] * (longest - len(p))] for p in prompts], lengths, where)

    # ----------------------------------------------------------------------- generation

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        params: SamplingParams | None = None,
        chunk: int = DEFAULT_CHUNK,
        images: Sequence[npt.ArrayLike] | None = None,
        replay: int | None = None,
    ) -> Iterator[list[int | None]]:
        """Feed the prompts, then yield the next token of every row; None for rows that have stopped.

        A stop token is yielded, then its row ends. Stop tokens are the checkpoint's end-of-sequence ids
        and `params.stop_ids`.
        """
        if max_new_tokens < 0:
            raise UsageError(f"max_new_tokens = {max_new_tokens}", where="generate", allowed="0 or more")
        params = params or SamplingParams()
        room = self.context - int((self.position + self._prompts(prompts, "generate")[1]).max())
        if max_new_tokens > room + 1:
            raise SessionError(
                f"{max_new_tokens} new tokens do not fit the context",
                where="generate",
                allowed=f"at most {max(room + 1, 0)}",
                hint="open the session with a larger context",
            )
        sampler, stops = Sampler(params), {*self.model["eos"], *params.stop_ids}
        alive, logits = np.ones(self.batch, bool), self.prefill(prompts, chunk, None, images, replay)
        for count in range(max_new_tokens):
            picked = sampler.pick(logits)
            yield [int(t) if ok else None for t, ok in zip(picked, alive, strict=True)]
            alive &= ~np.isin(picked, list(stops))
            if not alive.any() or count + 1 == max_new_tokens:
                return
            valid = alive.astype(np.int32)
            rows = np.zeros((self.batch, 1), np.int32)
            logits = self.backend.step(picked.astype(np.int32)[:, None], valid, rows, self.state)[:, 0]
            logits[~alive] = 0  # unspecified: the sampler must not trip over a row that has ended

    def generate(
        self,
        ids: Sequence[int] | Sequence[Sequence[int]],
        max_new_tokens: int,
        params: SamplingParams | None = None,
        chunk: int = DEFAULT_CHUNK,
        images: Sequence[npt.ArrayLike] | None = None,
        replay: int | None = None,
    ) -> list[Any]:
        """The new tokens: a list for one prompt of ids, a list of lists for a list of prompts.

        Greedy unless `params` says otherwise. The session keeps its state, so a further call continues.
        """
        single = len(ids) > 0 and isinstance(ids[0], int | np.integer)
        prompts: Any = [ids] if single else ids
        out: list[list[int]] = [[] for _ in prompts]
        for picked in self.stream(prompts, max_new_tokens, params, chunk, images, replay):
            for row, token in zip(out, picked, strict=True):
                if token is not None:
                    row.append(token)
        return out[0] if single else out

    # ------------------------------------------------------------------------- state

    def reset(self) -> None:
        """Forget everything; the session is as new."""
        self.bring_state()
        for array in self.state.values():
            array[...] = 0

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state to a file that an equal artifact can load."""
        self.bring_state()
        snapshot.save(Path(path), self.state, self._identity())

    def load(self, path: str | os.PathLike[str]) -> None:
        """Take the state from a file written by `save`.

        Raises:
            SessionError: not a saved session, or of another model, batch or context.
        """
        self.bring_state()
        for name, array in snapshot.load(Path(path), self.state, self._identity()).items():
            self.state[name][...] = array

    def fork(self) -> Session:
        """A second session at the same point; weights and code are shared, state is copied."""
        self.bring_state()
        twin = object.__new__(Session)
        twin.__dict__.update(self.__dict__)
        twin.state = self._fresh()
        for name, array in self.state.items():
            twin.state[name][...] = array
        return twin

    def bring_state(self) -> None:
        """Have the state in its arrays, wherever the backend keeps it between steps."""
        if isinstance(self.backend, Resident):
            self.backend.bring()

    def _identity(self) -> dict[str, Any]:
        return {"model": self.artifact.meta["identity"], "batch": self.batch, "context": self.context}
