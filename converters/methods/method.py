"""One PEFT method: which tensors it saves, which settings say what they mean, and how a module's become a change."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from converters.checkpoint import Floats, Tensors
from converters.methods.changes import Change, ModuleProblem
from converters.peft_config import PeftConfig
from converters.peft_settings import Setting
from converters.shards import DTYPES, matrix_of
from converters.writer import Value

PREFIX = "base_model.model."
Whole = npt.NDArray[np.int64]
BaseShape = Callable[[str], tuple[int, ...] | None]
"""A tensor of the base, as the adapter's changes name it, to its sizes; None where the base has no such tensor."""


BaseWeight = Callable[[str], Floats]
"""A tensor of the base to its values, float32, rows first; of a vector (values,)."""


def no_base(tensor: str) -> None:
    """A `BaseShape` where there is no base."""


def no_weights(tensor: str) -> Floats:
    """A `BaseWeight` where there is no base.

    Raises:
        ModuleProblem: always.
    """
    raise ModuleProblem(f"its change follows from {tensor}, which is not known")


@dataclass(frozen=True)
class Module:
    """The tensors that an adapter has for one module of its base.

    Attributes:
        name: in transformers ("model.layers.3.mlp.up_proj").
        parts: role ("a", "b" ...) to the stored tensor's name.
        shared: likewise for tensors that all modules share.
        siblings: names of all modules that the adapter has tensors for, this one too.
        shape_in_base: sizes of the base's tensors.
        weight_in_base: their values.
    """

    name: str
    config: PeftConfig
    tensors: Tensors
    parts: Mapping[str, str]
    shared: Mapping[str, str] = field(default_factory=dict)
    siblings: Sequence[str] = ()
    shape_in_base: BaseShape = no_base
    weight_in_base: BaseWeight = no_weights

    @property
    def weight(self) -> str:
        """The tensor of the base."""
        return f"{self.name}.weight"

    @property
    def bias(self) -> str:
        return f"{self.name}.bias"

    def __contains__(self, role: str) -> bool:
        return role in self.parts or role in self.shared

    def shape(self, role: str) -> tuple[int, ...]:
        return self.tensors.tensors[self._stored(role)].shape

    def check(self, role: str, *sizes: int | None) -> None:
        """Raises ModuleProblem where a part has another shape; None is any size but 0."""
        found = self.shape(role)
        fits = len(found) == len(sizes) and all(
            n == size or (size is None and n) for n, size in zip(found, sizes, strict=False)
        )
        if not fits:
            expected = ", ".join("any" if size is None else str(size) for size in sizes)
            raise ModuleProblem(f"{role} has shape {found}, expected ({expected})")

    def load(self, role: str) -> Floats:
        """A part in its own shape, float32."""
        stored = self._stored(role)
        return self.tensors.rows(stored).reshape(self.tensors.tensors[stored].shape)

    def rows(self, role: str, start: int, stop: int) -> Floats:
        """Some rows of a part, its leading dimensions taken together, float32."""
        return self.tensors.rows(self._stored(role), start, stop)

    def integers(self, role: str) -> Whole:
        """A part of whole numbers in its own shape; PEFT stores some as floats on Windows."""
        stored = self._stored(role)
        tensor = self.tensors.tensors[stored]
        if tensor.dtype.startswith(("F", "BF")):
            return _rounded(self.load(role), role)
        if tensor.dtype not in DTYPES:
            raise ModuleProblem(f"{role} is {tensor.dtype}, and holds whole numbers")
        dtype, (rows, columns) = DTYPES[tensor.dtype][0], matrix_of(tensor.shape)
        found = self.tensors.raw_rows(stored, 0, rows, columns * dtype.itemsize)
        return found.view(dtype).reshape(tensor.shape).astype(np.int64)

    def base_shape(self, module: str = "") -> tuple[int, int]:
        """(rows, columns) of the weight in the base of this module, or of another: what the adapter does not tell.

        Raises:
            ModuleProblem: the base is not known, or has no such weight.
        """
        shape = self.shape_in_base(f"{module or self.name}.weight")
        if shape is None or len(shape) != 2 or 0 in shape:
            raise ModuleProblem("is as large as the base's, which is not known or has no such layer")
        return shape[0], shape[1]

    def setting(self, key: str, pattern: str = "") -> Any:
        """A setting of the method; with `pattern` ("rank_pattern"), as that one overrides it for this module."""
        return self.config.of_module(key, pattern, self.name)

    def _stored(self, role: str) -> str:
        return self.parts[role] if role in self.parts else self.shared[role]


@dataclass(frozen=True)
class About:
    """What a configuration says of an adapter as a whole.

    Attributes:
        metadata: keys for the GGUF adapter.
        not_merged: why it cannot be merged into its base, where it cannot.
    """

    metadata: Mapping[str, Value] = field(default_factory=dict)
    not_merged: tuple[str, ...] = ()


def scaled(values: Floats, scale: float) -> Floats:
    with np.errstate(over="ignore", invalid="ignore"):  # infinite values are refused by name
        return np.ascontiguousarray(values) * np.float32(scale)


@dataclass(frozen=True)
class Method:
    """A row of `METHODS`.

    Attributes:
        title: what people call it.
        paper: where it is described.
        parts: ending of a stored tensor's name (after the module's) to its role.
        read: the changes that a module's tensors stand for; raises ModuleProblem where they do not go together.
            None where the method is no change of weights, and `refusal` says why.
        needed: roles without which a module is broken.
        shared: stored name of a tensor that all modules share, after "base_model.", to its role; a beginning that
            ends in a dot stands for every such name, and its role for what begins with it ("v." for "v.0", "v.1" ...).
        settings: keys that say what the tensors mean.
        free: keys of training alone, beside `peft_settings.COMMON_FREE`.
        refused: keys that must be off, and what it means when they are on.
        about: what its settings say of the whole adapter.
    """

    title: str
    paper: str = ""
    parts: Mapping[str, str] = field(default_factory=dict)
    read: Callable[[Module], Iterable[Change]] | None = None
    needed: tuple[str, ...] = ()
    shared: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Setting] = field(default_factory=dict)
    free: tuple[str, ...] = ()
    refused: Mapping[str, str] = field(default_factory=dict)
    about: Callable[[PeftConfig], About] = lambda config: About()
    refusal: str = ""


def _rounded(values: Floats, role: str) -> Whole:
    if not np.isfinite(values).all() or np.any(values != np.rint(values)) or np.any(np.abs(values) >= 2**31):
        raise ModuleProblem(f"{role} holds other than whole numbers")
    return values.astype(np.int64)
