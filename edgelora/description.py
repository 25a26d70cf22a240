"""What a base or an adapter is: everything `edgelora show` says of a file or folder, as plain data.

`describe` sees what it is and asks one of three: `base_description`, `adapter_description`, `peft_description`. Nothing
in a file is believed: a value of the wrong type counts as none.
"""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from converters.detect import SourceKind, detect
from converters.hub_cache import ADAPTER_CONFIG
from edgelora.template import BUILTIN

if TYPE_CHECKING:
    from edgelora.adapter_description import AdapterDescription
    from edgelora.base_description import BaseDescription
    from edgelora.peft_description import PeftDescription
    from edgelora.store import Looking, Store

    Description: TypeAlias = BaseDescription | AdapterDescription | PeftDescription

FIRST_LINE = 60


@dataclass(frozen=True)
class TemplateSummary:
    """A chat template: which of the built-in ones it is ("" for none), its hash, and how it begins."""

    name: str
    sha256: str
    first_line: str
    n_characters: int

    @classmethod
    def of(cls, source: object) -> TemplateSummary | None:
        """None where there is no template."""
        if not isinstance(source, str) or not source:
            return None
        name = next((name for name, text in BUILTIN.items() if text == source), "")
        line = next((line for line in source.splitlines() if line.strip()), "")
        short = line if len(line) <= FIRST_LINE else line[: FIRST_LINE - 3] + "..."
        return cls(name, hashlib.sha256(source.encode()).hexdigest(), short, len(source))


@dataclass(frozen=True)
class Fit:
    """A known file that goes with the one described: a base for an adapter, an adapter for a base."""

    name: str
    detail: str
    path: Path
    kind: str


def describe(path: Path, store: Store, looking: Looking | None = None) -> Description:
    """Describe a GGUF base (also by one of its parts), a GGUF adapter, a model folder or a PEFT adapter folder.

    Args:
        store: tells which known files go with it.
        looking: told of each file that has to be opened for that, the first time.

    Raises:
        ConversionError, ModelFileError: it is none of the four, or broken.
    """
    from edgelora.adapter_description import describe_adapter
    from edgelora.base_description import describe_folder, describe_gguf
    from edgelora.peft_description import describe_peft

    readers: Mapping[SourceKind, Callable[..., Description]] = {
        SourceKind.GGUF_BASE: describe_gguf,
        SourceKind.HF_BASE: describe_folder,
        SourceKind.GGUF_ADAPTER: describe_adapter,
        SourceKind.PEFT_ADAPTER: describe_peft,
    }
    # An adapter whose weights are pickles can be described: its configuration is JSON.
    kind = SourceKind.PEFT_ADAPTER if (path / ADAPTER_CONFIG).is_file() else detect(path)
    store.look(path)  # it may be what moved away from where it was registered
    return readers[kind](path, store, looking)


def to_dict(description: Description) -> dict[str, Any]:
    """Plain data for `--json`: no empty fields, paths as text, sizes in bytes."""
    values: dict[str, Any] = _plain(asdict(description))
    return values


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items() if item not in (None, "", (), [], {})}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) or is_dataclass(value) else value


def fits(fingerprint: str, names: Iterable[str], store: Store, looking: Looking | None, *, bases: bool) -> list[Fit]:
    """The known bases (or adapters) of a fingerprint, or that are named by or name one of `names`; GGUF files first."""
    from edgelora.listing import Model, grouped, names_of, with_named_bases

    wanted = {name for name in names if name}
    entries = with_named_bases(store, store.known(looking), wanted if bases else ())

    def matches(model: Model) -> bool:
        known_as = {name for base in model.bases for name in names_of(base)} | {"" if model.fingerprint else model.name}
        return bool((fingerprint and model.fingerprint == fingerprint) or known_as & wanted)

    models, _ = grouped(entry for entry in entries if entry.is_there)
    found = [entry for model in models if matches(model) for entry in (model.bases if bases else model.adapters)]
    return [Fit(entry.name, entry.detail, entry.path, entry.kind.value if entry.kind else "") for entry in found]


def command_line(*words: object) -> str:
    """A command as it can be typed."""
    return shlex.join(map(str, words))


def whole(value: object) -> int | None:
    return value if type(value) is int else None


def text(value: object) -> str:
    return value if isinstance(value, str) else ""


def number(value: object) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None
