"""Zeros in artifacts: whole pages become holes, and every byte reads back as if it had been written."""

from __future__ import annotations

import hashlib
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from support import Arr

from dsv4c.errors import ArtifactError
from dsv4c.runtime.container import Artifact, ArtifactWriter, holes, writer
from dsv4c.runtime.container.holes import PAGE, spans

RNG = np.random.default_rng(3)


def random_bytes(size: int) -> Arr:
    """Never zero, so that every zero in a test is one it has put there."""
    return RNG.integers(1, 256, size).astype(np.uint8)


def knows_holes(folder: Path) -> bool:
    with (folder / "probe").open("wb") as file:
        file.truncate(1 << 20)
    return (folder / "probe").stat().st_blocks * 512 < 1 << 20


@pytest.mark.parametrize("offset", [0, 1, PAGE - 1, PAGE, PAGE + 64])
@pytest.mark.parametrize("size", [0, 1, PAGE - 1, PAGE, PAGE + 1, 5 * PAGE + 7])
def test_holes_are_the_whole_zero_pages(offset: int, size: int) -> None:
    """Against a page-by-page definition, with pages of zeros, of ones, and with a single byte in them."""
    for _ in range(20):
        file = np.zeros(-(-(offset + size) // PAGE) * PAGE, np.uint8)
        for page in range(len(file) // PAGE):
            kind = RNG.integers(4)
            at = {0: slice(0, 0), 1: slice(0, PAGE), 2: slice(PAGE - 1, PAGE), 3: slice(0, 1)}[int(kind)]
            file[page * PAGE : (page + 1) * PAGE][at] = 1
        data = file[offset : offset + size].tobytes()
        found, at = list(spans(data, offset)), offset
        assert b"".join(part for _, part in found) == data
        zero = set()
        for hole, part in found:
            if hole:
                assert at % PAGE == 0 and len(part) % PAGE == 0 and len(part) and not any(part)
                zero |= set(range(at // PAGE, (at + len(part)) // PAGE))
            at += len(part)
        first, last = -(-offset // PAGE), (offset + size) // PAGE
        assert zero == {p for p in range(first, last) if not file[p * PAGE : (p + 1) * PAGE].any()}
        assert all(a != b for (a, _), (b, _) in pairwise(found)), "runs are whole"


def arrays() -> dict[str, Arr]:
    """Zeros at the start, inside, at the end, across chunks and alone; sizes that end inside a page."""
    mixed = random_bytes(40 * PAGE + 13)
    mixed[3 * PAGE : 17 * PAGE + 100] = 0
    mixed[20 * PAGE + 1 : 22 * PAGE] = 0
    tail = random_bytes(9 * PAGE)
    tail[2 * PAGE :] = 0
    return {
        "zeros": np.zeros(64 * PAGE + 5, np.uint8), "mixed": mixed, "tail": tail,
        "head": tail[::-1].copy(), "one": np.eye(1, 30 * PAGE, 11 * PAGE, dtype=np.uint8)[0],
        "short": np.zeros(77, np.uint8), "last": np.zeros(32 * PAGE, np.uint8),
    }  # fmt: skip


@pytest.mark.parametrize("named", [False, True], ids=["nameless", "named"])
@pytest.mark.parametrize("piece", [1 << 30, 5 * PAGE + 3, 1000])
def test_zeros_read_back_and_take_no_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: bool, piece: int
) -> None:
    if named:
        monkeypatch.delattr(writer.os, "O_TMPFILE", raising=False)
    made, target = arrays(), tmp_path / "m.dsv4"
    with ArtifactWriter(target) as out:
        out.add_section("zeros", bytes(3 * PAGE))
        for name, array in made.items():
            chunks = [array[at : at + piece] for at in range(0, len(array), piece)]
            out.add_tensor(name, "u8", array.shape, chunks)
    artifact = Artifact.open(target, check="full")
    assert artifact.section("zeros") == bytes(3 * PAGE)
    for name, array in made.items():
        assert np.array_equal(artifact.array(name), array), name
        assert artifact.tensors[name].sha256 == hashlib.sha256(array).hexdigest()
    if piece > PAGE and knows_holes(tmp_path):
        data = sum(int(array.any()) * array.nbytes for array in made.values())
        assert target.stat().st_blocks * 512 < data < target.stat().st_size / 1.5


def test_the_bytes_do_not_depend_on_holes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(target: Path) -> bytes:
        with ArtifactWriter(target) as out:
            for name, array in made.items():
                out.add_tensor(name, "u8", array.shape, array)
        return target.read_bytes()

    made = arrays()
    sparse = write(tmp_path / "sparse")
    monkeypatch.setattr(writer, "spans", lambda data, _: [(False, data)])
    assert write(tmp_path / "dense") == sparse


def test_an_artifact_that_is_replaced_shows_nothing_through_its_holes(tmp_path: Path) -> None:
    target = tmp_path / "m.dsv4"
    for fill in (1, 0):
        with ArtifactWriter(target) as out:
            out.add_tensor("t", "u8", (50 * PAGE,), np.full(50 * PAGE, fill, np.uint8))
    assert not Artifact.open(target, check="full").array("t").any()


@pytest.mark.parametrize("size", [64, 40 * PAGE])
def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """After the first failure come a hole and more data; the file must not appear, whatever lands in it."""

    def failing(data: bytes | memoryview, offset: int) -> list[tuple[bool, memoryview]]:
        if any(data):
            raise OSError(28, "No space left on device")
        return list(holes.spans(data, offset))

    target = tmp_path / "m.dsv4"
    with pytest.raises(ArtifactError, match="No space left"), ArtifactWriter(target) as out:
        monkeypatch.setattr(writer, "spans", failing)
        with pytest.raises(ArtifactError, match="No space left"):
            out.add_tensor("a", "u8", (size,), random_bytes(size))
        out.add_tensor("b", "u8", (20 * PAGE,), np.zeros(20 * PAGE, np.uint8))
        out.add_tensor("c", "u8", (size,), random_bytes(size))
    assert list(tmp_path.iterdir()) == []
