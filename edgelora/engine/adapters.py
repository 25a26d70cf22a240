"""The adapters that are loaded: checked, hashed, with their contracts, freed after every context let go of them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from edgelora.adapter_ref import BASE_NAMES, AdapterRef
from edgelora.contract import Contract
from edgelora.engine.model import Model
from edgelora.engine.native import Handle, forget_log, llama, reason
from edgelora.engine.preflight import check_adapter, check_fingerprint, check_finite, content_hash, read_checked
from edgelora.engine.prompt import encode_prompt
from edgelora.errors import ModelFileError, SettingsError
from edgelora.sampling import Sampling
from edgelora.template import ChatTemplate


@dataclass(frozen=True)
class Adapter:
    """A loaded adapter, or the bare base (`BARE`), which needs no file.

    Attributes:
        content_hash: SHA-256 of the file in hex; empty for the bare base.
        contract: what it carries; None where another tool made it.
        template: the contract's chat template.
        sampling: the contract's sampling defaults.
        notices: what could not be checked, or was overruled.
    """

    name: str
    ref: AdapterRef | None
    content_hash: str
    contract: Contract | None
    template: ChatTemplate | None
    sampling: Sampling = field(default_factory=Sampling)
    notices: tuple[str, ...] = ()
    handle: Handle | None = field(default=None, repr=False, compare=False)

    @property
    def pointer(self) -> Any:
        return self.handle.pointer if self.handle else None

    @property
    def scale(self) -> float:
        return self.ref.scale if self.ref else 1.0


BARE = Adapter("none", None, "", None, None)


def find_adapter(name: str | None, loaded: Mapping[str, Adapter]) -> Adapter:
    """The adapter of that name; None, "none" and "base" are the bare base.

    Raises:
        SettingsError: unknown; the hint lists the names.
    """
    if not isinstance(name, str | None):
        raise SettingsError(f"adapter is {name!r}, expected a loaded adapter's name")
    if name is None or name in BASE_NAMES:
        return BARE
    if name not in loaded:
        raise SettingsError(f"unknown adapter {name!r}", hint=f"Loaded: {', '.join([*loaded, 'none'])}.")
    return loaded[name]


class Adapters:
    """The adapters of one model, by name. Two names for one content share its memory."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._loaded: dict[str, Adapter] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._loaded))

    def get(self, name: str | None) -> Adapter:
        """See `find_adapter`."""
        return find_adapter(name, self._loaded)

    def load(self, ref: AdapterRef, *, force: bool = False) -> Adapter:
        """Check and load; an adapter of the same name is replaced once the new one is whole.

        Raises:
            ModelFileError, BaseMismatchError: see `preflight`; or golden tokens that come out otherwise on this base.
        """
        header = read_checked(ref.path, "adapter")
        check_adapter(header, self._model.header)
        contract = Contract.from_metadata(header.metadata, str(ref.path))
        template = ChatTemplate(contract.chat_template) if contract and contract.chat_template else None
        notices = tuple(_check_contract(ref, contract, template, self._model, force))
        digest = content_hash(ref.path)
        handle = next((a.handle for a in self._loaded.values() if a.content_hash == digest), None)
        if handle is None:
            check_finite(header)
            handle = _init(self._model, ref)
            if content_hash(ref.path) != digest:
                handle.close()
                raise ModelFileError(f"{ref.path}: changed while it was being loaded", hint="Try again.")
        replaced = self._loaded.get(ref.name)
        self._loaded[ref.name] = Adapter(
            ref.name, ref, digest, contract, template, _sampling(ref, contract), notices, handle
        )
        self._free_if_unused(replaced)
        return self._loaded[ref.name]

    def unload(self, name: str) -> None:
        """Forget a name. Every context must have let go of the adapter before.

        Raises:
            SettingsError: no such adapter.
        """
        if self.get(name) is BARE:
            raise SettingsError("the bare base cannot be unloaded")
        self._free_if_unused(self._loaded.pop(name))

    def close(self) -> None:
        """Free all; before the model is."""
        for name in self:
            self.unload(name)

    def _free_if_unused(self, adapter: Adapter | None) -> None:
        if adapter and adapter.handle and not any(a.handle is adapter.handle for a in self._loaded.values()):
            adapter.handle.close()


def _init(model: Model, ref: AdapterRef) -> Handle:
    library = llama()
    forget_log()
    pointer = library.llama_adapter_lora_init(model.pointer, os.fsencode(ref.path))
    if not pointer:  # a NULL pointer object is not None
        raise ModelFileError(f"{ref.path}: llama.cpp cannot load it: {reason()}")
    return Handle(pointer, library.llama_adapter_lora_free)


def _sampling(ref: AdapterRef, contract: Contract | None) -> Sampling:
    try:
        return Sampling.from_mapping(contract.sampling if contract else {})
    except SettingsError as error:
        raise ModelFileError(
            f"{ref.path}: its contract is damaged: {error.message}", hint="Convert it again."
        ) from None


def _check_contract(
    ref: AdapterRef, contract: Contract | None, template: ChatTemplate | None, model: Model, force: bool
) -> Iterator[str]:
    """Notices; with `force` a failed check becomes one."""
    if contract is None:
        yield (
            f"{ref.name}: {ref.path} carries no contract (another tool made it): whether {model.name} is its base, and "
            "its chat template, stop strings and system prompt, could not be checked"
        )
        return
    checks = (
        partial(check_fingerprint, contract, ref.path, model.header),
        partial(_check_golden, ref.path, contract, template, model),
    )
    for check in checks:
        try:
            check()
        except ModelFileError as error:
            if not force:
                raise
            yield f"{ref.name}: {error.message} (used all the same: force)"


def _check_golden(path: Path, contract: Contract, template: ChatTemplate | None, model: Model) -> None:
    if template is None or not contract.golden_messages or not contract.golden_tokens:
        return
    made = encode_prompt(model.tokenizer, template, contract.golden_messages)
    wanted = list(contract.golden_tokens)
    if made != wanted:
        at = next(
            (i for i, (a, b) in enumerate(zip(made, wanted, strict=False)) if a != b), min(len(made), len(wanted))
        )
        raise ModelFileError(
            f"{path}: its test conversation becomes {len(made)} tokens on {model.path}, in training it was "
            f"{len(wanted)}; they part at token {at} (here {made[at : at + 4]}, in training {wanted[at : at + 4]})",
            hint="The base's tokenizer is not the one it was trained with: convert the base again, or use --force.",
        )
