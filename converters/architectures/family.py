"""What one model family is: its tensors under both names, its hyperparameters, and what it refuses.

A family is a table. The converter goes through it from Hugging Face to GGUF, and adapters take B through the same row
order as the weight they change.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from converters.architectures.sizes import Sizes
from converters.architectures.stored import Stored
from converters.tokenizer_rules import BYTE_LEVEL_RULES, TokenizerRules

Config = Mapping[str, Any]
Indices = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
Order = Callable[[Sizes], Indices]
Present = Callable[[Config, int | None], bool]
IGNORED = (r".*\.rotary_emb\.inv_freq", r".*\.attention\.bias", r".*\.attention\.masked_bias")


@dataclass(frozen=True)
class Value:
    """A change to every value on the way into the file, and the way back."""

    forward: Callable[[Floats], Floats]
    back: Callable[[Floats], Floats]


PLUS_ONE = Value(lambda x: x + np.float32(1), lambda x: x - np.float32(1))  # norms that transformers adds 1 to
# In double precision: the nearest float32, which no library's own float32 exp is sure to give.
MINUS_EXP = Value(
    lambda x: (-np.exp(x.astype(np.float64))).astype(np.float32),
    lambda x: np.log(-x.astype(np.float64)).astype(np.float32),
)


@dataclass(frozen=True)
class Row:
    """One kind of tensor: a GGUF tensor as rows of one or more tensors of transformers.

    Attributes:
        hf: the module's name in transformers; `{layer}` stands for the layer's number, `{each}` for a number below
            the size `each`. Several modules, or `{each}`, are put one after the other, row by row.
        gguf: the tensor's name in llama.cpp, without its ending (llm_tensor names, src/llama-arch.cpp).
        shape: of the GGUF tensor: names of `sizes.NAMES` in numpy order, the row length last.
        rows: for each row of the GGUF tensor, the row of the HF tensors it is; None where they are the same.
        columns: likewise for its columns.
        hf_shape: of each HF tensor, where it is not `shape` (nor, with `{each}`, all but its first).
        transposed: the HF tensor holds the transpose (its last two dimensions); `rows` counts rows of the result.
        value: what is done to each value; None for nothing.
        ends: endings of the weight's name, in transformers and in GGUF.
        bias: whether the module has a bias too: always, never, or where a configuration key is true.
        when: whether a layer of this configuration has it; None: always.
        each: the size that `{each}` counts.
        absent_if_tied: the output, which a model with tied embeddings does not have.
        if_stored: it is taken where `when` says no, too, if the checkpoint holds it: llama.cpp's converter writes it,
            and nothing reads it.
        adaptable: llama.cpp's graph applies an adapter to it.
        scaled_by: ending of a tensor by which llama.cpp multiplies what each matrix of a stack gives, and not what an
            adapter adds to it: its factors must have it in themselves.
        mxfp4: the checkpoint holds blocks of MXFP4 (`_blocks`) and their exponents (`_scales`), which go over as they
            are, whatever the quantization.
    """

    hf: str | tuple[str, ...]
    gguf: str
    shape: tuple[str | int, ...]
    rows: Order | None = None
    columns: Order | None = None
    hf_shape: tuple[str | int, ...] = ()
    transposed: bool = False
    value: Value | None = None
    ends: tuple[str, str] = (".weight", ".weight")
    bias: bool | str = False
    when: Present | None = None
    each: str = ""
    absent_if_tied: bool = False
    if_stored: bool = False
    adaptable: bool = True
    scaled_by: str = ""
    mxfp4: bool = False

    @property
    def modules(self) -> tuple[str, ...]:
        return (self.hf,) if isinstance(self.hf, str) else self.hf

    def has_bias(self, config: Config) -> bool:
        return bool(config.get(self.bias)) if isinstance(self.bias, str) else self.bias

    def stored_shape(self) -> tuple[str | int, ...]:
        """Of one HF tensor."""
        if self.hf_shape:
            return self.hf_shape
        shape = self.shape[1:] if self.each else self.shape
        return (*shape[:-2], shape[-1], shape[-2]) if self.transposed else shape

    @property
    def is_linear(self) -> bool:
        """One linear module of transformers is one GGUF matrix, its rows and columns perhaps in another order."""
        is_one = isinstance(self.hf, str) and not (self.each or self.hf_shape or self.value)
        return is_one and self.ends[0] == ".weight"


@dataclass(frozen=True)
class Place:
    """One tensor of a model under both names.

    Attributes:
        layer: None outside the layers.
        is_needed: a checkpoint without it is broken.
    """

    row: Row
    layer: int | None
    is_bias: bool = False
    is_needed: bool = True

    def _filled(self, name: str) -> str:
        return name.replace("{layer}", str(self.layer))

    @property
    def gguf_module(self) -> str:
        return self._filled(self.row.gguf)

    @property
    def gguf_name(self) -> str:
        return self.gguf_module + (".bias" if self.is_bias else self.row.ends[1])

    def hf_names(self, sizes: Sizes) -> tuple[str, ...]:
        """The HF tensors it is made of, in order."""
        ending = ".bias" if self.is_bias else self.row.ends[0]
        names = [self._filled(module) + ending for module in self.row.modules]
        if not self.row.each:
            return tuple(names)
        return tuple(
            name.replace("{each}", str(n)) for name in names for n in range(sizes.at(self.layer)[self.row.each])
        )

    def shape(self, sizes: Sizes) -> tuple[int, ...]:
        shape = sizes.at(self.layer).shape(self.row.shape)
        return shape[:-1] if self.is_bias and len(shape) > 1 else shape

    def hf_shape(self, sizes: Sizes) -> tuple[int, ...]:
        return self.shape(sizes) if self.is_bias else sizes.at(self.layer).shape(self.row.stored_shape())

    def row_order(self, sizes: Sizes) -> Indices | None:
        return self.row.rows(sizes.at(self.layer)) if self.row.rows else None

    def column_order(self, sizes: Sizes) -> Indices | None:
        return self.row.columns(sizes.at(self.layer)) if self.row.columns and not self.is_bias else None


@dataclass(frozen=True)
class Family:
    """A model family.

    Attributes:
        architecture: `general.architecture`.
        rows: every kind of tensor it has. Rows of one GGUF name are other ways to store it; the first whose HF
            tensors are there is taken.
        hyperparameters: a complete configuration to GGUF metadata, without the architecture before each key.
        defaults: what transformers takes where the configuration has no such key.
        aliases: older or own names of configuration keys, to those used here.
        activations: values of `hidden_act` that llama.cpp computes; the first is what an absent key means.
        fixed: keys that must have this value, where they are there: llama.cpp knows no other.
        problems: what else in a configuration cannot be converted, each with its key and value.
        notices: what converts, but should be known.
        computed: tensors that are in the GGUF file and in no checkpoint, by GGUF name.
        kinds: what its own settings must be, as `settings.KINDS` says it of those that families share.
        ignored: regular expressions of HF tensors that are no weights of the text model.
        tokenizer: how its vocabulary is written.
        fills_head_dim: transformers writes `head_dim` into a configuration that has none.
        derived: settings that follow from others, where the configuration does not have them.
        derived_wins: they are right even where it has them.
        rename: other names of tensors to those of `rows`.
        extra_layers: how many layers beyond `num_hidden_layers` there are, by the names of the tensors.
        restored: settings of this family alone, read back from a GGUF base and the settings that are known of it
            (`architectures.configuration`).
        modules: parts of names of a loaded model's modules to those of `rows`, where transformers loads a checkpoint
            under other names than it is stored: adapters have the former.
    """

    architecture: str
    rows: tuple[Row, ...]
    hyperparameters: Callable[[Config], dict[str, Any]]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    activations: tuple[str, ...] = ("silu", "swish")
    fixed: Mapping[str, Any] = field(default_factory=dict)
    problems: Callable[[Config], list[str]] = lambda config: []
    notices: Callable[[Config], list[str]] = lambda config: []
    computed: Callable[[Config], dict[str, Floats]] = lambda config: {}
    kinds: Mapping[str, str] = field(default_factory=dict)
    ignored: tuple[str, ...] = IGNORED
    tokenizer: TokenizerRules = BYTE_LEVEL_RULES
    fills_head_dim: bool = False
    derived: Callable[[Config], dict[str, Any]] = lambda config: {}
    derived_wins: bool = False
    rename: Callable[[str, Config], str] = lambda name, config: name
    extra_layers: Callable[[Iterable[str]], int] = lambda names: 0
    modules: Mapping[str, str] = field(default_factory=dict)
    restored: Callable[[Stored, Config], dict[str, Any]] = lambda stored, found: {}

    def module_name(self, name: str) -> str:
        """A name of a loaded model's, as the rows have it."""
        for loaded, stored in self.modules.items():
            name = name.replace(loaded, stored)
        return name

    @property
    def prefix(self) -> str:
        """What tensors' names begin with, which checkpoints of the bare model leave out ("model.")."""
        return self.rows[0].modules[0].partition(".")[0] + "."

    @property
    def can_untie(self) -> bool:
        """Whether llama.cpp's graph takes an output of its own where a file has one."""
        return any(row.gguf == "output" for row in self.rows)

    @cached_property
    def patterns(self) -> tuple[tuple[Row, re.Pattern[str], int], ...]:
        """Row, expression of a tensor's name with groups `layer` and `each`, and which of the row's modules it is; -1
        where `each` says it."""
        found = []
        for row in self.rows:
            endings = {re.escape(row.ends[0])} | ({r"\.bias"} if row.bias and row.ends[0] == ".weight" else set())
            for index, module in enumerate(row.modules if not row.mxfp4 else ()):
                name = re.escape(module).replace(r"\{layer\}", r"(?P<layer>0|[1-9]\d{0,4})")
                name = name.replace(r"\{each\}", r"(?P<each>0|[1-9]\d{0,4})")
                expression = re.compile(f"{name}(?:{'|'.join(sorted(endings))})")
                found.append((row, expression, -1 if row.each else index))
        return tuple(found)

    def places(self, sizes: Sizes, config: Config) -> Iterator[Place]:
        """Every tensor that a model of these sizes and this configuration has; the output also where it is tied.

        A tensor with several ways to store it comes once for each.
        """
        for row in self.rows:
            for layer in range(sizes["layers"]) if "{layer}" in row.gguf else (None,):
                needed = row.when is None or row.when(config, layer)
                if needed or row.if_stored:
                    yield Place(row, layer, is_needed=needed)
                    if row.has_bias(config):
                        yield Place(row, layer, is_bias=True, is_needed=needed)


def interleaved_rows(heads: int, head_dim: int) -> Indices:
    """Row order of q and k for the rotary embedding of llama.cpp's llama family.

    transformers rotates the first half of a head against the second, llama.cpp neighbours against each other: row
    2j + i of a head is row i * head_dim / 2 + j of the checkpoint (`LlamaModel.permute`, conversion/llama.py).
    """
    order = np.arange(heads * head_dim, dtype=np.int64).reshape(heads, 2, head_dim // 2)
    return order.swapaxes(1, 2).reshape(-1)


def grouped_rows(groups: int, parts: tuple[int, ...], take: tuple[int, ...]) -> Indices:
    """Rows of a matrix whose heads are stored group by group, taken part by part.

    Args:
        groups: how often the parts follow one another.
        parts: rows of each part within a group (q, k and v of one head, say).
        take: which parts, in the order in which they come out; each from all groups.
    """
    order = np.arange(groups * sum(parts), dtype=np.int64).reshape(groups, sum(parts))
    starts = np.cumsum((0, *parts))
    return np.concatenate([order[:, starts[n] : starts[n + 1]].reshape(-1) for n in take])


def part_of_each(count: int, rows: int, start: int, stop: int) -> Indices:
    """Rows `start` to `stop` of each of `count` matrices of `rows` rows: the gates of fused gate_up experts, say."""
    return grouped_rows(count, (start, stop - start, rows - stop), (1,))


def every_second(count: int, first: int) -> Indices:
    """Rows first, first + 2 ...: where two matrices were stored in turns."""
    return np.arange(first, count, 2, dtype=np.int64)
