"""What a GGUF adapter is: the base it wants, its modules with rank and scale, and what it carries for serving."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from converters.reader import GGUFHeader, read_header
from edgelora.adapter_ref import default_name
from edgelora.certificate import decode
from edgelora.contract import Contract
from edgelora.description import Fit, TemplateSummary, command_line, fits, number, text
from edgelora.errors import ModelFileError
from edgelora.store import Looking, Store

WORST_TENSORS = 3
ALPHA, INVOCATION = "adapter.lora.alpha", "adapter.alora.invocation_tokens"
_TENSOR = re.compile(r"(?:blk\.(\d+)\.)?(.+?)(?:\.weight)?\.lora_b")


@dataclass(frozen=True)
class ModuleGroup:
    """Modules of one kind ("attn_q") in all layers.

    Attributes:
        ranks, scales: those that occur, ascending; a scale is what the adapter's B @ A counts for at strength 1.
    """

    name: str
    n_modules: int
    ranks: tuple[int, ...]
    scales: tuple[float, ...]


@dataclass(frozen=True)
class Exactness:
    """What the converter did to the weights, by its own report.

    Attributes:
        kind: "exact", "approximate", or empty where nothing is said.
        rounding: the largest relative error of storing the tensors.
        max_error: the bound that an approximation kept, relative to the exact change of the weights.
        worst: tensors with the largest share of that change left out.
    """

    kind: str
    rounding: float | None
    max_error: float | None
    worst: Mapping[str, float]


@dataclass(frozen=True)
class CertificateSummary:
    """The record of what the adapter did where it was trained: its size as text, and its probes; or a problem."""

    size_bytes: int
    n_probes: int
    problem: str = ""

    @classmethod
    def of(cls, contract: Contract, source: Path) -> CertificateSummary | None:
        """None where there is none."""
        if not contract.certificate:
            return None
        try:
            return cls(len(contract.certificate), len(decode(contract.certificate, str(source)).probes))
        except ModelFileError as error:
            return cls(len(contract.certificate), 0, error.message)


@dataclass(frozen=True)
class AdapterDescription:
    """Attributes:
    base_name, base_fingerprint: the base it wants; empty where it does not say.
    bases: known bases that fit it, GGUF files first.
    scales_from: where the groups' scales come from: "contract", "alpha / rank", or "folded into B".
    invocation_tokens: aLoRA: it begins to act after these.
    has_contract: without one it says nothing of template, stops and so on.
    """

    kind: str
    path: Path
    name: str
    architecture: str
    base_name: str
    base_fingerprint: str
    bases: tuple[Fit, ...]
    method: str
    groups: tuple[ModuleGroup, ...]
    scales_from: str
    dtypes: Mapping[str, int]
    size_bytes: int
    n_tensors: int
    has_contract: bool
    template: TemplateSummary | None = None
    golden_tokens: int = 0
    stop: tuple[str, ...] = ()
    sampling: Mapping[str, Any] = field(default_factory=dict)
    system: str = ""
    training: Mapping[str, Any] = field(default_factory=dict)
    exactness: Exactness | None = None
    certificate: CertificateSummary | None = None
    invocation_tokens: tuple[int, ...] = ()
    use: str = ""


def describe_adapter(path: Path, store: Store, looking: Looking | None) -> AdapterDescription:
    """See `description.describe`."""
    header = read_header(path)
    found = Contract.from_metadata(header.metadata, str(path))
    contract = found or Contract(chat_template=text(header.metadata.get("tokenizer.chat_template")))
    bases = fits(contract.base_fingerprint, [], store, looking, bases=True) if contract.base_fingerprint else []
    scales = contract.exactness.get("scales")
    groups, scales_from = module_groups(header, scales if isinstance(scales, Mapping) else {})
    tokens = header.metadata.get(INVOCATION)
    return AdapterDescription(
        kind="GGUF adapter",
        path=path,
        name=default_name(path),
        architecture=text(header.metadata.get("general.architecture")),
        base_name=contract.base_name or text(header.metadata.get("general.base_model.0.name")),
        base_fingerprint=contract.base_fingerprint,
        bases=tuple(bases),
        method=_method(contract, header),
        groups=groups,
        scales_from=scales_from,
        dtypes=dict(Counter(tensor.type_name for tensor in header.tensors.values()).most_common()),
        size_bytes=header.size_bytes,
        n_tensors=len(header.tensors),
        has_contract=found is not None,
        template=TemplateSummary.of(contract.chat_template),
        golden_tokens=len(contract.golden_tokens),
        stop=contract.stop,
        sampling=contract.sampling,
        system=contract.system,
        training=contract.training,
        exactness=_exactness(contract.exactness),
        certificate=CertificateSummary.of(contract, path),
        invocation_tokens=tuple(tokens) if isinstance(tokens, list) else (),
        use=usage(path, bases, contract.base_name),
    )


def module_groups(header: GGUFHeader, scales: Mapping[str, Any]) -> tuple[tuple[ModuleGroup, ...], str]:
    """Groups in the file's order, and where their scales come from.

    Args:
        scales: of each group, as the contract says them.
    """
    ranks: dict[str, list[int]] = {}
    for name, tensor in header.tensors.items():
        if match := _TENSOR.fullmatch(name):
            ranks.setdefault(match[2], []).append(tensor.shape[-1])
    alpha = number(header.metadata.get(ALPHA)) or 0.0
    said = {name: found for name in ranks if (found := _numbers(scales.get(name)))}
    groups = [
        ModuleGroup(name, len(found), tuple(sorted(set(found))), said.get(name) or _applied(alpha, found))
        for name, found in ranks.items()
    ]
    source = "contract" if said else "alpha / rank" if alpha else "folded into B"
    return tuple(groups), source


def _applied(alpha: float, ranks: Sequence[int]) -> tuple[float, ...]:
    """llama.cpp's own rule: alpha / rank, and 1 where alpha is 0 (`llama_adapter_lora_weight::get_scale`)."""
    return tuple(sorted({alpha / rank if alpha and rank else 1.0 for rank in ranks}))


def _numbers(values: object) -> tuple[float, ...]:
    items = values if isinstance(values, (list, tuple)) else [values]
    found = [number(item) for item in items]
    return tuple(sorted({item for item in found if item is not None})) if None not in found else ()


def _method(contract: Contract, header: GGUFHeader) -> str:
    said = contract.exactness.get("method") or contract.training.get("method") or header.metadata.get("adapter.type")
    return text(said) or "unknown"


def _exactness(report: Mapping[str, Any]) -> Exactness | None:
    if not report:
        return None
    energies = report.get("residual_energy")
    said = {text(name): number(value) for name, value in energies.items()} if isinstance(energies, Mapping) else {}
    known = {name: value for name, value in said.items() if value is not None}
    worst = sorted(known, key=lambda name: (-known[name], name))[:WORST_TENSORS]
    return Exactness(
        text(report.get("kind")),
        number(report.get("rounding")),
        number(report.get("max_error")),
        {name: known[name] for name in worst},
    )


def usage(path: Path, bases: Sequence[Fit], base_name: str) -> str:
    """The command that talks through it; the one that makes its base first, where none is known that can be run."""
    if any(base.path.suffix == ".gguf" or base.path.is_file() for base in bases):
        return command_line("edgelora", "chat", "--adapter", path)
    return command_line("edgelora", "chat", "--adapter", path, "--base") + " BASE.gguf"
