"""Runs the "onnx" section of an artifact: how states go in and come back, not what they mean.

The model's weights are external data in the artifact file, which ONNX Runtime maps: nothing is copied. The
model carries marks where the file's name and the offsets belong; they are overwritten here, at equal length,
so that an artifact may be renamed and no protobuf library is needed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dsv4c.errors import ArtifactError, SessionError, ToolchainError
from dsv4c.runtime.container import Artifact
from dsv4c.runtime.engram.host import HostOps
from dsv4c.runtime.images.rows import ImageRows, no_images
from dsv4c.runtime.undo import Undo

Arr = npt.NDArray[Any]
Positions = npt.NDArray[np.int64]
Provider = tuple[str, dict[str, str]]
"""An execution provider of ONNX Runtime, and its options."""

_STANDARD, _FUNCTIONS = b"ai.onnx", b"cpu.fns"
"""A node that a vendor knows in the standard domain, by its written name, is none of ONNX: for ONNX Runtime
the domain is renamed to one whose functions the model brings along. Both names are of one length."""

_LATER = b"cpu.ops"
"""A domain without nodes, whose version is that of the standard nodes here: a file for a consumer that stops
at an older one may hold element types that ONNX has only since. It is renamed to the standard domain."""

_CONTRIB, _BODIES = b"com.microsoft", b"cpu.functions"
"""A node of ONNX Runtime's own that its provider for a device has, and the processor may not: the domain is
renamed to one that only the functions of the model are in. Both names are of one length."""

_OFFSET_MARK = re.compile(rb"(?=@offset:(\d+)@)[@offset:\d]{20}")
"""Stands for the offset of a tensor, by its index in meta["onnx"]["tensors"]."""


class OnnxBackend:
    """One ONNX Runtime session over an opened artifact.

    Args:
        threads: threads of the session; None lets ONNX Runtime take every core.

    Raises:
        ToolchainError: onnxruntime is not installed.
        ArtifactError: the artifact holds no ONNX model, or ONNX Runtime refuses it.
    """

    undo: Undo | None = None
    """A step that has begun reads no files, so none can fail in its middle."""

    def __init__(self, artifact: Artifact, threads: int | None = None) -> None:
        self._artifact, self._threads = artifact, threads
        self._session = open_session(artifact, threads)
        self._inputs = {i.name: i.shape for i in self._session.get_inputs()}
        self._parts: dict[str, Any] = {}
        self._states: dict[str, dict[str, Any]] = artifact.meta["onnx"]["states"]
        self._outputs = ["logits", *(s["output"] for s in self._states.values())]
        self._host = HostOps(artifact)

    def step(
        self, tokens: Arr, n_valid: Arr, rows: Arr, state: dict[str, Arr], images: ImageRows | None = None
    ) -> npt.NDArray[np.float32]:
        """One step; `state` is updated in place.

        Args:
            tokens: i32 [B,T]; what stands beyond `n_valid` must still be token ids of the vocabulary.
            n_valid: i32 [B], 0 .. T.
            rows: i32 [B,L], tokens whose logits are wanted, 0 .. T-1.
            state: every state of the artifact, as its "step" meta data declares them.
            images: the rows of this call's image tokens; without them such tokens take their row of the
                embedding.

        Returns:
            f32 [B,L,vocab].

        Raises:
            SessionError: the sizes do not fit, the context is full, or ONNX Runtime refuses a value; the
                state is then as it was.
        """
        check_sizes(tokens, n_valid)
        before = state["pos"].astype(np.int64)
        after = before + n_valid
        feeds = {"tokens": tokens, "n_valid": n_valid, "rows": rows}
        feeds = {name: np.ascontiguousarray(a, np.int32) for name, a in feeds.items()}
        fed, kept = self._host.run(feeds["tokens"], feeds["n_valid"], state)
        feeds |= fed
        if "images" in self._inputs:
            given = images or no_images(len(tokens), int(self._inputs["images"][2]))
            feeds |= {"images": given.rows, "n_images": given.counts}
        for name, how in self._states.items():
            if "ratio" in how:
                feeds[name] = _fed(name, state[name], before, after, how)
            else:
                feeds[name] = np.ascontiguousarray(state[name])
        logits, *results = run_model(self._session, self._outputs, feeds)
        for (name, how), result in zip(self._states.items(), results, strict=True):
            if "ratio" in how:
                append_entries(state[name], result, before // how["ratio"], after // how["ratio"])
            else:
                np.copyto(state[name], result)
        for name, after_ in kept.items():
            np.copyto(state[name], after_)
        return np.asarray(logits, np.float32)

    def call_part(self, part: str, inputs: Sequence[Arr]) -> dict[str, Arr]:
        """The results by name of another program of the artifact; it is opened when first called."""
        facts = self._artifact.meta["onnx"]["parts"][part]
        if part not in self._parts:
            self._parts[part] = open_session(self._artifact, self._threads, f"onnx.part.{part}")
        feeds = dict(zip(facts["inputs"], inputs, strict=True))
        return dict(zip(facts["outputs"], run_model(self._parts[part], facts["outputs"], feeds), strict=True))


def run_model(session: Any, outputs: Sequence[str], feeds: dict[str, Arr]) -> list[Any]:
    """The outputs of one run of an opened session.

    Raises:
        SessionError: ONNX Runtime refuses a value.
    """
    known = {i.name for i in session.get_inputs()}
    try:
        found: list[Any] = session.run(outputs, {name: a for name, a in feeds.items() if name in known})
    except Exception as error:  # onnxruntime has an exception type per status, with no public base
        raise SessionError(f"ONNX Runtime refuses the step: {error}") from error
    return found


def check_sizes(tokens: Arr, n_valid: Arr) -> None:
    """A step has rows and tokens, and no row more valid ones than there are."""
    batch, count = tokens.shape
    if batch == 0 or count == 0:
        raise SessionError(f"a step of {batch} rows of {count} tokens", allowed="at least one of each")
    if n_valid.shape != (batch,) or n_valid.min() < 0 or n_valid.max() > count:
        raise SessionError(f"n_valid is {n_valid.tolist()}", allowed=f"{batch} numbers of 0 .. {count}")


def _fed(name: str, entries: Arr, before: Positions, after: Positions, how: dict[str, Any]) -> Arr:
    """What the model sees of entries [B,capacity,D]: [B,U,D], U at least 1, if possible without a copy.

    The used part of a batch is not contiguous. Where the model reads only the rows it picks, all of the
    capacity goes in at no cost; where it reads everything, copying the used part costs less than the reading.
    """
    if int(after.max()) // how["ratio"] > entries.shape[1]:
        raise SessionError("the context is full", where=name, allowed=f"{entries.shape[1]} entries")
    used = max(1, int(before.max()) // how["ratio"])
    if entries.shape[1] == 0:
        return np.zeros((entries.shape[0], 1, entries.shape[2]), entries.dtype)
    if how["read"] == "some":
        return np.ascontiguousarray(entries if len(entries) > 1 else entries[:, :used])
    return np.ascontiguousarray(entries[:, :used])


def append_entries(entries: Arr, new: Arr, first: Positions, last: Positions) -> None:
    """Row b's entries first[b] .. last[b]-1 are the first rows of new[b]."""
    for b, (start, stop) in enumerate(zip(first, last, strict=True)):
        entries[b, start:stop] = new[b, : stop - start]


def open_session(
    artifact: Artifact, threads: int | None, section: str = "onnx", probes: Sequence[str] = (),
    provider: Provider | None = None,
) -> Any:  # fmt: skip
    """An `onnxruntime.InferenceSession` over a model of the artifact; see `OnnxBackend`.

    Args:
        section: where the model lies in the artifact.
        probes: FLOAT tensors inside the model that become outputs.
        provider: who executes the model, as it is shipped; None is the processor, by the meaning of nodes.
    """
    ort = _onnxruntime()
    if provider and provider[0] not in ort.get_available_providers():
        raise ToolchainError(
            f"this ONNX Runtime has no {provider[0]}", allowed=", ".join(ort.get_available_providers()),
            hint="dsv4c targets --check names the wheel; it takes the place of onnxruntime",
        )  # fmt: skip
    if "onnx" not in artifact.meta:
        raise ArtifactError("holds no ONNX model", where=str(artifact.path))
    path = Path(os.path.realpath(artifact.path))  # ONNX Runtime follows no link out of its directory
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.enable_mem_pattern = False  # plans are cached per input shape, and shapes grow with the text
    if threads is not None:
        options.intra_op_num_threads = threads
    for key, value in {
        "session.disable_prepacking": "1",  # a packed copy of every weight would double the memory
        "session.model_external_initializers_file_folder_path": str(path.parent),
    }.items():
        options.add_session_config_entry(key, value)
    model = placed_model(artifact, path.name, section)
    model = (model if provider else _for_processor(artifact, model)) + _more_outputs(probes)
    # Where sizes are fixed they are folded already; what is left are weights, which must not be copied.
    static = "static" in artifact.meta["onnx"]
    disabled = ["ConstantFolding"] if static else []
    try:
        return ort.InferenceSession(
            model, options, providers=[provider or "CPUExecutionProvider"], disabled_optimizers=disabled
        )
    except Exception as error:  # onnxruntime has an exception type per status, with no public base
        raise ArtifactError(f"ONNX Runtime refuses the model: {error}", where=str(path)) from error


def _for_processor(artifact: Artifact, model: bytes) -> bytes:
    """A model made for another consumer as the processor runs it: by the meaning that its nodes carry."""
    if "static" in artifact.meta["onnx"]:
        model = model.replace(_CONTRIB, _BODIES)
    return model.replace(_STANDARD, _FUNCTIONS).replace(_LATER, _STANDARD)


def _more_outputs(names: Sequence[str]) -> bytes:
    """Appended to a model, these bytes make tensors inside it outputs.

    Protocol buffers merge a field that stands twice: this is a second `graph` with nothing but `output`
    entries of type FLOAT.
    """
    entries = b"".join(
        _field(12, _field(1, name.encode()) + _field(2, _field(1, b"\x08\x01"))) for name in names
    )
    return _field(7, entries) if names else b""


def _field(number: int, payload: bytes) -> bytes:
    """A length-delimited field of a protocol buffer."""
    size, length = len(payload), bytearray()
    while size >= 128:
        length.append(size & 127 | 128)
        size >>= 7
    return bytes([number << 3 | 2, *length, size]) + payload


def placed_model(artifact: Artifact, file_name: str, section: str = "onnx") -> bytes:
    """An ONNX model with a name of the artifact's file and the offsets of its tensors filled in.

    Raises:
        ArtifactError: the file's name is too long.
    """
    mark, name = artifact.meta["onnx"]["location"].encode(), os.fsencode(file_name)
    room = len(mark) - len(b"./")
    if len(name) > room:
        raise ArtifactError("the file's name is too long", where=str(artifact.path), allowed=f"{room} bytes")
    location = b".".ljust(len(mark) - len(name), b"/") + name  # repeated slashes count as one
    names = artifact.meta["onnx"]["tensors"]

    def offset(mark: re.Match[bytes]) -> bytes:
        return str(artifact.tensors[names[int(mark[1])]].offset).rjust(20, "0").encode()

    return _OFFSET_MARK.sub(offset, artifact.section(section)).replace(mark, location)


def _onnxruntime() -> Any:
    """The module; imported late, so that the runtime works without it."""
    try:
        import onnxruntime
    except ImportError as error:
        raise ToolchainError(
            "this artifact runs on ONNX Runtime, which is not installed", hint="pip install onnxruntime"
        ) from error
    return onnxruntime
