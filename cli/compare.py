"""`dsv4c compare`: what a change to a model costs, on held-out text. Needs the run-time dependencies only."""

from __future__ import annotations

import argparse
from typing import Any

from .base import Command, json_option
from .progress import Bars
from .show import as_json, table
from .texts import read_documents, text_options


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("before", metavar="BEFORE", help="artifact to compare with")
    parser.add_argument("after", metavar="AFTER", help="artifact of the same vocabulary")
    text_options(parser)
    json_option(parser)


def _run(args: argparse.Namespace) -> int:
    from dsv4c.runtime.quality import compare

    documents = read_documents(args)
    with Bars() as bars:
        found = compare(
            args.before, args.after, *documents, context=args.context, threads=args.threads,
            max_tokens=args.max_tokens, progress=bars,
        )  # fmt: skip
    facts = {"before_path": args.before, "after_path": args.after, **found.to_json()}
    print(as_json(facts) if args.json else _text(facts))
    return 0


def _text(facts: dict[str, Any]) -> str:
    kl = facts["kl"]
    rows = [
        (name, f"{facts[name]['nll']:.4f}", f"{facts[name]['perplexity']:.3f}", facts[f"{name}_path"])
        for name in ("before", "after")
    ]
    more = [
        ("KL(before || after)", f"{kl['mean']:.3g} nats mean, {kl['p99']:.3g} at the 99th %"),
        ("same likeliest token", f"{100 * facts['top1']:.2f} %"),
        ("largest logit difference", f"{facts['max_difference']:.3g} of the range"),
    ]
    head = table(rows, (f"{facts['tokens']} tokens", "nats/token", "perplexity", ""), right=[1, 2])
    return f"{head}\n\n{table(more)}"


COMPARE = Command(
    name="compare",
    summary="measure how far one artifact is from another on held-out text",
    about="Run two artifacts over the same text and compare their predictions: loss, perplexity, divergence\n"
    "of the probabilities, agreement on the likeliest token. The text is cut into windows that each start\n"
    "afresh; take text that nothing was trained, pruned or calibrated on.",
    examples=(
        "dsv4c compare exact.dsv4 pruned.dsv4 --text heldout.txt",
        "dsv4c compare exact.dsv4 pruned.dsv4 --ids heldout.ids --context 1024 --json",
    ),
    arguments=_arguments,
    run=_run,
)
