"""Images in the text of a prompt: `<image>` marks where each one belongs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dsv4c.errors import UsageError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MARKER = "<image>"


def split_prompt(text: str, marker: str = MARKER) -> list[str]:
    """The pieces of text around the markers, possibly empty: one more than there are markers."""
    return text.split(marker)


def encode_with_images(
    tokenizer: Tokenizer, text: str, placeholder_id: int, n_images: int, add_special_tokens: bool = True
) -> list[int]:
    """Token ids of a prompt in which every `<image>` has become the placeholder; for `expand`.

    Where the tokenizer has a token of its own with that id, the marker is replaced by it and the text is
    encoded whole; else, or where that token is not recognised in its place (it may want spaces around it),
    the pieces between the markers are encoded one by one, and the placeholder is put between them. What the
    tokenizer puts before and after a text stands once, around all of it.

    Args:
        tokenizer: of the artifact.
        text: the prompt; the spelling of the tokenizer's own image token counts as a marker too.
        placeholder_id: `ImageRules.placeholder`.
        n_images: how many images there are.
        add_special_tokens: False in the middle of a session, where no text begins.

    Raises:
        UsageError: not one marker per image.
    """
    pieces = split_prompt(text)
    own = tokenizer.get_added_tokens_decoder().get(placeholder_id)
    ids: list[int] = []
    if own is not None:
        ids = tokenizer.encode(own.content.join(pieces), add_special_tokens=add_special_tokens).ids
    if ids.count(placeholder_id) < len(pieces) - 1 or own is None:
        ids = _piecewise(tokenizer, pieces, placeholder_id, add_special_tokens)
    found = ids.count(placeholder_id)
    if found != n_images:
        raise UsageError(
            f"the prompt has {found} {MARKER}, the number of images is {n_images}", where="prompt",
            allowed="one per image",
            hint=f"write {MARKER} into the prompt where each image belongs, in the order of the images",
        )  # fmt: skip
    return list(ids)


def _piecewise(tokenizer: Tokenizer, pieces: list[str], placeholder: int, special: bool) -> list[int]:
    before, after = _frame(tokenizer) if special else ([], [])
    ids = before
    for i, piece in enumerate(pieces):
        ids += [placeholder] if i else []
        ids += tokenizer.encode(piece, add_special_tokens=False).ids
    return ids + after


def _frame(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and after a text, seen at one that is not empty."""
    inner: list[int] = tokenizer.encode("a", add_special_tokens=False).ids
    whole: list[int] = tokenizer.encode("a", add_special_tokens=True).ids
    extra = len(whole) - len(inner)
    first = next((i for i in range(extra) if whole[i : i + len(inner)] == inner != []), extra)
    return whole[:first], whole[first + len(inner) :]
