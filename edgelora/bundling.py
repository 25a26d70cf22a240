"""`edgelora bundle`: a base and adapters in one GGUF file, each adapter with its contract.

The bytes are the work of `converters.bundle`. This module adds what only edgelora knows: which base, which contracts,
what a conversation's first token is under an adapter's template, and the template that chooses an adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from edgelora.adapter_contract import check_base
from edgelora.adapter_ref import AdapterRef
from edgelora.bundle_reading import PREFIX, VERSION, contract_metadata
from edgelora.bundle_template import SAMPLES, Choice, Texts, adapted
from edgelora.contract import Contract, Value
from edgelora.errors import ModelFileError, SettingsError
from edgelora.resolution import contract_of, resolve_files
from edgelora.store import Store
from edgelora.template import ChatTemplate

if TYPE_CHECKING:
    from converters.bundle import BundleOptions, BundleReport
    from converters.reader import GGUFHeader
    from edgelora.engine.model import Model

Progress = Callable[[int, int, str], None]
_SPECIAL = (3, 4)  # control and user-defined tokens: their text is always theirs
_TYPES, _TOKENS = "tokenizer.ggml.token_type", "tokenizer.ggml.tokens"


@dataclass(frozen=True)
class Bundled:
    """An adapter on its way into a bundle.

    Attributes:
        found: whether its file brought the contract.
        first: text of the token that its conversations begin with; empty where its template writes none of the kind
            and llama.cpp puts BOS in front.
        substitute: id of the one or the other.
    """

    ref: AdapterRef
    contract: Contract
    found: bool
    template: str
    first: str
    substitute: int


def bundle_adapters(
    base: Path,
    adapters: Sequence[AdapterRef],
    out: Path,
    options: BundleOptions | None = None,
    *,
    store: Store | None = None,
    progress: Progress | None = None,
    force: bool = False,
) -> BundleReport:
    """Write a bundle, and remember it.

    Args:
        adapters: GGUF files or PEFT folders; a folder is converted into the store first.
        force: replace `out`, and take adapters that were made for another base.

    Raises:
        ConversionError, EdgeloraError: what is wrong; nothing is left behind.
    """
    from converters.base_file import read_base_header
    from converters.bundle import Member, bundle
    from converters.bundle_layout import check_base as check_fits

    if not adapters:
        raise SettingsError("no adapter named", hint="Name at least one: --adapter ADAPTER.")
    store = store or Store()
    files = resolve_files(adapters, base, store, force=force)
    header = read_base_header(files.base)
    check_fits(header)
    contracts, notices = _contracts(files.adapters, files.base, store, force=force)
    with _vocabulary(files.base) as model:
        added = _added_bos(model)
        notices += _golden_notices(contracts, model, force=force)
        members = [_placed(ref, contract, header, model, added) for ref, contract in contracts]
        template, doubts = _template(header, members, model, added)
    report = bundle(
        files.base,
        [Member(each.ref.name, each.ref.path, each.ref.scale, each.substitute) for each in members],
        out,
        options,
        template=template,
        metadata=_metadata(header, members, store.fingerprint(files.base)),
        progress=progress,
        force=force,
    )
    return replace(report, notices=(*notices, *doubts, *report.notices, *_remembered(report.path, store)))


def _remembered(path: Path, store: Store) -> Iterator[str]:
    """Tell the store; the file is written and good, whatever the store says."""
    try:
        store.register(path)
    except ModelFileError as error:
        yield f"not remembered for later: {error.message}"


def _contracts(
    adapters: Sequence[AdapterRef], base: Path, store: Store, *, force: bool
) -> tuple[list[tuple[AdapterRef, Contract | None]], list[str]]:
    """Each adapter's contract, held against the base.

    Raises:
        BaseMismatchError: one was made for another base.
    """
    found, notices = [], list[str]()
    for ref in adapters:
        contract = contract_of(ref.path)
        found.append((ref, contract))
        if contract is None:
            notices.append(
                f"{ref.name}: {ref.path} carries no contract (another tool made it): whether {base} is its base could "
                "not be checked"
            )
        else:
            notices += check_base(contract, ref.path, base, store.fingerprint(base), force=force)
    return found, notices


def _golden_notices(
    contracts: Sequence[tuple[AdapterRef, Contract | None]], model: Model, *, force: bool
) -> Iterator[str]:
    """Whether each adapter's test conversation becomes the tokens of its training; with `force` what does not is told.

    Raises:
        ModelFileError: one becomes others.
    """
    from edgelora.engine.adapters import check_golden

    for ref, contract in contracts:
        if contract is None or not contract.chat_template:
            continue
        try:
            check_golden(ref.path, contract, ChatTemplate(contract.chat_template), model)
        except ModelFileError as error:
            if not force:
                raise
            yield f"{ref.name}: {error.message} (used all the same: force)"


@contextmanager
def _vocabulary(base: Path) -> Iterator[Model]:
    from edgelora.engine.model import Model

    model = Model(base, vocab_only=True)
    try:
        yield model
    finally:
        model.close()


def _added_bos(model: Model) -> int | None:
    """The token that llama.cpp puts in front of every text, None where it does not."""
    from edgelora.engine.native import llama

    bos = model.tokenizer.bos
    return bos if bos >= 0 and llama().llama_vocab_get_add_bos(model.vocab) else None


def _placed(ref: AdapterRef, contract: Contract | None, header: GGUFHeader, model: Model, added: int | None) -> Bundled:
    """What the adapter's control token takes the place of.

    Raises:
        ModelFileError: its conversations do not begin with one and the same token.
    """
    known = contract or Contract()
    template = known.chat_template or _base_template(header)
    first = _first_token(template, header, model) if template else None
    if first is not None:
        return Bundled(ref, known, contract is not None, template, header.metadata[_TOKENS][first], first)
    bos = added if template or added is not None else model.tokenizer.bos
    if bos is None or bos < 0:
        raise ModelFileError(
            f"adapter {ref.name}: its conversations begin with ordinary text and no BOS token, or with different "
            "tokens: there is none whose place a control token could take",
            hint="Serve it beside the base: edgelora chat --base BASE --adapter ADAPTER.",
        )
    return Bundled(ref, known, contract is not None, template, "", bos)


def _base_template(header: GGUFHeader) -> str:
    value = header.metadata.get("tokenizer.chat_template")
    return value if isinstance(value, str) else ""


def _first_token(source: str, header: GGUFHeader, model: Model) -> int | None:
    """The special token that every conversation begins with under a template; None where there is none."""
    from edgelora.engine.prompt import encode_prompt

    template, firsts = ChatTemplate(source), set[int]()
    for sample in SAMPLES:
        with suppress(ModelFileError):  # it may refuse, say, system messages
            firsts.add(next(iter(encode_prompt(model.tokenizer, template, sample)), -1))
    kinds = header.metadata.get(_TYPES) or ()
    return next((first for first in firsts if len(firsts) == 1 and first >= 0 and kinds[first] in _SPECIAL), None)


def _template(
    header: GGUFHeader, members: Sequence[Bundled], model: Model, added: int | None
) -> tuple[str | None, list[str]]:
    """The bundle's chat template, None to leave the base's alone; and notices."""
    tokens = ", ".join(f"<|{each.ref.name}|>" for each in members)
    base = _base_template(header) or next((each.template for each in members if each.template), "")
    raw = f"begin a prompt with the token itself to choose an adapter: {tokens}"
    notices = []
    if added is not None:
        text = header.metadata[_TOKENS][added]
        notices.append(
            f"llama.cpp adds no {text} to this file's prompts: a raw one has to begin with it, or with a control token"
        )
        without = [each.ref.name for each in members if each.substitute != added]
        if without:
            notices.append(f"conversations begin without {text}, as their template has it: {', '.join(without)}")
    if not base or not all(each.template for each in members):
        return None, [*notices, f"there is no chat template that could choose: {raw}"]
    texts = Texts(model.tokenizer.text_of("bos"), model.tokenizer.text_of("eos"),
                  "" if added is None else header.metadata[_TOKENS][added])  # fmt: skip
    choices = [
        Choice(each.ref.name, f"<|{each.ref.name}|>", each.first, each.template, each.contract.system)
        for each in members
    ]
    try:
        return adapted(base, choices, texts), notices
    except ModelFileError as error:
        return None, [*notices, f"{error.message}; it is left as it was: {raw}"]


def _metadata(header: GGUFHeader, members: Sequence[Bundled], fingerprint: str) -> dict[str, Value | list[float]]:
    from edgelora.engine.preflight import content_hash

    name = header.metadata.get("general.name")
    keys: dict[str, Value | list[float]] = {
        f"{PREFIX}version": VERSION,
        f"{PREFIX}base_name": name if isinstance(name, str) else header.path.stem,
        f"{PREFIX}base_fingerprint": fingerprint,
        f"{PREFIX}names": [each.ref.name for each in members],
        f"{PREFIX}hashes": [content_hash(each.ref.path) for each in members],
        f"{PREFIX}scales": [float(each.ref.scale) for each in members],
    }
    if template := _base_template(header):
        keys[f"{PREFIX}base_template"] = template
    for number, each in enumerate(members):
        if each.found:
            keys |= contract_metadata(number, each.contract)
    return keys
