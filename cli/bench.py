"""`dsv4c bench`: how fast an artifact reads prompts and writes tokens here, on random ids."""

from __future__ import annotations

import argparse
import resource
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import numpy.typing as npt

from dsv4c.errors import UsageError
from dsv4c.runtime import Artifact, Session
from dsv4c.runtime.profile import can_profile, check_profile
from dsv4c.runtime.replay import exact_tokens, parse_prefill
from dsv4c.runtime.session import DEFAULT_CHUNK

from .base import (
    Command,
    arch_option,
    check_directory_of,
    integer,
    json_option,
    prefill_option,
    table_options,
    tables_of,
    threads_option,
)
from .bench_profile import Profiles, profile_text
from .progress import Bars
from .show import as_json, rate, size, table

PHASES = ("prefill", "decode")
SETTINGS = ("prompt_tokens", "decode_tokens", "repeat", "batch", "chunk", "threads")
Ids = npt.NDArray[np.int32]


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="artifact")
    parser.add_argument(
        "--prompt-tokens", type=integer(1), default=512, metavar="N", help="per row (default 512)"
    )
    parser.add_argument(
        "--decode-tokens", type=integer(1), default=64, metavar="N", help="per row (default 64)"
    )
    parser.add_argument("--repeat", type=integer(1), default=5, metavar="N", help="timed runs (default 5)")
    parser.add_argument(
        "--batch", type=integer(1), default=1, metavar="N", help="rows side by side (default 1)"
    )
    parser.add_argument(
        "--chunk", type=integer(1), default=DEFAULT_CHUNK, metavar="N", help="prompt tokens per step"
    )
    parser.add_argument(
        "--profile", action="store_true",
        help="time every kernel, by op and by layer, against what the machine can do (format tvm)",
    )  # fmt: skip
    parser.add_argument(
        "--html", metavar="OUT",
        help="write the page of dsv4c report with what was measured; with a profile where there can be one",
    )  # fmt: skip
    threads_option(parser)
    arch_option(parser)
    prefill_option(parser)
    table_options(parser)
    json_option(parser)


def _run(args: argparse.Namespace) -> int:
    started = time.perf_counter()
    artifact = Artifact.open(args.file)
    if args.html:
        check_directory_of(args.html, "the page")
    if args.profile:
        check_profile(artifact)
    context = _context(artifact, args)
    session = Session(artifact, args.batch, context, args.threads, tables_of(args), arch=args.arch)
    load = time.perf_counter() - started
    ids = np.random.default_rng(0).integers(0, session.model["vocab_size"], (args.batch, context), np.int32)
    image = session.model.get("vision", {}).get("placeholder", -1)
    ids[ids == image] = 0  # without an image its id means nothing
    prompt, rest = ids[:, : args.prompt_tokens], ids[:, args.prompt_tokens :]
    replay = parse_prefill(args.prefill, artifact)
    _once(session, prompt[:, : args.chunk], rest[:, :1], args.chunk, replay)  # loads pages and plans
    profiles = Profiles(session) if args.profile or (args.html and can_profile(artifact)) else None
    runs = []
    with Bars() as bars:
        for done in range(args.repeat):
            bars("runs", done, args.repeat)
            runs.append(_once(session, prompt, rest, args.chunk, replay))
            if profiles:
                _once(session, prompt, rest, args.chunk, replay, profiles.phase)
        bars("runs", args.repeat, args.repeat)
    facts = _facts(args, session, load, runs)
    if replay is not None:
        facts["replay"] = _replay_error(session, prompt, rest, args.chunk, replay)
    if profiles:
        plain = dict(zip(PHASES, zip(*runs, strict=True), strict=True))
        facts["profile"] = profiles.facts(args.threads, plain)
    if args.html:
        _write_page(artifact, args.html, facts)
    print(as_json(facts) if args.json else _text(facts))
    return 0


def _write_page(artifact: Artifact, path: str, facts: dict[str, Any]) -> None:
    from .report import write_report
    from .report.ceilings import Ceilings

    found = facts.get("profile", {}).get("ceilings")
    ceilings = found and Ceilings(
        found["flops_per_second"], found["bytes_per_second"],
        f"measured in this run, {found['threads']} threads",
    )  # fmt: skip
    artifact.meta["report"]["bench"] = facts
    write_report(artifact, path, ceilings)


def _context(artifact: Artifact, args: argparse.Namespace) -> int:
    need, longest = args.prompt_tokens + args.decode_tokens, int(artifact.meta["model"]["max_positions"])
    if need > longest:
        raise UsageError(
            f"{need} positions do not fit the model", where="dsv4c bench", allowed=f"at most {longest}",
            hint="give smaller --prompt-tokens or --decode-tokens",
        )  # fmt: skip
    return int(need)


def _replay_error(session: Session, prompt: Ids, rest: Ids, chunk: int, replay: int) -> dict[str, Any]:
    """What leaving the decoder layers out of most of the prompt changes, at every token after it.

    `kl` is the mean of KL(full || replay) in nats, `same_top` the share of tokens with the same best next.
    """
    logits = []
    for how in (None, replay):
        session.reset()
        found = [session.prefill(prompt.tolist(), chunk, replay=how)]
        found += [session.step(rest[:, column : column + 1])[:, 0] for column in range(rest.shape[1])]
        logits.append(np.stack(found).astype(np.float64))
    full, cut = (x - x.max(-1, keepdims=True) for x in logits)
    full, cut = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (full, cut))
    return {
        "tokens": replay,
        "exact_from": exact_tokens(session.artifact),
        "kl": float((np.exp(full) * (full - cut)).sum(-1).mean()),
        "same_top": float((full.argmax(-1) == cut.argmax(-1)).mean()),
    }


def _once(
    session: Session, prompt: Ids, rest: Ids, chunk: int, replay: int | None = None,
    phase: Callable[[str], AbstractContextManager[object]] = lambda name: nullcontext(),
) -> tuple[float, float]:  # fmt: skip
    """Seconds to read the prompt and to take the other tokens one by one, from a fresh state.

    `phase` is entered with the name of each while it is timed.
    """
    session.reset()
    with phase("prefill"):
        started = time.perf_counter()
        session.prefill(prompt.tolist(), chunk, replay=replay)
        prefill = time.perf_counter() - started
    with phase("decode"):
        started = time.perf_counter()
        for column in range(rest.shape[1]):
            session.step(rest[:, column : column + 1])
        decode = time.perf_counter() - started
    return prefill, decode


def _facts(
    args: argparse.Namespace, session: Session, load: float, runs: list[tuple[float, float]]
) -> dict[str, Any]:
    phases = zip(
        PHASES, (args.prompt_tokens, args.decode_tokens), zip(*runs, strict=True), strict=True
    )
    artifact = session.artifact
    return {
        "path": str(artifact.path),
        "target": f"{artifact.meta['target']}:{artifact.meta['arch']['name']}",
        "format": artifact.meta["format"],
        "settings": {key: getattr(args, key) for key in SETTINGS},
        "tokens_per_second": {name: _spread(args.batch * count, seconds) for name, count, seconds in phases},
        "load_seconds": load,
        "peak_rss_bytes": peak_rss(),
        "weight_bytes": sum(t.nbytes for t in artifact.tensors.values() if not t.name.startswith("golden.")),
        "state_bytes": session.state_bytes,
        "tables": session.table_statistics(),
    }


def _spread(tokens: int, seconds: tuple[float, ...]) -> dict[str, float]:
    rates = [rate(tokens, s) for s in seconds]
    return {"median": statistics.median(rates), "min": min(rates), "max": max(rates)}


def peak_rss() -> int:
    """Bytes of memory this process held at its peak, the mapped weights that were touched included."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


def _text(facts: dict[str, Any]) -> str:
    speeds = [
        (name, *(f"{spread[key]:.1f}" for key in ("median", "min", "max")))
        for name, spread in facts["tokens_per_second"].items()
    ]
    sizes = [
        ("load", f"{facts['load_seconds']:.2f} s"),
        *((key, size(facts[f"{key}_bytes"])) for key in ("weight", "state", "peak_rss")),
    ]
    s = facts["settings"]
    head = (
        f"{facts['path']}: {facts['target']}, {facts['format']}; "
        f"{s['prompt_tokens']} + {s['decode_tokens']} tokens, batch {s['batch']}, {s['repeat']} runs"
    )
    speed = table(speeds, ("tokens/s", "median", "min", "max"), right=[1, 2, 3])
    more = [*_tables(facts["tables"]), *_replay(facts)]
    if "profile" in facts:
        more.append(profile_text(facts["profile"]))
    return "\n\n".join([head, speed, table(sizes, right=[1]), *more])


def _replay(facts: dict[str, Any]) -> list[str]:
    if "replay" not in facts:
        return []
    r = facts["replay"]
    return [
        f"decoder layers over the last {r['tokens']} tokens (exact from {r['exact_from']}): KL {r['kl']:.3g},"
        f" same top token {100 * r['same_top']:.1f} %"
    ]


def _tables(facts: dict[str, dict[str, Any]]) -> list[str]:
    """What each looked-up table answered, and from where."""
    rows = [
        (name, f["tier"], f["rows"], f"{100 * f['hit_rate']:.1f} %", size(f["bytes"]), f["stalls"],
         f"{1000 * f['stall_seconds']:.1f} ms")
        for name, f in facts.items()
    ]  # fmt: skip
    head = ("table", "tier", "rows", "hits", "read", "stalls", "waited")
    return [table(rows, head, right=[2, 3, 4, 5, 6])] if rows else []


BENCH = Command(
    name="bench",
    summary="measure tokens per second of an artifact",
    about="Time prefill and decode on random token ids. All rows of a batch count; the median of the\n"
    "runs is the number to quote. With --profile every other run logs each kernel, and the run of median\n"
    "time is shown. '% of roof' is the least time that bytes and operations need on this machine, of the\n"
    "time taken; it may exceed 100 where values stay in the cache.",
    examples=(
        "dsv4c bench m.dsv4",
        "dsv4c bench m.dsv4 --prompt-tokens 2048 --decode-tokens 128 --threads 8 --json",
        "dsv4c bench m.dsv4 --profile",
        "dsv4c bench m.dsv4 --html report.html",
    ),
    arguments=_arguments,
    run=_run,
)
