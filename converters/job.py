"""A base about to be written: everything is decided, no weight has been read yet. Wherever it comes from."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from converters.imatrix import quantize_metadata
from converters.options import QuantizeOptions
from converters.plan import Plan, make_plan
from converters.split import check_other_parts, other_parts, plan_parts
from converters.stream import Progress, Source, write_tensors
from converters.writer import Part, Value, check_output

QUANTIZATION_VERSION = 2  # GGML_QNT_VERSION, ggml/include/ggml.h


@dataclass(frozen=True)
class BaseReport:
    """What was written, or would be.

    Attributes:
        path: the file; the first where there are several.
        files: all of them.
        types: how many tensors have each type.
        fingerprint: "" where the base has none: it has no vocabulary.
        notices: what the reader should know: differences at run time, values that are not finite.
        plan: of a dry run.
    """

    path: Path
    files: tuple[Path, ...]
    size_bytes: int
    n_tensors: int
    types: Mapping[str, int]
    seconds: float
    name: str
    architecture: str
    quant: str
    fingerprint: str
    chat_template: str | None
    notices: tuple[str, ...] = ()
    plan: Plan | None = None


@dataclass(frozen=True)
class Job:
    """What to write.

    Attributes:
        sources: the tensors, in the order of the file.
        stored: what each is now, by name: "BF16", "Q8_0", "computed".
        metadata: the whole file's.
        inputs: files that are read.
        weights: those of them that hold the weights.
        alignment: what `metadata` says.
    """

    sources: tuple[Source, ...]
    stored: Mapping[str, str]
    metadata: Mapping[str, Value]
    inputs: tuple[Path, ...]
    weights: tuple[Path, ...]
    name: str
    architecture: str
    fingerprint: str
    chat_template: str | None
    notices: tuple[str, ...]
    alignment: int = 32

    def parts(self, out: Path, options: QuantizeOptions) -> tuple[Part, ...]:
        return plan_parts(
            out,
            self.metadata,
            [source.spec for source in self.sources],
            max_bytes=options.split_max_bytes,
            max_tensors=options.split_max_tensors,
            alignment=self.alignment,
        )

    def run(
        self, out: Path, options: QuantizeOptions, *, progress: Progress | None, force: bool, dry_run: bool
    ) -> BaseReport:
        """Write it, or with `dry_run` say what would be written.

        Raises:
            ConversionError: a child of it that says what is wrong; nothing is left behind.
        """
        started, parts = time.monotonic(), self.parts(out, options)
        self._check(parts, force=force, dry_run=dry_run)
        notices, plan = list(self.notices), None
        if (options.split_max_bytes or options.split_max_tensors) and len(parts) == 1:
            notices.append("not split: it is within the limits of one file")
        if dry_run:
            plan = make_plan(parts, self.sources, self.stored, self.weights, options.threads)
            if not plan.fits:
                notices.append(f"the disk is too small: {plan.size_bytes:,} bytes, {plan.free_bytes:,} are free there")
        else:
            notices += write_tensors(parts, self.sources, options.threads, progress, strict=options.strict)
            for other in other_parts(parts):
                other.unlink()
        return BaseReport(
            path=parts[0].path,
            files=tuple(part.path for part in parts),
            size_bytes=sum(part.size_bytes for part in parts),
            n_tensors=len(self.sources),
            types=dict(Counter(source.spec.block_type.name for source in self.sources)),
            seconds=time.monotonic() - started,
            name=self.name,
            architecture=self.architecture,
            quant=options.quant.lower(),
            fingerprint=self.fingerprint,
            chat_template=self.chat_template,
            notices=tuple(notices),
            plan=plan,
        )

    def _check(self, parts: tuple[Part, ...], *, force: bool, dry_run: bool) -> None:
        """What would fail late. A dry run says itself whether the disk is large enough."""
        total = 0 if dry_run else sum(part.size_bytes for part in parts)
        for part in parts:
            check_output(part.path, total, force=force, inputs=self.inputs)
        check_other_parts(parts, force=force, inputs=self.inputs)


def quantization_keys(file_type: int, options: QuantizeOptions) -> dict[str, Value]:
    """The keys of a quantization, in llama-quantize's order."""
    keys: dict[str, Value] = {
        "general.quantization_version": QUANTIZATION_VERSION,
        "general.file_type": file_type,
    }
    if options.imatrix is None:
        return keys
    measured = quantize_metadata(options.imatrix, options.imatrix_file)
    if not options.imatrix_file:
        del measured["quantize.imatrix.file"]
    return {**keys, **measured}
