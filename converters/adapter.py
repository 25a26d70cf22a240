"""A PEFT adapter folder to a GGUF adapter that fits one base.

llama.cpp applies `alpha / rank` to a whole adapter, or nothing where alpha is 0. So every module's own scale goes into
its B, in float32, and alpha is 0: rank-stabilized LoRA, rank patterns and alpha patterns come out exact. B's rows take
the row order of the weight they change. Everything that a GGUF adapter cannot hold is refused, all in one message.

Format: `llama_adapter_lora_init_impl`, src/llama-adapter.cpp in llama.cpp.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from converters.architectures import Family, Place, Sizes, find_gguf_family
from converters.base import Progress
from converters.base_file import read_base_header
from converters.checkpoint import Checkpoint, Floats, Tensors, missing_weights
from converters.errors import BaseMismatchError, FormatError, UnsupportedAdapterError, UnsupportedError, listed
from converters.fingerprint import fingerprint_of, fingerprint_of_header
from converters.methods import METHODS, Factors
from converters.model import norms, understand
from converters.model_card import describe
from converters.peft_config import PeftConfig, read_peft_config
from converters.quant_types import RECIPES, TYPES, BlockType, tensor_order
from converters.quantize import quantize_rows
from converters.safetensors_file import read_tensors
from converters.writer import TensorSpec, Value, check_output, create, file_size, header_bytes

WEIGHTS = "adapter_model.safetensors"
DTYPES = ("f32", "f16", "bf16")
F16_MAX = 65504.0
F16_ERROR = 1e-3  # rounding alone gives 2e-4; above, values are too small for f16 (below 6e-8 they become zero)


@dataclass(frozen=True)
class AdapterReport:
    """What was written.

    Attributes:
        ranks: the ranks that occur; likewise `scales`, what PEFT multiplies B @ A by.
        targets: the kinds of modules it changes ("q_proj", "up_proj").
        dtype: of its tensors; "f32" where f16 was asked for and would have lost small values.
        max_relative_error: of the stored A and B of any module, |stored - exact| / |exact|; measured.
    """

    path: Path
    size_bytes: int
    n_tensors: int
    ranks: tuple[int, ...]
    scales: tuple[float, ...]
    targets: tuple[str, ...]
    base_name: str
    base_fingerprint: str
    dtype: str
    seconds: float
    max_relative_error: float = 0.0
    notices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Base:
    """What an adapter needs to know of its base, from an HF folder or a GGUF file.

    Attributes:
        shapes: GGUF name to shape in numpy order, of every tensor the base has.
    """

    name: str
    family: Family
    sizes: Sizes
    shapes: Mapping[str, tuple[int, ...]]
    fingerprint: str


def read_base(path: Path) -> Base:
    """Look at a base without reading its weights (but for the norms).

    Raises:
        ConversionError: it is not a base, is broken, or of an unknown family.
    """
    return _base_of_folder(path) if path.is_dir() else _base_of_gguf(path)


def _base_of_folder(folder: Path) -> Base:
    with Checkpoint(folder) as checkpoint:
        model = understand(checkpoint)
        shapes = {name: view.shape for name, view in model.views.items()}
        hashed = fingerprint_of(model.sizes, model.vocabulary.tokens, norms(model))
    name = str(describe(folder, model.family.architecture, shapes)["general.name"])
    return Base(name, model.family, model.sizes, shapes, hashed)


def _base_of_gguf(path: Path) -> Base:
    header = read_base_header(path)
    if header.kind == "adapter":
        raise FormatError(f"{path}: is an adapter; an adapter is converted against a base")
    family = find_gguf_family(header.architecture, path)
    shapes = {name: tensor.shape for name, tensor in header.tensors.items()}
    if "token_embd.weight" not in shapes:
        raise FormatError(f"{path}: has no token_embd.weight")
    sizes = Sizes(header.architecture, shapes["token_embd.weight"][0], header.metadata)
    name = str(header.metadata.get("general.name") or path.stem)
    return Base(name, family, sizes, shapes, fingerprint_of_header(header))


@dataclass(frozen=True)
class Target:
    """One weight of the base and what the adapter does to it."""

    place: Place
    factors: Factors

    def load(self, sizes: Sizes) -> tuple[Floats, Floats]:
        """(A, B) as llama.cpp wants them: B's rows and A's columns in the base's order; an embedding's A transposed."""
        a, b = self.factors.load_a(), self.factors.load_b()
        order, columns = self.place.row_order(sizes), self.place.column_order(sizes)
        if self.factors.is_embedding:
            return np.ascontiguousarray(a.T), b
        return a if columns is None else a[:, columns], b if order is None else b[order]

    def specs(self, block_type: BlockType) -> tuple[TensorSpec, TensorSpec]:
        rows, columns = self.factors.shape
        rank, name = self.factors.rank, self.place.gguf_name
        shapes = ((rows, rank), (columns, rank)) if self.factors.is_embedding else ((rank, columns), (rows, rank))
        return TensorSpec(f"{name}.lora_a", shapes[0], block_type), TensorSpec(f"{name}.lora_b", shapes[1], block_type)


def convert_adapter(
    folder: Path,
    base: Path,
    out: Path,
    *,
    dtype: str = "f16",
    metadata: Mapping[str, Value] | None = None,
    progress: Progress | None = None,
    force: bool = False,
) -> AdapterReport:
    """Convert a PEFT folder.

    Args:
        folder: adapter_config.json and adapter_model.safetensors.
        base: the base it was trained on: an HF folder, or a GGUF file of any quantization.
        out: the GGUF adapter to write.
        dtype: of its tensors, "f32", "f16" or "bf16"; f16 becomes f32 where it would lose small values.
        metadata: more keys for the file; they win.
        force: overwrite `out`.

    Raises:
        UnsupportedAdapterError: what cannot be converted exactly; every reason in one message.
        BaseMismatchError: tensors that do not fit this base.
        ConversionError: files that are missing or broken, or a failure to write.
    """
    started = time.monotonic()
    folder, out = Path(folder), Path(out)
    _block_type(dtype)
    config, tensors = read_peft_config(folder), _open(folder)
    known = read_base(Path(base))
    with tensors:
        targets = _targets(folder, config, tensors, known, dtype)
        dtype, error, lossy = _exact_enough(targets, dtype)
        block_type = _block_type(dtype)
        specs = [spec for target in targets for spec in target.specs(block_type)]
        pairs = {**_metadata(folder, known, dtype), **(metadata or {})}
        header = header_bytes(pairs, specs)
        check_output(out, file_size(header, specs), force=force, inputs=_inputs(folder, Path(base)))
        notices = (*lossy, *_notices(targets))
        _write(out, header, targets, known.sizes, block_type, progress)
    return AdapterReport(
        path=out,
        size_bytes=file_size(header, specs),
        n_tensors=len(specs),
        ranks=tuple(sorted({target.factors.rank for target in targets})),
        scales=tuple(sorted({target.factors.scale for target in targets})),
        targets=tuple(sorted({target.factors.module.rpartition(".")[2] for target in targets})),
        base_name=known.name,
        base_fingerprint=known.fingerprint,
        dtype=dtype.lower(),
        seconds=time.monotonic() - started,
        max_relative_error=error,
        notices=notices,
    )


def _inputs(folder: Path, base: Path) -> list[Path]:
    return [*folder.iterdir(), *(base.iterdir() if base.is_dir() else [base])]


def _block_type(dtype: str) -> BlockType:
    if dtype.lower() not in DTYPES:
        raise UnsupportedError(f"unknown adapter dtype {dtype!r}", hint=f"Known: {', '.join(DTYPES)}.")
    return TYPES[dtype.upper()]


def _open(folder: Path) -> Tensors:
    if not (folder / WEIGHTS).is_file():
        raise missing_weights(folder, WEIGHTS)
    return Tensors(read_tensors(folder / WEIGHTS))


def _targets(folder: Path, config: PeftConfig, tensors: Tensors, base: Base, dtype: str) -> list[Target]:
    """Every module of the adapter with its place in the base, in llama.cpp's order of tensors."""
    if config.peft_type not in METHODS:
        raise UnsupportedAdapterError(
            f"{folder}: peft_type is {config.peft_type!r}, which a GGUF adapter cannot hold",
            hint=f"These methods convert: {', '.join(METHODS)}.",
        )
    factors, problems = METHODS[config.peft_type](config, tensors)
    problems = [*config.problems, *problems, *_halves(config, tensors, base.family)]
    targets, misfits = [], []
    for each in factors:
        place = base.family.from_hf(f"{each.module}.weight")
        if place and not place.row.adaptable:
            problems.append(f"{each.module}: llama.cpp's {base.family.architecture} never applies an adapter to it")
        elif problem := _misfit(each, place, base):
            misfits.append(problem)
        elif place:
            targets.append(Target(place, each))
    problems += [problem for target in targets for problem in _bad_values(target, dtype)]
    if problems:
        raise UnsupportedAdapterError(
            f"{folder}: cannot be converted exactly:{listed([*problems, *misfits])}",
            hint="Nothing was written. Train it as plain LoRA, or serve it merged into its base.",
        )
    if misfits:
        raise BaseMismatchError(
            f"{folder}: {len(misfits)} modules do not fit the base {base.name}:{listed(misfits)}",
            hint=_UNTIE_HINT
            if any(_TIED in misfit for misfit in misfits)
            else f"It was trained on {config.base_model or 'a base it does not name'}: give that one.",
        )
    if not targets:
        raise FormatError(f"{folder / WEIGHTS}: holds no LoRA tensors")
    return sorted(targets, key=lambda target: tensor_order(target.place.gguf_name))


def _halves(config: PeftConfig, tensors: Tensors, family: Family) -> list[str]:
    """Target modules that this family has and the file has nothing of: a part of the adapter is missing."""
    known = {module.rpartition(".")[2] for row in family.rows for module in row.modules}
    wanted = [name for name in config.target_modules if name.rpartition(".")[2] in known]
    absent = [name for name in wanted if not any(f".{name}.lora_" in tensor for tensor in tensors.tensors)]
    return [f"target_modules has {name!r}, and no tensor belongs to it" for name in absent]


_TIED = "the base ties its embeddings"
_UNTIE_HINT = "Give a base that does not, with --base: `edgelora convert BASE --untie` makes one."


def _misfit(factors: Factors, place: Place | None, base: Base) -> str:
    if place is None:
        return f"{factors.module}: no module of a {base.family.architecture} model"
    is_tied = "output.weight" not in base.shapes
    if is_tied and place.gguf_module in ("token_embd", "output"):
        return f"{factors.module}: {_TIED}, and llama.cpp cannot adapt one tensor in two places"
    shape = base.shapes.get(place.gguf_name)
    if shape is None:
        return f"{factors.module}: the base has no {place.gguf_name}"
    if shape != factors.shape:
        return f"{factors.module}: the adapter is for {_times(factors.shape)}, {place.gguf_name} is {_times(shape)}"
    if factors.is_embedding != (place.gguf_module == "token_embd"):
        return f"{factors.module}: has the factors of {'an embedding' if factors.is_embedding else 'a linear layer'}"
    return ""


def _times(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _bad_values(target: Target, dtype: str) -> Iterator[str]:
    for name, load in (("A", target.factors.load_a), ("B", target.factors.load_b)):
        largest = np.abs(load()).max()  # NaN if there is one
        if not np.isfinite(largest):
            yield f"{target.factors.module}: {name} holds NaN or infinite values"
        elif dtype.lower() == "f16" and largest > F16_MAX:
            yield f"{target.factors.module}: {name} reaches {largest:.3g}, too large for f16; use f32 or bf16"


def _exact_enough(targets: list[Target], dtype: str) -> tuple[str, float, tuple[str, ...]]:
    """The dtype to write, the largest relative error it gives, and a notice where it is not the one asked for."""
    errors = {target.factors.module: _relative_error(target, dtype) for target in targets}
    largest = max(errors.values())
    if dtype.lower() != "f16" or largest <= F16_ERROR:
        return dtype, largest, ()
    worst = [module for module, error in errors.items() if error > F16_ERROR]
    names = ", ".join(worst[:3]) + (f" and {len(worst) - 3} more" if len(worst) > 3 else "")
    return "f32", 0.0, (f"written as f32: f16 would change {names} by up to {largest:.1%}, its values are too small",)


def _relative_error(target: Target, dtype: str) -> float:
    errors = [0.0]
    for load in (target.factors.load_a, target.factors.load_b):
        exact = load().astype(np.float64)
        if norm := np.linalg.norm(exact):
            errors.append(float(np.linalg.norm(_rounded(exact.astype(np.float32), dtype) - exact) / norm))
    return max(errors)


def _rounded(values: Floats, dtype: str) -> Floats:
    stored = quantize_rows(values, _block_type(dtype))
    if dtype.lower() == "bf16":
        return (stored.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)
    return stored.view(np.float16 if dtype.lower() == "f16" else np.float32).astype(np.float32)


def _notices(targets: list[Target]) -> tuple[str, ...]:
    if any(target.factors.load_b().any() for target in targets):
        return ()
    return ("every B is zero: this adapter changes nothing (was it trained?)",)


def _metadata(folder: Path, base: Base, dtype: str) -> dict[str, Value]:
    return {
        "general.architecture": base.family.architecture,
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": 0.0,
        "general.name": folder.resolve().name,
        "general.base_model.count": 1,
        "general.base_model.0.name": base.name,
        "general.file_type": RECIPES[dtype.lower()].file_type,
        "general.quantization_version": 2,
        "edgelora.base.name": base.name,
        "edgelora.base.fingerprint": base.fingerprint,
    }


def _write(
    out: Path,
    header: bytes,
    targets: list[Target],
    sizes: Sizes,
    block_type: BlockType,
    progress: Progress | None,
) -> None:
    done, total = len(header), file_size(header, [spec for target in targets for spec in target.specs(block_type)])
    with create(out, header) as file:
        for target in targets:
            for values, spec in zip(target.load(sizes), target.specs(block_type), strict=True):
                data = quantize_rows(values, block_type)
                file.write(data.data)
                done += data.nbytes + file.end_tensor(spec)
                if progress:
                    progress(done, total, spec.name)
