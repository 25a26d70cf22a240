"""The contract of an adapter that is converted: which base it belongs to, found and checked, and under which template.

A PEFT folder may bring a contract (training wrote it), a GGUF adapter has one in its metadata, and others get one from
what their base says of itself.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgelora.contract import GOLDEN_MESSAGES, Contract
from edgelora.errors import BaseMismatchError, BaseNotFoundError, EdgeloraError
from edgelora.messages import Message
from edgelora.repaired_base import other_weights
from edgelora.store import Store
from edgelora.template import ChatTemplate, resolve


@dataclass(frozen=True)
class ContractTerms:
    """How strictly a contract is held against a base.

    Attributes:
        chat_template: a built-in name or a Jinja file, instead of the adapter's own.
        force: another base than it was made for is a notice, not an error.
    """

    chat_template: str | None = None
    force: bool = False


@dataclass(frozen=True)
class Settled:
    """A contract for one base, and what should be known of it."""

    contract: Contract
    notices: tuple[str, ...] = ()


def find_base(folder: Path, given: Path | None, store: Store) -> Path:
    """The base a PEFT folder is converted against: the one given, the one it names (a folder, a GGUF file, or a hub id
    that lies in the Hugging Face cache), or the store's.

    Raises:
        BaseNotFoundError: none of them.
    """
    if given:
        return given
    named = named_base(folder)
    if named and _is_base_of(named, folder, store):
        return named
    try:
        return store.find_base(Contract.load(folder), folder).path
    except BaseNotFoundError as error:
        wanted = _base_named_by(folder)
        trained = f" It was trained on {wanted}." if wanted else ""
        raise BaseNotFoundError(
            error.message, hint=f"Name it with --base: its Hugging Face folder, or a GGUF of it.{trained}"
        ) from None


def named_base(folder: Path) -> Path | None:
    """The base that an adapter's folder names: a folder or a GGUF file, where it lies on this machine."""
    from converters.hub import is_hub_id
    from converters.hub_cache import cached_snapshot, missing_from
    from converters.peft_config import read_peft_config

    name = _base_named_by(folder)
    if not name:
        return None
    is_file = name.endswith(".gguf") and os.path.isfile(name)  # unlike Path.is_file, also false of names too long
    if is_file or os.path.isfile(os.path.join(name, "config.json")):
        return Path(name)
    revision = read_peft_config(folder).values.get("revision")
    found = cached_snapshot(name, revision if isinstance(revision, str) else "main") if is_hub_id(name) else None
    return found if found and not missing_from(found) else None


def _is_base_of(named: Path, folder: Path, store: Store) -> bool:
    """Whether the folder an adapter names is still what it was trained on; without a contract, it is believed."""
    contract = Contract.load(folder)
    return contract is None or not contract.base_fingerprint or store.fingerprint(named) == contract.base_fingerprint


def _base_named_by(folder: Path) -> str:
    from converters.peft_config import read_peft_config

    config = read_peft_config(folder)
    return config.base_model or str(config.values.get("model") or "")  # MLX's name for it


def contract_for(folder: Path, base: Path, store: Store, terms: ContractTerms | None = None) -> Settled:
    """The contract of a PEFT folder: the one training wrote, or one made from what the base says of itself.

    Raises:
        BaseMismatchError: training wrote down another base than `base`.
    """
    found = Contract.load(folder) or Contract(base_name=_base_named_by(folder) or base.stem)
    return against(found, folder, base, store, terms)


def against(contract: Contract, source: Path, base: Path, store: Store, terms: ContractTerms | None = None) -> Settled:
    """A contract for one base.

    Args:
        source: the adapter, for messages.

    Raises:
        BaseMismatchError: it was made for another.
    """
    terms = terms or ContractTerms()
    fingerprint = store.fingerprint(base)
    notices = check_base(contract, source, base, fingerprint, force=terms.force)
    if terms.chat_template or not contract.chat_template:
        contract = with_template(contract, checked_template(terms.chat_template) or _template_of(base))
        if contract.chat_template and not contract.stop and base.is_dir():
            golden = _with_golden(contract, base)
            contract, notices = golden.contract, (*notices, *golden.notices)
    return Settled(contract.with_changes(base_fingerprint=fingerprint), notices)


def check_base(contract: Contract, source: Path, base: Path, fingerprint: str, *, force: bool) -> tuple[str, ...]:
    """Raises BaseMismatchError where a contract names another base; with `force` that is a notice."""
    if contract.base_fingerprint not in ("", fingerprint):
        problem = (
            f"{source} was trained on {contract.base_name or 'another base'} (fingerprint "
            f"{contract.base_fingerprint[:12]}); {base} is another (fingerprint {fingerprint[:12]})"
        )
    elif other := other_weights(contract, base):
        problem = f"{source}: {other}"
    else:
        return ()
    if force:
        return (f"{problem}: used all the same (--force), and what it answers may be nonsense",)
    raise BaseMismatchError(problem, hint="Name the right base with --base, or use --force to convert it all the same.")


def with_template(contract: Contract, template: str) -> Contract:
    """Under another template: what was recorded under the old one is no longer true."""
    if template == contract.chat_template:
        return contract
    return contract.with_changes(chat_template=template, golden_messages=(), golden_tokens=(), certificate="")


def checked_template(name_or_path: str | None) -> str:
    """The source of a built-in template or a Jinja file; "" for None.

    Raises:
        SettingsError, ModelFileError: there is no such template, or it is not one.
    """
    return ChatTemplate(resolve(name_or_path)).source if name_or_path else ""


def _template_of(base: Path) -> str:
    """The base's own chat template, empty where it has none."""
    if base.is_dir():
        from converters.special_tokens import chat_template_of

        return chat_template_of(base)
    from converters.base_file import read_base_header

    return str(read_base_header(base).metadata.get("tokenizer.chat_template", ""))


def _with_golden(contract: Contract, base: Path) -> Settled:
    """Record the ids of a short conversation, by the Hugging Face tokenizer, for the device to compare with."""
    try:
        tokens = golden_tokens(base, contract.chat_template, GOLDEN_MESSAGES)
    except EdgeloraError as error:
        return Settled(contract, (f"no token ids to compare on the device: {error.message}",))
    return Settled(contract.with_changes(golden_messages=GOLDEN_MESSAGES, golden_tokens=tokens) if tokens else contract)


def golden_tokens(base: Path, template: str, messages: tuple[Message, ...]) -> tuple[int, ...]:
    """The ids of `messages` under `template`, by the tokenizer in an HF folder; empty without a `tokenizer.json`."""
    import json

    from tokenizers import Tokenizer

    path = base / "tokenizer.json"
    if not path.is_file():
        return ()
    names: dict[str, Any] = {}
    if (base / "tokenizer_config.json").is_file():
        names = json.loads((base / "tokenizer_config.json").read_text(encoding="utf-8"))
    text = ChatTemplate(template).render(
        messages,
        add_generation_prompt=True,
        bos_token=_token_text(names.get("bos_token")),
        eos_token=_token_text(names.get("eos_token")),
    )
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tuple(tokenizer.encode(text, add_special_tokens=False).ids)


def _token_text(value: Any) -> str:
    return str(value.get("content", "")) if isinstance(value, dict) else str(value or "")
