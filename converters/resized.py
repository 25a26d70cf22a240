"""A base whose vocabulary an adapter resized, as `resize_token_embeddings` leaves it.

    config.json of the base              vocab_size 32000
    adapter: embed_tokens, lm_head       (32064, 4096): the rows that take the place of the base's
    adapter: tokenizer.json ...          the tokens of all 32064 rows

The weights are the base's, with rows of zeros where it has none; the adapter's own tensors replace them all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from converters.adapted_base import AdaptedBase, of_folder
from converters.architectures import find_family
from converters.architectures.settings import flatten
from converters.checkpoint import Checkpoint, Floats, Tensor
from converters.compile import is_resized
from converters.errors import UnsupportedAdapterError, listed
from converters.methods import Reading, Replaced
from converters.placement import find_slots
from converters.shards import Shards, floats, matrix_of
from converters.stored import Dequantized
from converters.tensor_kinds import EMBEDDING, OUTPUT

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
LOST = "was not saved with its {} rows: save it too (modules_to_save, or save_embedding_layers=True)"
NO_TOKENIZER = (
    "has no tokenizer for its {} tokens (the base has {}): save it beside the adapter, tokenizer.save_pretrained({}); "
    "or copy the base's files there, where no token was added"
)


@dataclass(frozen=True)
class Resize:
    """Another vocabulary.

    Attributes:
        size: rows of the embeddings.
        tokenizer: the folder with its tokenizer.
    """

    size: int
    tokenizer: Path


def find_resize(path: Path, reading: Reading, base: AdaptedBase) -> Resize | None:
    """The vocabulary that an adapter gives its base; None where it leaves the base's.

    Args:
        path: the adapter's folder.

    Raises:
        UnsupportedAdapterError: the base cannot get it; every reason in one message.
    """
    resized = [change for change in reading.changes if isinstance(change, Replaced) and is_resized(base, change)]
    if not resized:
        return None
    size = max(change.shape[0] for change in resized)
    problems = [*_lost(base, resized, size)]
    if not base.path.is_dir():
        problems.append(
            f"it has {size} tokens and the base {base.sizes.vocab}, and only a Hugging Face folder can get others: "
            "name that as the base"
        )
    if not any((path / name).is_file() for name in TOKENIZERS):
        problems.append(NO_TOKENIZER.format(size, base.sizes.vocab, str(path)))
    if problems:
        raise UnsupportedAdapterError(f"{path}: cannot be merged into {base.name}:{listed(problems)}")
    return Resize(size, path)


def common_resize(found: Sequence[Resize]) -> Resize | None:
    """The one vocabulary of several adapters.

    Raises:
        UnsupportedAdapterError: they have several.
    """
    if len({resize.size for resize in found}) > 1 or len({_digest(resize.tokenizer) for resize in found}) > 1:
        shown = [f"{resize.tokenizer}: {resize.size} tokens" for resize in found]
        raise UnsupportedAdapterError(f"adapters with vocabularies of their own do not go together:{listed(shown)}")
    return found[0] if found else None


def _lost(base: AdaptedBase, resized: Sequence[Replaced], size: int) -> Iterator[str]:
    """Tensors with a row for each token that the adapter does not have."""
    saved = {slot.gguf: change for change in resized for slot in find_slots(base, change.tensor)}
    for row in base.family.rows:
        needed = [f"{row.gguf}{ending}" for ending in (".weight", ".bias") if f"{row.gguf}{ending}" in base.shapes]
        if row.gguf == "output" and base.is_tied and not (EMBEDDING in saved and saved[EMBEDDING].keeps_tie):
            needed = [OUTPUT]
        if "vocab" not in row.shape:
            continue
        if row.gguf not in ("token_embd", "output"):
            yield from (f"{row.modules[0]}: has a row for each token too, and resizing leaves it" for _ in needed)
            continue
        for name in needed:
            if name not in saved or saved[name].shape[0] != size:
                yield f"{row.modules[0]}.{name.rpartition('.')[2]}: {LOST.format(size)}"


def _digest(folder: Path) -> tuple[bytes, ...]:
    return tuple((folder / name).read_bytes() for name in TOKENIZERS if (folder / name).is_file())


@contextmanager
def open_resized(base: Path, resize: Resize) -> Iterator[AdaptedBase]:
    """A folder as adapters see it after the resizing.

    Raises:
        ConversionError: see `open_base`; or the tokenizer cannot be read.
    """
    with checkpoint_of(base, resize) as checkpoint:
        yield of_folder(checkpoint)


def checkpoint_of(folder: Path, resize: Resize | None) -> Checkpoint:
    """A model folder, resized where that is asked for."""
    return Checkpoint(folder) if resize is None else _ResizedCheckpoint(folder, resize)


class _ResizedCheckpoint(Checkpoint):
    """`tokenizer_folder` is the adapter's, and so is the number of tokens."""

    def __init__(self, folder: Path, resize: Resize) -> None:
        super().__init__(folder)
        self._size, self.tokenizer_folder = resize.size, resize.tokenizer
        rows = find_family(flatten(self.config), folder).rows
        self._modules = {module for row in rows if row.gguf in ("token_embd", "output") for module in row.modules}
        nested, sized = self.config.get("text_config"), {"vocab_size": resize.size}
        self.config |= {**sized, "text_config": {**nested, **sized}} if isinstance(nested, dict) else sized

    def rename(self, names: Mapping[str, str]) -> None:
        super().rename(names)
        for name, tensor in self.tensors.items():
            if name.rpartition(".")[0] in self._modules:
                shape = (self._size, *tensor.shape[1:])
                self.tensors[name] = _Resized(tensor.name, tensor.dtype, shape, tensor.file, tensor)


@dataclass(frozen=True)
class _Resized(Dequantized):
    """A tensor of the base with more rows, which are zeros, or fewer; a vector with more or fewer values."""

    tensor: Tensor

    def rows(self, shards: Shards, start: int, stop: int) -> Floats:
        if len(self.shape) == 1:
            return _padded(self._rows(shards, 0, 1).T, self.shape[0]).T
        there = matrix_of(self.tensor.shape)[0]
        return _padded(self._rows(shards, min(start, there), min(stop, there)), stop - start)

    def _rows(self, shards: Shards, start: int, stop: int) -> Floats:
        if isinstance(self.tensor, Dequantized):
            return self.tensor.rows(shards, start, stop)
        return floats(shards.rows(self.tensor, start, stop), self.tensor.dtype)


def _padded(rows: Floats, count: int) -> Floats:
    return np.pad(rows[:count], ((0, max(0, count - len(rows))), (0, 0)))
