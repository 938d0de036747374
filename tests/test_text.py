"""Streaming text is the text: whatever the tokens, pushed and flushed pieces join to the decoded whole."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from dsv4c.runtime.text import StreamDecoder


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """Byte-level with almost no merges, so that most characters take several tokens."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(["in the beginning was the word"], trainer)
    return made


@pytest.mark.parametrize("text", ["in the beginning", "größe, 你好 🙂 end", "🙂🙂", "x", " the  word \n"])
def test_pieces_join_to_the_text(tokenizer: Tokenizer, text: str) -> None:
    decoder = StreamDecoder(tokenizer)
    pieces = [decoder.push(token) for token in tokenizer.encode(text).ids]
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert decoder.flush() == ""


def test_half_a_character_is_held_back_until_the_end(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a🙂").ids
    decoder = StreamDecoder(tokenizer)
    assert [decoder.push(token) for token in ids[:-1]] == ["a", *[""] * (len(ids) - 2)]
    assert "\ufffd" in decoder.flush()
