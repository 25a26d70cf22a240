"""What a base is: a GGUF file, also in parts, or a Hugging Face model folder."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, TypeGuard

from converters.base_file import read_base_header
from converters.checkpoint import Checkpoint
from converters.errors import FormatError, UnsupportedError
from converters.fingerprint import TOKENS
from converters.model import Model, understand
from converters.reader import ARRAY, STRING, GGUFHeader
from converters.safetensors_file import StoredTensor
from edgelora.bundle_reading import BundledAdapter, bundled_adapters
from edgelora.contract import Contract
from edgelora.description import Fit, TemplateSummary, command_line, fits, text, whole
from edgelora.entry import members, place_of, quantization_of
from edgelora.store import Looking, Store

MERGED = "edgelora.merged"  # names of the adapters that a base was made with
TEMPLATE = "tokenizer.chat_template"
_SIZES: Mapping[str, str] = {  # what is said of a model, and its key under the architecture's name
    "context_length": "context_length",
    "layers": "block_count",
    "embedding_length": "embedding_length",
    "feed_forward_length": "feed_forward_length",
    "heads": "attention.head_count",
    "heads_kv": "attention.head_count_kv",
    "experts": "expert_count",
}


@dataclass(frozen=True)
class BundledDescription:
    """An adapter inside a bundle: what chooses it, and what its contract says."""

    name: str
    token: str
    token_id: int
    scale: float
    content_hash: str
    template: TemplateSummary | None
    system: str
    training: Mapping[str, Any]

    @classmethod
    def of(cls, adapter: BundledAdapter) -> BundledDescription:
        contract = adapter.contract or Contract()
        return cls(
            name=adapter.name,
            token=adapter.text,
            token_id=adapter.token,
            scale=adapter.scale,
            content_hash=adapter.content_hash,
            template=TemplateSummary.of(contract.chat_template),
            system=contract.system,
            training=contract.training,
        )


@dataclass(frozen=True)
class BaseDescription:
    """Attributes:
    parameters: values in all tensors; a tied output is counted once.
    quantization: a recipe's name, or the type of most bytes.
    tensor_types: how many tensors of each type.
    sizes: see `_SIZES`; where layers differ, a number a layer.
    is_tied: the output is the embeddings; None where that is not known.
    problem: why it cannot be converted or used.
    merged: adapters that are part of its weights.
    bundled: adapters that it has inside, by name, of a bundle.
    """

    kind: str
    path: Path
    name: str
    architecture: str
    parameters: int
    size_bytes: int
    n_files: int
    quantization: str
    tensor_types: Mapping[str, int]
    sizes: Mapping[str, int | list[int]]
    vocabulary_size: int | None
    tokenizer: str
    is_tied: bool | None
    template: TemplateSummary | None
    fingerprint: str
    merged: tuple[str, ...]
    adapters: tuple[Fit, ...]
    notices: tuple[str, ...]
    problem: str
    use: str
    bundled: tuple[BundledDescription, ...] = ()


def describe_gguf(path: Path, store: Store, looking: Looking | None) -> BaseDescription:
    """See `description.describe`."""
    path = path.parent / place_of(path).name  # of a split base, the first part stands for all
    header, entry = read_base_header(path), store.look(path)
    metadata, tensors = header.metadata, header.tensors.values()
    merged, bundled = metadata.get(MERGED), bundled_adapters(header)
    return BaseDescription(
        kind="GGUF bundle" if bundled else "GGUF base",
        path=path,
        name=text(metadata.get("general.name")) or entry.name,
        architecture=header.architecture,
        parameters=sum(prod(tensor.shape) for tensor in tensors),
        size_bytes=header.size_bytes,
        n_files=len(header.files),
        quantization=quantization_of(header),
        tensor_types=dict(Counter(tensor.type_name for tensor in tensors).most_common()),
        sizes=_sizes(header.architecture, metadata),
        vocabulary_size=_count_of_tokens(header),
        tokenizer=_tokenizer(metadata),
        is_tied="output.weight" not in header.tensors,
        template=TemplateSummary.of(metadata.get(TEMPLATE)),
        fingerprint=entry.fingerprint,
        merged=tuple(text(name) for name in merged) if isinstance(merged, list) else (),
        adapters=tuple(fits(entry.fingerprint, [entry.name], store, looking, bases=False)),
        notices=(),
        problem=entry.problem,
        use="" if entry.problem else command_line("edgelora", "chat", "--base", path, *_first_of(bundled)),
        bundled=tuple(map(BundledDescription.of, bundled)),
    )


def _first_of(bundled: Sequence[BundledAdapter]) -> list[str]:
    return ["--adapter", bundled[0].name] if bundled else []


def describe_folder(folder: Path, store: Store, looking: Looking | None) -> BaseDescription:
    """See `description.describe`. A model of a family that is not known is described as far as its files go."""
    with Checkpoint(folder) as checkpoint:
        plain = _of_checkpoint(folder, checkpoint)
        try:
            model = understand(checkpoint)
        except (UnsupportedError, FormatError) as error:
            return replace(plain, problem=error.message)
        shapes = [view.shape for view in model.views.values()]
    entry = store.look(folder)
    return replace(
        plain,
        name=entry.name,
        architecture=model.family.architecture,
        parameters=sum(map(prod, shapes)),
        sizes=_sizes(model.family.architecture, model.metadata),
        vocabulary_size=len(model.vocabulary.tokens),
        tokenizer=_tokenizer(model.vocabulary.metadata),
        is_tied=_is_tied(model),
        template=TemplateSummary.of(model.vocabulary.metadata.get(TEMPLATE)),
        fingerprint=entry.fingerprint,
        adapters=tuple(fits(entry.fingerprint, [entry.name, str(folder)], store, looking, bases=False)),
        notices=model.notices,
        use=command_line("edgelora", "convert", folder),
    )


def _of_checkpoint(folder: Path, checkpoint: Checkpoint) -> BaseDescription:
    stored = [tensor for tensor in checkpoint.tensors.values() if isinstance(tensor, StoredTensor)]
    bytes_of: Counter[str] = Counter()
    for tensor in stored:
        bytes_of[tensor.dtype] += tensor.size_bytes
    names = checkpoint.config.get("architectures")
    files = {tensor.file for tensor in stored}
    return BaseDescription(
        kind="model folder",
        path=folder,
        name=folder.resolve().name,
        architecture=text(names[0]) if isinstance(names, list) and names else "",
        parameters=sum(prod(tensor.shape) for tensor in checkpoint.tensors.values()),
        size_bytes=sum(file.stat().st_size for file in files or members(folder)),
        n_files=len(files),
        quantization=bytes_of.most_common(1)[0][0].lower() if bytes_of else "stored quantized",
        tensor_types=dict(Counter(tensor.dtype for tensor in stored).most_common()),
        sizes={}, vocabulary_size=whole(checkpoint.config.get("vocab_size")), tokenizer="", is_tied=None,
        template=None, fingerprint="", merged=(), adapters=(), notices=(), problem="", use="",
    )  # fmt: skip


def _is_tied(model: Model) -> bool:
    return "output.weight" not in model.views


def _sizes(architecture: str, metadata: Mapping[str, Any]) -> dict[str, int | list[int]]:
    values = {name: metadata.get(f"{architecture}.{key}") for name, key in _SIZES.items()}
    return {name: value for name, value in values.items() if _is_size(value)}


def _is_size(value: Any) -> TypeGuard[int | list[int]]:
    items = value if isinstance(value, list) else [value]
    return bool(items) and all(type(item) is int for item in items)


def _count_of_tokens(header: GGUFHeader) -> int | None:
    if TOKENS not in header.metadata:
        return None
    raw = header.metadata.raw(TOKENS)
    return raw.count if (raw.kind, raw.item_kind) == (ARRAY, STRING) else None


def _tokenizer(metadata: Mapping[str, Any]) -> str:
    """The tokenizer's kind and pre-tokenizer, as llama.cpp calls them: "gpt2, qwen2"."""
    parts = [text(metadata.get(f"tokenizer.ggml.{key}")) for key in ("model", "pre")]
    return ", ".join(part for part in parts if part)
