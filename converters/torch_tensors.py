"""Tensors as a pickle of torch describes them, and the few functions that a state dict's pickle calls to make them.

Each function here only notes what it was given, after checking it: a tensor is a view of a storage, and the storage's
numbers lie in a member of the file of their own.

    _rebuild_tensor_v2(Storage("0", "F32", 12), 4, (2, 4), (4, 1), False, {})
    -> PickledTensor("F32", Storage("0", "F32", 12), offset=4, shape=(2, 4), strides=(4, 1))

Format: torch/_utils.py, https://github.com/pytorch/pytorch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, TypeGuard

from converters.safetensors_file import ITEM_BITS, MAX_DIMENSIONS

BYTES = ""  # the dtype of a storage that does not tell it
MAX_REPEATED = 2**24  # numbers of a tensor that shows those of its storage more than once
STORAGES: Mapping[str, str] = {
    "torch.DoubleStorage": "F64", "torch.FloatStorage": "F32", "torch.HalfStorage": "F16",
    "torch.BFloat16Storage": "BF16", "torch.LongStorage": "I64", "torch.IntStorage": "I32",
    "torch.ShortStorage": "I16", "torch.CharStorage": "I8", "torch.ByteStorage": "U8", "torch.BoolStorage": "BOOL",
    "torch.ComplexFloatStorage": "C64", "torch.storage.UntypedStorage": BYTES,
}  # fmt: skip
# Types that have no storage class of their own.
DTYPES: Mapping[str, str] = {
    "torch.uint64": "U64", "torch.uint32": "U32", "torch.uint16": "U16", "torch.float8_e4m3fn": "F8_E4M3",
    "torch.float8_e5m2": "F8_E5M2", "torch.float8_e8m0fnu": "F8_E8M0", "torch.float8_e4m3fnuz": "F8_E4M3FNUZ",
    "torch.float8_e5m2fnuz": "F8_E5M2FNUZ",
}  # fmt: skip
# What torch can save and this cannot read, by the function that would make it.
FOREIGN: Mapping[str, str] = {
    "torch._utils._rebuild_qtensor": "quantized tensors",
    "torch._utils._rebuild_sparse_tensor": "sparse tensors",
    "torch._utils._rebuild_nested_tensor": "nested tensors",
    "torch._utils._rebuild_meta_tensor_no_storage": "tensors without values (on the meta device)",
    "torch._utils._rebuild_device_tensor_from_numpy": "tensors in another device's format",
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": "tensors in another device's format",
    "torch._utils._rebuild_wrapper_subclass": "tensors of a class of their own",
    "torch._tensor._rebuild_from_type_v2": "tensors of a class of their own",
    "torch._utils._rebuild_tensor": "tensors as torch before 0.4 wrote them",
    "torch.ComplexDoubleStorage": "complex numbers of 128 bits",
}


class BrokenPickleError(Exception):
    """It contradicts itself; without the file's name, which the caller knows."""


class ForbiddenError(Exception):
    """What is not read here: code, or tensors of another kind; without the file's name."""


@dataclass(frozen=True)
class Global:
    """A name that unpickling would import: "torch.FloatStorage"."""

    name: str


@dataclass(frozen=True)
class Storage:
    """Numbers in a member of the file.

    Attributes:
        dtype: as safetensors names it; `BYTES` if only the tensors on it tell, and `count` is of bytes.
    """

    key: str
    dtype: str
    count: int

    @property
    def size_bytes(self) -> int:
        return self.count * (ITEM_BITS[self.dtype] // 8 if self.dtype else 1)


@dataclass(frozen=True)
class PickledTensor:
    """A view of a storage, within its bounds; `offset` and `strides` count numbers."""

    dtype: str
    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def item_bytes(self) -> int:
        return ITEM_BITS[self.dtype] // 8

    @property
    def span(self) -> int:
        """Numbers of the storage from its first to its last, both included."""
        if 0 in self.shape:
            return 0
        return 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))

    @property
    def is_contiguous(self) -> bool:
        steps = [(size, prod(self.shape[place + 1 :])) for place, size in enumerate(self.shape)]
        pairs = zip(steps, self.strides, strict=True)
        return 0 in self.shape or all(stride == step for (size, step), stride in pairs if size > 1)


def storage_of(identity: tuple[Any, ...]) -> Storage:
    """The storage that a persistent id stands for: ("storage", its class, its member, its device, its size)."""
    if len(identity) != 5 or identity[0] != "storage" or not isinstance(identity[1], Global):
        raise ForbiddenError("refers to something outside of it that is no storage")
    _, kind, key, _, count = identity
    if kind.name not in STORAGES or type(key) is not str or not _is_whole(count):
        raise BrokenPickleError("describes a storage that cannot be")
    return Storage(key, STORAGES[kind.name], count)


def _tensor(arguments: tuple[Any, ...]) -> PickledTensor:
    """(storage, offset, shape, strides, requires_grad, hooks, metadata)"""
    storage, offset, shape, strides, hooks, metadata = _given(arguments, (0, 1, 2, 3, 5), 6)
    if type(storage) is not Storage or storage.dtype == BYTES:
        raise BrokenPickleError("describes a tensor without a storage of its type")
    return _view(PickledTensor(storage.dtype, storage, offset, shape, strides), hooks, metadata)


def _tensor_of_bytes(arguments: tuple[Any, ...]) -> PickledTensor:
    """(storage, offset, shape, strides, requires_grad, hooks, dtype, metadata)"""
    storage, offset, shape, strides, hooks, kind, metadata = _given(arguments, (0, 1, 2, 3, 5, 6), 7)
    if type(storage) is not Storage or type(kind) is not Global or kind.name not in DTYPES:
        raise BrokenPickleError("describes a tensor without a storage or a type")
    return _view(PickledTensor(DTYPES[kind.name], storage, offset, shape, strides), hooks, metadata)


def _given(arguments: tuple[Any, ...], needed: tuple[int, ...], optional: int) -> list[Any]:
    """Some of a function's arguments, and its last one, which may be left out."""
    if len(arguments) not in (optional, optional + 1):
        raise BrokenPickleError("describes a tensor that cannot be")
    return [*(arguments[place] for place in needed), arguments[optional] if len(arguments) > optional else None]


def _view(view: PickledTensor, hooks: Any, metadata: Any) -> PickledTensor:
    shape, strides = view.shape, view.strides
    if not _is_whole(view.offset) or not _are_whole(shape) or not _are_whole(strides) or len(shape) != len(strides):
        raise BrokenPickleError("describes a tensor that cannot be")
    if hooks or metadata:
        raise ForbiddenError("holds tensors with hooks, or conjugate or negative views")
    if (view.offset + view.span) * view.item_bytes > view.storage.size_bytes:
        raise BrokenPickleError(f"describes a tensor {shape} that lies outside of its storage")
    if prod(shape) > max(view.span, MAX_REPEATED):
        raise ForbiddenError(f"holds a tensor {shape} that repeats {view.span} numbers")
    return view


def _parameter(arguments: tuple[Any, ...]) -> PickledTensor:
    """(tensor, requires_grad, hooks) and, in one of two forms, attributes that a model gave it."""
    if len(arguments) not in (3, 4) or type(arguments[0]) is not PickledTensor:
        raise BrokenPickleError("describes a parameter that cannot be")
    return arguments[0]


def _dictionary(arguments: tuple[Any, ...]) -> dict[Any, Any]:
    if arguments:
        raise BrokenPickleError("makes a dictionary of something")
    return {}


CALLS: Mapping[str, Callable[[tuple[Any, ...]], Any]] = {
    "collections.OrderedDict": _dictionary,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_of_bytes,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
}
NAMES = frozenset((*CALLS, *STORAGES, *DTYPES))


def _is_whole(value: object) -> TypeGuard[int]:
    return type(value) is int and 0 <= value < 2**63


def _are_whole(values: object) -> TypeGuard[tuple[int, ...]]:
    return type(values) is tuple and len(values) <= MAX_DIMENSIONS and all(map(_is_whole, values))
