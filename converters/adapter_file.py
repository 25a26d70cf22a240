"""A GGUF adapter about to be written: pairs of A and B, what their storage type does to them, and the file.

Format: `llama_adapter_lora_init_impl`, src/llama-adapter.cpp in llama.cpp.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from math import inf, isfinite, sqrt
from pathlib import Path

import numpy as np

from converters.checkpoint import Floats
from converters.dequantize import dequantize_rows
from converters.errors import UnsupportedError
from converters.pairs import Pair
from converters.quant_types import RECIPES, TYPES, BlockType
from converters.quantize import Bytes, quantize_rows
from converters.stream import Progress, default_threads, in_order
from converters.tensor_kinds import EMBEDDING
from converters.writer import TensorSpec, Value, check_output, create, file_size, header_bytes

DTYPES = ("f32", "f16", "bf16", "q8_0")
F16_MAX = 65504.0
LARGEST = 1e18  # beyond it the square of a float32 is infinite
# By type, the largest value: that of F16, and what a block's F16 scale times 127 reaches.
MAXIMA = {"F16": F16_MAX, "Q8_0": 127 * F16_MAX}
# By type of the file, the largest error: rounding alone gives 2e-4 and up to 2e-2; above, values are too small for F16
# (below 6e-8 they become zero), which tensors and block scales of q8_0 are too, or their ranks cancel one another.
MAX_ERRORS = {"f16": 1e-3, "q8_0": 0.03}
SMALLEST_SUM = 1e-6  # of squared norms: what float32 tells from nothing
MOST_THREADS = 4  # each holds a pair
KEPT_BYTES = 256 << 20  # of encoded tensors that are kept from the check to the writing
RESIDUAL = "edgelora.adapter.residual_energy"  # float32 for each pair, likewise, where any was approximated
SCALES = "edgelora.adapter.scales"  # float32 for each pair, in the file's order; 0 where it has several


def check_dtype(dtype: str) -> None:
    """Raises UnsupportedError where an adapter's tensors cannot be of it."""
    if dtype.lower() not in DTYPES:
        raise UnsupportedError(f"unknown adapter dtype {dtype!r}", hint=f"Known: {', '.join(DTYPES)}.")


@dataclass(frozen=True)
class AdapterFile:
    """See the module.

    Attributes:
        dtype: of its tensors; "f32" where f16 or q8_0 was asked for and would have lost small values.
        rounding: the largest |stored - exact| / |exact| of a change, as rounding A and B leaves it.
        problems: values that cannot be stored.
        encoded: tensors that were encoded already, by name.
    """

    architecture: str
    pairs: tuple[Pair, ...]
    dtype: str
    rounding: float
    problems: tuple[str, ...]
    notices: tuple[str, ...]
    encoded: Mapping[str, Bytes] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, architecture: str, pairs: Sequence[Pair], dtype: str) -> AdapterFile:
        """Look at every value: none may be NaN, infinite, or beyond the type."""
        pairs, dtype = tuple(pairs), dtype.lower()
        check = _Check()
        threads = min(default_threads(), MOST_THREADS)
        with ThreadPoolExecutor(threads) as pool:
            for look in in_order(pool, (partial(_looked_at, pair, dtype) for pair in pairs), ahead=threads + 1):
                check.add(look)
        notices = [*check.notices]
        rounding = max(check.errors.values(), default=0.0)
        most = MAX_ERRORS.get(dtype, inf)
        if rounding > most and not check.problems:
            again = cls.of(architecture, pairs, "f32")
            notice = _too_small([tensor for tensor, error in check.errors.items() if error > most], rounding, dtype)
            notices = [each for each in notices if each in again.notices]
            return cls(architecture, pairs, "f32", again.rounding, (), (notice, *notices), again.encoded)
        return cls(architecture, pairs, dtype, rounding, tuple(check.problems), tuple(notices), check.encoded)

    @property
    def residual_energy(self) -> dict[str, float]:
        return {pair.tensor: pair.residual_energy for pair in self.pairs if pair.residual_energy}

    @property
    def module_scales(self) -> dict[str, list[float]]:
        """Kind of tensor ("attn_q") to the scales that occur."""
        found: dict[str, set[float]] = {}
        for pair in self.pairs:
            found.setdefault(pair.tensor.removesuffix(".weight").rpartition(".")[2], set()).update(pair.scales)
        return {kind: sorted(scales) for kind, scales in found.items()}

    def write(
        self,
        out: Path,
        metadata: Mapping[str, Value],
        inputs: Iterable[Path],
        progress: Progress | None,
        *,
        force: bool,
    ) -> int:
        """Write it; returns its size in bytes.

        Raises:
            WriteError, OutputExistsError: it cannot be written.
        """
        specs = [spec for pair in self.pairs for spec, _ in specs_of(pair, self.dtype)]
        header = header_bytes({**self._keys(), **metadata}, specs)
        total = file_size(header, specs)
        check_output(out, total, force=force, inputs=inputs)
        done = len(header)
        with create(out, header) as file:
            for spec, data in self._tensors():
                file.write(data.data)
                done += data.nbytes + file.end_tensor(spec)
                if progress:
                    progress(done, total, spec.name)
        return total

    def _tensors(self) -> Iterator[tuple[TensorSpec, Bytes]]:
        for pair in self.pairs:
            specs = [spec for spec, _ in specs_of(pair, self.dtype)]
            if all(spec.name in self.encoded for spec in specs):
                yield from ((spec, self.encoded[spec.name]) for spec in specs)
            else:
                for spec, values in zip(specs, pair.stored(), strict=True):
                    yield spec, _encode(values, spec.block_type)

    def _keys(self) -> dict[str, Value]:
        scales = [pair.scales[0] if len(pair.scales) == 1 else 0.0 for pair in self.pairs]
        return {
            "general.architecture": self.architecture,
            "general.type": "adapter",
            "adapter.type": "lora",
            "adapter.lora.alpha": 0.0,
            "general.file_type": RECIPES[self.dtype].file_type,
            "general.quantization_version": 2,
            SCALES: scales,
            **({RESIDUAL: [pair.residual_energy for pair in self.pairs]} if self.residual_energy else {}),
        }


@dataclass(frozen=True)
class _Look:
    """What one type does to the values of one pair.

    Attributes:
        error: of the change, see `AdapterFile.rounding`.
        encoded: both tensors, by name.
        plain: why tensors are of a plain type instead.
    """

    pair: Pair
    error: float
    is_zero: bool
    problems: tuple[str, ...]
    encoded: Mapping[str, Bytes]
    plain: tuple[str, ...]


class _Check:
    """What one type does to the values of all pairs."""

    def __init__(self) -> None:
        self.errors: dict[str, float] = {}
        self.problems: list[str] = []
        self.encoded: dict[str, Bytes] = {}
        self._kept = 0
        self._all_zero = True
        self._plain: set[str] = set()

    def add(self, look: _Look) -> None:
        self.errors[look.pair.tensor] = look.error
        self.problems += look.problems
        self._all_zero &= look.is_zero
        self._plain.update(look.plain)
        n_bytes = sum(data.nbytes for data in look.encoded.values())
        if self._kept + n_bytes <= KEPT_BYTES:
            self.encoded.update(look.encoded)
            self._kept += n_bytes

    @property
    def notices(self) -> list[str]:
        untrained = ["every B is zero: this adapter changes nothing (was it trained?)"] if self._all_zero else []
        return [*untrained, *sorted(self._plain)]


def _looked_at(pair: Pair, dtype: str) -> _Look:
    """Load a pair and encode it; runs in a thread."""
    loaded, specs = pair.stored(), specs_of(pair, dtype)
    encoded = [_encoded(spec, values) for (spec, _), values in zip(specs, loaded, strict=True)]
    sizes = [(norm, error) for _, norm, error in encoded]
    largest, problems = max(error / norm if norm else 0.0 for norm, error in sizes), []
    # A value that is not finite, or becomes so, makes its sum of squares so: only then is it looked for.
    if not np.isfinite(sizes).all():
        sides = zip("AB", specs, loaded, strict=True)
        problems = [*filter(None, (_problem(pair, side, spec, values) for side, (spec, _), values in sides))]
    return _Look(
        pair,
        error=largest * _amplification(pair, *loaded) if largest else 0.0,
        is_zero=any(norm == 0.0 for norm, _ in sizes),
        problems=tuple(problems),
        encoded={spec.name: data for (spec, _), (data, _, _) in zip(specs, encoded, strict=True)},
        plain=tuple(reason for _, reason in specs if reason),
    )


def _encoded(spec: TensorSpec, values: Floats) -> tuple[Bytes, float, float]:
    """A tensor, its norm, and that of what its type rounds away."""
    assert values.shape == spec.shape, f"{spec.name}: placed as {values.shape}, and {spec.shape} were announced"
    data = _encode(values, spec.block_type)
    if spec.block_type.name == "F32":
        return data, _norm(values), 0.0
    rounded = dequantize_rows(data, spec.block_type, values.shape[-1]).reshape(values.shape)
    with np.errstate(invalid="ignore"):
        rounded -= values
    return data, _norm(values), _norm(rounded)


def _amplification(pair: Pair, first: Floats, second: Floats) -> float:
    """How much larger the error of B @ A is than those of B and A: above 1 where its ranks cancel one another.

    The squared norms of the ranks, each for itself, over that of their sum: of B @ A, or the sum of (B.T @ B) *
    (A @ A.T), whichever is smaller to build. Those two hold the squared norms of the ranks on their diagonals.
    """
    b, a = (first, second.T) if pair.tensor == EMBEDDING else (second, first)
    with np.errstate(over="ignore", invalid="ignore"):
        if pair.rank > max(b.shape[-2], a.shape[-1]):
            apart = float((np.square(b).sum(axis=-2) * np.square(a).sum(axis=-1)).sum())
            together = float(np.square(b @ a).sum())
        else:
            products = (np.swapaxes(b, -1, -2) @ b) * (a @ np.swapaxes(a, -1, -2))
            apart, together = float(np.trace(products, axis1=-2, axis2=-1).sum()), float(products.sum())
    if not isfinite(apart) or apart <= together:
        return 1.0
    return sqrt(apart / max(together, apart * SMALLEST_SUM))


def _norm(values: Floats) -> float:
    flat = np.ascontiguousarray(values).reshape(-1)
    with np.errstate(over="ignore", invalid="ignore"):
        square = float(np.dot(flat, flat))
    return sqrt(square) if isfinite(square) else square


def _problem(pair: Pair, letter: str, spec: TensorSpec, values: Floats) -> str:
    largest = float(np.abs(values).max())  # NaN if there is one
    if not isfinite(largest):
        return f"{pair.tensor}: {letter} holds NaN or infinite values"
    if largest > MAXIMA.get(spec.block_type.name, inf):
        name = spec.block_type.name.lower()
        return f"{pair.tensor}: {letter} reaches {largest:.3g}, too large for {name}; use f32 or bf16"
    return f"{pair.tensor}: {letter} reaches {largest:.3g}, too large for any use" if largest > LARGEST else ""


def _too_small(tensors: Sequence[str], error: float, dtype: str) -> str:
    names = ", ".join(tensors[:3]) + (f" and {len(tensors) - 3} more" if len(tensors) > 3 else "")
    why = "its values are too small, or cancel one another"
    return f"written as f32: {dtype} would change {names} by up to {error:.1%}, {why}"


def specs_of(pair: Pair, dtype: str) -> list[tuple[TensorSpec, str]]:
    """A and B as the file has them, and why one of them is not of the type that was asked for."""
    return [_spec(f"{pair.tensor}.lora_{side}", shape, dtype) for side, shape in zip("ab", pair.shapes, strict=True)]


def _spec(name: str, shape: tuple[int, ...], dtype: str) -> tuple[TensorSpec, str]:
    block_type = TYPES[dtype.upper()]
    if shape[-1] % block_type.block:
        reason = f"tensors whose rows are no multiple of {block_type.block} values are f16 (rank {shape[-1]})"
        return TensorSpec(name, shape, TYPES["F16"]), reason
    return TensorSpec(name, shape, block_type), ""


def _encode(values: Floats, block_type: BlockType) -> Bytes:
    return quantize_rows(np.ascontiguousarray(values).reshape(-1, values.shape[-1]), block_type)
