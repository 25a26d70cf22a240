"""What an adapter needs of its base: sizes, shapes, the fingerprint, and weights where a method asks for them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import Enum
from functools import cached_property, partial
from math import prod
from pathlib import Path

import numpy as np

from converters.architectures import Family, Sizes, find_gguf_family
from converters.base_file import BaseFile
from converters.block_types import PLAIN
from converters.checkpoint import Checkpoint, Floats
from converters.errors import FormatError
from converters.fingerprint import MERGED, UNTIED, fingerprint_of, fingerprint_with, is_norm, merged_fingerprint
from converters.model import understand
from converters.model_card import describe
from converters.reader import GGUFHeader
from converters.tensor_kinds import EMBEDDING, OUTPUT

ReadRows = Callable[[str, int, int], Floats]
COMPARED_ROWS = 512
NEARLY = 0.5  # |output - embeddings| / |embeddings|; of rounded copies less, of independent weights more than 1


class Tie(Enum):
    """Whether a model takes its embeddings for its output too, in however many tensors a file has them."""

    TIED = "tied"
    APART = "apart"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Known:
    """What takes a moment to find out about a base, where somebody knows it already: what it calls itself, and its
    fingerprint."""

    name: str = ""
    fingerprint: str = ""


NOTHING_KNOWN = Known()


@dataclass(frozen=True)
class AdaptedBase:
    """A base as adapters see it.

    Attributes:
        shapes: GGUF name to shape in numpy order, of every tensor the base has.
        rows: GGUF name, first and last row to float32 values (rows, row length); a stack's matrices follow one another,
            a vector is one row.
        is_lossy: its weights were quantized: changes that depend on them come out a little different.
        is_rounded: it is a file with matrices in half precision, which the checkpoint's may not have been.
        merged: adapters that were merged into it.
        is_untied: its output was made of its embeddings (`--untie`); None where the file does not say.
        original: what it was before adapters changed it; None where none did.
        edited: names of what they changed.
        read_name: what it calls itself.
        known: of that and of its fingerprint, what need not be found out.
        fingerprint_with: what the fingerprint would be with these norms, GGUF name and values of each.
    """

    path: Path
    read_name: Callable[[], str]
    family: Family
    sizes: Sizes
    shapes: Mapping[str, tuple[int, ...]]
    rows: ReadRows
    is_lossy: bool
    fingerprint_with: Callable[[Iterable[tuple[str, Floats]]], str]
    merged: tuple[str, ...] = ()
    known: Known = NOTHING_KNOWN
    is_rounded: bool = False
    is_untied: bool | None = False
    original: AdaptedBase | None = None
    edited: frozenset[str] = frozenset()

    @cached_property
    def name(self) -> str:
        """`general.name` of its GGUF files."""
        return self.known.name or self.read_name()

    @cached_property
    def fingerprint(self) -> str:
        """See `converters.fingerprint`; computed where it was not known."""
        return self.known.fingerprint or merged_fingerprint(self.plain_fingerprint, self.merged)

    @property
    def plain_fingerprint(self) -> str:
        """The fingerprint without what was merged into it."""
        return self.fingerprint_with((name, rows.reshape(-1)) for name, rows in self.norms())

    def norms(self) -> Iterator[tuple[str, Floats]]:
        """GGUF name and rows of every norm; some have a row for each head."""
        for name in filter(is_norm, self.shapes):
            yield name, self.rows(name, 0, prod(self.shapes[name][:-1]))

    @property
    def is_tied(self) -> bool:
        """Whether one tensor stands for the embeddings and the output."""
        return OUTPUT not in self.shapes

    @property
    def released(self) -> AdaptedBase:
        """What adapters were trained on."""
        return self.original or self

    @cached_property
    def tie(self) -> Tie:
        """Whether the model ties its output to its embeddings; rows are read where the file does not say."""
        base = self.released
        if base.is_tied or base.is_untied:
            return Tie.TIED
        if base.is_untied is False or base.shapes[OUTPUT] != base.shapes[EMBEDDING]:
            return Tie.APART
        first = max(0, base.shapes[OUTPUT][0] - COMPARED_ROWS) // 2  # in the middle: those of all languages
        output, embeddings = (base.rows(name, first, min(first + COMPARED_ROWS, base.shapes[name][0]))
                              for name in (OUTPUT, EMBEDDING))  # fmt: skip
        is_far = np.linalg.norm(output - embeddings) >= NEARLY * np.linalg.norm(embeddings)
        return Tie.APART if is_far else Tie.UNKNOWN


@contextmanager
def open_base(path: Path, known: Known = NOTHING_KNOWN) -> Iterator[AdaptedBase]:
    """Open a base: a Hugging Face folder, or a GGUF file of any quantization. No weights are read yet.

    Args:
        known: about it.

    Raises:
        ConversionError: it is not a base, is broken, or of an unknown family.
    """
    if path.is_dir():
        with Checkpoint(path) as checkpoint:
            yield replace(of_folder(checkpoint), known=known)
    else:
        with BaseFile(path) as file:
            yield replace(_of_file(file), known=known)


def of_folder(checkpoint: Checkpoint) -> AdaptedBase:
    """A model folder that is open, as adapters see it."""
    model = understand(checkpoint)
    shapes = {name: view.shape for name, view in model.views.items()}
    return AdaptedBase(
        path=checkpoint.folder,
        read_name=lambda: str(describe(checkpoint.folder, model.family.architecture, shapes)["general.name"]),
        family=model.family,
        sizes=model.sizes,
        shapes=shapes,
        fingerprint_with=lambda norms: fingerprint_of(model.sizes, model.vocabulary.tokens, norms),
        rows=lambda name, start, stop: model.views[name].read(start, stop),
        is_lossy=bool(checkpoint.notices),
    )


def _of_file(file: BaseFile) -> AdaptedBase:
    header = file.header
    return AdaptedBase(
        path=header.path,
        read_name=lambda: str(header.metadata.get("general.name") or header.path.stem),
        family=family_of(header),
        sizes=sizes_of(header),
        shapes={name: tensor.shape for name, tensor in header.tensors.items()},
        fingerprint_with=partial(fingerprint_with, header),
        rows=file.rows,
        merged=tuple(header.metadata.get(MERGED, ())),
        is_untied=True if header.metadata.get(UNTIED) is True else None,
        is_lossy=any(tensor.type_name not in PLAIN for tensor in header.tensors.values()),
        is_rounded=any(tensor.type_name != "F32" for tensor in header.tensors.values()),
    )


def family_of(header: GGUFHeader) -> Family:
    """The family of a GGUF base.

    Raises:
        FormatError: it is an adapter.
        UnsupportedArchitectureError: no family here knows it.
    """
    if header.kind == "adapter":
        raise FormatError(f"{header.path}: is an adapter; an adapter is converted against a base")
    return find_gguf_family(header.architecture, header.path)


def sizes_of(header: GGUFHeader) -> Sizes:
    """Raises FormatError where a key or the embeddings are missing."""
    embedding = header.tensors.get(EMBEDDING)
    if embedding is None:
        raise FormatError(f"{header.path}: has no {EMBEDDING}")
    return Sizes(header.architecture, embedding.shape[0], header.metadata)
