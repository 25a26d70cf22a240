"""What fits into the memory that is free: KV sequences and their type, layers on the GPU; or why nothing does."""

from __future__ import annotations

from collections.abc import Sequence, Sized
from dataclasses import dataclass

from converters.reader import GGUFHeader
from edgelora.engine.devices import Device
from edgelora.errors import SettingsError

DEFAULT_N_CTX = 4096
MAX_PARALLEL = 8
MAX_N_CTX = 2**31
KV_SHARE = 4
"""By default, KV sequences take no more than this part of the free memory, but for the first."""
KV_TYPES = {"f16": (1, 2.0), "q8_0": (8, 34 / 32), "q4_0": (2, 18 / 32)}
"""Type of KV values to its number in `enum ggml_type`, and bytes for each value."""
PROGRAM_BYTES = 70_000_000
"""Python and its libraries: what chatting with a model of no size takes."""
CHUNK_TOKENS, ACTIVATIONS = 512, 3
"""Tokens of a prompt that are computed at once, and how many activations of each width are alive at a time."""
GPU_MARGIN_BYTES = 1 << 30
"""Left free on a GPU: compute buffers, and whatever else shows windows there."""


@dataclass(frozen=True)
class KVFit:
    """The KV memory of a context.

    Attributes:
        n_ctx: tokens of each sequence; `parallel` of them.
        kv_type: a key of `KV_TYPES`.
        notices: what the user should know of the choice.
    """

    n_ctx: int
    parallel: int
    kv_type: str
    notices: tuple[str, ...] = ()


def fit_kv(
    values_per_token: int,
    n_ctx_train: int,
    free_bytes: int,
    *,
    n_ctx: int | None = None,
    parallel: int | None = None,
    kv_type: str | None = None,
) -> KVFit:
    """As much as was asked for; of what was not, as much as is sensible.

    A type that was not asked for is F16, or Q8_0 where only that has room for the context that was.

    Args:
        values_per_token: keys and values that a token has in all layers.
        free_bytes: of memory; 0 where it is not known.

    Raises:
        SettingsError: beyond what llama.cpp counts, or what is free.
    """
    tokens, wanted = n_ctx or min(n_ctx_train, DEFAULT_N_CTX), parallel or 1
    if tokens * wanted >= MAX_N_CTX:
        raise SettingsError(
            f"a context of {tokens * wanted} tokens; llama.cpp counts to {MAX_N_CTX - 1}", hint=_smaller(wanted)
        )

    def size(name: str) -> int:
        return max(1, int(values_per_token * tokens * KV_TYPES[name][1]))

    chosen, notices = kv_type or "f16", []
    if kv_type is None and free_bytes and size("q8_0") * wanted <= free_bytes < size("f16") * wanted:
        chosen = "q8_0"
        notices.append(
            f"the KV cache of {_times(wanted, tokens)} tokens is kept as Q8_0: as F16 it takes "
            f"{_gib(size('f16') * wanted)}, and {_gib(free_bytes)} are free"
        )
    if free_bytes and size(chosen) * wanted > free_bytes:
        raise SettingsError(
            f"a context of {_times(wanted, tokens)} tokens takes {_gib(size(chosen) * wanted)} of KV cache "
            f"({chosen.upper()}); {_gib(free_bytes)} are free",
            hint=_smaller(wanted),
        )
    if parallel is None and free_bytes:
        room = free_bytes // KV_SHARE // size(chosen)
        wanted = max(1, min(MAX_PARALLEL, room, (MAX_N_CTX - 1) // tokens))
    return KVFit(tokens, wanted, chosen, tuple(notices))


def fit_gpu_layers(base: GGUFHeader, devices: Sequence[Device], kv_values_per_token: int, n_ctx: int) -> int:
    """How many layers go to the GPUs: -1 for all, where all fit or nothing is known of the memory."""
    gpus = [device for device in devices if "GPU" in device.kind and device.total_bytes]
    layers = base.metadata.get(f"{base.architecture}.block_count")
    if not gpus or not isinstance(layers, int) or layers < 1:
        return -1
    free = sum(max(0, device.free_bytes - GPU_MARGIN_BYTES) for device in gpus)
    weights = sum(tensor.size_bytes for tensor in base.tensors.values())
    kv = int(kv_values_per_token * n_ctx * KV_TYPES["f16"][1])
    if weights + kv <= free:
        return -1
    return min(layers, int(free * layers // (weights + kv)))


def kv_values_per_token(base: GGUFHeader) -> int:
    """Keys and values that a token has in all layers, by the file's metadata; an upper bound where windows slide."""
    get, architecture = base.metadata.get, base.architecture
    heads = get(f"{architecture}.attention.head_count", 1)
    kv_heads = get(f"{architecture}.attention.head_count_kv", heads)
    layers = int(get(f"{architecture}.block_count", 1))
    widest = max(heads) if isinstance(heads, list) else heads
    width = int(get(f"{architecture}.embedding_length", 0)) // max(1, int(widest))
    key, value = (int(get(f"{architecture}.attention.{side}_length", width)) for side in ("key", "value"))
    total = sum(kv_heads) if isinstance(kv_heads, list) else layers * int(kv_heads)
    return total * (key + value)


def serving_bytes(base: GGUFHeader, weights: int, adapters: int, n_ctx: int, kv_type: str = "f16") -> int:
    """What one conversation takes in memory: the program, weights, adapters, KV, and what a prompt is computed in.

    The last is an estimate: logits and a few activations of `CHUNK_TOKENS` tokens in float32.

    Args:
        base: a header; its tensors are not looked at.
        weights, adapters: bytes of the base's and the adapters' tensors.
    """
    get, architecture = base.metadata.get, base.architecture
    tokens = get("tokenizer.ggml.tokens")
    n_vocab = len(tokens) if isinstance(tokens, Sized) else 0
    width, wide = (_largest(get(f"{architecture}.{key}_length", 0)) for key in ("embedding", "feed_forward"))
    computed = CHUNK_TOKENS * 4 * (n_vocab + ACTIVATIONS * (width + wide))
    kv = int(kv_values_per_token(base) * n_ctx * KV_TYPES[kv_type][1])
    return PROGRAM_BYTES + weights + adapters + kv + computed


def _largest(value: object) -> int:
    """Of a size that may be each layer's own."""
    return max(map(int, value)) if isinstance(value, list) and value else int(value) if isinstance(value, int) else 0


def _smaller(parallel: int) -> str:
    return "Give a smaller context window" + (", or fewer sequences." if parallel > 1 else ".")


def _times(parallel: int, tokens: int) -> str:
    return f"{parallel} x {tokens}" if parallel > 1 else str(tokens)


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.1f} GiB"
