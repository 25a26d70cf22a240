"""What a PEFT adapter folder is, from its configuration, the header of its weights, and the contract beside them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from converters.checkpoint import pickles_in, read_json
from converters.errors import MissingFileError
from converters.hub_cache import ADAPTER_CONFIG, ADAPTER_WEIGHTS, repository_of
from converters.safetensors_file import read_tensors
from edgelora.adapter_description import CertificateSummary, usage
from edgelora.contract import Contract
from edgelora.description import Fit, TemplateSummary, command_line, fits, text
from edgelora.store import Looking, Store

PICKLED_WEIGHTS = "adapter_model.bin"
# Keys with a line of their own, and keys that say nothing of the adapter as it is.
_OWN_LINE = ("peft_type", "r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern", "init_lora_weights",
             "base_model_name_or_path")  # fmt: skip
_UNTOLD = ("task_type", "inference_mode", "peft_version", "auto_mapping", "lora_dropout")
_OFF: tuple[Any, ...] = (None, False, [], {}, "", "none")


@dataclass(frozen=True)
class PeftDescription:
    """Attributes:
    rank, alpha, target_modules, rank_pattern, alpha_pattern, init: as the configuration has them.
    settings: all others that are on.
    parameters: values in its tensors; None where they are a pickle, which is not opened.
    bases: known bases that fit: of the contract's fingerprint, or called as the configuration says.
    problem: why its weights cannot be read.
    """

    kind: str
    path: Path
    name: str
    method: str
    rank: Any
    alpha: Any
    target_modules: Any
    rank_pattern: Any
    alpha_pattern: Any
    init: Any
    settings: Mapping[str, Any]
    base_name: str
    base_fingerprint: str
    bases: tuple[Fit, ...]
    size_bytes: int
    n_tensors: int
    parameters: int | None
    dtypes: Mapping[str, int]
    has_contract: bool
    template: TemplateSummary | None
    stop: tuple[str, ...]
    system: str
    training: Mapping[str, Any]
    certificate: CertificateSummary | None
    problem: str
    convert: str
    use: str


def describe_peft(folder: Path, store: Store, looking: Looking | None) -> PeftDescription:
    """See `description.describe`."""
    values, found = read_json(folder / ADAPTER_CONFIG), Contract.load(folder)
    contract = found or Contract()
    named = text(values.get("base_model_name_or_path"))
    bases = fits(contract.base_fingerprint, [named], store, looking, bases=True)
    is_pickle = _is_pickle(folder)
    weights = folder / (PICKLED_WEIGHTS if is_pickle else ADAPTER_WEIGHTS)
    tensors = {} if is_pickle else read_tensors(weights)
    return PeftDescription(
        kind="PEFT adapter folder",
        path=folder,
        name=repository_of(folder) or folder.resolve().name,
        method=text(values.get("peft_type")) or "unknown",
        rank=values.get("r"),
        alpha=values.get("lora_alpha"),
        target_modules=values.get("target_modules"),
        rank_pattern=values.get("rank_pattern"),
        alpha_pattern=values.get("alpha_pattern"),
        init=values.get("init_lora_weights"),
        settings=_others(values),
        base_name=contract.base_name or named,
        base_fingerprint=contract.base_fingerprint,
        bases=tuple(bases),
        size_bytes=weights.stat().st_size,
        n_tensors=len(tensors),
        parameters=None if is_pickle else sum(prod(tensor.shape) for tensor in tensors.values()),
        dtypes=dict(Counter(tensor.dtype for tensor in tensors.values()).most_common()),
        has_contract=found is not None,
        template=TemplateSummary.of(contract.chat_template),
        stop=contract.stop,
        system=contract.system,
        training=contract.training,
        certificate=CertificateSummary.of(contract, folder),
        problem=f"{PICKLED_WEIGHTS} is a pickle, which can run code when opened: it was not" if is_pickle else "",
        convert=_conversion(folder, bases),
        use=usage(folder, bases, contract.base_name),
    )


def _is_pickle(folder: Path) -> bool:
    """Raises:
    MissingFileError: there are no weights at all.
    """
    if (folder / ADAPTER_WEIGHTS).is_file():
        return False
    if PICKLED_WEIGHTS in pickles_in(folder):
        return True
    raise MissingFileError(f"{folder}: no {ADAPTER_WEIGHTS} beside {ADAPTER_CONFIG}", hint="Is it still in training?")


def _others(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in sorted(values.items())
            if key not in (*_OWN_LINE, *_UNTOLD) and value not in _OFF}  # fmt: skip


def _conversion(folder: Path, bases: list[Fit]) -> str:
    """The command that makes a GGUF of it; without a base in reach it has to be given one."""
    command = command_line("edgelora", "convert", folder)
    return command if bases else f"{command} --base BASE"
