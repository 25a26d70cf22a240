"""What is checked before llama.cpp sees a file: it can end the process on an adapter that does not fit.

llama.cpp itself compares the architecture and two of the dimensions (`src/llama-adapter.cpp`); a wrong value type, rank
or expert count, or an embedding adapter on tied weights, is an assertion that kills the process at load or at the first
decode, and trained norms are dropped without a word. All of it is refused here, in one message.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path

from converters.base_file import read_base_header
from converters.errors import ConversionError
from converters.reader import GGUFHeader, TensorInfo, read_header
from edgelora.contract import Contract
from edgelora.errors import BaseMismatchError, ModelFileError
from edgelora.repaired_base import other_weights

MAX_PROBLEMS_SHOWN = 8
UINT32, STRING, FLOAT32 = 4, 8, 6  # GGUF value types
READ_BYTES = 1 << 20
_VALUE_TYPES = {
    "general.type": STRING,
    "general.architecture": STRING,
    "adapter.type": STRING,
    "adapter.lora.alpha": FLOAT32,
}
WEIGHT_TYPES = (  # what ggml multiplies with; integers and F64 are a crash
    *("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"),
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"),
)
INVOCATION = "adapter.alora.invocation_tokens"
_HINTS = {
    "base": "This is an adapter: give it with --adapter, and its base with --base.",
    "adapter": "This is a base: give it with --base.",
}
Pair = tuple[TensorInfo | None, TensorInfo | None]


def read_checked(path: Path, kind: str) -> GGUFHeader:
    """The header of a GGUF that must be a `kind` ("base" or "adapter"); of all parts of a base that is split.

    Raises:
        ModelFileError: missing, a folder, not GGUF, truncated, or the other kind.
    """
    if path.is_dir():
        raise ModelFileError(
            f"{path}: a folder, expected a GGUF {kind}", hint=f"Convert it first: `edgelora convert {path}`."
        )
    try:
        header = read_base_header(path) if kind == "base" else read_header(path)
        _ = header.architecture
    except ConversionError as error:
        raise ModelFileError(error.message, hint=error.hint) from None
    if header.kind != kind:
        raise ModelFileError(f"{path}: expected a GGUF {kind}, this is a GGUF {header.kind}", hint=_HINTS[kind])
    return header


def check_adapter(adapter: GGUFHeader, base: GGUFHeader) -> None:
    """Every value and tensor that llama.cpp would stumble over.

    Raises:
        BaseMismatchError: tensors or architecture that do not fit this base.
        ModelFileError: an adapter that fits no base, or of a kind that cannot be run.
    """
    if broken := [*_metadata_problems(adapter), *_pair_problems(adapter)]:
        raise ModelFileError(listed(f"{adapter.path}: cannot be used as an adapter", broken), hint="Convert it again.")
    if misfits := list(_misfits(adapter, base)):
        raise BaseMismatchError(
            listed(f"{adapter.path} does not fit the base {base.path}", misfits),
            hint=_wanted_base(Contract.from_metadata(adapter.metadata, str(adapter.path))),
        )


def check_fingerprint(contract: Contract, adapter: Path, base: GGUFHeader) -> None:
    """The base's fingerprint is the one the adapter was made for.

    Raises:
        BaseMismatchError: it is another.
    """
    found = base_fingerprint(base.path)
    if contract.base_fingerprint and found != contract.base_fingerprint:
        name = base.metadata.get("general.name") or base.path.stem
        raise BaseMismatchError(
            f"{adapter} was made for {contract.base_name or 'another base'} (fingerprint "
            f"{contract.base_fingerprint[:12]}); {base.path} is {name} (fingerprint {found[:12]})",
            hint=_wanted_base(contract) + " To use it all the same, with answers that may be wrong: --force.",
        )


def check_repair(contract: Contract, adapter: Path, base: GGUFHeader) -> None:
    """The base's weights are those that the adapter's ranks repair, where it repairs any.

    Raises:
        BaseMismatchError: they are others.
    """
    if problem := other_weights(contract, base.path):
        raise BaseMismatchError(
            f"{adapter}: {problem}",
            hint="Convert it for this base: edgelora convert ADAPTER --base BASE.gguf --repair-rank N; or without a "
            "repair, for all quantizations.",
        )


def _wanted_base(contract: Contract | None) -> str:
    name = contract.base_name if contract and contract.base_name else "the base it was trained on"
    return f"Give {name} with --base."


def _metadata_problems(adapter: GGUFHeader) -> Iterator[str]:
    metadata = adapter.metadata
    for key, wanted in _VALUE_TYPES.items():
        if key not in metadata:
            if key != "adapter.lora.alpha":
                yield f"{key} is missing"
        elif metadata.raw(key).kind != wanted:
            yield f"{key} has GGUF type {metadata.raw(key).kind}, expected {wanted}"
        elif key == "adapter.lora.alpha" and not math.isfinite(metadata[key]):
            yield f"{key} is {metadata[key]}, expected a finite number"
        elif key == "adapter.type" and metadata[key] != "lora":
            yield f"adapter.type is {metadata[key]!r}, expected 'lora'"
    if INVOCATION in metadata and (metadata.raw(INVOCATION).item_kind != UINT32 or not metadata[INVOCATION]):
        yield f"{INVOCATION} is {metadata[INVOCATION]!r}, expected the numbers of tokens (uint32)"


def pairs_of(adapter: GGUFHeader) -> dict[str, Pair]:
    """Base tensor's name to its A and B; other tensors are left out."""
    found: dict[str, Pair] = {}
    for name, tensor in adapter.tensors.items():
        target, _, side = name.rpartition(".lora_")
        if side in ("a", "b"):
            a, b = found.get(target, (None, None))
            found[target] = (tensor, b) if side == "a" else (a, tensor)
    return found


def _pair_problems(adapter: GGUFHeader) -> Iterator[str]:
    for name, tensor in adapter.tensors.items():
        if tensor.type_name not in WEIGHT_TYPES:
            yield f"{name} has type {tensor.type_name}, which llama.cpp cannot compute with in an adapter"
        if name.endswith("_norm.weight"):
            yield f"{name}: a trained norm, which llama.cpp would drop without a word"
        elif not name.endswith((".lora_a", ".lora_b")):
            yield f"{name}: not a LoRA tensor"
    pairs = pairs_of(adapter)
    if not pairs:
        yield "no LoRA tensors"
    for target, (a, b) in pairs.items():
        if a is None or b is None:
            yield f"{target}: lora_{'a' if a is None else 'b'} is missing"
        elif _rank(target, a) != b.shape[-1] or len(a.shape) < 2:
            yield f"{target}: A {_shape(a)} and B {_shape(b)} do not share a rank"


def _rank(target: str, a: TensorInfo) -> int:
    # A of token_embd is stored transposed, (vocabulary, rank): it is looked up by row.
    return a.shape[-1] if target == "token_embd.weight" else a.shape[-2] if len(a.shape) > 1 else 0


def _misfits(adapter: GGUFHeader, base: GGUFHeader) -> Iterator[str]:
    if adapter.architecture != base.architecture:
        yield f"architecture: adapter {adapter.architecture}, base {base.architecture}"
    for target, (a, b) in pairs_of(adapter).items():
        weight = base.tensors.get(target)
        if weight is None or a is None or b is None:
            yield f"{target}: the base has no such tensor" + (
                " (its output is tied)" if target == "output.weight" else ""
            )
        elif (made_for := _weight_shape(target, a, b)) != weight.shape:
            yield f"{target}: adapter {'x'.join(map(str, made_for))}, base {_shape(weight)}"
        elif weight.type_name.lower() == "nvfp4":
            yield f"{target}: the base is NVFP4, on which llama.cpp cannot apply adapters"
        elif target == "token_embd.weight" and "output.weight" not in base.tensors:
            yield (
                f"{target}: the base's embedding is tied to its output, on which llama.cpp cannot apply an adapter "
                "(`edgelora convert BASE --untie` makes a base where it is not)"
            )


def _weight_shape(target: str, a: TensorInfo, b: TensorInfo) -> tuple[int, ...]:
    """The shape, in numpy order, of the weight that B @ A was made for; experts lead."""
    if target == "token_embd.weight":
        return (a.shape[-2], b.shape[-2])
    experts = a.shape[:-2] if a.shape[:-2] == b.shape[:-2] else (-1,)
    return (*experts, b.shape[-2], a.shape[-1])


def _shape(tensor: TensorInfo) -> str:
    return "x".join(map(str, tensor.shape))


def listed(title: str, problems: list[str]) -> str:
    """All problems in one message; the first eight by name."""
    shown = problems[:MAX_PROBLEMS_SHOWN]
    rest = [f"and {len(problems) - len(shown)} more"] if len(problems) > len(shown) else []
    return f"{title} ({len(problems)} problem{'s' * (len(problems) > 1)}): " + "; ".join([*shown, *rest])


def content_hash(path: Path) -> str:
    """SHA-256 of a file, in hex; computed once for each state (size, modification time) of it.

    Raises:
        ModelFileError: it cannot be read.
    """
    try:
        stat = path.stat()
        return _content_hash(path.resolve(), stat.st_size, stat.st_mtime_ns)
    except OSError as error:
        raise ModelFileError(f"{path}: cannot be read ({error.strerror})") from None


@lru_cache(maxsize=4096)
def _content_hash(path: Path, _size: int, _mtime_ns: int) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while data := file.read(READ_BYTES):
            digest.update(data)
    return digest.hexdigest()


def base_fingerprint(path: Path) -> str:
    """`converters.fingerprint` of a base; computed once for each state of the file.

    Raises:
        ModelFileError: it cannot be read.
    """
    try:
        stat = path.stat()
        return _fingerprint(path.resolve(), stat.st_size, stat.st_mtime_ns)
    except OSError as error:
        raise ModelFileError(f"{path}: cannot be read ({error.strerror})") from None
    except ConversionError as error:
        raise ModelFileError(error.message, hint=error.hint) from None


@lru_cache(maxsize=256)
def _fingerprint(path: Path, _size: int, _mtime_ns: int) -> str:
    from converters.fingerprint import fingerprint

    return fingerprint(path)


# Type to the unsigned integer of its bits, and its exponent's, which are all set in NaN and in infinity.
_EXPONENTS: Mapping[str, tuple[str, int]] = {
    "F32": ("<u4", 0x7F800000),
    "F16": ("<u2", 0x7C00),
    "BF16": ("<u2", 0x7F80),
}


def check_finite(adapter: GGUFHeader, data: bytes) -> None:
    """No weight is NaN or infinite: such an adapter makes every logit NaN, and sampling from them is undefined.

    Args:
        data: the whole file.

    Raises:
        ModelFileError: naming the tensors.
    """
    import numpy as np

    broken = []
    for tensor in adapter.tensors.values():
        if layout := _EXPONENTS.get(tensor.type_name):
            dtype, exponent = layout
            width = np.dtype(dtype).itemsize
            bits = np.frombuffer(data, dtype, count=tensor.size_bytes // width, offset=tensor.offset)
            if ((bits & exponent) == exponent).any():
                broken.append(tensor.name)
    if broken:
        raise ModelFileError(listed(f"{adapter.path}: weights that are not finite numbers", broken))
