"""Measures llama.cpp on a GGUF file; obeys lines on standard input (see `protocol`).

    worker_llama.py FILE THREADS CONTEXT [plain]

Runs in the environment of `rivals-requirements.txt`. Flash attention is on, a prompt is one batch, and only
the last token's logits are asked for: the fastest settings that were found. `plain` leaves weights in the
layout of the file, without the buffers for tile registers and repacked blocks.
"""

from __future__ import annotations

import ctypes
import sys

import llama_cpp as llama
import numpy as np
import numpy.typing as npt
from protocol import Result, packed_logits, serve, token_ids

BATCH = 512


class Model:
    """A model with one sequence."""

    def __init__(self, path: str, threads: int, context: int, plain: bool) -> None:
        self._log = llama.llama_log_callback(lambda level, text, data: None)
        llama.llama_log_set(self._log, ctypes.c_void_p(0))
        llama.llama_backend_init()
        how = llama.llama_model_default_params()
        how.use_extra_bufts = not plain
        self._model = llama.llama_model_load_from_file(path.encode(), how)
        params = llama.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = context, BATCH, BATCH
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_ENABLED
        self._context = llama.llama_init_from_model(self._model, params)
        if not self._context:
            raise SystemExit(f"llama.cpp does not take {path}")
        self.vocab = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self._model))
        self._seen = 0

    def reset(self) -> None:
        llama.llama_memory_clear(llama.llama_get_memory(self._context), True)
        self._seen = 0

    def step(self, tokens: list[int]) -> npt.NDArray[np.float32]:
        """Feed up to `BATCH` tokens; the last one's logits [vocab]."""
        batch = llama.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, self._seen + i, 1
            batch.seq_id[i][0], batch.logits[i] = 0, i == len(tokens) - 1
        status = llama.llama_decode(self._context, batch)
        llama.llama_batch_free(batch)
        if status:
            raise SystemExit(f"llama_decode gives {status}")
        self._seen += len(tokens)
        return np.ctypeslib.as_array(llama.llama_get_logits_ith(self._context, -1), shape=(self.vocab,))


def main() -> None:
    path, threads, context = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    model = Model(path, threads, context, "plain" in sys.argv[4:])

    def last(tokens: int) -> npt.NDArray[np.float32]:
        model.reset()
        ids = token_ids(tokens, model.vocab)
        return [model.step(ids[i : i + BATCH]) for i in range(0, tokens, BATCH)][-1]

    def prefill(tokens: int) -> None:
        last(tokens)

    def decode(tokens: int) -> None:
        for token in token_ids(tokens, model.vocab):
            model.step([token])

    def logits(tokens: int) -> Result:
        return packed_logits(last(tokens))

    serve({"prefill": prefill, "decode": decode, "logits": logits})


if __name__ == "__main__":
    main()
