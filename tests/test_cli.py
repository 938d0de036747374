"""The command line: its frame, and every command in process on one small artifact."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from test_model_harness import Models
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as kinds

from dsv4c import __version__, cli
from dsv4c.cli import progress, show
from dsv4c.cli.base import Command, Parser
from dsv4c.cli.streaming import StopFilter
from dsv4c.cli.table import COMMANDS
from dsv4c.errors import UsageError
from dsv4c.frontend.generate import generate_checkpoint
from dsv4c.passes import parse_pipeline, print_pipeline
from dsv4c.runtime.container import Artifact, ArtifactWriter
from dsv4c.targets import TARGETS

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


def build(models: Models) -> Built:
    """Compiles once in a run, whichever test module asks first in whatever process."""
    root = models.root / "cli"
    with models.alone(root):
        if not (root / "summary").exists():
            _build(root)
    summary = (root / "summary").read_text()
    return Built(root / "checkpoint", summary, root / "ir", root / "tiny.dsv4", root / "bare.dsv4")


def _build(root: Path) -> None:
    checkpoint = generate_checkpoint(root / "checkpoint", "tiny", seed=0)
    tokenizer = Tokenizer(
        kinds.WordLevel({letter: i for i, letter in enumerate(LETTERS)}, unk_token="<bos>")
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
    (root / "summary").write_text(out)


@pytest.fixture(scope="module")
def built(models: Models) -> Built:
    return build(models)


def _call(argv: list[str]) -> tuple[int, str, str]:
    """`main` with its output, where capsys cannot reach: in a module's fixture."""
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
    texts = {path.name: path.read_text() for path in (ROOT / "cli").rglob("*.py") if path.name != "base.py"}
    declared = sum(text.count(" = Command(\n") for text in texts.values())
    assert declared == len(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_teaches(dsv4c: Call, name: str) -> None:
    text = ok(dsv4c(name, "--help"))
    assert f"examples:\n  dsv4c {name}" in text
    assert len(COMMANDS[name].examples) >= 2


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_parse(name: str) -> None:
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
    with pytest.raises(UsageError, match="unrecognized arguments: --verbose"):
        Parser(prog="dsv4c").parse_args(["--verbose"])


# ------------------------------------------------------------------------------ commands


def test_compile_reports(built: Built) -> None:
    assert built.summary.startswith(f"{built.artifact}: ")
    for word in ("weights", "code", "tokenizer", "golden vectors", "at MODEL -> ", "at TARGET"):
        assert word in built.summary
    names = sorted(path.name for path in built.ir.iterdir())
    passes = parse_pipeline(TARGETS["cpu"].format("tvm").passes)
    assert names == ["00-model.ir", *(f"{i:02d}-{p.name}.ir" for i, p in enumerate(passes, 1))]


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
    assert "at context 512" in text and "fuse_expert_gemms" in text and "tokenizer" in text
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
    passes = parse_pipeline(TARGETS["cpu"].format("tvm").passes)
    rest = print_pipeline(passes[2:])
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


class _Bar:
    """What `Bars` asks of a bar, as a log."""

    def __init__(self, log: list[str], **options: Any) -> None:
        self.log, self.n, self.name = log, 0, options["desc"]
        log.append(f"{self.name} {'waits' if 'delay' in options else 'shows'}")

    def update(self, n: int) -> None:
        self.n += n

    def close(self) -> None:
        self.log.append(f"{self.name} {self.n}")


def test_bars_only_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    monkeypatch.setattr(progress, "_tqdm", lambda: functools.partial(_Bar, log))
    for terminal in (False, True):
        monkeypatch.setattr(sys.stderr, "isatty", lambda terminal=terminal: terminal, raising=False)
        with progress.Bars() as bars:
            for what, done, total in (("code", 0, 1), ("code", 1, 1), ("weights", 4, 9), ("weights", 7, 9)):
                bars(what, done, total)
    assert log == ["code shows", "code 1", "weights waits", "weights 7"]


def test_sizes_for_people() -> None:
    assert [show.size(n) for n in (0, 1023, 1536, 3 << 30)] == ["0 B", "1023 B", "1.5 KiB", "3 GiB"]
    assert [show.amount(n) for n in (7, 284_300_000_000)] == ["7", "284.3 B"]
    assert json.loads(show.as_json({"a": [float("inf"), (1.5, float("nan"))]})) == {"a": [None, [1.5, None]]}
    assert show.table([("a", 1), ("bb", 22)], ("x", "n"), right=[1]) == "x    n\na    1\nbb  22"
