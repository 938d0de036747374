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
    """Turns token ids into text as they come."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer, self._ids, self._shown = tokenizer, [], ""  # type: ignore[var-annotated]

    def push(self, token: int) -> str:
        """The text that `token` adds; "" while a character is incomplete."""
        self._ids.append(token)
        text: str = self._tokenizer.decode(self._ids)
        if text.endswith("\ufffd"):
            return ""
        new, self._shown = text[len(self._shown) :], text
        return new
