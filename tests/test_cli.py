"""The command line: every command in process, the bad command lines, and the promises about processes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from dsv4c import __version__, cli
from dsv4c.cli.base import Command, Parser
from dsv4c.cli.streaming import StopFilter
from dsv4c.cli.table import COMMANDS
from dsv4c.frontend.generate import generate_checkpoint
from dsv4c.runtime.container import Artifact, ArtifactWriter

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "tests" / "data" / "configs"
LETTERS = ["<bos>", "<eos>", *"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ 0123456"]
"""One letter a token: as many as the tiny model has."""


class Built(NamedTuple):
    """A checkpoint, what compiling it printed, and artifacts: whole, and stripped of their extras."""

    checkpoint: Path
    summary: str
    ir: Path
    artifact: Path
    bare: Path


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    root = tmp_path_factory.mktemp("cli")
    checkpoint = generate_checkpoint(root / "checkpoint", "tiny", seed=0)
    tokenizer = Tokenizer(
        models.WordLevel({letter: i for i, letter in enumerate(LETTERS)}, unk_token="<bos>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<bos>", "<eos>"])
    tokenizer.save(str(checkpoint / "tokenizer.json"))
    artifact, ir = root / "tiny.dsv4", root / "ir"
    command = ["compile", str(checkpoint), "--target", "cpu", "-o", str(artifact), "--dump-ir", str(ir)]
    code, out, err = _call(command)
    assert code == 0, err
    _strip(artifact, root / "bare.dsv4")
    return Built(checkpoint, out, ir, artifact, root / "bare.dsv4")


def _call(argv: list[str]) -> tuple[int, str, str]:
    """`main` with its output, where capsys cannot reach: in a module's fixture."""
    import contextlib
    import io

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(argv)
    return code, out.getvalue(), err.getvalue()


def _strip(source: Path, path: Path) -> None:
    """The same artifact without tokenizer and golden vectors."""
    old = Artifact.open(source)
    with ArtifactWriter(path) as new:
        for key, value in old.meta.items():
            if key != "golden":
                new.set_meta(key, value)
        for name in old.sections.keys() - {"tokenizer"}:
            new.add_section(name, old.section(name))
        for t in old.tensors.values():
            if not t.name.startswith("golden."):
                new.add_tensor(t.name, t.dtype, t.shape, old.array(t.name))


Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def dsv4c(capsys: pytest.CaptureFixture[str]) -> Call:
    """Runs one command line; gives exit code, standard output and standard error."""

    def call(*argv: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = cli.main([str(word) for word in argv])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def ok(result: tuple[int, str, str]) -> str:
    code, out, err = result
    assert code == 0, err
    return out


def ok_json(result: tuple[int, str, str]) -> Any:
    return json.loads(ok(result))


# ------------------------------------------------------------------------------ the frame


def test_every_command_on_disk_is_in_the_table() -> None:
    texts = {path.name: path.read_text() for path in (ROOT / "cli").glob("*.py") if path.name != "base.py"}
    declared = sum(text.count(" = Command(\n") for text in texts.values())
    assert declared == len(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_teaches(dsv4c: Call, name: str) -> None:
    text = ok(dsv4c(name, "--help"))
    assert f"examples:\n  dsv4c {name}" in text
    assert len(COMMANDS[name].examples) >= 2


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_parse(name: str) -> None:
    import shlex

    for line in COMMANDS[name].examples:
        assert cli.build_parser().parse_args(shlex.split(line)[1:]).command == name


def test_help_and_version(dsv4c: Call) -> None:
    text = ok(dsv4c("--help"))
    assert all(name in text and command.summary in text for name, command in COMMANDS.items())
    assert ok(dsv4c("--version")) == f"dsv4c {__version__}\n"


def _raising(error: BaseException) -> Command:
    def run(args: object) -> int:
        raise error

    return Command("passes", "", "", (), lambda parser: None, run)


def test_exit_codes_of_exceptions(dsv4c: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(COMMANDS, "passes", _raising(KeyboardInterrupt()))
    assert dsv4c("passes") == (130, "", "")
    monkeypatch.setitem(COMMANDS, "passes", _raising(ZeroDivisionError("a bug")))
    with pytest.raises(ZeroDivisionError):
        cli.main(["passes"])


def test_a_parser_never_exits_on_errors() -> None:
    from dsv4c.errors import UsageError

    with pytest.raises(UsageError, match="unrecognized arguments: --verbose"):
        Parser(prog="dsv4c").parse_args(["--verbose"])


# ------------------------------------------------------------------------------ commands


def test_compile_reports(built: Built) -> None:
    assert built.summary.startswith(f"{built.artifact}: ")
    for word in ("weights", "code", "tokenizer", "golden vectors", "at MODEL -> ", "at TARGET"):
        assert word in built.summary
    names = sorted(path.name for path in built.ir.iterdir())
    assert names[0] == "00-model.ir" and len(names) == 6


def test_run_ids_streams_ids(dsv4c: Call, built: Built) -> None:
    code, out, err = dsv4c("run", built.artifact, "--ids", "5,6,7", "--max-new-tokens", 4)
    assert code == 0
    assert len(out.strip().split(",")) == 4
    assert "tokens/s" in err and "seed" not in err
    facts = ok_json(dsv4c("run", built.artifact, "--ids", "5 6 7", "--max-new-tokens", 4, "--json"))
    assert facts["ids"] == [int(i) for i in out.split(",")]
    assert facts["prompt_tokens"] == 3 and facts["finish"] == "length" and facts["text"] is None


def test_run_text_equals_its_ids(dsv4c: Call, built: Built, tmp_path: Path) -> None:
    out = ok(dsv4c("run", built.artifact, "--prompt", "abc", "--max-new-tokens", 6))
    facts = ok_json(dsv4c("run", built.artifact, "--prompt", "abc", "--max-new-tokens", 6, "--json"))
    assert out == facts["text"] + "\n"
    assert facts["text"] == "".join(LETTERS[i] for i in facts["ids"] if i > 1)
    assert ok(dsv4c("run", built.artifact, "--prompt", "abc", "--max-new-tokens", 6, "--no-stream")) == out
    (tmp_path / "prompt.txt").write_text("abc")
    assert (
        ok(dsv4c("run", built.artifact, "--prompt-file", tmp_path / "prompt.txt", "--max-new-tokens", 6))
        == out
    )


def test_run_stops_at_a_text(dsv4c: Call, built: Built) -> None:
    options = ("--prompt", "abc", "--max-new-tokens", 30, "--temperature", 1.0, "--seed", 3, "--json")
    whole = ok_json(dsv4c("run", built.artifact, *options))["text"]
    stop = whole[4:6]
    facts = ok_json(dsv4c("run", built.artifact, *options, "--stop", "no such text", "--stop", stop))
    assert facts["text"] == whole[: whole.index(stop)]
    assert facts["finish"] == "stop text"


def test_a_sampled_run_repeats_with_its_seed(dsv4c: Call, built: Built) -> None:
    options = (
        "run",
        built.artifact,
        "--ids",
        "5,6,7",
        "--max-new-tokens",
        12,
        "--temperature",
        1.0,
        "--top-p",
        0.95,
    )
    _, first, err = dsv4c(*options)
    seed = err.split("seed ")[1].strip()
    assert ok(dsv4c(*options, "--seed", seed)) == first
    assert ok(dsv4c(*options, "--seed", int(seed) + 1)) != first


def test_a_saved_session_continues_like_one_run(dsv4c: Call, built: Built, tmp_path: Path) -> None:
    saved = tmp_path / "s.npz"
    size = ("--max-new-tokens", 5, "--json")
    first = ok_json(dsv4c("run", built.artifact, "--ids", "5,6,7", *size, "--save-session", saved))
    second = ok_json(dsv4c("run", built.artifact, "--ids", "9,8", *size, "--load-session", saved))
    assert first["position"] == 3 + 5
    everything = [5, 6, 7, *first["ids"], 9, 8]
    whole = ok_json(dsv4c("run", built.artifact, "--ids", ",".join(map(str, everything)), *size))
    assert second["ids"] == whole["ids"]
    assert second["position"] == whole["position"]


def test_prompts_can_be_read_without_answering(dsv4c: Call, built: Built, tmp_path: Path) -> None:
    saved = tmp_path / "s.npz"
    facts = ok_json(
        dsv4c("run", built.artifact, "--ids", "5,6", "--max-new-tokens", 0, "--save-session", saved, "--json")
    )
    assert facts["ids"] == [] and facts["position"] == 2 and saved.is_file()


def test_inspect_artifact(dsv4c: Call, built: Built) -> None:
    facts = ok_json(dsv4c("inspect", built.artifact, "--context", 128, "--json"))
    assert facts["kind"] == "artifact" and facts["model"]["layers"] == 4
    assert facts["states"]["context"] == 128
    assert facts["states"]["buffers"]["layers.1.entries"]["bytes"] == 32 * 40 * 4
    assert facts["weights"]["bytes"] == Artifact.open(built.bare).weight_bytes
    text = ok(dsv4c("inspect", built.artifact))
    assert "at context 512" in text and "fuse_experts" in text and "tokenizer" in text
    assert "golden vectors\n  none" in ok(dsv4c("inspect", built.bare))


def test_inspect_checkpoint(dsv4c: Call, built: Built) -> None:
    facts = ok_json(dsv4c("inspect", built.checkpoint, "--json"))
    assert facts["kind"] == "checkpoint" and facts["naming"] == "published" and facts["tokenizer"]
    classes = facts["parameters"]["classes"]
    assert classes["routed experts"] == 4 * 4 * 3 * 56 * 96
    assert "other" not in classes
    assert "published names" in ok(dsv4c("inspect", built.checkpoint))


@pytest.mark.parametrize(
    ("style", "naming"),
    [("transformers", "transformers (stacked experts)"), ("saved", "saved by transformers")],
)
def test_inspect_names_the_spelling(dsv4c: Call, tmp_path: Path, style: str, naming: str) -> None:
    generate_checkpoint(tmp_path / "c", "tiny", style=style, dtype="bf16")
    assert ok_json(dsv4c("inspect", tmp_path / "c", "--json"))["naming"] == naming


def test_inspect_config_alone(dsv4c: Call) -> None:
    facts = ok_json(dsv4c("inspect", CONFIGS / "v4-flash", "--json"))
    assert facts["kind"] == "config" and facts["tensors"] == 69187
    assert facts["parameters"]["classes"].keys().isdisjoint({"other"})
    assert round(facts["parameters"]["total"] / 1e9) == 284
    assert "the released format of this model: 69187 tensors" in ok(dsv4c("inspect", CONFIGS / "v4-flash"))


def test_verify(dsv4c: Call, built: Built) -> None:
    out = ok(dsv4c("verify", built.artifact, "--full"))
    assert "ok: " in out and "state layers.3.window" in out
    facts = ok_json(dsv4c("verify", built.artifact, "--threads", 1, "--json"))
    assert facts["ok"] and facts["first"] is None and all(check["ok"] for check in facts["checks"])


@pytest.fixture
def damaged(built: Built, tmp_path: Path) -> Path:
    """One weight of layer 2 with flipped bits, at its place in the file."""
    path = tmp_path / "damaged.dsv4"
    shutil.copy(built.artifact, path)
    entry = Artifact.open(path).tensors["layers.2.attn.wkv.weight"]
    data = bytearray(path.read_bytes())
    span = slice(entry.offset, entry.offset + entry.nbytes)
    data[span] = bytes(byte ^ 0x80 for byte in data[span])
    path.write_bytes(data)
    return path


def test_verify_names_the_layer_of_a_damaged_weight(dsv4c: Call, damaged: Path) -> None:
    code, out, _ = dsv4c("verify", damaged)
    assert code == 1
    assert "the first is state layers.2.window: the difference begins in layer 2" in out
    code, out, _ = dsv4c("verify", damaged, "--json")
    facts = json.loads(out)
    assert code == 1 and not facts["ok"] and facts["layer"] == 2 and facts["first"] == "state layers.2.window"


def test_full_verify_names_the_damaged_tensor(dsv4c: Call, damaged: Path) -> None:
    code, out, err = dsv4c("verify", damaged, "--full", "--json")
    assert code == 2
    assert "tensor 'layers.2.attn.wkv.weight' does not match its checksum" in err
    assert json.loads(out)["error"]["type"] == "ArtifactError"


def test_bench(dsv4c: Call, built: Built) -> None:
    sizes = ("--prompt-tokens", 20, "--decode-tokens", 3, "--repeat", 2, "--batch", 2, "--threads", 1)
    facts = ok_json(dsv4c("bench", built.artifact, *sizes, "--json"))
    for phase in ("prefill", "decode"):
        spread = facts["tokens_per_second"][phase]
        assert 0 < spread["min"] <= spread["median"] <= spread["max"]
    assert facts["peak_rss_bytes"] > facts["weight_bytes"] > 0
    assert facts["load_seconds"] > 0 and facts["state_bytes"] > 0
    assert "median" in ok(dsv4c("bench", built.artifact, *sizes))


def test_opt_round_trip(dsv4c: Call, built: Built, tmp_path: Path) -> None:
    dumps = sorted(built.ir.iterdir())
    assert ok(dsv4c("opt", dumps[0])) == dumps[0].read_text()
    fused = ok(dsv4c("opt", dumps[0], "-p", "merge_common_subexpressions,fuse_swiglu"))
    assert fused == dumps[2].read_text()
    out = tmp_path / "out.ir"
    rest = 'fuse_index_select,fuse_experts,narrow_weights{storage="auto"}'
    assert ok(dsv4c("opt", dumps[2], "-p", rest, "-o", out)) == ""
    assert out.read_text() == dumps[-1].read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["out.ir"]


def test_opt_without_checks_shows_what_a_pass_left(dsv4c: Call, built: Built) -> None:
    first = built.ir / "00-model.ir"
    raw = ok(dsv4c("opt", first, "-p", "fuse_swiglu", "--no-verify-each"))
    clean = ok(dsv4c("opt", first, "-p", "fuse_swiglu"))
    assert "level FUSED" in raw and len(raw) >= len(clean)


def test_targets(dsv4c: Call) -> None:
    facts = ok_json(dsv4c("targets", "--json"))
    (cpu,) = [t for t in facts["targets"] if t["name"] == "cpu"]
    assert sum(arch["default"] for arch in cpu["archs"]) == 1
    assert {f["name"] for f in cpu["formats"]} == {"tvm", "onnx"}
    assert "ziglang" in facts["linkers"]
    text = ok(dsv4c("targets"))
    assert text.count("default here") == len(facts["targets"]) and "apache-tvm" in text


def test_passes(dsv4c: Call) -> None:
    facts = ok_json(dsv4c("passes", "--json"))["passes"]
    (narrow,) = [p for p in facts if p["name"] == "narrow_weights"]
    assert narrow["options"] == [{"name": "storage", "type": "str", "default": "auto"}]
    assert narrow["takes"] == ["FUSED"] and narrow["gives"] == "FUSED"
    text = ok(dsv4c("passes"))
    assert "narrow_weights{storage: str = 'auto'}" in text and "FUSED -> FUSED" in text


@pytest.mark.parametrize(
    ("stops", "pieces", "shown", "hit"),
    [
        ((), ["ab", "c"], ["ab", "c", ""], False),
        (("END",), ["aE", "N", "Db"], ["a", "", "", ""], True),
        (("END",), ["aE", "NX"], ["a", "ENX", ""], False),
        (("END",), ["aEN"], ["a", "EN"], False),
        (("b", "abc"), ["xa", "bc"], ["x", "", ""], True),
        (("aab",), ["aa", "ab"], ["", "a", ""], True),
    ],
)
def test_stop_texts_across_tokens(
    stops: tuple[str, ...], pieces: list[str], shown: list[str], hit: bool
) -> None:
    stop = StopFilter(stops)
    assert [*(stop.push(piece) for piece in pieces), stop.finish()] == shown
    assert stop.hit == hit


# ------------------------------------------------------------------------------ bad command lines

COMPILE = "compile {checkpoint} --target cpu"
RUN = "run {artifact} --ids 1,2"

BAD = [
    ("", "no command"),
    ("comple x", "unknown command 'comple'; allowed: bench, compile"),
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
    (COMPILE + "q -o {new}", "unknown target 'cpuq'; allowed: cpu"),
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
    ("opt {missing}", "no such file"),
    ("opt {config}", "config.json"),
    ("opt {artifact}", "is not UTF-8 text"),
    ("opt {model} -p fuse", "unknown pass 'fuse'"),
    ("opt {model} -p fuse_experts", "does not take level MODEL; allowed: FUSED"),
    ("opt {model} -o {directory}", "the output is a directory"),
    ("opt {model} -o /proc/out.ir", "cannot be written"),
    ("targets cpu", "unrecognized arguments: cpu"),
]


@pytest.mark.parametrize(("line", "message"), BAD)
def test_bad_command_lines(dsv4c: Call, built: Built, tmp_path: Path, line: str, message: str) -> None:
    directory = tmp_path / "directory"
    directory.mkdir()
    (tmp_path / "empty").write_text("")
    places = {
        "checkpoint": built.checkpoint, "artifact": built.artifact, "bare": built.bare,
        "directory": directory, "missing": tmp_path / "missing", "new": tmp_path / "new", "empty": tmp_path / "empty",
        "config": built.checkpoint / "config.json", "config_only": CONFIGS / "v4-flash",
        "model": built.ir / "00-model.ir",
    }  # fmt: skip
    words = [word.format(**places) for word in line.split()]
    code, _, err = dsv4c(*words)
    assert code == 2
    assert err.startswith("dsv4c: error: ") and message in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["directory", "empty"]


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
    for words in (("verify", built.artifact), ("inspect", built.artifact), ("--help",)):
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
