"""An adapter to a GGUF adapter that fits one base: exactly, within an error that is stated, or not at all.

llama.cpp applies `alpha / rank` to a whole adapter, or nothing where alpha is 0. So every module's own scale goes into
its B, in float32, and alpha is 0: rank-stabilized LoRA, rank patterns and alpha patterns come out exact. Rows and
columns take the order that they have in the base's file. Everything that a GGUF adapter cannot hold is refused, all of
it in one message.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import isfinite, prod, sqrt
from pathlib import Path
from typing import Any

from converters.adapted_base import NOTHING_KNOWN, AdaptedBase, Known, open_base
from converters.adapter_file import AdapterFile, check_dtype
from converters.adapter_source import AdapterSource, open_adapter
from converters.adapter_targets import missing_targets, unused_targets
from converters.compile import DEFAULT_MAX_ERROR, Compiled, compile_changes, is_finite, weight_of
from converters.errors import BaseMismatchError, FormatError, UnsupportedAdapterError, UnsupportedError, listed
from converters.initialisation import RECOMPUTED, WHAT_TO_SAVE, what_to_save
from converters.methods import Change, Transformed
from converters.model_card import readable_name
from converters.pairs import Pair, shortened
from converters.placement import shape_in_base
from converters.quant_types import tensor_order
from converters.stream import Progress
from converters.writer import Value

LARGE_SHARE = 0.25
UNBOUNDED = "{}: what was left out of its approximations may be more than what they have left of one another"
FROM_QUANTIZED = (
    "computed from weights that were quantized, which the stated error leaves out: against the base as it was released "
    "(--base FOLDER) it is another change"
)
NEVER_UNTIED = "llama.cpp's {} always takes the embeddings for the output too: train without adapting either of them."
UNTIE_HINT = "Make a base whose output is a tensor of its own, and name it with --base: edgelora convert {} --untie"


@dataclass(frozen=True)
class AdapterOptions:
    """What to make of an adapter.

    Attributes:
        dtype: of its tensors: "f32", "f16", "bf16" or "q8_0"; f16 and q8_0 become f32 where they would lose small
            values.
        rank: at most so many ranks for each tensor, 1 or more; None keeps a LoRA's, and takes the fewest for an
            approximation.
        max_error: of what is approximated or cut, |change - B @ A| / |change| for each tensor; above 0.
        allow_bin: read weights that were saved as a pickle; nothing in it is executed.
        initial: the adapter before it was trained, where its initialisation moved a part of the base into it.
    """

    dtype: str = "f16"
    rank: int | None = None
    max_error: float = DEFAULT_MAX_ERROR
    allow_bin: bool = False
    initial: Path | None = None

    def check(self) -> None:
        """Raises UnsupportedError for values that say nothing."""
        check_dtype(self.dtype)
        problems = []
        if not isfinite(self.max_error) or self.max_error <= 0.0:
            problems.append(f"max_error is {self.max_error}, expected a number above 0 (0.01 is 1%)")
        if self.rank is not None and self.rank < 1:
            problems.append(f"rank is {self.rank}, expected 1 or more")
        if problems:
            raise UnsupportedError("; ".join(problems), hint="Without them a LoRA keeps its rank, and 1% is allowed.")


@dataclass(frozen=True)
class AdapterReport:
    """What was written.

    Attributes:
        method: what people call it ("DoRA").
        kind: "exact", or "approximate": within `max_residual` of what was trained on this base.
        ranks: the ranks that occur; likewise `scales`, what PEFT multiplies B @ A by.
        targets: the kinds of modules it changes ("q_proj", "up_proj").
        dtype: of its tensors; "f32" where f16 or q8_0 was asked for and would have lost small values.
        max_relative_error: of the change that the stored A and B of any module make, |stored - exact| / |exact|.
        residual_energy: of approximated tensors, by GGUF name: at most this share of the change's energy is left out.
        from_quantized: computed from weights that were quantized; what that costs is in no number here.
    """

    path: Path
    size_bytes: int
    n_tensors: int
    method: str
    kind: str
    ranks: tuple[int, ...]
    scales: tuple[float, ...]
    targets: tuple[str, ...]
    base_name: str
    base_fingerprint: str
    dtype: str
    seconds: float
    max_relative_error: float = 0.0
    residual_energy: Mapping[str, float] = field(default_factory=dict)
    notices: tuple[str, ...] = ()
    from_quantized: bool = False

    @property
    def max_residual(self) -> float:
        """The largest |change - B @ A| / |change| of a tensor."""
        return sqrt(max(self.residual_energy.values(), default=0.0))


@dataclass(frozen=True)
class PreparedAdapter:
    """An adapter of which everything is known but its file.

    Attributes:
        keys: metadata for it.
        inputs: files that are read, which it must not replace.
        from_quantized: see `AdapterReport`.
    """

    file: AdapterFile
    keys: Mapping[str, Value]
    inputs: tuple[Path, ...]
    method: str
    base_name: str
    base_fingerprint: str
    is_approximate: bool
    targets: tuple[str, ...] = ()
    notices: tuple[str, ...] = ()
    from_quantized: bool = False

    def exactness(self) -> dict[str, Any]:
        """What a contract says of the conversion."""
        file = self.file
        largest = sqrt(max(file.residual_energy.values(), default=0.0))
        lossy = {"max_error": largest, "residual_energy": file.residual_energy}
        return {
            "kind": self.kind,
            "method": self.method,
            "dtype": file.dtype,
            "rounding": file.rounding,
            "scales": file.module_scales,
            **(lossy if file.residual_energy else {}),
            **({"from_quantized": True} if self.from_quantized else {}),
        }

    @property
    def kind(self) -> str:
        return "approximate" if self.is_approximate or self.from_quantized else "exact"

    def write(
        self,
        out: Path,
        metadata: Mapping[str, Value] | None = None,
        *,
        progress: Progress | None = None,
        force: bool = False,
    ) -> AdapterReport:
        """Write it, whole or not at all.

        Args:
            metadata: more keys; they win.

        Raises:
            WriteError, OutputExistsError: it cannot be written.
        """
        started, file = time.monotonic(), self.file
        size = file.write(out, {**self.keys, **(metadata or {})}, self.inputs, progress, force=force)
        return AdapterReport(
            path=out,
            size_bytes=size,
            n_tensors=2 * len(file.pairs),
            method=self.method,
            kind=self.kind,
            ranks=tuple(sorted({pair.rank for pair in file.pairs})),
            scales=tuple(sorted({scale for pair in file.pairs for scale in pair.scales})),
            targets=self.targets,
            base_name=self.base_name,
            base_fingerprint=self.base_fingerprint,
            dtype=file.dtype,
            seconds=time.monotonic() - started,
            max_relative_error=file.rounding,
            residual_energy=file.residual_energy,
            notices=(*self.notices, *file.notices),
            from_quantized=self.from_quantized,
        )


def convert_adapter(
    source: Path,
    base: Path,
    out: Path,
    options: AdapterOptions | None = None,
    *,
    metadata: Mapping[str, Value] | None = None,
    progress: Progress | None = None,
    force: bool = False,
) -> AdapterReport:
    """Convert an adapter folder; see `prepare_adapter`.

    Args:
        out: the GGUF adapter to write.
        metadata: more keys for the file; they win.
        force: overwrite `out`.

    Raises:
        ConversionError: see `prepare_adapter`; or a failure to write.
    """
    started = time.monotonic()
    with prepare_adapter(source, base, options) as prepared:
        report = prepared.write(Path(out), metadata, progress=progress, force=force)
    return replace(report, seconds=time.monotonic() - started)


@contextmanager
def prepare_adapter(
    source: Path, base: Path, options: AdapterOptions | None = None, *, known: Known = NOTHING_KNOWN
) -> Iterator[PreparedAdapter]:
    """Read an adapter folder, and everything that can be refused about it.

    Args:
        source: what PEFT (adapter_config.json and adapter_model.safetensors) or MLX saved.
        base: the base it was trained on: a Hugging Face folder, or a GGUF file of any quantization.
        known: about the base.

    Raises:
        UnsupportedAdapterError: what a GGUF adapter cannot hold; every reason in one message.
        BaseMismatchError: tensors that do not fit this base.
        ConversionError: files that are missing or broken.
    """
    options, source, base = options or AdapterOptions(), Path(source), Path(base)
    with (
        open_base(base, known) as opened,
        source_pairs(source, opened, options) as (adapter, pairs, is_approximate),
    ):
        yield prepared_pairs(
            source,
            opened.family.architecture,
            pairs,
            options,
            keys={**_keys(source, opened), **adapter.reading.metadata},
            inputs=(*adapter.inputs, *(base.iterdir() if base.is_dir() else [base])),
            method=adapter.method,
            base_name=opened.name,
            base_fingerprint=opened.fingerprint,
            is_approximate=is_approximate,
            targets=tuple(sorted({_kind(change) for change in adapter.reading.changes})),
            notices=(*adapter.notices, *_size_notices(pairs, is_approximate and not adapter.from_quantized)),
            from_quantized=adapter.from_quantized,
        )


@contextmanager
def source_pairs(
    source: Path, base: AdaptedBase, options: AdapterOptions
) -> Iterator[tuple[AdapterSource, tuple[Pair, ...], bool]]:
    """An adapter folder, its pairs on a base, and whether they are approximate.

    Raises:
        ConversionError: see `prepare_adapter`.
    """
    options.check()
    with open_adapter(source, base, allow_bin=options.allow_bin, initial=options.initial) as read:
        adapter = _with_notices(against_base(read, base), base)
        compiled = compile_changes(adapter.reading, base, rank=options.rank, max_error=options.max_error)
        problems = [*compiled.problems, *missing_targets(adapter, base)]
        _check(adapter, replace(compiled, problems=problems), base, options)
        yield adapter, tuple(compiled.pairs(base)), compiled.is_approximate or adapter.from_quantized


def _with_notices(adapter: AdapterSource, base: AdaptedBase) -> AdapterSource:
    """With what should be known of it on this base."""
    from_quantized = base.is_lossy and any(map(_depends_on_weights, adapter.reading.changes))
    notices = [*unused_targets(adapter, base), *([FROM_QUANTIZED] if from_quantized else [])]
    return replace(adapter, notices=(*adapter.notices, *notices), from_quantized=from_quantized)


def _depends_on_weights(change: Change) -> bool:
    return isinstance(change, Transformed) and change.uses_weight and not change.tensor.endswith(".bias")


def prepared_pairs(
    source: Path,
    architecture: str,
    pairs: Sequence[Pair],
    options: AdapterOptions,
    *,
    keys: Mapping[str, Value],
    inputs: tuple[Path, ...],
    method: str,
    base_name: str,
    base_fingerprint: str,
    is_approximate: bool,
    targets: tuple[str, ...] = (),
    notices: tuple[str, ...] = (),
    from_quantized: bool = False,
) -> PreparedAdapter:
    """Pairs cut to the rank that was asked for, and looked at in the type that they will have.

    Raises:
        UnsupportedAdapterError: values that cannot be stored, a rank that is too low for the error, or approximations
            that cancel one another.
    """
    options.check()
    file = AdapterFile.of(architecture, _shortened(source, pairs, options), options.dtype)
    if file.problems:
        raise refused(source, file.problems)
    if unknown := [UNBOUNDED.format(pair.tensor) for pair in file.pairs if pair.residual_energy >= 1.0]:
        raise refused(source, unknown)
    is_lossy = is_approximate or bool(file.residual_energy)
    return PreparedAdapter(
        file, keys, inputs, method, base_name, base_fingerprint, is_lossy, targets, notices, from_quantized
    )


def _size_notices(pairs: Sequence[Pair], is_approximate: bool) -> list[str]:
    """A word where an approximation takes a good part of the weights that it changes."""
    own, changed = sum(map(prod, _shapes(pairs))), sum(prod(pair.shape) for pair in pairs)
    if not is_approximate or own < LARGE_SHARE * changed:
        return []
    ranks = max(pair.rank for pair in pairs)
    return [
        f"of up to {ranks} ranks, {own / changed:.0%} of the weights that it changes: merged into its base (--merge) "
        "it would be exact and cost nothing at run time"
    ]


def _shapes(pairs: Sequence[Pair]) -> Iterator[tuple[int, ...]]:
    return (shape for pair in pairs for shape in pair.shapes)


def _kind(change: Change) -> str:
    """The last part of a module's name: "q_proj"."""
    return change.tensor.removesuffix(".weight").rpartition(".")[2]


def against_base(adapter: AdapterSource, base: AdaptedBase) -> AdapterSource:
    """An adapter whose initialisation moved a part of the base, against the base as it was released.

    Raises:
        UnsupportedAdapterError: what was moved is not known, and does not follow from this base.
    """
    if not adapter.init:
        return adapter
    if adapter.init not in RECOMPUTED:
        raise _not_released(adapter.path, f"init_lora_weights is {adapter.init!r}: {what_to_save(adapter.init)}")
    if base.is_lossy or base.is_rounded:
        what = "was quantized" if base.is_lossy else "is in half precision, which what was released may not be"
        raise _not_released(
            adapter.path,
            f"init_lora_weights is {adapter.init!r}, whose first state follows from the base's weights, and "
            f"{base.path} {what}: name the folder of the base as it was released. Or: {WHAT_TO_SAVE}",
        )
    return adapter.against(lambda tensor: weight_of(base, tensor) if shape_in_base(base, tensor) else None)


def _not_released(path: Path, problem: str) -> UnsupportedAdapterError:
    return UnsupportedAdapterError(f"{path}: does not say what it changes of its base:{listed([problem])}")


def _check(adapter: AdapterSource, compiled: Compiled, base: AdaptedBase, options: AdapterOptions) -> None:
    """Raises:
    UnsupportedAdapterError, BaseMismatchError: everything that is wrong with it, in one message.
    """
    if compiled.problems:
        broken = [
            f"{change.tensor}: holds NaN or infinite values"
            for change in adapter.reading.changes
            if not is_finite(change)
        ]
        raise refused(adapter.path, [*compiled.problems, *compiled.misfits, *compiled.tied, *broken])
    if compiled.misfits:
        raise BaseMismatchError(
            f"{adapter.path}: {len(compiled.misfits)} modules do not fit the base {base.name}:"
            + listed(compiled.misfits),
            hint=f"It was trained on {adapter.base_model or 'a base it does not name'}: give that one.",
        )
    if compiled.tied:
        raise BaseMismatchError(
            f"{adapter.path}: llama.cpp cannot adapt one tensor in two places:{listed(compiled.tied)}",
            hint=UNTIE_HINT.format(shlex.quote(str(base.path)))
            if base.family.can_untie
            else NEVER_UNTIED.format(base.family.architecture),
        )
    if compiled.too_rough:
        raise UnsupportedAdapterError(
            f"{adapter.path}: {adapter.method} is no low-rank change, and an adapter would be off by more than "
            f"{options.max_error:.1%}:{listed(compiled.too_rough)}",
            hint=f"Merge it into its base, which is exact: edgelora convert {base.path} --merge {adapter.path}; or "
            "accept a larger error with --max-error (0.2 is 20%), perhaps with fewer ranks (--rank).",
        )
    if not compiled.pieces:
        raise FormatError(f"{adapter.path}: holds no tensors that change its base")


def refused(path: Path, problems: Sequence[str]) -> UnsupportedAdapterError:
    return UnsupportedAdapterError(
        f"{path}: cannot become a GGUF adapter:{listed(problems)}",
        hint="Nothing was written. `edgelora convert BASE --merge ADAPTER` merges what an adapter cannot hold.",
    )


def _shortened(source: Path, pairs: Sequence[Pair], options: AdapterOptions) -> tuple[Pair, ...]:
    """Pairs of at most the rank asked for.

    Raises:
        UnsupportedAdapterError: that leaves out more than the error asked for.
    """
    if options.rank is None:
        return _in_order(pairs)
    cut = [shortened(pair, rank=options.rank, max_error=options.max_error) for pair in pairs]
    rough = [
        f"{pair.tensor}: {sqrt(pair.residual_energy):.1%} of its change is left out at rank {pair.rank}"
        for pair in cut
        if sqrt(pair.residual_energy) > options.max_error
    ]
    if rough:
        raise UnsupportedAdapterError(
            f"{source}: rank {options.rank} is too low for an error of {options.max_error:.1%}:{listed(rough)}",
            hint="Give a higher --rank, or accept a larger error with --max-error (0.2 is 20%).",
        )
    return _in_order(cut)


def _in_order(pairs: Sequence[Pair]) -> tuple[Pair, ...]:
    return tuple(sorted(pairs, key=lambda pair: tensor_order(pair.tensor)))


def _keys(source: Path, base: AdaptedBase) -> dict[str, Value]:
    return {
        "general.name": readable_name(source),
        "general.base_model.count": 1,
        "general.base_model.0.name": base.name,
        "edgelora.base.name": base.name,
        "edgelora.base.fingerprint": base.fingerprint,
    }
