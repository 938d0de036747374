"""The artifact file: what is written is read back, what is damaged is refused by name."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsv4c.errors import ArtifactError, UsageError
from dsv4c.runtime.container import STORAGE, Artifact, ArtifactWriter, layout, writer
from dsv4c.runtime.container.layout import Header

CODE = bytes(range(256)) * 20
NAN = float("nan")


def sample_arrays() -> dict[str, tuple[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    arrays = {f"t.{d}": (d, (rng.random((3, 5)) * 100).astype(s)) for d, s in STORAGE.items()}
    arrays["t.scalar"] = ("f32", np.array(2.5, "<f4"))
    arrays["t.empty"] = ("bf16", np.zeros((4, 0, 2), "<u2"))
    arrays["t.big"] = ("f32", rng.random((257, 129), dtype=np.float32))
    return arrays


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A small artifact with two sections, tensors of every dtype, and meta."""
    target = tmp_path / "m.dsv4"
    with ArtifactWriter(target) as w:
        w.add_section("code", CODE)
        w.add_section("empty", b"")
        for name, (dtype, array) in sample_arrays().items():
            w.add_tensor(name, dtype, array.shape, [array])
        w.add_section("tokenizer", b"{}")
        w.set_meta("model", {"layers": 3, "ratios": [0, 4], "name": "späße"})
    return target


# ---------------------------------------------------------------- writing and reading back


def test_round_trip(path: Path) -> None:
    a = Artifact.open(path, check="full")
    assert a.path == path
    assert a.meta == {"model": {"layers": 3, "ratios": [0, 4], "name": "späße"}}
    assert list(a.sections) == ["code", "empty", "tokenizer"]
    assert (a.section("code"), a.section("empty"), a.section("tokenizer")) == (CODE, b"", b"{}")
    for name, (dtype, array) in sample_arrays().items():
        found = a.array(name)
        assert (found.dtype, found.shape, a.tensors[name].dtype) == (STORAGE[dtype], array.shape, dtype)
        assert np.array_equal(found, array), name
    assert a.weight_bytes == sum(array.nbytes for _, array in sample_arrays().values())


def test_sections_and_tensors_are_aligned(path: Path) -> None:
    a = Artifact.open(path)
    for name in a.sections:
        offset, size = a.section_span(name)
        assert offset % 4096 == 0
        assert path.read_bytes()[offset : offset + size] == a.section(name)
    assert all(t.offset % 64 == 0 for t in a.tensors.values())
    assert all(a.array(t).ctypes.data % 64 == 0 for t in a.tensors if a.tensors[t].nbytes)
    assert next(iter(a.tensors.values())).offset % 4096 == 0


def test_equal_content_gives_equal_bytes(path: Path, tmp_path: Path) -> None:
    def write(target: Path) -> bytes:
        with ArtifactWriter(target) as w:
            w.add_tensor("a", "i8", (3,), b"abc")
            w.set_meta("k", [1, None])
        return target.read_bytes()

    assert write(tmp_path / "1") == write(tmp_path / "2")


def test_an_artifact_may_be_empty(tmp_path: Path) -> None:
    with ArtifactWriter(tmp_path / "e"):
        pass
    a = Artifact.open(tmp_path / "e", check="full")
    assert (a.meta, a.sections, a.tensors, a.weight_bytes) == ({}, {}, {}, 0)


def test_arrays_are_writable_views_that_never_reach_the_file(path: Path) -> None:
    before = path.read_bytes()
    a = Artifact.open(path)
    view = a.array("t.big")
    assert view.flags.writeable and not view.flags.owndata
    assert np.shares_memory(view, a.array("t.big"))
    assert np.from_dlpack(view)[0, 0] == view[0, 0]
    view[:] = -1
    del a  # the view keeps the map alive
    assert (view == -1).all()
    assert path.read_bytes() == before


@pytest.mark.skipif(sys.platform != "linux", reason="needs sparse files and Linux overcommit")
def test_weights_larger_than_memory_can_be_opened(tmp_path: Path) -> None:
    pages, page = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    rows = 4 * pages * page // 4096  # four times the memory, all of it a hole in the file
    target = tmp_path / "huge"
    entry = layout.TensorEntry("t", "u8", (rows, 4096), 4096, rows * 4096, "")
    manifest = layout.Manifest({}, {}, {"t": entry}).encode()
    with target.open("wb") as f:
        f.write(Header.of(manifest, 4096 + entry.nbytes).pack())
        try:
            f.seek(4096 + entry.nbytes)
            f.write(manifest)
            f.flush()
        except OSError as e:
            pytest.skip(f"no sparse file of this size here: {e}")
    assert Artifact.open(target).array("t")[rows // 2].sum() == 0


def test_chunks_may_be_cut_anywhere(tmp_path: Path) -> None:
    want = np.arange(1000, dtype="<f4").reshape(10, 100)
    raw = want.tobytes()
    cuts = {
        "rows": (row for row in want),
        "one": want,
        "bytes": [raw[:1], b"", raw[1:7], bytearray(raw[7:50]), memoryview(raw)[50:]],
        "strided": [want[:, :].T.copy().T],
        "typed view": [memoryview(want)],
        "raw": raw,
    }
    with ArtifactWriter(tmp_path / "m") as w:
        for name, chunks in cuts.items():
            w.add_tensor(name, "f32", (10, 100), chunks)
    a = Artifact.open(tmp_path / "m", check="full")
    for name in cuts:
        assert np.array_equal(a.array(name), want), name


def test_extension_types_are_taken_as_they_are(tmp_path: Path) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    values = np.array([1.0, -2.5, 0.125])
    with ArtifactWriter(tmp_path / "m") as w:
        w.add_tensor("b", "bf16", (3,), values.astype(ml_dtypes.bfloat16))
        w.add_tensor("f", "f8e4m3", (3,), values.astype(ml_dtypes.float8_e4m3fn))
    a = Artifact.open(tmp_path / "m")
    assert a.array("b").tolist() == [0x3F80, 0xC020, 0x3E00]
    assert a.array("f").tolist() == [0x38, 0xC2, 0x20]


def test_writing_holds_one_chunk_at_a_time(tmp_path: Path) -> None:
    """64 MiB stream through a process that may not grow by more than 24 MiB."""
    script = """
        import resource, sys
        from dsv4c.runtime.container import ArtifactWriter
        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        before = peak()
        with ArtifactWriter(sys.argv[1]) as w:
            w.add_tensor("t", "u8", (64 << 20,), (bytes([i]) * (1 << 20) for i in range(64)))
        print((peak() - before) >> 10)
    """
    run = subprocess.run(_python(script, tmp_path / "m"), capture_output=True, text=True, check=True)
    assert int(run.stdout) < 24
    assert Artifact.open(tmp_path / "m", check="full").array("t")[-1] == 63


def test_verify_reports_progress(path: Path) -> None:
    a, calls = Artifact.open(path), []
    a.verify_tensors(lambda name, done, total: calls.append((name, done, total)))
    assert [name for name, _, _ in calls] == list(a.tensors)
    assert calls[-1][1:] == (a.weight_bytes, a.weight_bytes)


# ---------------------------------------------------------------- whole or not at all


def _python(script: str, *args: object) -> list[str]:
    root = Path(__file__).resolve().parents[1] / ".pkg"
    lines = f"import sys; sys.path.insert(0, {str(root)!r})\n" + textwrap.dedent(script)
    return [sys.executable, "-c", lines, *map(str, args)]


ENDLESS_WRITER = """
    import itertools, sys, time
    from dsv4c.runtime.container import ArtifactWriter
    def chunks():
        for i in itertools.count():
            if i == 8:
                print("half way", flush=True)
                time.sleep(60)
            yield bytes(1 << 20)
    with ArtifactWriter(sys.argv[1]) as w:
        w.add_section("code", b"x" * 100)
        w.add_tensor("t", "u8", (1 << 30,), chunks())
"""


def _no_name_needed(directory: Path) -> bool:
    try:
        os.close(os.open(directory, os.O_TMPFILE | os.O_RDWR))
    except (OSError, AttributeError):
        return False
    return os.path.isdir("/proc/self/fd")


@pytest.mark.parametrize("old", [None, b"the old artifact"])
def test_killed_writer_leaves_nothing(tmp_path: Path, old: bytes | None) -> None:
    if not _no_name_needed(tmp_path):
        pytest.skip("this file system has no nameless files")
    target = tmp_path / "m.dsv4"
    if old is not None:
        target.write_bytes(old)
    with subprocess.Popen(_python(ENDLESS_WRITER, target), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "half way\n"
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert os.listdir(tmp_path) == ([] if old is None else ["m.dsv4"])
    assert old is None or target.read_bytes() == old


@pytest.mark.parametrize("nameless", [True, False])
def test_exception_keeps_the_old_artifact(
    path: Path, nameless: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not nameless:
        monkeypatch.delattr(writer.os, "O_TMPFILE", raising=False)
    before = path.read_bytes()
    with pytest.raises(ZeroDivisionError), ArtifactWriter(path) as w:
        w.add_section("code", b"new")
        assert len(os.listdir(path.parent)) == (1 if nameless and _no_name_needed(path.parent) else 2)
        _ = 1 / 0
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("nameless", [True, False])
def test_old_artifact_is_replaced_only_at_the_end(
    path: Path, nameless: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not nameless:
        monkeypatch.delattr(writer.os, "O_TMPFILE", raising=False)
    opened, before = Artifact.open(path), path.read_bytes()
    with ArtifactWriter(path) as w:
        w.add_section("code", b"new")
        assert path.read_bytes() == before
    assert Artifact.open(path, check="full").section("code") == b"new"
    assert opened.section("code") == CODE  # who has it open keeps the old one
    assert os.listdir(path.parent) == [path.name]


def test_temporary_name_is_removed_when_the_interpreter_ends(tmp_path: Path) -> None:
    script = """
        import os, sys
        del os.O_TMPFILE
        from dsv4c.runtime.container import ArtifactWriter
        w = ArtifactWriter(sys.argv[1]).__enter__()
        assert len(os.listdir(os.path.dirname(sys.argv[1]))) == 1
    """
    subprocess.run(_python(script, tmp_path / "m"), check=True)
    assert os.listdir(tmp_path) == []


def test_file_mode_follows_the_umask(tmp_path: Path) -> None:
    script = """
        import os, sys
        os.umask(0o027)
        from dsv4c.runtime.container import ArtifactWriter
        with ArtifactWriter(sys.argv[1]): pass
    """
    subprocess.run(_python(script, tmp_path / "m"), check=True)
    assert (tmp_path / "m").stat().st_mode & 0o777 == 0o640


def test_a_swallowed_failure_is_not_published(tmp_path: Path) -> None:
    incomplete = pytest.raises(ArtifactError, match="not written, because tensor 't' was left incomplete")
    with incomplete, ArtifactWriter(tmp_path / "m") as w, pytest.raises(ArtifactError, match="got 3 bytes"):
        w.add_tensor("t", "u8", (4,), b"abc")
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "_open_unnamed", lambda *_: (os.open("/dev/full", os.O_RDWR), None))
    full = pytest.raises(ArtifactError, match="m: cannot be written: No space left on device")
    with full, ArtifactWriter(tmp_path / "m") as w:
        w.add_tensor("t", "u8", (4 << 20,), bytes(4 << 20))
    assert os.listdir(tmp_path) == []


# ---------------------------------------------------------------- misuse of the writer


def _tensor(dtype: str, shape: Any, data: Any) -> Callable[[ArtifactWriter], None]:
    return lambda w: w.add_tensor("t", dtype, shape, data)


def _twice(method: str, *args: Any) -> Callable[[ArtifactWriter], object]:
    return lambda w: [getattr(w, method)(*args) for _ in range(2)]


MISUSE: dict[str, tuple[Callable[[ArtifactWriter], object], str]] = {
    "section twice": (_twice("add_section", "s", b""), "section name 's' is used twice"),
    "tensor twice": (_twice("add_tensor", "t", "u8", (0,), b""), "tensor name 't' is used twice"),
    "no name": (lambda w: w.add_section("", b""), "'' cannot name a section; allowed: non-empty printable"),
    "control": (lambda w: w.add_tensor("a\n", "u8", (0,), b""), r"'a\\n' cannot name a tensor"),
    "dtype": (_tensor("f64", (1,), b"12345678"), "'t' has unknown dtype 'f64'; allowed: f32, f16"),
    "shape": (_tensor("u8", (-1,), b""), r"'t' has shape \(-1,\); allowed: a tuple of integers >= 0"),
    "shape of bool": (_tensor("u8", (True,), b"x"), r"'t' has shape \(True,\)"),
    "short": (_tensor("f32", (2,), [b"1234"]), "'t' got 4 bytes, its dtype and shape need 8"),
    "endless": (_tensor("u8", (2,), iter(lambda: b"1", 0)), "'t' got at least 3 bytes, its .* need 2"),
    "array type": (_tensor("f32", (1,), np.zeros(1, "<i4")), "f32 got an array of int32; allowed: float32"),
    "endianness": (_tensor("f32", (1,), np.zeros(1, ">f4")), "f32 got an array of >f4"),
    "meta NaN": (lambda w: w.set_meta("k", {"a": NAN}), "meta 'k' cannot be stored as JSON"),
    "meta type": (lambda w: w.set_meta("k", {1, 2}), "meta 'k' cannot be stored as JSON: .*set"),
}


@pytest.mark.parametrize("case", MISUSE)
def test_misuse_is_refused(tmp_path: Path, case: str) -> None:
    act, message = MISUSE[case]
    with pytest.raises(ArtifactError, match=message) as e, ArtifactWriter(tmp_path / "m") as w:
        act(w)
    assert str(tmp_path / "m") in str(e.value)
    assert os.listdir(tmp_path) == []


def test_meta_is_a_snapshot(tmp_path: Path) -> None:
    layers = [1]
    with ArtifactWriter(tmp_path / "m") as w:
        w.set_meta("layers", layers)
        layers.append(2)
    assert Artifact.open(tmp_path / "m").meta == {"layers": [1]}


def test_writer_must_be_open(tmp_path: Path) -> None:
    w = ArtifactWriter(tmp_path / "m")
    with pytest.raises(ArtifactError, match=r"not open\n  hint: use it as a context manager"):
        w.add_section("s", b"")
    with w:
        pass
    with pytest.raises(ArtifactError, match="not open"):
        w.add_tensor("t", "u8", (0,), b"")


def test_source_errors_pass_through(tmp_path: Path) -> None:
    """An unreadable checkpoint is not to be reported as an unwritable artifact."""

    def chunks() -> Any:
        yield b"1"
        raise FileNotFoundError("shard 3")

    with pytest.raises(FileNotFoundError, match="shard 3"), ArtifactWriter(tmp_path / "m") as w:
        w.add_tensor("t", "u8", (2,), chunks())


def test_unwritable_targets(tmp_path: Path) -> None:
    def refuse(target: Path, message: str) -> None:
        with pytest.raises(ArtifactError, match=message), ArtifactWriter(target):
            pytest.fail("opened")

    refuse(tmp_path, "the output is a directory")
    refuse(tmp_path / "no" / "m", r"output directory does not exist\n  hint: mkdir -p .*no")
    refuse(Path("/dev/null"), "the output is not a regular file")
    refuse(Path("/proc/m"), "cannot be written: ")


# ---------------------------------------------------------------- misuse of the reader


def test_unknown_names_list_the_known_ones(path: Path) -> None:
    a = Artifact.open(path)
    with pytest.raises(ArtifactError, match=r"unknown section 'cod'; allowed: code, empty, .*\n.*'code'\?"):
        a.section("cod")
    with pytest.raises(ArtifactError, match="unknown section 'x'"):
        a.section_span("x")
    known = len(sample_arrays())
    with pytest.raises(ArtifactError, match=rf"unknown tensor 't.bf8'; allowed: {known} names, e.g. t.bf16"):
        a.array("t.bf8")


def test_unreadable_paths(tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(target: Path, message: str) -> None:
        with pytest.raises(ArtifactError, match=message):
            Artifact.open(target)

    refuse(tmp_path / "none", "none: cannot be read: No such file or directory")
    refuse(tmp_path, "this is a directory; allowed: an artifact file")
    refuse(path / "x", "cannot be read: Not a directory")
    os.mkfifo(tmp_path / "pipe")
    refuse(tmp_path / "pipe", "not a regular file")

    def deny(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", deny)  # chmod does not stop root
    refuse(path, "cannot be read: Permission denied")


def test_unknown_check(path: Path) -> None:
    with pytest.raises(UsageError, match="unknown check 'none'; allowed: code, full"):
        Artifact.open(path, check="none")  # type: ignore[arg-type]


def test_one_artifact_serves_many_threads(path: Path) -> None:
    a, sums = Artifact.open(path), []
    threads = [threading.Thread(target=lambda: sums.append(a.array("t.big").sum())) for _ in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(set(sums)) == 1 and len(sums) == 8
