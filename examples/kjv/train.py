"""Train a small DeepSeek-V4 model on a plain text and export it in the published format.

    python train.py --text kjv.txt --out . --minutes 75 --seed 1

The run is bounded by wall-clock time: the learning rate and the phases follow the fraction
of --minutes that has passed. An interrupted run continues from its state file. Phases:

    0 .. 30 %    the index of the sparse layers is trained against full attention
    30 .. 100 %  sparse attention through the index, as at inference
    60 .. 100 %  quantisation-aware: the forward pass sees the stored FP4 / FP8 / BF16 values
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import data
import numpy as np
import torch
import torch.nn.functional as F
from export import export_checkpoint, write_json
from model import CONFIG, initial_model, parameter_groups
from quantise import round_trip
from tokenizers import Tokenizer
from torch import Tensor, nn

WARMUP_STEPS = 100
DENSE_UNTIL = 0.3
QUANTISED_FROM = 0.6
BALANCE_UNTIL = 0.9
BALANCE_RATE = 0.01
LONG_EVERY = 10  # one step in ten uses long windows, so that positions beyond --length are seen
LONG_LENGTH = 1024
PROMPTS = ("In the beginning", "And the LORD said unto")


class Observer:
    """Hooks that add what the library does not train: the sparse index and the balance of experts.

    The index only chooses entries, so the language-model loss gives it no gradient. Its
    scores are fitted to the attention that the layer gives to the compressed entries
    (Kullback-Leibler divergence over the visible chosen entries); the inputs of the index
    are detached, so this loss changes nothing but the index.
    """

    def __init__(self, model: nn.Module) -> None:
        self.losses: list[Tensor] = []
        self.loads: list[tuple[nn.Module, Tensor]] = []
        self.indexers: list[nn.Module] = []
        for layer in model.model.layers:
            if hasattr(layer.mlp.gate, "e_score_correction_bias"):
                layer.mlp.gate.register_forward_hook(self._count)
            indexer = getattr(layer.self_attn.compressor, "indexer", None)
            if indexer is not None:
                self.indexers.append(indexer)
                indexer.register_forward_pre_hook(lambda _, a: (a[0].detach(), a[1].detach(), *a[2:]))
                scores: list[Tensor] = []
                indexer.scorer.register_forward_hook(lambda _, __, out, keep=scores: keep.append(out))
                layer.self_attn.register_forward_hook(
                    lambda _, __, out, keep=scores: self._compare(out[1], keep)
                )

    def _count(self, gate: nn.Module, _: Any, out: tuple[Tensor, Tensor, Tensor]) -> None:
        self.loads.append((gate, torch.bincount(out[2].flatten(), minlength=gate.num_experts).float()))

    def _compare(self, attention: Tensor, keep: list[Tensor]) -> None:
        scores = keep.pop()
        if not torch.is_grad_enabled():
            return
        mass = attention[..., -scores.shape[-1] :].detach().sum(1)
        chosen = mass > 0
        total = mass.sum(-1, keepdim=True)
        rows = chosen.sum(-1) > 1
        target = (mass / total.clamp_min(1e-20))[rows]
        guess = scores.masked_fill(~chosen, -1e9)[rows].log_softmax(-1)
        self.losses.append((target * (target.clamp_min(1e-20).log() - guess)).sum(-1).mean())

    def take_loss(self) -> Tensor:
        """Sum of the index losses since the last call."""
        loss = torch.stack(self.losses).sum()
        self.losses.clear()
        return loss

    @torch.no_grad()
    def balance(self, rate: float) -> None:
        """Nudge the selection bias of each router towards equal loads."""
        for gate, load in self.loads:
            gate.e_score_correction_bias += rate * torch.sign(load.mean() - load)
        self.loads.clear()

    def limit(self, count: int) -> None:
        """Set how many compressed entries the index may choose."""
        for indexer in self.indexers:
            indexer.index_topk = count


@contextmanager
def stored_weights(model: nn.Module, active: bool = True) -> Iterator[None]:
    """Inside, the parameters hold the values that the checkpoint will hold; afterwards the masters again."""
    masters = {}
    if active:
        for name, parameter in model.named_parameters():
            masters[name] = parameter.data
            parameter.data = round_trip(name, parameter.data)
    try:
        yield
    finally:
        for name, parameter in model.named_parameters():
            if name in masters:
                parameter.data = masters[name]


@torch.no_grad()
def held_out_loss(model: nn.Module, tokens: np.ndarray, length: int) -> float:
    """Mean nats per token; every window of `length` starts with <bos>."""
    model.eval()
    inputs, targets = (torch.from_numpy(a) for a in data.held_out_windows(tokens, length))
    total = 0.0
    for x, y in zip(inputs.split(4), targets.split(4), strict=True):
        logits = model(x, use_cache=False).logits
        total += F.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=-100, reduction="sum").item()
    model.train()
    return total / len(tokens)


@torch.no_grad()
def write_text(model: nn.Module, tokenizer: Tokenizer, prompt: str, count: int, temperature: float) -> str:
    """Continue a prompt by `count` tokens; temperature 0 is greedy."""
    model.eval()
    ids = [data.BOS, *data.encode(tokenizer, prompt)]
    generator = torch.Generator().manual_seed(0)
    step, cache = torch.tensor([ids]), None
    for _ in range(count):
        out = model(step, past_key_values=cache, use_cache=True)
        cache, logits = out.past_key_values, out.logits[0, -1]
        if temperature > 0:
            chosen = int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator))
        else:
            chosen = int(logits.argmax())
        ids.append(chosen)
        step = torch.tensor([[chosen]])
    model.train()
    return tokenizer.decode(ids)


class Run:
    """One training run: model, optimizer, data streams and counters."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        text = args.text.read_text(encoding="utf-8")
        train_text, held_text = data.split_text(text)
        self.tokenizer = data.train_tokenizer(train_text, CONFIG["vocab_size"])
        self.train_tokens = data.encode(self.tokenizer, train_text)
        self.held_tokens = data.encode(self.tokenizer, held_text)
        self.held_bytes = len(held_text.encode())
        self.held_text = held_text
        self.model = initial_model(args.seed).train()
        self.model.set_experts_implementation("grouped_mm")
        self.observer = Observer(self.model)
        self.optimizer = torch.optim.AdamW(parameter_groups(self.model, 0.1), lr=args.lr, betas=(0.9, 0.95))
        self.step = self.seen = 0
        self.elapsed = 0.0
        self.recent: list[float] = []
        if args.state.exists():
            self._load()
        self.streams = {
            length: itertools.islice(data.windows(self.train_tokens, length, args.seed + length), skip, None)
            for length, skip in ((args.length, self._used(False)), (LONG_LENGTH, self._used(True)))
        }

    def _used(self, long: bool) -> int:
        """Windows taken from a stream so far."""
        long_steps = self.step // LONG_EVERY
        return long_steps * self._batch(True) if long else (self.step - long_steps) * self._batch(False)

    def _batch(self, long: bool) -> int:
        return max(1, self.args.batch * self.args.length // LONG_LENGTH) if long else self.args.batch

    def _load(self) -> None:
        state = torch.load(self.args.state, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seen, self.elapsed = state["step"], state["seen"], state["elapsed"]
        self.recent = state["recent"]

    def save(self) -> None:
        """Write the state from which the run can continue."""
        temporary = self.args.state.with_name(self.args.state.name + ".tmp")
        torch.save(
            {
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "step": self.step,
                "seen": self.seen,
                "elapsed": self.elapsed,
                "recent": self.recent,
            },
            temporary,
        )
        temporary.replace(self.args.state)

    def train_step(self, progress: float) -> None:
        """One optimizer step."""
        long = self.step % LONG_EVERY == LONG_EVERY - 1
        length = LONG_LENGTH if long else self.args.length
        batch = np.stack([next(self.streams[length]) for _ in range(self._batch(long))])
        tokens = torch.from_numpy(batch)
        warm = min(1.0, (self.step + 1) / WARMUP_STEPS)
        for group in self.optimizer.param_groups:
            group["lr"] = (
                self.args.lr * warm * (0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))
            )
        self.observer.limit(CONFIG["index_topk"] if progress >= DENSE_UNTIL else LONG_LENGTH)
        with stored_weights(self.model, progress >= QUANTISED_FROM):
            logits = self.model(tokens[:, :-1], use_cache=False).logits
            loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
            index_loss = self.observer.take_loss()
            (loss + index_loss).backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        loads = [load for _, load in self.observer.loads]
        self.observer.balance(BALANCE_RATE * max(0.0, BALANCE_UNTIL - progress))
        self.step += 1
        self.seen += batch.shape[0] * length
        self.recent = [*self.recent, loss.item()][-200:]
        if self.step % 20 == 0:
            worst = max(float(load.max() / load.mean()) for load in loads)
            print(
                f"step {self.step} tokens {self.seen} minutes {self.elapsed / 60:.1f}"
                f" loss {np.mean(self.recent[-20:]):.3f} index {index_loss.item():.3f}"
                f" norm {float(norm):.2f} load {worst:.2f}",
                flush=True,
            )

    def export(self) -> int:
        """Write the checkpoint with the weights as they are now."""
        folder = self.args.out / "checkpoint"
        return export_checkpoint(self.model.state_dict(), CONFIG, self.tokenizer.to_str(), folder)

    def report(self, size: int) -> dict[str, Any]:
        """Measured facts of the run, with the weights as stored."""
        self.observer.limit(CONFIG["index_topk"])
        master_loss = held_out_loss(self.model, self.held_tokens, self.args.length)
        with stored_weights(self.model):
            loss = held_out_loss(self.model, self.held_tokens, self.args.length)
            greedy = [write_text(self.model, self.tokenizer, prompt, 200, 0.0) for prompt in PROMPTS]
            sampled = [write_text(self.model, self.tokenizer, prompt, 200, 0.7) for prompt in PROMPTS]
        self.observer.loads.clear()
        return {
            "seed": self.args.seed,
            "steps": self.step,
            "tokens_seen": self.seen,
            "minutes": round(self.elapsed / 60, 1),
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "checkpoint_tensor_bytes": size,
            "train_tokens": len(self.train_tokens),
            "held_out_tokens": len(self.held_tokens),
            "held_out_bytes": self.held_bytes,
            "final_train_loss": round(float(np.mean(self.recent)), 4),
            "held_out_loss": round(loss, 4),
            "held_out_loss_unquantised": round(master_loss, 4),
            "held_out_bits_per_byte": round(loss * len(self.held_tokens) / self.held_bytes / math.log(2), 4),
            "unigram_held_out_loss": round(
                data.unigram_loss(self.train_tokens, self.held_tokens, CONFIG["vocab_size"]), 4
            ),
            "greedy": greedy,
            "sampled_temperature_0.7": sampled,
        }

    def finish(self) -> None:
        """Export and write the facts and the published slice of the held-out text."""
        self.save()
        size = self.export()
        write_json(self.args.out / "training.json", self.report(size))
        end = self.held_text.rindex("\n", 0, 40_000) + 1
        (self.args.out / "heldout.txt").write_text(self.held_text[:end], encoding="utf-8")
        print("exported", flush=True)

    def train(self) -> None:
        """Train until the time is used, saving the state often and exporting from time to time."""
        limit = self.args.minutes * 60
        saved = exported = clock = time.monotonic()
        while self.elapsed < limit:
            self.train_step(self.elapsed / limit)
            now = time.monotonic()
            self.elapsed += now - clock
            clock = now
            if now - saved > 180:
                self.save()
                saved = now
            if now - exported > self.args.export_every * 60:
                self.finish()
                exported = saved = clock = time.monotonic()
        self.finish()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Train a small DeepSeek-V4 model and export it.")
    parser.add_argument("--text", type=Path, required=True, help="plain text, UTF-8")
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint and the facts")
    parser.add_argument("--minutes", type=float, default=75.0, help="training time")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--state", type=Path, help="state file of the run (default: OUT/state.pt)")
    parser.add_argument("--length", type=int, default=384, help="tokens per training window")
    parser.add_argument("--batch", type=int, default=4, help="windows per step")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--export-every", type=float, default=15.0, help="minutes between exports")
    args = parser.parse_args()
    args.state = args.state or args.out / "state.pt"
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    Run(args).train()


if __name__ == "__main__":
    main()
