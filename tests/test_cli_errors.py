"""The command line when something is wrong: bad command lines, missing packages, signals and closed pipes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_cli import CONFIGS, ROOT, Built, Call, built, dsv4c

__all__ = ["built", "dsv4c"]  # fixtures: pytest finds them by name

# ------------------------------------------------------------------------------ bad command lines

COMPILE = "compile {checkpoint} --target cpu"
RUN = "run {artifact} --ids 1,2"
CALIBRATE = "calibrate {checkpoint} -o {new}"

BAD = [
    ("", "no command"),
    ("comple x", "unknown command 'comple'; allowed: bench, calibrate"),
    ("comple x", "did you mean 'compile'?"),
    ("--verbose", "unrecognized arguments: --verbose"),
    ("run", "the following arguments are required: FILE"),
    ("run {artifact}", "one of the arguments --prompt --ids --prompt-file is required"),
    (RUN + " --prompt x", "not allowed with argument"),
    ("run {missing} --ids 1", "cannot be read: No such file"),
    ("run {directory} --ids 1", "this is a directory"),
    ("run {config} --ids 1", "this is not a dsv4c artifact"),
    ("run {artifact} --ids 1,x", "'1,x' is not a list of token ids like 1,2,3"),
    ("run {artifact} --ids ,", "is not a list of token ids"),
    ("run {artifact} --ids 61", "a token id is outside the vocabulary; allowed: 0..60"),
    ("run {bare} --prompt x", "carries no tokenizer"),
    ("run {artifact} --prompt-file {missing}", "no such file"),
    ("run {artifact} --prompt-file {artifact}", "is not UTF-8 text"),
    ("run {artifact} --prompt-file {empty}", "the prompt is empty"),
    ("run {artifact} --prompt \udcff", "the text is not UTF-8"),
    (RUN + " --max-new-tokens -1", "'-1' is not an integer of at least 0"),
    (RUN + " --max-new-tokens 600", "600 new tokens do not fit the context"),
    (RUN + " --context 513", "context = 513; allowed: 1 to 512"),
    (
        RUN + " --context 4 --max-new-tokens 3 --save-session {new}",
        "allowed: at most 2 when the session is saved",
    ),
    (RUN + " --threads 0", "'0' is not an integer of at least 1"),
    (RUN + " --chunk 0", "'0' is not an integer of at least 1"),
    (RUN + " --temperature hot", "'hot' is not a number"),
    (RUN + " --temperature -1", "temperature is -1.0; allowed: a finite number >= 0"),
    (RUN + " --temperature nan", "temperature is nan"),
    (RUN + " --top-p 0", "top_p is 0.0; allowed: a number > 0 and <= 1"),
    (RUN + " --top-k 1.5", "'1.5' is not an integer"),
    (RUN + " --stop x", "--stop needs text; allowed: --prompt or --prompt-file"),
    (RUN + " --temp 1", "unrecognized arguments: --temp"),
    (RUN + " --load-session {config}", "is not a saved session"),
    (RUN + " --load-session {missing}", "is not a saved session"),
    (RUN + " --save-session {missing}/s.npz", "the directory of the session to save does not exist"),
    (RUN + " --save-session {directory}", "the session to save is a directory"),
    (COMPILE, "the following arguments are required: -o/--output"),
    ("compile {checkpoint} -o {new}", "the following arguments are required: --target"),
    (COMPILE + "q -o {new}", "unknown target 'cpuq'; allowed: ascend, cpu, cuda, mlu, rocm"),
    (COMPILE + ":x86-64-v9 -o {new}", "unknown arch 'x86-64-v9'"),
    (COMPILE + " -o {new} --format tv", "unknown format 'tv'; allowed: onnx, tvm"),
    (COMPILE + " -o {new} --numerics fast", "numerics 'fast'; allowed: exact"),
    (COMPILE + " -o {new} --passes fuse_swigl", "did you mean 'fuse_swiglu'?"),
    (COMPILE + " -o {new} --passes narrow_weights{{size=1}}", "unknown option 'size'; allowed: storage"),
    (COMPILE + " -o {new} --dump-ir {artifact}", "is not a directory"),
    (COMPILE + " -o {directory}", "the output is a directory"),
    (COMPILE + " -o {missing}/m.dsv4", "the output directory does not exist"),
    (COMPILE + " -o /proc/m.dsv4", "cannot be written"),
    ("compile {missing} --target cpu -o {new}", "config.json: no such file"),
    ("compile {config_only} --target cpu -o {new}", "safetensors"),
    ("inspect {missing}", "no such file or directory"),
    ("inspect {directory}", "config.json: no such file"),
    ("inspect {config}", "this is not a dsv4c artifact"),
    ("inspect {artifact} --context 513", "context = 513; allowed: 1 to 512"),
    ("verify {bare}", "has no golden vectors"),
    ("verify {missing}", "cannot be read"),
    ("bench {artifact}", "576 positions do not fit the model; allowed: at most 512"),
    ("bench {artifact} --repeat 0", "'0' is not an integer of at least 1"),
    (CALIBRATE, "no text; allowed: --text FILE or --ids FILE"),
    (CALIBRATE + " --text {missing}", "no such file"),
    (CALIBRATE + " --text {empty}", "is empty"),
    (CALIBRATE + " --text {artifact}", "is not UTF-8 text"),
    (CALIBRATE + " --ids {empty}", "is empty; allowed: ids like 1 2 3"),
    (CALIBRATE + " --ids {config}", "'{' is not part of a token id"),
    (CALIBRATE + " --text {text} --max-tokens 0", "'0' is not an integer of at least 1"),
    (CALIBRATE + " --text {text} --context 513", "context = 513; allowed: 1 to 512"),
    (CALIBRATE + " --text {config}", "token id 61 is outside the vocabulary"),
    (CALIBRATE + " --text {text} --target cpuq", "unknown target 'cpuq'"),
    ("calibrate {checkpoint} --text {text} -o {missing}/s.npz", "the directory of the output does not"),
    ("calibrate {checkpoint} --text {text} -o {directory}", "the output is a directory"),
    ("calibrate {checkpoint} --text {text}", "the following arguments are required: -o/--output"),
    ("calibrate {missing} --text {text} -o {new}", "config.json: no such file"),
    ("compare {artifact} --text {text}", "the following arguments are required: AFTER"),
    ("compare {artifact} {artifact}", "no text; allowed: --text FILE or --ids FILE"),
    ("compare {artifact} {missing} --text {text}", "cannot be read: No such file"),
    ("compare {artifact} {config} --text {text}", "this is not a dsv4c artifact"),
    ("compare {bare} {artifact} --text {text}", "carries no tokenizer"),
    ("compare {artifact} {artifact} --text {text} --context 513", "context = 513; allowed: 1 to 512"),
    ("opt {missing}", "no such file"),
    ("opt {config}", "config.json"),
    ("opt {artifact}", "is not UTF-8 text"),
    ("opt {model} -p fuse", "unknown pass 'fuse'"),
    ("opt {model} -p fuse_expert_gemms", "does not take level MODEL; allowed: FUSED"),
    ("opt {model} -o {directory}", "the output is a directory"),
    ("opt {model} -o /proc/out.ir", "cannot be written"),
    ("targets cpu", "unrecognized arguments: cpu"),
]


@pytest.mark.parametrize(("line", "message"), BAD)
def test_bad_command_lines(dsv4c: Call, built: Built, tmp_path: Path, line: str, message: str) -> None:
    directory = tmp_path / "directory"
    directory.mkdir()
    (tmp_path / "empty").write_text("")
    (tmp_path / "text").write_text("let there be light")
    places = {
        "checkpoint": built.checkpoint, "artifact": built.artifact, "bare": built.bare,
        "directory": directory, "missing": tmp_path / "missing", "new": tmp_path / "new",
        "empty": tmp_path / "empty", "text": tmp_path / "text",
        "config": built.checkpoint / "config.json", "config_only": CONFIGS / "v4-flash",
        "model": built.ir / "00-model.ir",
    }  # fmt: skip
    words = [word.format(**places) for word in line.split()]
    code, _, err = dsv4c(*words)
    assert code == 2
    assert err.startswith("dsv4c: error: ") and message in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["directory", "empty", "text"]


def test_errors_are_objects_with_json(dsv4c: Call, built: Built) -> None:
    code, out, err = dsv4c("run", built.artifact, "--ids", "61", "--json")
    error = json.loads(out)["error"]
    assert code == 2 and error["type"] == "SessionError" and error["allowed"] == "0..60" and err
    code, out, _ = dsv4c("inspect", "--json", "--nonsense")
    assert code == 2 and json.loads(out)["error"]["type"] == "UsageError"


# ------------------------------------------------------------------------------ processes

BLOCKER = """
import sys
class Block:
    names = {names!r}
    def find_spec(self, name, path=None, target=None):
        if name in self.names or name.partition(".")[0] in self.names:
            raise ImportError(name + " is blocked")
sys.meta_path.insert(0, Block())
"""


def _environment(*paths: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (*paths, ROOT / ".pkg")))}


def test_running_needs_no_compiler(built: Built, tmp_path: Path) -> None:
    names = ["tvm", "onnx", "onnx_ir", "onnxruntime", "networkx", "torch", "transformers", "tqdm"]
    names += [f"dsv4c.{part}" for part in ("api", "frontend", "ir", "passes", "targets")]
    (tmp_path / "sitecustomize.py").write_text(BLOCKER.format(names=names))

    def run(*words: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "dsv4c", *map(str, words)]
        env = _environment(tmp_path)
        return subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=120)

    text = run("run", built.artifact, "--prompt", "abc", "--max-new-tokens", 3)
    assert text.returncode == 0, text.stderr
    assert len(text.stdout) > 1
    ids = tmp_path / "ids"
    ids.write_text("5 6 7 8")
    compared = ("compare", built.artifact, built.artifact, "--ids", ids)
    for words in (("verify", built.artifact), ("inspect", built.artifact), compared, ("--help",)):
        assert run(*words).returncode == 0
    compiled = run("compile", built.checkpoint, "--target", "cpu", "-o", tmp_path / "m.dsv4")
    assert compiled.returncode == 2
    assert 'hint: pip install "dsv4c[compile]"' in compiled.stderr
    assert "Traceback" not in compiled.stderr


def test_a_killed_compile_leaves_nothing(built: Built, tmp_path: Path) -> None:
    if not hasattr(os, "O_TMPFILE") or not Path("/proc/self/fd").is_dir():
        pytest.skip("the file system knows no nameless files")
    out = tmp_path / "out"
    out.mkdir()
    command = [sys.executable, "-m", "dsv4c", "compile", str(built.checkpoint), "--target", "cpu"]
    child = subprocess.Popen(
        [*command, "-o", str(out / "m.dsv4")], env=_environment(), stderr=subprocess.PIPE
    )
    try:
        deadline = time.monotonic() + 60
        while not _has_open(child.pid, out):
            assert child.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(0.5)  # into the work
        assert child.poll() is None
    finally:
        child.kill()
        _, err = child.communicate()
    assert child.returncode == -signal.SIGKILL, err
    assert list(out.iterdir()) == []


def _has_open(pid: int, directory: Path) -> bool:
    """Whether a process has a file of the directory open, named or nameless."""
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        try:
            target = os.readlink(descriptor)
        except OSError:
            continue
        if target.startswith(f"{directory}/"):
            return True
    return False


def test_a_closed_pipe_is_quiet() -> None:
    command = [sys.executable, "-m", "dsv4c", "passes"]
    child = subprocess.Popen(
        command, env=_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert child.stdout is not None and child.stderr is not None
    child.stdout.close()
    assert child.stderr.read() == ""
    assert child.wait() == 141
    child.stderr.close()
