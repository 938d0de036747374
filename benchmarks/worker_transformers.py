"""Measures transformers on the same checkpoint; obeys lines on standard input (see `protocol`)."""

from __future__ import annotations

import sys
from typing import Any

import torch
from protocol import serve
from transformers import DeepseekV4ForCausalLM


def main() -> None:
    path, threads, dtype, experts = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4]
    torch.set_num_threads(threads)
    model = DeepseekV4ForCausalLM.from_pretrained(
        path, dtype=getattr(torch, dtype), experts_implementation=experts, attn_implementation="eager"
    ).eval()
    cache: list[Any] = [None]
    generator = torch.Generator().manual_seed(7)

    @torch.no_grad()
    def prefill(tokens: int) -> None:
        prompt = torch.randint(2, model.config.vocab_size, (1, tokens), generator=generator)
        cache[0] = model(prompt, use_cache=True, logits_to_keep=1).past_key_values

    @torch.no_grad()
    def decode(tokens: int) -> None:
        for token in torch.randint(2, model.config.vocab_size, (tokens, 1, 1), generator=generator):
            cache[0] = model(
                token, past_key_values=cache[0], use_cache=True, logits_to_keep=1
            ).past_key_values

    serve(prefill, decode)


if __name__ == "__main__":
    main()
