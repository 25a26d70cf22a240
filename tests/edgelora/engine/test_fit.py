"""What fits into the free memory, by numbers; and a context that was made so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from converters.reader import read_header
from edgelora.engine.devices import Device
from edgelora.engine.engine import Engine
from edgelora.engine.fit import GPU_MARGIN_BYTES, KVFit, fit_gpu_layers, fit_kv, kv_values_per_token
from edgelora.errors import SettingsError

GIB = 2**30
LLAMA_7B = 2 * 32 * 4096  # keys and values of a token: 512 KiB as F16
LLAMA_3B = 2 * 28 * 1024


@pytest.mark.parametrize(
    ("values", "train", "free", "asked", "fit"),
    [
        (LLAMA_3B, 131072, 8 * GIB, {}, KVFit(4096, 4, "f16")),
        (LLAMA_3B, 2048, 8 * GIB, {}, KVFit(2048, 8, "f16")),
        (LLAMA_7B, 4096, 8 * GIB, {}, KVFit(4096, 1, "f16")),
        (LLAMA_7B, 4096, 4 * GIB, {"parallel": 2}, KVFit(4096, 2, "f16")),
        (LLAMA_7B, 4096, 8 * GIB, {"kv_type": "q4_0", "parallel": 12}, KVFit(4096, 12, "q4_0")),
        (LLAMA_7B, 4096, 0, {}, KVFit(4096, 1, "f16")),
    ],
)
def test_what_was_not_asked_for_is_chosen(
    values: int, train: int, free: int, asked: dict[str, Any], fit: KVFit
) -> None:
    assert fit_kv(values, train, free, **asked) == fit


def test_q8_0_is_taken_where_only_that_has_room_and_it_is_said() -> None:
    fit = fit_kv(LLAMA_7B, 32768, 9 * GIB, n_ctx=32768)
    assert (fit.n_ctx, fit.parallel, fit.kv_type) == (32768, 1, "q8_0")
    assert "as F16 it takes 16.0 GiB, and 9.0 GiB are free" in fit.notices[0]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"n_ctx": 32768}, r"32768 tokens takes 16.0 GiB of KV cache \(F16\); 8.0 GiB are free"),
        ({"n_ctx": 32768, "kv_type": "q8_0"}, r"takes 8.5 GiB of KV cache \(Q8_0\)"),
        ({"n_ctx": 4096, "parallel": 16, "kv_type": "f16"}, r"16 x 4096 tokens takes 32.0 GiB"),
        ({"n_ctx": 2**31}, "llama.cpp counts to"),
    ],
)
def test_the_impossible_is_refused_with_numbers(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        fit_kv(LLAMA_7B, 4096, 8 * GIB, **asked)


def gpu(free: int) -> Device:
    return Device("CUDA0", "a card", "GPU", free, 24 * GIB)


def test_layers_go_to_the_gpu_as_far_as_they_fit(base: Path) -> None:
    header = read_header(base)
    layers, weights = header.metadata["llama.block_count"], sum(t.size_bytes for t in header.tensors.values())
    values = kv_values_per_token(header)
    whole = weights + values * 2 * 512
    cpu = Device("CPU", "cores", "CPU", 8 * GIB, 16 * GIB)
    assert fit_gpu_layers(header, [cpu], values, 512) == -1
    assert fit_gpu_layers(header, [cpu, gpu(whole + GPU_MARGIN_BYTES)], values, 512) == -1
    assert fit_gpu_layers(header, [gpu(whole // 2 + 10 + GPU_MARGIN_BYTES)], values, 512) == layers // 2
    assert fit_gpu_layers(header, [gpu(GPU_MARGIN_BYTES // 2)], values, 512) == 0


def test_the_metadata_says_what_llama_cpp_allocates(base: Path) -> None:
    from edgelora.engine.model import Model

    model = Model(base)
    assert kv_values_per_token(model.header) == model.kv_bytes_per_token() // 2
    model.close()


@pytest.mark.parametrize("kv_type", ["q8_0", "q4_0"])
def test_quantized_kv_answers(base: Path, adapters: dict[str, Path], kv_type: str) -> None:
    with Engine(base, adapters, threads=1, kv_type=kv_type) as engine:
        done = engine.chat("Tell me about Fennick.", adapter="red", sampling={"temperature": 0, "max_tokens": 8})
        assert done.completion_tokens > 0


def test_an_unknown_type_is_refused(base: Path) -> None:
    with pytest.raises(SettingsError, match="kv_type is 'q1_0', expected f16 or q8_0 or q4_0"):
        Engine(base, kv_type="q1_0")
