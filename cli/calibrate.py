"""`dsv4c calibrate`: how text uses a checkpoint, as a file that pruning and requantising passes read."""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING, Any

from .base import Command, check_directory_of, integer, json_option, load_compiler
from .progress import Bars
from .show import as_json, rate, table
from .texts import read_documents, text_options

if TYPE_CHECKING:
    from dsv4c.passes.statistics import Statistics

DEFAULT_CHUNK = 256


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="directory with config.json and *.safetensors"
    )
    parser.add_argument(
        "-o", "--output", required=True, metavar="FILE", help="statistics to write, e.g. s.npz"
    )
    text_options(parser)
    parser.add_argument(
        "--target", default="cpu", metavar="T[:ARCH]", help="machine to run on: dsv4c targets (default cpu)"
    )
    parser.add_argument(
        "--chunk", type=integer(1), default=DEFAULT_CHUNK, metavar="N", help="tokens per step (default 256)"
    )
    json_option(parser)


def _run(args: argparse.Namespace) -> int:
    check_directory_of(args.output, "the output")
    documents = read_documents(args)
    quality, started = load_compiler("dsv4c.quality"), time.perf_counter()
    with Bars() as bars:
        found = quality.calibrate(
            args.checkpoint, *documents, target=args.target, context=args.context, chunk=args.chunk,
            threads=args.threads, max_tokens=args.max_tokens, progress=bars,
        )  # fmt: skip
    found.save(args.output)
    facts = _facts(args.output, found, time.perf_counter() - started)
    print(as_json(facts) if args.json else _text(facts))
    return 0


def _facts(path: str, found: Statistics, seconds: float) -> dict[str, Any]:
    layers = [
        {
            "layer": layer,
            "experts": usage.experts,
            "unused": int((usage.tokens == 0).sum()),
            "least": int(usage.tokens.min()),
            "most": int(usage.tokens.max()),
            "mean": float(usage.tokens.mean()),
        }
        for layer, usage in found.experts.items()
    ]
    return {
        "path": path,
        "identity": found.identity,
        "tokens": found.tokens_seen,
        "distinct_tokens": int((found.extra["tokens"] > 0).sum()),
        "vocab_size": found.vocab_size,
        "layers": layers,
        "seconds": round(seconds, 3),
        "tokens_per_second": rate(found.tokens_seen, seconds),
    }


def _text(facts: dict[str, Any]) -> str:
    rows = [
        (a["layer"], a["experts"], a["unused"], a["least"], f"{a['mean']:.1f}", a["most"])
        for a in facts["layers"]
    ]
    header = ("layer", "experts", "unused", "least", "mean", "most")
    return (
        f"{facts['path']}: {facts['tokens']} tokens, {facts['distinct_tokens']} of {facts['vocab_size']} "
        f"distinct, {facts['seconds']:.1f} s\n\n{table(rows, header, right=[1, 2, 3, 4, 5])}"
    )


CALIBRATE = Command(
    name="calibrate",
    summary="count how text uses the experts and matrices of a checkpoint",
    about="Compile a checkpoint with counters beside its experts, run text through it, and write per layer\n"
    "and expert the tokens routed to it, the sum of its gate weights and the sum of the norms of its\n"
    "weighted outputs, and per matrix the mean square of every column of its input. prune_experts reads\n"
    "the first, requantise{search=true} the last. The text is cut into windows that each start afresh.",
    examples=(
        "dsv4c calibrate CHECKPOINT --text train.txt -o statistics.npz",
        "dsv4c calibrate CHECKPOINT --text a.txt --text b.txt --max-tokens 100000 -o statistics.npz",
        "dsv4c calibrate CHECKPOINT --ids train.ids --context 1024 --threads 8 -o statistics.npz --json",
    ),
    arguments=_arguments,
    run=_run,
)
