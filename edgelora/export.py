"""From a trained folder to what is served: the adapter's GGUF, its base at every quantization, and the proof.

    support/                      what `train` left
    support.gguf                  the adapter, beside it
    my-model-q4_k_m.gguf          the base, beside it; where the store knows one of that quantization, that one

`plan_export` settles where everything goes, and what stands in the way, before training begins.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgelora.adapter_ref import AdapterRef
from edgelora.errors import SettingsError
from edgelora.store import Store

if TYPE_CHECKING:
    from edgelora.base_settings import BaseSettings
    from edgelora.verification.report import Report

ITSELF = "base"
"""Instead of a quantization: the GGUF file that was trained on."""
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Target:
    """A base to serve on.

    Attributes:
        quant: a key of `converters.quant_types.RECIPES`.
        is_there: it need not be made.
    """

    quant: str
    path: Path
    is_there: bool


@dataclass(frozen=True)
class ExportPlan:
    """Where an export comes from and goes to.

    Attributes:
        folder: the one that training leaves.
        base: what is trained on: a Hugging Face folder or a GGUF file.
        adapter: the file to be made.
    """

    folder: Path
    base: Path
    adapter: Path
    targets: tuple[Target, ...]

    def merged(self, quant: str) -> Path:
        """The base that the result is a part of, where it becomes no adapter."""
        return self.adapter.with_name(f"{self.folder.name}-{quant}.gguf")


@dataclass(frozen=True)
class Exported:
    """What an export made.

    Attributes:
        adapter: the GGUF adapter; None where the result is a part of the base.
        bases: to serve on, in the order in which they were asked for.
        reports: `verify` of the adapter on each; none without an adapter.
        notices: what a person should know.
    """

    adapter: Path | None
    bases: tuple[Path, ...]
    reports: tuple[Report, ...] = ()
    notices: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        return all(report.passed for report in self.reports)


def plan_export(wanted: str, base: Path, folder: Path, store: Store, *, replace: bool = False) -> ExportPlan:
    """Settle an export before its training begins.

    Args:
        wanted: quantizations with commas between them, or `ITSELF`.
        base: what is trained on.
        replace: files of an earlier export of this run may be written again.

    Raises:
        SettingsError: unknown quantizations, files that are in the way, or a base that gives no other quantization.
        ConversionError: no base.
    """
    from edgelora.conversion import source_name

    folder = folder.absolute()
    plan = ExportPlan(folder, base, folder.parent / f"{folder.name}.gguf", ())
    quants = _quants(wanted, base)
    there = [path for path in (plan.adapter, *map(plan.merged, quants)) if path.exists()]
    if there and not replace:
        raise SettingsError(
            f"--export: {', '.join(map(str, there))}: in the way", hint="Move it away, or name another folder with -o."
        )
    named = source_name(base)
    targets = [_target(quant, base, folder.parent / f"{named}-{quant}.gguf", store) for quant in quants]
    return dataclasses.replace(plan, targets=tuple(targets))


def _quants(wanted: str, base: Path) -> list[str]:
    from converters.quant_types import RECIPES

    names = list(dict.fromkeys(name.strip().lower() for name in wanted.split(",")))
    if unknown := [name for name in names if name not in RECIPES and name != ITSELF]:
        raise SettingsError(
            f"--export: unknown quantizations: {', '.join(unknown)}", hint=f"Known: {', '.join(RECIPES)}."
        )
    if ITSELF in names and base.is_dir():
        raise SettingsError(
            f"--export {ITSELF}: {base} is no GGUF file, which could be served as it is",
            hint="Name quantizations: --export q4_k_m,q8_0.",
        )
    return [_quant_of(base) if name == ITSELF else name for name in names]


def _quant_of(base: Path) -> str:
    from converters.base_file import read_base_header
    from edgelora.entry import quantization_of

    return quantization_of(read_base_header(base))


def _target(quant: str, base: Path, beside: Path, store: Store) -> Target:
    """The base itself, one that the store knows, one that lies there, or one to be made there."""
    from converters.detect import SourceKind

    if base.is_file() and quant == _quant_of(base):
        return Target(quant, base, is_there=True)
    fingerprint = store.fingerprint(base)
    known = [store.look(beside)] if beside.is_file() else []
    known += [entry for entry in store.registered() if entry.is_there and entry.kind is SourceKind.GGUF_BASE]
    for entry in known:
        if entry.fingerprint == fingerprint and entry.detail == quant:
            return Target(quant, entry.path, is_there=True)
    if beside.exists():
        raise SettingsError(f"--export: {beside} exists, and is not {base} in {quant}", hint="Move it away.")
    if base.is_file():
        raise SettingsError(
            f"--export {quant}: {base} is {_quant_of(base)}, and quantizing it again would lose more",
            hint=f"Serve what you train: --export {ITSELF}; or make the other one of the model's own folder first: "
            f"edgelora convert FOLDER --quant {quant}.",
        )
    return Target(quant, beside, is_there=False)


def export(plan: ExportPlan, outcome: str, store: Store, progress: Progress | None = None) -> Exported:
    """Make everything that a plan names, and verify the adapter on every base. Whatever is made stays, also where a
    check fails.

    Args:
        outcome: what the training's result becomes, a key of `edgelora.train.methods.EXPORTS`.

    Raises:
        ConversionError, EdgeloraError: what cannot be made; what was made before stays.
    """
    return _EXPORTS.get(outcome, _export_adapter)(plan, store, progress)


def _export_adapter(plan: ExportPlan, store: Store, progress: Progress | None) -> Exported:
    from edgelora.conversion import ConvertOptions, convert
    from edgelora.verify import verify

    options = ConvertOptions(base=plan.base, force=True)
    made = convert(plan.folder, plan.adapter, options, store=store, progress=progress)
    bases = [_made(target, plan.base, store, progress) for target in plan.targets]
    reports = [verify(AdapterRef(plan.folder.name, plan.adapter), base) for base in bases]
    return Exported(plan.adapter, tuple(bases), tuple(reports), made.notices)


def _export_merged(plan: ExportPlan, store: Store, progress: Progress | None) -> Exported:
    """A base with the adapter in it, of every quantization."""
    from edgelora.base_settings import BaseSettings

    settings = BaseSettings(merge=(AdapterRef(plan.folder.name, plan.folder),))
    return _export_bases(plan, plan.base, settings, store, progress)


def _export_base(plan: ExportPlan, store: Store, progress: Progress | None) -> Exported:
    """The trained model, of every quantization."""
    from edgelora.base_settings import BaseSettings

    return _export_bases(plan, plan.folder, BaseSettings(), store, progress)


def _export_bases(
    plan: ExportPlan, source: Path, settings: BaseSettings, store: Store, progress: Progress | None
) -> Exported:
    from edgelora.conversion import ConvertOptions, convert

    paths, notices = [], list[str]()
    for quant in (target.quant for target in plan.targets):
        options = ConvertOptions(quant=quant, settings=settings, force=True)
        notices += convert(source, plan.merged(quant), options, store=store, progress=progress).notices
        paths.append(plan.merged(quant))
    return Exported(None, tuple(paths), notices=tuple(dict.fromkeys(notices)))


def _made(target: Target, base: Path, store: Store, progress: Progress | None) -> Path:
    from edgelora.conversion import ConvertOptions, convert

    if not target.is_there:
        convert(base, target.path, ConvertOptions(quant=target.quant), store=store, progress=progress)
    return target.path


_EXPORTS: Mapping[str, Callable[[ExportPlan, Store, Progress | None], Exported]] = {
    "merge": _export_merged,
    "base": _export_base,
}
