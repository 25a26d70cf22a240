"""llama.cpp through its low-level API, for comparisons: logits, token ids, and its own quantizer."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt

F32 = 0  # ggml_type
FLASH_ATTENTION_OFF = 0
_log: list[str] = []


@llama_cpp.llama_log_callback
def _collect(level: int, text: bytes, user_data: ctypes.c_void_p) -> None:
    _log.append(text.decode("utf-8", errors="replace"))


llama_cpp.llama_log_set(_collect, ctypes.c_void_p(0))
llama_cpp.llama_backend_init()


@contextlib.contextmanager
def loaded(path: Path, *, vocab_only: bool = False) -> Iterator[Any]:
    params = llama_cpp.llama_model_default_params()
    params.n_gpu_layers, params.vocab_only = 0, vocab_only
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
    if not model:
        raise RuntimeError("llama.cpp cannot load it: " + "".join(_log[-5:]))
    try:
        yield model
    finally:
        llama_cpp.llama_model_free(model)


def logits(path: Path, ids: Sequence[int], adapter: Path | None = None) -> npt.NDArray[np.float32]:
    """Logits of every position, shape (len(ids), vocabulary); KV cache in F32, no flash attention: nothing rounds."""
    with loaded(path) as model:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = 512
        params.type_k = params.type_v = F32
        params.flash_attn_type = FLASH_ATTENTION_OFF
        params.n_threads = params.n_threads_batch = 1
        context = llama_cpp.llama_init_from_model(model, params)
        try:
            if adapter:
                _apply(model, context, adapter)
            return _decode(model, context, ids)
        finally:
            llama_cpp.llama_free(context)


def _apply(model: Any, context: Any, path: Path) -> None:
    adapter = llama_cpp.llama_adapter_lora_init(model, str(path).encode())
    if not adapter:
        raise RuntimeError("llama.cpp cannot load the adapter: " + "".join(_log[-5:]))
    adapters, scales = (type(adapter) * 1)(adapter), (ctypes.c_float * 1)(1.0)
    if llama_cpp.llama_set_adapters_lora(context, adapters, 1, scales):
        raise RuntimeError("llama.cpp cannot apply the adapter")


def _decode(model: Any, context: Any, ids: Sequence[int]) -> npt.NDArray[np.float32]:
    batch = llama_cpp.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for position, token in enumerate(ids):
        batch.token[position], batch.pos[position] = token, position
        batch.n_seq_id[position], batch.seq_id[position][0], batch.logits[position] = 1, 0, 1
    try:
        if llama_cpp.llama_decode(context, batch):
            raise RuntimeError("llama_decode failed")
        vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        return np.ctypeslib.as_array(llama_cpp.llama_get_logits(context), (len(ids), vocab)).copy()
    finally:
        llama_cpp.llama_batch_free(batch)


def tokenize(path: Path, texts: Sequence[str], *, special: bool) -> list[list[int]]:
    """Token ids by llama.cpp's own tokenizer; `special` adds bos and eos and reads special tokens in the text."""
    with loaded(path, vocab_only=True) as model:
        vocab = llama_cpp.llama_model_get_vocab(model)
        return [_tokenize(vocab, text.encode(), special) for text in texts]


def _tokenize(vocab: Any, text: bytes, special: bool) -> list[int]:
    room = (ctypes.c_int32 * (len(text) + 16))()
    count = llama_cpp.llama_tokenize(vocab, text, len(text), room, len(room), special, True)
    return list(room[:count])


def quantize(source: Path, out: Path, file_type: int) -> None:
    """llama-quantize."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = file_type, 1
    if llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(params)):
        raise RuntimeError("llama_model_quantize failed: " + "".join(_log[-5:]))
