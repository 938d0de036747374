"""Text in and out: the artifact's tokenizer, and streaming decoding that never shows half a character."""

from __future__ import annotations

from tokenizers import Tokenizer

from dsv4c.errors import ArtifactError

from .container import Artifact


def tokenizer_of(artifact: Artifact) -> Tokenizer:
    """The tokenizer that was compiled in.

    Raises:
        ArtifactError: the checkpoint had none, or it does not load.
    """
    if "tokenizer" not in artifact.sections:
        raise ArtifactError(
            "carries no tokenizer", where=str(artifact.path),
            hint="put tokenizer.json into the checkpoint directory and compile again, or use --ids",
        )  # fmt: skip
    try:
        return Tokenizer.from_buffer(artifact.section("tokenizer"))
    except Exception as error:  # the library raises bare Exception
        raise ArtifactError(f"the tokenizer does not load: {error}", where=str(artifact.path)) from error


class StreamDecoder:
    """Turns token ids into text as they come; decodes a few tokens per call, however long the text is."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._context, self._shown = 0, 0  # ids: where context begins, where new text begins

    def push(self, token: int) -> str:
        """The text that `token` adds; "" while a character is incomplete."""
        self._ids.append(token)
        text = self._new()
        if not text or text.endswith("\ufffd"):
            return ""
        self._context, self._shown = self._shown, len(self._ids)
        return text

    def flush(self) -> str:
        """What was held back as the beginning of a character."""
        text = self._new()
        self._context = self._shown = len(self._ids)
        return text

    def _new(self) -> str:
        before: str = self._tokenizer.decode(self._ids[self._context : self._shown])
        after: str = self._tokenizer.decode(self._ids[self._context :])
        return after[len(before) :]
