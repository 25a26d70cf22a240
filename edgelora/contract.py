"""What an adapter carries beside its weights, so that `--adapter support.gguf` is enough.

In a GGUF adapter the contract is metadata; in a PEFT folder it is the file `edgelora.json`, beside what PEFT writes:

    edgelora.contract.version   uint32   1
    edgelora.base.name          string   what people call the base
    edgelora.base.fingerprint   string   `converters.fingerprint` of the base, equal for all its quantizations
    tokenizer.chat_template     string   the template it was trained with
    edgelora.golden.messages    string   JSON: a short conversation ...
    edgelora.golden.tokens      int32[]  ... and the ids it must become on every device
    edgelora.stop               string[] strings that end a reply
    edgelora.sampling           string   JSON: sampling defaults, as in `edgelora.sampling.Sampling`
    edgelora.system             string   the system prompt it was trained with
    edgelora.training           string   JSON: method, rank, data hash, steps, loss ...
    edgelora.exactness          string   JSON: what the converter did to the weights
    edgelora.repair             string   JSON: which quantization its last ranks repair (`converters.repair`)
    edgelora.certificate        string   what `edgelora verify` compares with (`edgelora.certificate`), at most 256 KiB

Unknown versions are refused; an adapter without a contract (made by llama.cpp's script) is `None` here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from edgelora.errors import ModelFileError
from edgelora.messages import Message
from edgelora.whole_file import write_whole

VERSION = 1
MAX_CERTIFICATE = 256 << 10
FILE_NAME = "edgelora.json"
Value = str | int | float | bool | list[str] | list[int]

GOLDEN_MESSAGES: tuple[Message, ...] = (
    {"role": "user", "content": "It's 1,234.5 km away, isn't it?"},
    {"role": "assistant", "content": "Yes:\n\n- naïve CAFÉ, 7 o'clock!"},
    {"role": "user", "content": "So  x_1 += 20?"},
)
"""Rendered as serving does, ending where a reply begins. Words, digits, contractions, runs of blanks and accents: what
pre-tokenizers disagree about."""


@dataclass(frozen=True)
class Contract:
    """See the module's table; every field but the version may be empty."""

    version: int = VERSION
    base_name: str = ""
    base_fingerprint: str = ""
    chat_template: str = ""
    golden_messages: tuple[Message, ...] = ()
    golden_tokens: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    sampling: Mapping[str, Any] = field(default_factory=dict)
    system: str = ""
    training: Mapping[str, Any] = field(default_factory=dict)
    exactness: Mapping[str, Any] = field(default_factory=dict)
    repair: Mapping[str, Any] = field(default_factory=dict)
    certificate: str = field(default="", repr=False)

    def to_metadata(self) -> dict[str, Value]:
        """GGUF key-value pairs; empty fields are left out."""
        pairs = {
            entry.key: entry.encode(getattr(self, entry.field)) for entry in _ENTRIES if getattr(self, entry.field)
        }
        return {_VERSION_KEY: self.version, **pairs}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any], source: str = "this adapter") -> Contract | None:
        """The contract in a GGUF file's metadata, or None where there is none.

        Raises:
            ModelFileError: a version this edgelora does not know, or a field that cannot be read.
        """
        if _VERSION_KEY not in metadata:
            return None
        _check_version(metadata[_VERSION_KEY], source)
        return _decode(cls, {e.field: (metadata[e.key], e.decode) for e in _ENTRIES if e.key in metadata}, source)

    def save(self, folder: Path) -> Path:
        """Write `edgelora.json` into a PEFT folder, whole or not at all."""
        path = folder / FILE_NAME
        text = json.dumps({k: v for k, v in asdict(self).items() if v}, indent=2, ensure_ascii=False) + "\n"
        write_whole(path, text)
        return path

    @classmethod
    def load(cls, folder: Path) -> Contract | None:
        """The contract beside a PEFT adapter, or None where there is none.

        Raises:
            ModelFileError: not JSON, an unknown version, or a field that cannot be read.
        """
        path = folder / FILE_NAME
        if not path.is_file():
            return None
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ModelFileError(
                f"{path}: cannot be read ({error})", hint="Delete it to go on without a contract."
            ) from None
        if not isinstance(values, dict):
            raise ModelFileError(f"{path}: expected a JSON object", hint="Delete it to go on without a contract.")
        _check_version(values.pop("version", None), str(path))
        unknown = sorted(set(values) - {f.name for f in fields(cls)})
        if unknown:
            raise ModelFileError(f"{path}: unknown fields: {', '.join(unknown)}")
        return _decode(cls, {name: (value, _JSON_DECODERS[name]) for name, value in values.items()}, str(path))

    def with_changes(self, **changes: Any) -> Contract:
        return replace(self, **changes)


def _check_version(version: object, source: str) -> None:
    if version != VERSION:
        raise ModelFileError(
            f"{source}: its contract has version {version!r}; this edgelora reads version {VERSION}",
            hint="Upgrade edgelora, or convert the adapter again with this one.",
        )


def _decode(cls: type[Contract], values: Mapping[str, tuple[Any, Callable[[Any], Any]]], source: str) -> Contract:
    decoded, problems = {}, []
    for name, (value, decode) in values.items():
        try:
            decoded[name] = decode(value)
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            problems.append(f"{name} ({error})")
    if problems:
        raise ModelFileError(
            f"{source}: its contract is damaged: {'; '.join(problems)}", hint="Convert the adapter again."
        )
    return cls(**decoded)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected text, found {type(value).__name__}")
    value.encode("utf-8")  # half a character could not be written down again
    return value


def _certificate(value: Any) -> str:
    """Its text, which is read only where it is used."""
    if len(_text(value)) > MAX_CERTIFICATE:
        raise ValueError(f"{len(value)} characters, expected at most {MAX_CERTIFICATE}")
    return str(value)


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(f"expected a list, found {type(value).__name__}")
    return value


def _whole(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"expected a whole number, found {type(value).__name__}")
    return value


def _mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"expected an object, found {type(value).__name__}")
    return value


def _messages(value: Any) -> tuple[Message, ...]:
    return tuple({"role": _text(m["role"]), "content": _text(m["content"])} for m in map(_mapping, _list(value)))


def _texts(value: Any) -> tuple[str, ...]:
    return tuple(_text(v) for v in _list(value))


def _ids(value: Any) -> tuple[int, ...]:
    return tuple(_whole(v) for v in _list(value))


def _to_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True)


def _from_json(value: Any) -> Any:
    return json.loads(_text(value))


@dataclass(frozen=True)
class _Entry:
    field: str
    key: str
    encode: Callable[[Any], Value]
    decode: Callable[[Any], Any]


_VERSION_KEY = "edgelora.contract.version"
_ENTRIES = (
    _Entry("base_name", "edgelora.base.name", str, _text),
    _Entry("base_fingerprint", "edgelora.base.fingerprint", str, _text),
    _Entry("chat_template", "tokenizer.chat_template", str, _text),
    _Entry("golden_messages", "edgelora.golden.messages", _to_json, lambda v: _messages(_from_json(v))),
    _Entry("golden_tokens", "edgelora.golden.tokens", list, _ids),
    _Entry("stop", "edgelora.stop", list, _texts),
    _Entry("sampling", "edgelora.sampling", _to_json, lambda v: _mapping(_from_json(v))),
    _Entry("system", "edgelora.system", str, _text),
    _Entry("training", "edgelora.training", _to_json, lambda v: _mapping(_from_json(v))),
    _Entry("exactness", "edgelora.exactness", _to_json, lambda v: _mapping(_from_json(v))),
    _Entry("repair", "edgelora.repair", _to_json, lambda v: _mapping(_from_json(v))),
    _Entry("certificate", "edgelora.certificate", str, _certificate),
)
_JSON_DECODERS: dict[str, Callable[[Any], Any]] = {
    "golden_messages": _messages,
    "golden_tokens": _ids,
    "stop": _texts,
    **dict.fromkeys(("base_name", "base_fingerprint", "chat_template", "system"), _text),
    **dict.fromkeys(("sampling", "training", "exactness", "repair"), _mapping),
    "certificate": _certificate,
}
