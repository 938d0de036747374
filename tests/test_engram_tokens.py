"""Token compression from a tokenizer: which tokens fall into one class, and damaged inputs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from dsv4c.errors import CheckpointError
from dsv4c.frontend.stored import StoredTensor, write_safetensors
from dsv4c.frontend.token_map import FILE, Overlay, read_token_map, token_map
from dsv4c.ir.dtypes import Array, DType

# Tokens in order, and the class that the rule of section 2 gives each.
WORDS = {
    "<s>": 0, "The": 1, "the": 1, "  the\t": 1, "THÉ": 1, "É": 2, "e": 2, "\uff45": 2, "\n": 3, " ": 3,
    " \t\r\n": 3, "ﬁ": 4, "fi": 4, "Ⅳ": 5, "iv": 5, "\u0301": 6, "\u0300": 7, "a\ufffd": 8,
    "A\ufffd": 9, "b  c": 10, "b\nc": 10, "\u00a0x\u2003": 11, "x": 11, "\u00a0": 3, "\u200b": 12,
}  # fmt: skip


def word_level() -> bytes:
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    return Tokenizer(models.WordLevel(vocabulary, unk_token="<s>")).to_str().encode()


def test_classes_by_hand() -> None:
    """Case, accents, compatibility forms and space do not count; what loses everything keeps its text."""
    found = token_map(word_level())
    assert dict(zip(WORDS, found.tolist(), strict=True)) == WORDS
    assert found.dtype == np.int32


def test_half_a_character_is_a_class_of_its_own() -> None:
    """Byte-level tokens that are no text are compared by their vocabulary string."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=280, initial_alphabet=alphabet, show_progress=False, special_tokens=["<end>"]
    )
    made.train_from_iterator(["the THE the The  the"], trainer)
    found = token_map(made.to_str().encode())
    assert len(found) == made.get_vocab_size()
    texts = [made.decode([i], skip_special_tokens=False) for i in range(len(found))]
    broken = [i for i, text in enumerate(texts) if "\ufffd" in text]
    assert len(broken) > 100 and len(set(found[broken])) == len(broken)
    assert found[made.token_to_id("T")] == found[made.token_to_id("t")] != found[made.token_to_id("h")]
    assert texts[0] == "<end>"


def test_classes_are_numbered_by_first_appearance() -> None:
    found = token_map(word_level())
    first = [int(np.flatnonzero(found == c)[0]) for c in range(found.max() + 1)]
    assert first == sorted(first)


def stored(file: Path, name: str, array: Array) -> None:
    dtype = DType.I64 if array.dtype.kind == "i" else DType.F32
    write_safetensors(file, [StoredTensor(name, dtype, array.shape, lambda: iter([array]))])


def test_a_stored_map_wins_over_the_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(word_level())
    assert read_token_map(tmp_path).tolist() == list(WORDS.values())
    stored(tmp_path / FILE, "map", np.array([0, 1, 0, 2]))
    assert read_token_map(tmp_path).tolist() == [0, 1, 0, 2]


@pytest.mark.parametrize(("name", "array", "what"), [
    ("other", np.array([0]), "holds no token map"), ("map", np.zeros((2, 2), np.int64), "holds no token map"),
    ("map", np.zeros(2, np.float32), "holds no token map"), ("map", np.array([0, -1]), "out of range"),
    ("map", np.array([0, 2]), "out of range"),
])  # fmt: skip
def test_a_stored_map_is_checked(tmp_path: Path, name: str, array: Array, what: str) -> None:
    stored(tmp_path / FILE, name, array)
    with pytest.raises(CheckpointError, match=what):
        read_token_map(tmp_path)


def test_no_tokenizer_and_a_damaged_one(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot be compressed.*tokenizer.json or engram_token_map"):
        read_token_map(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="does not load"):
        read_token_map(tmp_path)


def test_computed_tensors_stand_in_front_of_stored_ones() -> None:
    class Below:
        def read(self, name: str) -> Array:
            return np.array([len(name)])

    store = Overlay(Below(), {"a": np.array([7])})
    assert (store.read("a").tolist(), store.read("bcd").tolist()) == ([7], [3])
