"""Token compression: which tokens of a vocabulary count as the same word (Engram specification, section 2).

The map is shipped nowhere: it follows from tokenizer.json, or from a file that was made from it. Knows no
graph and no layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Regex, Tokenizer, normalizers

from dsv4c.errors import CheckpointError
from dsv4c.ir.dtypes import Array, DType
from dsv4c.ir.weights import TensorStore

from .safetensors import TensorFiles, read_header
from .stored import StoredTensor, write_safetensors

FILE = "engram_token_map.safetensors"
TENSOR = "map"
SOURCE = "engram.token_map"
"""The name under which a graph's store serves the map."""
BROKEN = "\ufffd"
_BLANK = "\ue000"  # stands for a lone space while the ends are stripped

TokenMap = npt.NDArray[np.int32]


class Overlay:
    """A `TensorStore` with computed tensors in front of those of a checkpoint."""

    def __init__(self, store: TensorStore, arrays: Mapping[str, Array]) -> None:
        self.store, self.arrays = store, dict(arrays)

    def read(self, name: str) -> Array:
        found = self.arrays.get(name)
        return self.store.read(name) if found is None else found


def read_token_map(directory: str | Path) -> TokenMap:
    """[V] int32 of a checkpoint directory: from engram_token_map.safetensors, else from tokenizer.json.

    Raises:
        CheckpointError: neither is there, or the file holds no map.
    """
    root = Path(directory)
    if (root / FILE).is_file():
        return _stored_map(root / FILE)
    if (root / "tokenizer.json").is_file():
        return token_map((root / "tokenizer.json").read_bytes(), str(root / "tokenizer.json"))
    raise CheckpointError(
        "no tokenizer, so tokens cannot be compressed", where=str(root), allowed=f"tokenizer.json or {FILE}"
    )


def _stored_map(file: Path) -> TokenMap:
    tensors = {t.name: t for t in read_header(file)}
    if TENSOR not in tensors or len(tensors[TENSOR].shape) != 1 or tensors[TENSOR].dtype.is_float:
        raise CheckpointError("holds no token map", where=str(file), allowed=f"{TENSOR!r}, integers [vocab]")
    values = TensorFiles(tensors).read(TENSOR)
    if not len(values) or values.min() < 0 or values.max() >= len(values):
        raise CheckpointError("a class is out of range", where=str(file), allowed=f"0..{len(values) - 1}")
    return values.astype(np.int32)


def write_token_map(directory: str | Path, table: TokenMap) -> Path:
    """Store a map [V] beside the weights of a checkpoint, where `read_token_map` finds it."""
    file, values = Path(directory) / FILE, np.asarray(table, np.int64)
    write_safetensors(file, [StoredTensor(TENSOR, DType.I64, values.shape, lambda: iter([values]))])
    return file


def token_map(tokenizer: bytes, where: str = "") -> TokenMap:
    """[V] int32: the class of every token, numbered in order of first appearance.

    Args:
        tokenizer: the bytes of tokenizer.json.

    Raises:
        CheckpointError: they do not load.
    """
    try:
        loaded = Tokenizer.from_buffer(tokenizer)
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(f"the tokenizer does not load: {error}", where=where) from error
    classes: dict[str, int] = {}
    return np.array([classes.setdefault(key, len(classes)) for key in token_keys(loaded)], np.int32)


def token_keys(tokenizer: Tokenizer) -> Iterator[str]:
    """What tokens are compared by: the normalised text, or the vocabulary string of half a character."""
    normal = normalizers.Sequence([
        normalizers.NFKC(), normalizers.NFD(), normalizers.StripAccents(), normalizers.Lowercase(),
        normalizers.Replace(Regex(r"[ \t\r\n]+"), " "), normalizers.Replace(Regex(r"^ $"), _BLANK),
        normalizers.Strip(), normalizers.Replace(_BLANK, " "),
    ])  # fmt: skip
    for token in range(tokenizer.get_vocab_size(with_added_tokens=True)):
        text = tokenizer.decode([token], skip_special_tokens=False)
        if BROKEN in text:
            yield tokenizer.id_to_token(token) or ""
        else:
            yield normal.normalize_str(text) or text
