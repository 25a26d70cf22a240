"""A base and adapters in one GGUF file that any llama.cpp program runs: each conversation chooses its adapter by its
first token.

llama.cpp's `graniteswitch` has stacks of adapters in every layer, and picks the slot of each token by a control token
that stands before it or is it. The control token has the embedding of its substitute, so in the place of a
conversation's first token it makes the conversation what the base with that LoRA computes, from the first token on.
Behind another token it would not: that token's keys and values would be the bare base's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np

from converters.base_file import BaseFile
from converters.block_types import TYPES, BlockType
from converters.bundle_layout import ARCHITECTURE, ATTENTION, BASE_ARCHITECTURE, NOT_LLAMAS, Sizes, check_base
from converters.bundle_stacks import STACK_TYPES, Member, Stacks, open_stacks
from converters.bundle_tokens import ControlToken, control_tokens, vocabulary
from converters.errors import UnsupportedError
from converters.job import Job
from converters.options import QuantizeOptions
from converters.quantize import Bytes, Floats
from converters.reader import GGUFHeader
from converters.split import KEYS as SPLIT_KEYS
from converters.stream import Progress, Source
from converters.tensor_kinds import EMBEDDING, OUTPUT, tensor_order
from converters.writer import TensorSpec, Value

__all__ = ["BundleOptions", "BundleReport", "ControlToken", "Member", "bundle"]

ROUTER_GAIN = 15.0  # the other tokens' share is exp(-30) for each
FUSED_TYPES = ("f32", "f16", "bf16", "q8_0")
TEMPLATE = "tokenizer.chat_template"
_OWN_KEYS = ("edgelora.fingerprint",)  # of a base: the bundle has another vocabulary


@dataclass(frozen=True)
class BundleOptions:
    """Attributes:
    dtype: of the stacked adapters; None is the adapters' own, float32 where they differ.
    fused_type: where queries, keys and values are of different types, which share one tensor here: "f32" holds the
        values of all of them; the others are smaller, and round.
    """

    dtype: str | None = None
    fused_type: str = "f32"
    threads: int | None = None

    def __post_init__(self) -> None:
        for name, value, known in (("dtype", self.dtype, STACK_TYPES), ("fused type", self.fused_type, FUSED_TYPES)):
            if value is not None and value.lower() not in known:
                raise UnsupportedError(f"unknown {name} {value!r} of a bundle", hint=f"Known: {', '.join(known)}.")


@dataclass(frozen=True)
class BundleReport:
    """What was written.

    Attributes:
        tokens: a control token for each adapter, in their order.
        rank, dtype: of the stacked adapters.
        rounding: the largest relative error that storing an adapter made; 0 where the values are what they were.
    """

    path: Path
    size_bytes: int
    n_tensors: int
    seconds: float
    tokens: tuple[ControlToken, ...]
    rank: int
    dtype: str
    rounding: float
    notices: tuple[str, ...] = field(default=())


def bundle(
    base: Path,
    members: Sequence[Member],
    out: Path,
    options: BundleOptions | None = None,
    *,
    template: str | None = None,
    metadata: Mapping[str, Value] | None = None,
    progress: Progress | None = None,
    force: bool = False,
) -> BundleReport:
    """Write a base and adapters into one file, whole or not at all; memory does not grow with them.

    Args:
        base: a GGUF base of the llama architecture, or any part of a split one.
        template: a chat template that knows the control tokens; None keeps the base's.
        metadata: more keys for the file.
        force: overwrite `out`.

    Raises:
        UnsupportedError: a base, or adapters, that llama.cpp's graniteswitch could not compute exactly, by name.
        BaseMismatchError: adapters of another base.
        ConversionError: another child of it that says what is wrong; nothing is left behind.
    """
    options = options or BundleOptions()
    with ExitStack() as stack:
        file = stack.enter_context(BaseFile(base))
        sizes = check_base(file.header)
        stacks = open_stacks(members, file.header, sizes, options.dtype, stack)
        known = template or file.header.metadata.get(TEMPLATE)
        texts = [known] if isinstance(known, str) else []
        tokens = control_tokens(file.header, [(member.name, member.substitute) for member in members], texts)
        fused = _Fused(file, sizes, TYPES[options.fused_type.upper()])
        sources = [*_base_sources(file, tokens), *fused.sources(), *stacks.sources()]
        keys = {**_keys(file.header, stacks, tokens), **({TEMPLATE: template} if template else {}), **(metadata or {})}
        notices = (*stacks.notices, *fused.notices(), *_template_notices(file.header))
        job = _job(file.header, sorted(sources, key=lambda source: tensor_order(source.spec.name)), keys, notices)
        job = replace(job, inputs=(*job.inputs, *(member.path for member in members)))
        settings = QuantizeOptions(threads=options.threads)
        report = job.run(Path(out), settings, progress=progress, force=force, dry_run=False)
    return BundleReport(
        path=report.path,
        size_bytes=report.size_bytes,
        n_tensors=report.n_tensors,
        seconds=report.seconds,
        tokens=tokens,
        rank=stacks.rank,
        dtype=stacks.dtype,
        rounding=stacks.rounding,
        notices=report.notices,
    )


def _job(header: GGUFHeader, sources: Sequence[Source], keys: Mapping[str, Value], notices: Sequence[str]) -> Job:
    return Job(
        sources=tuple(sources),
        stored={source.spec.name: source.spec.block_type.name for source in sources},
        metadata=keys,
        inputs=header.files,
        weights=header.files,
        name=str(keys["general.name"]),
        architecture=ARCHITECTURE,
        fingerprint="",
        chat_template=None,
        notices=tuple(notices),
        alignment=header.alignment,
    )


def _keys(header: GGUFHeader, stacks: Stacks, tokens: Sequence[ControlToken]) -> dict[str, Value]:
    """The base's own keys, under the other architecture, and those of the stacks."""
    dropped = (*SPLIT_KEYS, *_OWN_KEYS, *(f"{BASE_ARCHITECTURE}.{name}" for name in NOT_LLAMAS))
    prefix = f"{BASE_ARCHITECTURE}."
    kept: dict[str, Value] = {
        f"{ARCHITECTURE}.{key.removeprefix(prefix)}" if key.startswith(prefix) else key: header.metadata.raw(key)
        for key in header.metadata
        if key not in dropped and not _is_other_template(key)
    }
    name = header.metadata.get("general.name")
    kept |= vocabulary(header, tokens)
    kept |= {
        "general.architecture": ARCHITECTURE,
        "general.name": f"{name if isinstance(name, str) and name else header.path.stem} bundle",
        f"{ARCHITECTURE}.logit_scale": 1.0,
        f"{ARCHITECTURE}.adapters.count": len(tokens),
        f"{ARCHITECTURE}.adapters.lora_rank": stacks.rank,
        f"{ARCHITECTURE}.adapters.router_gain": ROUTER_GAIN,
        f"{ARCHITECTURE}.adapters.token_ids_activate": [token.id for token in tokens],
        f"{ARCHITECTURE}.adapters.token_ids_substitute": [token.substitute for token in tokens],
    }
    if f"{ARCHITECTURE}.vocab_size" in kept:
        kept[f"{ARCHITECTURE}.vocab_size"] = header.tensors[EMBEDDING].shape[0] + sum(t.is_added for t in tokens)
    return kept


def _is_other_template(key: str) -> bool:
    """Templates for tools and the like: they know nothing of control tokens."""
    return key == "tokenizer.chat_templates" or key.startswith(f"{TEMPLATE}.")


def _template_notices(header: GGUFHeader) -> Iterator[str]:
    names = [key.removeprefix(f"{TEMPLATE}.") for key in header.metadata if key.startswith(f"{TEMPLATE}.")]
    if names:
        yield f"chat templates that know no control tokens are left out: {', '.join(names)}"


def _base_sources(base: BaseFile, tokens: Sequence[ControlToken]) -> Iterator[Source]:
    """What goes over as it is, and the embeddings and output with a row for each new token."""
    added = [token.substitute for token in tokens if token.is_added]
    for name, tensor in base.header.tensors.items():
        if name.split(".")[-2] in ATTENTION:
            continue
        rows = (tensor.shape[0] + len(added), *tensor.shape[1:]) if name in (EMBEDDING, OUTPUT) else tensor.shape
        read = partial(_extended, base, name, tensor.shape[0], added) if rows != tensor.shape else None
        yield Source(TensorSpec(name, rows, TYPES[tensor.type_name]), read_blocks=read or partial(base.blocks, name))


def _extended(base: BaseFile, name: str, count: int, added: Sequence[int], start: int, stop: int) -> Bytes:
    """Rows of a tensor that has copies of some rows behind its `count` own."""
    own = [base.blocks(name, start, min(stop, count))] if start < count else []
    copies = [base.blocks(name, added[row - count], added[row - count] + 1) for row in range(max(start, count), stop)]
    return np.concatenate([*own, *copies])


class _Fused:
    """Queries, keys and values of each layer in one tensor, row under row.

    Args:
        otherwise: the type where theirs differ. The values of two quantized types have none in common but F32.
    """

    def __init__(self, base: BaseFile, sizes: Sizes, otherwise: BlockType) -> None:
        self._base, self._sizes, self._otherwise = base, sizes, otherwise
        self._types = [
            {name: base.header.tensors[f"blk.{layer}.{name}.weight"].type_name for name in ATTENTION}
            for layer in range(sizes.layers)
        ]
        if self._mixed and sizes.embedding % otherwise.block:
            raise UnsupportedError(
                f"{base.header.path}: rows of {sizes.embedding} do not fill blocks of {otherwise.name}",
                hint="Choose f32, f16 or bf16.",
            )

    @property
    def _mixed(self) -> list[int]:
        """Layers whose types differ."""
        return [layer for layer, types in enumerate(self._types) if len(set(types.values())) > 1]

    def sources(self) -> Iterator[Source]:
        mixed, sizes = set(self._mixed), self._sizes
        for layer, types in enumerate(self._types):
            parts = [(f"blk.{layer}.{name}.weight", sizes.shape(name)[0]) for name in ATTENTION]
            shape = (sum(rows for _, rows in parts), sizes.embedding)
            name = f"blk.{layer}.attn_qkv.weight"
            if layer in mixed:
                yield Source(TensorSpec(name, shape, self._otherwise), read=partial(_joined_rows, self._base, parts))
            else:
                spec = TensorSpec(name, shape, TYPES[types[ATTENTION[0]]])
                yield Source(spec, read_blocks=partial(_joined_blocks, self._base, parts))

    def notices(self) -> Iterator[str]:
        if not (mixed := self._mixed):
            return
        types = self._types[mixed[0]]
        tensors = [self._base.header.tensors[f"blk.{layer}.{name}.weight"] for layer in mixed for name in ATTENTION]
        more = sum(self._otherwise.tensor_bytes(t.shape) for t in tensors) - sum(t.size_bytes for t in tensors)
        kinds = ", ".join(f"{name} {kind}" for name, kind in types.items())
        rounds = "every value as it was" if self._otherwise.name == "F32" else "values rounded to it"
        alike = types[ATTENTION[0]]
        others = [f"--tensor-type {name}={alike.lower()}" for name, kind in types.items() if kind != alike]
        yield (
            f"{len(mixed)} of {self._sizes.layers} layers have queries, keys and values of different types ({kinds}), "
            f"which share one tensor here: it is {self._otherwise.name}, {rounds}, {more / 1e6:+.1f} MB. A base with "
            f"one type for them (`edgelora convert {' '.join(others)}`) needs none of it"
        )


def _pieces(parts: Sequence[tuple[str, int]], start: int, stop: int) -> Iterator[tuple[str, int, int]]:
    """Which rows of which tensor the rows `start` to `stop` of all of them are."""
    first = 0
    for name, rows in parts:
        if (begin := max(start, first)) < (end := min(stop, first + rows)):
            yield name, begin - first, end - first
        first += rows


def _joined_blocks(base: BaseFile, parts: Sequence[tuple[str, int]], start: int, stop: int) -> Bytes:
    return np.concatenate([base.blocks(*piece) for piece in _pieces(parts, start, stop)])


def _joined_rows(base: BaseFile, parts: Sequence[tuple[str, int]], start: int, stop: int) -> Floats:
    return np.concatenate([base.rows(*piece) for piece in _pieces(parts, start, stop)])
