"""`dsv4c run`: a prompt in, a stream of text or token ids out. Needs the run-time dependencies only."""

from __future__ import annotations

import argparse
import secrets
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dsv4c.errors import UsageError
from dsv4c.runtime import Artifact, SamplingParams, Session
from dsv4c.runtime.images import encode_with_images
from dsv4c.runtime.replay import describe, parse_prefill
from dsv4c.runtime.session import DEFAULT_CHUNK

from .base import (
    Command,
    arch_option,
    check_directory_of,
    id_list,
    integer,
    json_option,
    number,
    prefill_option,
    read_text,
    table_options,
    tables_of,
    threads_option,
)
from .show import as_json, rate

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from .streaming import Printer

    Floats = npt.NDArray[np.float32]

DEFAULT_NEW_TOKENS = 128


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="artifact")
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="text to continue")
    prompt.add_argument("--ids", type=id_list, metavar="1,2,3", help="token ids to continue; ids are printed")
    prompt.add_argument(
        "--prompt-file", metavar="F", help="file with the text to continue; - is standard input"
    )
    parser.add_argument(
        "--image", action="append", default=[], metavar="FILE",
        help="image for the next <image> of the prompt; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--max-new-tokens", type=integer(0), metavar="N",
        help=f"tokens to generate (default: {DEFAULT_NEW_TOKENS}, or what the context has room for)",
    )  # fmt: skip
    _sampling_arguments(parser)
    session = parser.add_argument_group("session")
    session.add_argument("--context", type=integer(1), metavar="N", help="positions to make room for")
    session.add_argument(
        "--chunk", type=integer(1), default=DEFAULT_CHUNK, metavar="N", help="prompt tokens per step"
    )
    session.add_argument("--load-session", metavar="F", help="continue a saved session with the prompt")
    session.add_argument("--save-session", metavar="F", help="save the session after the last token")
    threads_option(session)
    arch_option(session)
    prefill_option(session)
    table_options(session)
    parser.add_argument("--no-stream", action="store_true", help="print the text at the end, all at once")
    json_option(parser)


def _sampling_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling")
    group.add_argument("--temperature", type=number, default=0.0, metavar="T", help="0 (default) is greedy")
    group.add_argument(
        "--top-k", type=integer(0), default=0, metavar="K", help="keep the K likeliest; 0 keeps all"
    )
    group.add_argument(
        "--top-p", type=number, default=1.0, metavar="P", help="keep the likeliest that sum to P"
    )
    group.add_argument(
        "--seed", type=integer(0), metavar="S", help="repeat a run; the seed in use is reported"
    )
    group.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be repeated"
    )


@dataclass(frozen=True)
class _Feed:
    """A prompt as token ids, with the embeddings of its image tokens."""

    ids: list[int]
    images: list[Floats] | None = None


@dataclass
class _Result:
    """Tokens and text of one run, and seconds by phase."""

    prompt: int
    ids: list[int] = field(default_factory=list)
    text: str = ""
    finish: str = "length"
    layers: str = ""
    load: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0


def _run(args: argparse.Namespace) -> int:
    params = _sampling(args)
    prompt = args.prompt if args.prompt_file is None else read_text(args.prompt_file)
    _check_text(prompt, *args.stop)
    if args.save_session:
        check_directory_of(args.save_session, "the session to save")
    started = time.perf_counter()
    session = _open(args)
    ids, printer = _prepare(args, session, prompt)
    feed = _Feed(ids) if not args.image else _Feed(*session.with_images(ids, args.image))
    replay = parse_prefill(args.prefill, session.artifact)
    result = _Result(len(feed.ids), load=time.perf_counter() - started)
    result.layers = describe(replay, session.artifact, result.prompt)
    live = not (args.json or args.no_stream)
    limit = _limit(args, session, len(feed.ids))
    emit = _write if live else lambda text: None
    _generate(session, feed, replay, limit, params, args.chunk, printer, result, emit)
    if args.save_session:
        _save(session, result.ids, args.save_session)
    if args.json:
        print(as_json(_facts(result, session, params, args)))
    else:
        print("" if live else result.text)
        print(_rates(result, params), file=sys.stderr)
    return 0


def _check_text(*texts: str | None) -> None:
    """Bytes of the command line that are no UTF-8 arrive as lone surrogates."""
    for text in texts:
        try:
            (text or "").encode()
        except UnicodeEncodeError:
            raise UsageError(
                "the text is not UTF-8", where="dsv4c run", hint="check the terminal's encoding"
            ) from None


def _sampling(args: argparse.Namespace) -> SamplingParams:
    """The parameters, with a seed that can be reported."""
    if args.ids and args.stop:
        raise UsageError("--stop needs text", where="dsv4c run", allowed="--prompt or --prompt-file")
    if not all(args.stop):
        raise UsageError("--stop is empty", where="dsv4c run", allowed="the text to stop at")
    seed = secrets.randbits(32) if args.seed is None else args.seed
    params = SamplingParams(args.temperature, args.top_k, args.top_p, seed)
    if args.temperature == 0 and (args.top_k or args.top_p < 1):
        print("dsv4c: note: --top-k and --top-p do nothing at --temperature 0", file=sys.stderr)
    return params


def _open(args: argparse.Namespace) -> Session:
    artifact = Artifact.open(args.file)
    session = Session(artifact, 1, args.context, args.threads, tables_of(args), arch=args.arch)
    if args.load_session:
        session.load(args.load_session)
    return session


def _prepare(args: argparse.Namespace, session: Session, prompt: str | None) -> tuple[list[int], Printer]:
    """The prompt as token ids, and what shows the answer."""
    from .streaming import IdPrinter, TextPrinter

    if args.ids:
        return args.ids, IdPrinter()
    from dsv4c.runtime.text import tokenizer_of

    tokenizer = tokenizer_of(session.artifact)
    # In the middle of a session there is no beginning of a text.
    begins = not session.position.any()
    if args.image:
        ids = encode_with_images(tokenizer, prompt or "", session.image_token, len(args.image), begins)
    else:
        ids = tokenizer.encode(prompt, add_special_tokens=begins).ids
    if not ids:
        raise UsageError("the prompt is empty", where="dsv4c run", allowed="at least one token")
    return list(ids), TextPrinter(tokenizer, tuple(args.stop))


def _limit(args: argparse.Namespace, session: Session, prompt: int) -> int:
    """How many tokens to generate; saving a session feeds the last one too, which takes a position."""
    room = session.context - int(session.position.max()) - prompt + (0 if args.save_session else 1)
    if args.max_new_tokens is None:
        return min(DEFAULT_NEW_TOKENS, max(room, 0))
    if args.save_session and args.max_new_tokens > room >= 0:
        raise UsageError(
            f"{args.max_new_tokens} new tokens do not fit the context", where="dsv4c run",
            allowed=f"at most {room} when the session is saved", hint="give a larger --context",
        )  # fmt: skip
    return int(args.max_new_tokens)


def _generate(
    session: Session, feed: _Feed, replay: int | None, limit: int, params: SamplingParams, chunk: int,
    printer: Printer, result: _Result, emit: Callable[[str], None],
) -> None:  # fmt: skip
    def show(text: str) -> None:
        result.text += text
        emit(text)

    started = time.perf_counter()
    for (token,) in session.stream([feed.ids], limit, params, chunk, feed.images, replay):
        assert token is not None  # the only row: when it stops, so does the stream
        result.prefill = result.prefill or time.perf_counter() - started
        result.ids.append(token)
        show(printer.push(token))
        if printer.stopped:
            break
    show(printer.finish())
    total = time.perf_counter() - started
    result.prefill = result.prefill or total
    result.decode = total - result.prefill
    if printer.stopped:
        result.finish = "stop text"
    elif result.ids and result.ids[-1] in session.model["eos"]:
        result.finish = "stop token"


def _write(text: str) -> None:
    if text:
        sys.stdout.write(text)
        sys.stdout.flush()


def _save(session: Session, ids: list[int], path: str) -> None:
    """The last token is picked but not fed yet; a saved session has seen all that was shown."""
    if ids:
        session.step([ids[-1]])
    session.save(path)


def _facts(
    result: _Result, session: Session, params: SamplingParams, args: argparse.Namespace
) -> dict[str, Any]:
    return {
        "prompt_tokens": result.prompt,
        "ids": result.ids,
        "text": None if args.ids else result.text,
        "finish": result.finish,
        "prefill": result.layers,
        "arch": session.artifact.meta["arch"]["name"],
        "seed": params.seed,
        "position": int(session.position.max()),
        "context": session.context,
        "seconds": {"load": result.load, "prefill": result.prefill, "decode": result.decode},
        "tokens_per_second": {
            "prefill": rate(result.prompt, result.prefill),
            "decode": rate(len(result.ids) - 1, result.decode),
        },
    }  # fmt: skip


def _rates(result: _Result, params: SamplingParams) -> str:
    parts = [
        f"{result.prompt} prompt tokens at {rate(result.prompt, result.prefill):.1f} tokens/s",
        f"{len(result.ids)} new tokens at {rate(len(result.ids) - 1, result.decode):.1f} tokens/s",
        f"loaded in {result.load:.2f} s",
    ]
    parts += [result.layers] if result.layers.startswith("decoder") else []
    return ", ".join(parts + ([f"seed {params.seed}"] if params.temperature else []))


RUN = Command(
    name="run",
    summary="generate text with an artifact",
    about="Continue a prompt. Text goes to standard output as it is made, the tokens per second to standard\n"
    "error. Works where only the runtime is installed.",
    examples=(
        'dsv4c run m.dsv4 --prompt "In the beginning" --max-new-tokens 60',
        "dsv4c run m.dsv4 --prompt-file story.txt --temperature 0.7 --top-p 0.95 --seed 7",
        'dsv4c run m.dsv4 --prompt "<image> What is this?" --image photo.jpg',
        'dsv4c run m.dsv4 --prompt "Long text" --max-new-tokens 0 --save-session s.npz',
    ),
    arguments=_arguments,
    run=_run,
)
