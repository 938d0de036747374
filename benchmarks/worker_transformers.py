"""Measures transformers on the same checkpoint; obeys lines on standard input (see `protocol`).

    worker_transformers.py CHECKPOINT THREADS DTYPE EXPERTS
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from protocol import Result, packed_logits, serve, token_ids
from transformers import DeepseekV4ForCausalLM
from transformers.utils import logging


def main() -> None:
    path, threads, dtype, experts = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4]
    logging.disable_progress_bar()
    torch.set_num_threads(threads)
    model = DeepseekV4ForCausalLM.from_pretrained(
        path, dtype=getattr(torch, dtype), experts_implementation=experts, attn_implementation="eager"
    ).eval()
    vocab = int(model.config.vocab_size)
    cache: list[Any] = [None]

    @torch.no_grad()
    def step(tokens: list[int]) -> Any:
        out = model(torch.tensor([tokens]), past_key_values=cache[0], use_cache=True, logits_to_keep=1)
        cache[0] = out.past_key_values
        return out.logits[0, -1]

    def prefill(tokens: int) -> None:
        cache[0] = None
        step(token_ids(tokens, vocab))

    def decode(tokens: int) -> None:
        for token in token_ids(tokens, vocab):
            step([token])

    def logits(tokens: int) -> Result:
        cache[0] = None
        return packed_logits(step(token_ids(tokens, vocab)).float().numpy())

    serve({"prefill": prefill, "decode": decode, "logits": logits})


if __name__ == "__main__":
    main()
