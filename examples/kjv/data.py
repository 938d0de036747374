"""Text, tokenizer and training windows."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

BOS, EOS = 0, 1
HELD_OUT_BYTES = 100_000
# Digits in groups of up to three, then words with one leading space, punctuation and white space.
_DIGITS = r"\p{N}{1,3}"
_WORDS = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def split_text(text: str, held_out_bytes: int = HELD_OUT_BYTES) -> tuple[str, str]:
    """The text before and after a line boundary about `held_out_bytes` from the end."""
    cut = text.index("\n", len(text) - held_out_bytes) + 1
    return text[:cut], text[cut:]


def train_tokenizer(text: str, vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer with <bos> = 0 and <eos> = 1."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_DIGITS), "isolated"),
            pre_tokenizers.Split(Regex(_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<bos>", "<eos>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """Token ids of a text, without special tokens."""
    return np.array(tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int64)


def windows(tokens: np.ndarray, length: int, seed: int) -> Iterator[np.ndarray]:
    """Endless training windows of length + 1 tokens.

    Every pass over the text uses a new phase and a new order. Half of the windows start
    with <bos> in front, the other half in the middle of the text, so that the model
    accepts prompts with and without <bos>.
    """
    generator = np.random.default_rng(seed)
    while True:
        starts = np.arange(generator.integers(length), len(tokens) - length - 1, length)
        for start in generator.permutation(starts):
            window = tokens[start : start + length + 1]
            yield np.concatenate([[BOS], window[:-1]]) if generator.random() < 0.5 else window


def held_out_windows(tokens: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs (each starting with <bos>) and targets that score every token once; -100 pads the last."""
    count = -(-len(tokens) // length)
    targets = np.full(count * length, -100, dtype=np.int64)
    targets[: len(tokens)] = tokens
    targets = targets.reshape(count, length)
    inputs = np.concatenate([np.full((count, 1), BOS), np.maximum(targets[:, :-1], 0)], axis=1)
    return inputs, targets


def unigram_loss(train: np.ndarray, held_out: np.ndarray, vocab_size: int) -> float:
    """Held-out nats per token of add-one smoothed token frequencies."""
    counts = np.bincount(train, minlength=vocab_size) + 1.0
    return float(-np.log(counts / counts.sum())[held_out].mean())
