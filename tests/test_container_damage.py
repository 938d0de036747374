"""A damaged artifact is refused, and the message names the damaged part."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsv4c.errors import ArtifactError
from dsv4c.runtime.container import Artifact, ArtifactWriter
from dsv4c.runtime.container.layout import Header

Break = Callable[[Path], object]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Three sections around four tensors; t.big is larger than a page."""
    target, rng = tmp_path / "m.dsv4", np.random.default_rng(0)
    with ArtifactWriter(target) as w:
        w.add_section("code", bytes(range(256)) * 20)
        w.add_section("empty", b"")
        w.add_tensor("t.f32", "f32", (3, 5), rng.random((3, 5), dtype=np.float32))
        w.add_tensor("t.f16", "f16", (3, 5), rng.random((3, 5)).astype("<f2"))
        w.add_tensor("t.bf16", "bf16", (7,), np.arange(7, dtype="<u2"))
        w.add_tensor("t.big", "f32", (64, 129), rng.random((64, 129), dtype=np.float32))
        w.add_section("tokenizer", b"{}")
        w.set_meta("layers", 3)
    return target


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes the manifest and makes all checksums right again: damage only a sanity check can find."""
    data = path.read_bytes()
    offset = Header.unpack(data[:64], len(data), "").offset
    tree = json.loads(data[offset:])
    tree = change(tree) or tree
    raw = tree if isinstance(tree, bytes) else json.dumps(tree).encode()
    path.write_bytes(Header.of(raw, offset).pack() + data[64:offset] + raw)


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x40
    path.write_bytes(data)


def _write(data: bytes) -> Break:
    return lambda path: path.write_bytes(data)


def _cut(size: int) -> Break:
    return lambda path: os.truncate(path, size if size >= 0 else path.stat().st_size + size)


def _flip_at(at: int) -> Break:
    return lambda path: flip(path, at)


def _flip_in(find: Callable[[Artifact], int]) -> Break:
    return lambda path: flip(path, find(Artifact.open(path)))


def _manifest(raw: bytes) -> Break:
    return lambda path: edit(path, lambda _: raw)


def _entry(target: str, /, **values: object) -> Break:
    """Overwrites fields of one entry; a value may be a function of the whole manifest."""

    def change(tree: dict[str, Any]) -> None:
        row = next(row for row in tree["sections"] + tree["tensors"] if row["name"] == target)
        row.update({k: v(tree) if callable(v) else v for k, v in values.items()})

    return lambda path: edit(path, change)


def _offset(name: str) -> Callable[[dict[str, Any]], int]:
    return lambda tree: next(t["offset"] for t in tree["tensors"] + tree["sections"] if t["name"] == name)


def _version(number: int) -> Break:
    def change(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[8:12] = struct.pack("<I", number)
        path.write_bytes(data)

    return change


def _lose_tensor(path: Path) -> None:
    edit(path, lambda tree: tree["tensors"].clear())


def _f32(**values: object) -> Break:
    return _entry("t.f32", **values)


NOT_ONE = "this is not a dsv4c artifact"
BAD_HEADER = "the header does not match its checksum: the file is damaged"

BROKEN: dict[str, tuple[Break, str]] = {
    "empty file": (_write(b""), "truncated at 0 bytes: the file is empty"),
    "text": (_write(b"{}" * 999), rf"{NOT_ONE}\n  hint: artifacts are made by: dsv4c compile"),
    "two letters": (_write(b"PK"), NOT_ONE),
    "another format": (_write(b"\x08\x07\x12" + bytes(200)), NOT_ONE),
    "copy not finished": (_write(bytes(9999)), NOT_ONE),
    "newlines translated": (lambda p: p.write_bytes(p.read_bytes().replace(b"\r\n", b"\n")), NOT_ONE),
    "cut in the magic": (_cut(5), "truncated at 5 bytes, inside the header"),
    "cut in the header": (_cut(63), "truncated at 63 bytes, inside the header"),
    "cut after the header": (_cut(64), r"truncated at 64 bytes of \d+"),
    "cut in the code": (_cut(5000), r"truncated at 5000 bytes of \d+"),
    "cut in the weights": (_cut(20000), r"truncated at 20000 bytes of \d+"),
    "cut in the manifest": (_cut(-1), r"truncated at \d+ bytes of \d+\n  hint: copy it again"),
    "appended": (lambda p: p.write_bytes(p.read_bytes() + b"!!"), "2 bytes follow the artifact's end at"),
    "version 99": (_version(99), r"version 99 is newer .*; allowed: up to 1\n  hint: update dsv4c"),
    "version 0": (_version(0), BAD_HEADER),
    "flip magic": (_flip_at(2), NOT_ONE),
    "flip header checksum": (_flip_at(13), BAD_HEADER),
    "flip manifest offset": (_flip_at(18), BAD_HEADER),
    "flip manifest length": (_flip_at(25), BAD_HEADER),
    "flip manifest checksum": (_flip_at(40), BAD_HEADER),
    "flip manifest": (_flip_at(-10), "the manifest does not match its checksum"),
    "flip code": (_flip_in(lambda a: a.section_span("code")[0] + 77), "section 'code' does not match its"),
    "flip tokenizer": (_flip_in(lambda a: a.section_span("tokenizer")[0]), "section 'tokenizer' does not"),
    "not JSON": (_manifest(b"{oops"), "the manifest is not JSON: Expecting"),
    "deep JSON": (_manifest(b"[" * 10**6), "the manifest is not JSON"),
    "not UTF-8": (_manifest(b"\xff\xfe\xfd"), "the manifest is not JSON"),
    "a list": (_manifest(b"[]"), "the manifest is incomplete; allowed: meta, sections, tensors"),
    "no tensors": (_manifest(b'{"meta":{},"sections":[]}'), "the manifest is incomplete"),
    "entry is text": (lambda p: edit(p, lambda t: t["sections"].append("x")), "malformed entry: x"),
    "extra field": (_f32(colour=1), "malformed entry: .*t.f32"),
    "shape is a number": (_f32(shape=3), "malformed entry: .*t.f32"),
    "name is a number": (_f32(name=3), "entry of tensor 3 is malformed: name"),
    "name twice": (_f32(name="t.f16"), "the manifest lists tensor 't.f16' twice"),
    "unknown dtype": (_f32(dtype="f4"), "tensor 't.f32' is malformed: unknown dtype 'f4'"),
    "dtype is a list": (_f32(dtype=[]), r"tensor 't.f32' is malformed: unknown dtype \[\]"),
    "shape of floats": (_f32(shape=[3.0, 5]), r"tensor 't.f32' is malformed: shape \(3.0, 5\)"),
    "wrong size": (_f32(shape=[3, 6]), "'t.f32' is malformed: 60 bytes where dtype and shape need 72"),
    "negative offset": (_f32(offset=-64), "tensor 't.f32' is malformed: offset -64"),
    "unaligned": (_f32(offset=4097), "tensor 't.f32' is malformed: offset 4097 is not aligned"),
    "unaligned section": (_entry("code", offset=64), "section 'code' is malformed: offset 64 is not"),
    "far beyond": (_f32(offset=1 << 60), "tensor 't.f32' lies outside the file's body"),
    "over the manifest": (_entry("tokenizer", nbytes=999), "section 'tokenizer' lies outside the file's"),
    "over the header": (_entry("empty", offset=0), "section 'empty' lies outside the file's body"),
    "over a tensor": (_entry("t.f16", offset=_offset("t.f32")), "tensor 't.f32' overlaps tensor 't.f16'"),
    "over the code": (_f32(offset=_offset("code")), "section 'code' overlaps tensor 't.f32'"),
    "tensors lost": (_lose_tensor, r"\d+ bytes at \d+ belong to no entry"),
}

# Damage in the weights and in padding: only a full check reads these bytes.
BROKEN_DEEP: dict[str, tuple[Break, str]] = {
    "weight": (_flip_in(lambda a: a.tensors["t.bf16"].offset + 3), "tensor 't.bf16' does not match its"),
    "last weight": (_flip_in(lambda a: a.tensors["t.big"].offset + 64 * 129 * 4 - 1), "tensor 't.big' does"),
    "header padding": (_flip_at(100), "padding at byte 64 is not zero"),
    "padding": (_flip_in(lambda a: sum(a.section_span("code")) + 1), r"padding at byte \d+ is not zero"),
}


@pytest.mark.parametrize("check", ["code", "full"])
@pytest.mark.parametrize("case", BROKEN)
def test_damage_is_named(path: Path, case: str, check: Any) -> None:
    act, message = BROKEN[case]
    act(path)
    with pytest.raises(ArtifactError, match=message) as e:
        Artifact.open(path, check=check)
    assert e.value.where == str(path)


@pytest.mark.parametrize("case", BROKEN_DEEP)
def test_damage_in_the_weights_is_named(path: Path, case: str) -> None:
    act, message = BROKEN_DEEP[case]
    act(path)
    Artifact.open(path, check="code")
    with pytest.raises(ArtifactError, match=message):
        Artifact.open(path, check="full")


def test_no_flipped_byte_escapes_the_full_check(tmp_path: Path) -> None:
    target = tmp_path / "m"
    with ArtifactWriter(target) as w:
        w.add_section("code", b"abc")
        w.add_tensor("t", "u8", (5,), b"hello")
        w.set_meta("k", 1)
    good = target.read_bytes()
    for at in [*range(80), *range(4090, 4110), *range(8190, 8210), *range(8250, len(good))]:
        flip(target, at)
        with pytest.raises(ArtifactError):
            Artifact.open(target, check="full")
        target.write_bytes(good)
    Artifact.open(target, check="full")


def test_no_length_passes_for_the_whole(path: Path) -> None:
    good = path.read_bytes()
    for size in {*range(0, 70), *range(70, len(good), 997)}:
        path.write_bytes(good[:size])
        with pytest.raises(ArtifactError, match=f"truncated at {size} bytes"):
            Artifact.open(path)


def test_verify_tensors_names_the_first_bad_one(path: Path) -> None:
    a = Artifact.open(path)
    spans = [a.tensors[name].offset for name in ("t.f32", "t.big")]
    for at in spans:
        flip(path, at)
    with pytest.raises(ArtifactError, match=r"tensor 't.f32' does not .*\n  hint: copy it again"):
        Artifact.open(path).verify_tensors()
