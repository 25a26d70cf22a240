"""The adapters inside a bundle, by its header alone.

graniteswitch.adapters.token_ids_activate     int32[]    id of each adapter's control token
graniteswitch.adapters.token_ids_substitute   int32[]    and of the token whose place it takes
edgelora.bundle.version                       uint32     1
edgelora.bundle.base_name, .base_fingerprint  string     the base it was made of
edgelora.bundle.base_template                 string     that base's own chat template
edgelora.bundle.names                         string[]   what requests call the adapters
edgelora.bundle.hashes                        string[]   SHA-256 of each adapter's file
edgelora.bundle.scales                        float32[]  how strongly each is applied
edgelora.bundle.0.edgelora.contract.version   uint32     from here on the first adapter's contract, key by key
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from converters.bundle_layout import ARCHITECTURE
from converters.reader import GGUFHeader
from edgelora.adapter_ref import check_name
from edgelora.contract import Contract, Value
from edgelora.errors import ModelFileError, SettingsError

VERSION = 1
PREFIX = "edgelora.bundle."
_TOKENS = "tokenizer.ggml.tokens"


@dataclass(frozen=True)
class BundledAdapter:
    """One adapter of a bundle.

    Attributes:
        token: id of its control token, and `text` what a client types for it.
        substitute: id of the token whose place it takes: the first of a conversation.
        content_hash: SHA-256 of the file that it was made of.
        scale: at which it was put in.
    """

    name: str
    token: int
    text: str
    substitute: int
    content_hash: str
    scale: float
    contract: Contract | None = field(default=None, repr=False)

    def placed(self, tokens: Sequence[int], bos: int) -> list[int]:
        """A conversation's tokens with the control token in the place of the first.

        Args:
            bos: id of the token that stands in front of a conversation whose template does not write it.

        Raises:
            ModelFileError: the conversation begins with another token, under a template it was not made with.
        """
        if tokens and tokens[0] == self.substitute:
            return [self.token, *tokens[1:]]
        if self.substitute == bos:
            return [self.token, *tokens]
        raise ModelFileError(
            f"adapter {self.name}: the conversation begins with token {tokens[0] if tokens else 'none'}, and its "
            f"control token {self.text} takes the place of token {self.substitute}",
            hint="Leave --chat-template out, or bundle it again with that template.",
        )


def is_bundle(header: GGUFHeader) -> bool:
    """Whether edgelora made it; another graniteswitch file names no adapters."""
    return header.metadata.get("general.architecture") == ARCHITECTURE and f"{PREFIX}version" in header.metadata


def base_template(header: GGUFHeader) -> str:
    """The chat template of a bundle's base, empty where it had none."""
    value = header.metadata.get(f"{PREFIX}base_template")
    return value if isinstance(value, str) else ""


def bundled_adapters(header: GGUFHeader) -> tuple[BundledAdapter, ...]:
    """The adapters of a bundle, none of any other file.

    Raises:
        ModelFileError: a version this edgelora does not know, or lists that contradict one another.
    """
    if not is_bundle(header):
        return ()
    metadata = header.metadata
    if (version := metadata[f"{PREFIX}version"]) != VERSION:
        raise ModelFileError(
            f"{header.path}: a bundle of version {version!r}; this edgelora reads version {VERSION}",
            hint="Upgrade edgelora, or bundle the adapters again with this one.",
        )
    columns = [_list(metadata, key, kind) for key, kind in _COLUMNS.items()]
    names, tokens, substitutes = columns[:3]
    texts = metadata[_TOKENS] if isinstance(metadata.get(_TOKENS), list) else []
    is_sound = {len(column) for column in columns} == {len(names)} and len({*names}) == len({*tokens}) == len(names)
    if not names or not is_sound or not all(0 <= token < len(texts) for token in (*tokens, *substitutes)):
        raise ModelFileError(f"{header.path}: its lists of adapters contradict one another", hint="Bundle it again.")
    return tuple(
        BundledAdapter(_checked(header, name), token, str(texts[token]), substitute, digest, scale,
                       _contract(header, number))
        for number, (name, token, substitute, digest, scale) in enumerate(zip(*columns, strict=True))
    )  # fmt: skip


_COLUMNS: Mapping[str, type] = {
    f"{PREFIX}names": str,
    f"{ARCHITECTURE}.adapters.token_ids_activate": int,
    f"{ARCHITECTURE}.adapters.token_ids_substitute": int,
    f"{PREFIX}hashes": str,
    f"{PREFIX}scales": float,
}


def _list(metadata: Mapping[str, Any], key: str, kind: type) -> list[Any]:
    value = metadata.get(key)
    return value if isinstance(value, list) and all(type(item) is kind for item in value) else []


def _checked(header: GGUFHeader, name: str) -> str:
    try:
        return check_name(name)
    except SettingsError as error:
        raise ModelFileError(f"{header.path}: {error.message}", hint="Bundle it again.") from None


def _contract(header: GGUFHeader, number: int) -> Contract | None:
    prefix = f"{PREFIX}{number}."
    own = {key.removeprefix(prefix): header.metadata[key] for key in header.metadata if key.startswith(prefix)}
    return Contract.from_metadata(own, f"{header.path}, adapter {number + 1}")


def contract_metadata(number: int, contract: Contract) -> dict[str, Value]:
    """A contract's keys as a bundle has them."""
    return {f"{PREFIX}{number}.{key}": value for key, value in contract.to_metadata().items()}


def check_no_bundle(adapter: Path, base: GGUFHeader) -> None:
    """A bundle takes no adapter beside its own: it has other tensors than the base that the adapter was made for.

    Raises:
        ModelFileError: `base` is a bundle.
    """
    if inside := bundled_adapters(base):
        raise ModelFileError(
            f"{adapter} cannot be used beside {base.path}: a bundle, which takes no further adapter; it has "
            f"{', '.join(each.name for each in inside)}",
            hint="Make a new one of its base and all the adapters: edgelora bundle BASE --adapter ADAPTER.",
        )
