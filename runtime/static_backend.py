"""Runs artifacts of fixed shapes through ONNX Runtime: which program takes which tokens, how states go in.

The very models that a device would be given run here, nodes of a vendor by the meaning they carry.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from dsv4c.errors import ArtifactError, SessionError
from dsv4c.runtime.container import Artifact
from dsv4c.runtime.engram.host import HostOps
from dsv4c.runtime.images.rows import ImageFeed, ImageRows, no_images
from dsv4c.runtime.undo import Undo

from .onnx_backend import Provider, append_entries, check_sizes, open_session, run_model

Arr = npt.NDArray[Any]


class Program(Protocol):
    """A prepared program: some layers, one number of tokens."""

    def run(self, outputs: Sequence[str], feeds: dict[str, Arr]) -> list[Arr]:
        """The named outputs, fresh arrays; feeds that the program lacks are ignored.

        Raises:
            SessionError: it refuses a value.
        """
        ...


Opener = Callable[[dict[str, Any], Sequence[str]], Program]
"""(facts of a program in meta["onnx"]["static"], tensors inside to show as outputs) -> the program."""


class OnnxProgram:
    """A program in ONNX Runtime on this machine's processor, or by the provider of a device."""

    def __init__(
        self, artifact: Artifact, threads: int | None, section: str, probes: Sequence[str],
        provider: Provider | None = None,
    ) -> None:  # fmt: skip
        self._session = open_session(artifact, threads, section, probes, provider)

    def run(self, outputs: Sequence[str], feeds: dict[str, Arr]) -> list[Arr]:
        return run_model(self._session, outputs, feeds)


def provider_opener(artifact: Artifact) -> Opener:
    """Programs by the provider of ONNX Runtime that the artifact was made for, on its device.

    Raises:
        ArtifactError: another program than ONNX Runtime reads its models.
    """
    found = artifact.meta["onnx"]["static"].get("provider")
    if not found:
        raise ArtifactError("was made for no provider of ONNX Runtime", where=str(artifact.path))
    provider = str(found[0]), {str(k): str(v) for k, v in found[1].items()}
    return lambda facts, probes: OnnxProgram(artifact, None, f"onnx.{facts['name']}", probes, provider)


class StaticBackend:
    """Runs steps by programs of fixed shapes, each opened when first needed.

    A step of more tokens than the largest program holds runs as several.

    Args:
        probe: show the residual streams of every layer in `probes`.
        opener: who runs the programs; ONNX Runtime by default.

    Attributes:
        batch, context: the sizes the artifact was compiled for.
        probes: layer -> its residual streams [B,T,n,d] of the last step, where it was opened with `probe`.

    Raises:
        ToolchainError: onnxruntime is not installed.
        ArtifactError: the artifact holds no such programs, or ONNX Runtime refuses one.
    """

    undo: Undo | None = None

    def __init__(
        self,
        artifact: Artifact,
        threads: int | None = None,
        probe: bool = False,
        opener: Opener | None = None,
    ) -> None:
        static = artifact.meta["onnx"]["static"]
        self.batch, self.context = int(static["batch"]), int(static["context"])
        self.probes: dict[str, Arr] = {}
        self._probe = probe
        self._open = opener or (
            lambda facts, probes: OnnxProgram(artifact, threads, f"onnx.{facts['name']}", probes)
        )
        self._states: dict[str, dict[str, Any]] = artifact.meta["onnx"]["states"]
        self._buckets: list[dict[str, Any]] = static["buckets"]
        self._programs: dict[str, Program] = {}
        self._host, model = HostOps(artifact), artifact.meta.get("model", {})
        self._width = int(model.get("hidden_size", 0))
        self._image_token = int(model.get("vision", {}).get("placeholder", -1))

    def step(
        self, tokens: Arr, n_valid: Arr, rows: Arr, state: dict[str, Arr], images: ImageRows | None = None
    ) -> npt.NDArray[np.float32]:
        """One step, as `OnnxBackend.step`; the batch must be the artifact's."""
        check_sizes(tokens, n_valid)
        if len(tokens) != self.batch:
            raise SessionError(f"a step of {len(tokens)} rows", allowed=f"{self.batch}, as compiled")
        need = int((state["pos"].astype(np.int64) + n_valid).max())
        if need > self.context:
            raise SessionError(f"{need} positions are needed", allowed=f"at most {self.context}, as compiled")
        logits, probes, feed = [], [], self._feed(images, tokens, n_valid)
        for start, bucket in _cut(tokens.shape[1], self._buckets):
            part = tokens[:, start : start + bucket["tokens"]]
            valid = np.clip(n_valid - start, 0, part.shape[1]).astype(np.int32)
            result, seen = self._run(bucket, part, valid, state, feed)
            logits.append(result[:, : part.shape[1]])
            probes.append({name: value[:, : part.shape[1]] for name, value in seen.items()})
        self.probes = {name: np.concatenate([p[name] for p in probes], axis=1) for name in probes[0]}
        return np.take_along_axis(np.concatenate(logits, axis=1), rows[..., None].astype(np.int64), axis=1)

    def call_part(self, part: str, inputs: Sequence[Arr]) -> dict[str, Arr]:
        """Programs of fixed shapes are those of the text model alone.

        Raises:
            SessionError: always; says what to do instead.
        """
        raise SessionError(
            f"has no program {part!r} of fixed shapes", where="StaticBackend", allowed="steps",
            hint="run it from an artifact for cpu, and give its rows to the steps as images",
        )  # fmt: skip

    def _feed(self, images: ImageRows | None, tokens: Arr, n_valid: Arr) -> ImageFeed | None:
        """Hands the rows of a step out to the programs it runs through."""
        if images is None:
            return None
        given = [rows[:count] for rows, count in zip(images.rows, images.counts, strict=True)]
        return ImageFeed(given, tokens, n_valid, self._image_token, self._width)

    def _run(
        self, bucket: dict[str, Any], part: Arr, valid: Arr, state: dict[str, Arr], feed: ImageFeed | None
    ) -> tuple[Arr, dict[str, Arr]]:
        """Logits of every token of a program, padding included, and its probes; `state` is updated."""
        count = bucket["tokens"]
        padded = np.zeros((self.batch, count), np.int32)
        padded[:, : part.shape[1]] = part
        every = np.broadcast_to(np.arange(count, dtype=np.int32), padded.shape)
        feeds = {"tokens": padded, "n_valid": valid, "rows": np.ascontiguousarray(every)}
        fed, kept = self._host.run(padded, valid, state)
        feeds |= fed
        if self._image_token >= 0:
            given = feed.take(part, valid) if feed else no_images(self.batch, self._width)
            feeds |= {"images": _room(given.rows, count), "n_images": given.counts}
        for name, value in state.items():
            feeds[name] = value if value.size else np.zeros((len(value), 1, *value.shape[2:]), value.dtype)
        found, probes = self._through(bucket["programs"], feeds)
        before = state["pos"].astype(np.int64)
        for name, how in self._states.items():
            result = found[how["output"]]
            if "ratio" in how:
                append_entries(state[name], result, before // how["ratio"], (before + valid) // how["ratio"])
            else:
                np.copyto(state[name], result)
        for name, after in kept.items():
            np.copyto(state[name], after)
        return found["logits"], probes

    def _through(
        self, programs: Sequence[dict[str, Any]], feeds: dict[str, Arr]
    ) -> tuple[dict[str, Arr], dict[str, Arr]]:
        """Outputs and probes of the stages, one after the other; states change only when all have run."""
        found: dict[str, Arr] = {}
        seen: dict[str, Arr] = {}
        for facts in programs:
            names = [name for name, _, _ in facts["border"]["outputs"]]
            probes = facts["probes"] if self._probe else {}
            results = self._program(facts).run([*names, *probes.values()], feeds)
            found.update(zip(names, results, strict=False))
            seen.update(zip(probes, results[len(names) :], strict=True))
            feeds |= {f"{name}.in": value for name, value in found.items()}
        return found, seen

    def _program(self, facts: dict[str, Any]) -> Program:
        name = str(facts["name"])
        if name not in self._programs:
            self._programs[name] = self._open(facts, list(facts["probes"].values()) if self._probe else [])
        return self._programs[name]


def _room(rows: Arr, count: int) -> Arr:
    """Image rows [B,I,d] with zeros behind them, [B,count,d]."""
    out = np.zeros((len(rows), count, rows.shape[2]), np.float32)
    out[:, : rows.shape[1]] = rows
    return out


def _cut(count: int, buckets: Sequence[dict[str, Any]]) -> list[tuple[int, dict[str, Any]]]:
    """(first token, program) of each part: the largest while they fill, then the smallest for the rest."""
    out, start, largest = [], 0, buckets[-1]
    while count - start > largest["tokens"]:
        out.append((start, largest))
        start += largest["tokens"]
    return [*out, (start, next(b for b in buckets if b["tokens"] >= count - start))]
