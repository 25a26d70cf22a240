"""`edgelora convert ADAPTER --base base-q2_k.gguf --repair-rank 16`: ranks that repair the base, kept where they help.

Whether they help is measured, and told either way: by the certificate's divergence from what torch computed without any
quantization, and by the perplexity on a text. The adapter is measured on its base with the ranks and without.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from edgelora.adapter_ref import AdapterRef
from edgelora.adapter_settings import AdapterSettings
from edgelora.contract import Contract
from edgelora.errors import BaseNotFoundError, SettingsError
from edgelora.store import Store

if TYPE_CHECKING:
    from converters.adapter import AdapterReport
    from converters.imatrix import ImportanceMatrix
    from converters.repair import Repair
    from edgelora.calibration_text import CalibrationText

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Measured:
    """An adapter on the base that is to be repaired.

    Attributes:
        divergence: KL of base and adapter here from torch, in nats a token; None without a certificate.
        perplexity: on the text that was given; None without one.
        failed: checks of `verify` that fail.
    """

    divergence: float | None
    perplexity: float | None
    failed: tuple[str, ...] = ()

    def figures(self) -> Iterator[tuple[str, float]]:
        yield from (("KL from torch, nats a token", self.divergence),) if self.divergence is not None else ()
        yield from (("perplexity", self.perplexity),) if self.perplexity is not None else ()


@dataclass(frozen=True)
class RepairPlan:
    """A repair of which everything is known that can be refused.

    Attributes:
        imatrix: how strongly columns are used; None where nobody measured it.
        text: to measure perplexity on.
        has_certificate: whether `verify` has something to compare with.
    """

    rank: int
    base: Path
    reference: Path
    imatrix: ImportanceMatrix | None
    text: CalibrationText | None
    has_certificate: bool

    def apply(self, report: AdapterReport, contract: Contract, progress: Progress | None = None) -> AdapterReport:
        """Put the ranks beside those of an adapter that was just written, where that helps.

        Returns:
            The report of what lies there now; its notices tell what was measured.

        Raises:
            ConversionError, EdgeloraError: the ranks cannot be found or measured; the adapter stays as it is.
        """
        from converters.repair import find_repair

        repair = find_repair(self.base, self.reference, self.rank, self.imatrix, progress)
        partial = report.path.with_name(f".{report.path.name}.repaired")
        try:
            made, quant = write_repaired(report.path, self.base, repair, contract, partial, report.dtype)
            before, after = self._measured(report.path), self._measured(partial)
            if helps := _helps(before, after):
                os.replace(partial, report.path)
        finally:
            partial.unlink(missing_ok=True)
        told = _told(before, after, kept=helps, share=repair.share, is_weighted=repair.is_weighted, quant=quant)
        if not helps:
            return replace(report, notices=(*report.notices, told))
        return replace(
            report,
            size_bytes=made.size_bytes,
            n_tensors=made.n_tensors,
            ranks=made.ranks,
            max_relative_error=made.max_relative_error,
            notices=(*report.notices, *made.notices, told),
        )

    def _measured(self, adapter: Path) -> Measured:
        from edgelora.engine.perplexity import perplexity
        from edgelora.verify import verify

        value = perplexity(self.base, self.text, adapter=adapter).value if self.text else None
        if not self.has_certificate:
            return Measured(None, value)
        report = verify(AdapterRef("repaired", adapter), self.base)
        divergence = next((check.number for check in report.checks if check.name == "adapter_kl"), None)
        return Measured(divergence, value, report.failed)


def write_repaired(
    adapter: Path, base: Path, repair: Repair, contract: Contract, out: Path, dtype: str
) -> tuple[AdapterReport, str]:
    """Write a GGUF adapter with the ranks beside its own, and a contract that binds it to the base's weights.

    Args:
        contract: the adapter's.
        dtype: see `AdapterOptions`.

    Returns:
        What was written, and the base's quantization ("q2_k").

    Raises:
        ConversionError: the adapter repairs a base already, or the ranks cannot be stored.
    """
    from converters.adapter import AdapterOptions
    from converters.base_file import read_base_header
    from converters.repair import prepare_repaired
    from edgelora.entry import quantization_of

    quant = quantization_of(read_base_header(base))
    repairing = contract.with_changes(repair={**repair.metadata(), "quant": quant})
    with prepare_repaired(adapter, base, repair, AdapterOptions(dtype=dtype)) as prepared:
        return prepared.write(out, repairing.to_metadata(), force=True), quant


def check_settings(settings: AdapterSettings) -> None:
    """Raises SettingsError: options that do not go together, whatever the adapter."""
    given = [name for name in settings.given() if name.startswith("--repair")]
    if given and settings.repair_rank is None:
        raise SettingsError(f"{', '.join(given)}: needs --repair-rank")
    if given and settings.rank is not None:
        raise SettingsError("--rank cuts ranks, and --repair-rank adds some", hint="Cut the adapter first.")


def plan_repair(
    settings: AdapterSettings, imatrix: Path | None, source: Path, base: Path, contract: Contract, store: Store
) -> RepairPlan | None:
    """What `--repair-rank` asks for; None where it is not given.

    Args:
        imatrix: a file of how strongly columns are used.
        base: what the adapter is converted against.
        contract: the adapter's.

    Raises:
        SettingsError: a base that was never quantized, or nothing to tell by whether it helps.
        BaseNotFoundError: nobody knows what the base was before it was quantized.
        ConversionError, DataFileError: files that cannot be read.
    """
    if settings.repair_rank is None:
        return None
    problems = [*_problems(settings, base, contract)]
    if problems:
        raise SettingsError("--repair-rank: " + "; ".join(problems))
    from converters.imatrix import read_imatrix
    from edgelora.calibration_text import read_calibration

    return RepairPlan(
        settings.repair_rank,
        base,
        settings.repair_reference or _reference(source, base, store),
        read_imatrix(imatrix) if imatrix else None,
        read_calibration(settings.repair_text) if settings.repair_text else None,
        bool(contract.certificate),
    )


def _problems(settings: AdapterSettings, base: Path, contract: Contract) -> Iterator[str]:
    if not base.is_file():
        yield f"{base} is a folder, whose weights nobody quantized: name the GGUF file that is served with --base"
    if contract.repair:
        yield "the adapter repairs a base already: convert it as it was trained"
    if not contract.certificate and settings.repair_text is None:
        yield "the adapter has no certificate, so give a text to tell by whether it helps: --repair-text FILE"


def _reference(source: Path, base: Path, store: Store) -> Path:
    """The unquantized base: the folder that the adapter names, or one that the store knows."""
    from converters.detect import SourceKind
    from edgelora.adapter_contract import named_base

    fingerprint = store.fingerprint(base)
    named = named_base(source) if source.is_dir() else None
    folders = [named] if named and named.is_dir() else []
    folders += [entry.path for entry in store.remembered() if entry.kind is SourceKind.HF_BASE and entry.is_there]
    found = next((folder for folder in folders if store.fingerprint(folder) == fingerprint), None)
    if found is None:
        raise BaseNotFoundError(
            f"{base}: what it was before it was quantized is not known here",
            hint="Name the Hugging Face folder it was made from with --repair-reference.",
        )
    return found


def _helps(before: Measured, after: Measured) -> bool:
    """Every figure is lower, and no check fails that did not fail before."""
    pairs = zip(before.figures(), after.figures(), strict=True)
    return set(after.failed) <= set(before.failed) and all(now < then for (_, then), (_, now) in pairs)


def _told(before: Measured, after: Measured, *, kept: bool, share: float, is_weighted: bool, quant: str) -> str:
    weighted = "activation-weighted error" if is_weighted else "error of the weights"
    changes = [
        f"{name} {then:.4f} -> {now:.4f} ({now / then - 1:+.1%})"
        for (name, then), (_, now) in zip(before.figures(), after.figures(), strict=True)
    ]
    newly = sorted(set(after.failed) - set(before.failed))
    changes += [f"`verify` fails: {', '.join(newly)}"] if newly else []
    outcome = f"kept, for these {quant} weights alone" if kept else "not kept: it does not help"
    return f"repair {outcome}; its ranks hold {share:.1%} of the {weighted}; {', '.join(changes)}"
