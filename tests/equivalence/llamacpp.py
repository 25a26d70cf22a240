"""llama.cpp through its low-level API, for comparisons: logits, token ids, and its own quantizer."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt

from converters.ggml_base import library_path
from edgelora.engine.native import forget_log, llama, reason

F32 = 0  # ggml_type
FLASH_ATTENTION_OFF = 0

llama()  # hides matrix tiles where they would end the process, and keeps llama.cpp's log: `reason` tells what it said


@contextlib.contextmanager
def loaded(path: Path, *, vocab_only: bool = False) -> Iterator[Any]:
    params = llama_cpp.llama_model_default_params()
    params.n_gpu_layers, params.vocab_only = 0, vocab_only
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
    if not model:
        raise RuntimeError("llama.cpp cannot load it: " + reason())
    try:
        yield model
    finally:
        llama_cpp.llama_model_free(model)


def logits(
    path: Path, ids: Sequence[int], adapter: Path | None = None, *, context: int = 512, begins: int = 0
) -> npt.NDArray[np.float32]:
    """Logits of every position, shape (len(ids), vocabulary); KV cache in F32, no flash attention: nothing rounds.

    Args:
        begins: the token from which on the adapter is active.
    """
    with loaded(path) as model:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = context
        params.type_k = params.type_v = F32
        params.flash_attn_type = FLASH_ATTENTION_OFF
        params.n_threads = params.n_threads_batch = 1
        opened = llama_cpp.llama_init_from_model(model, params)
        try:
            before = _decode(model, opened, ids[:begins]) if begins else None
            if adapter:
                _apply(model, opened, adapter)
            after = _decode(model, opened, ids[begins:], begins)
            return after if before is None else np.concatenate((before, after))
        finally:
            llama_cpp.llama_free(opened)


def _apply(model: Any, context: Any, path: Path) -> None:
    adapter = llama_cpp.llama_adapter_lora_init(model, str(path).encode())
    if not adapter:
        raise RuntimeError("llama.cpp cannot load the adapter: " + reason())
    adapters, scales = (type(adapter) * 1)(adapter), (ctypes.c_float * 1)(1.0)
    if llama_cpp.llama_set_adapters_lora(context, adapters, 1, scales):
        raise RuntimeError("llama.cpp cannot apply the adapter")


def _decode(model: Any, context: Any, ids: Sequence[int], first: int = 0) -> npt.NDArray[np.float32]:
    batch = llama_cpp.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for position, token in enumerate(ids):
        batch.token[position], batch.pos[position] = token, first + position
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


def quantize(
    source: Path,
    out: Path,
    file_type: int,
    *,
    imatrix: Mapping[str, npt.NDArray[np.float32]] | None = None,
    tensor_types: Sequence[tuple[str, int]] = (),
    output: int | None = None,
    token_embedding: int | None = None,
    pure: bool = False,
    allow_requantize: bool = False,
) -> None:
    """llama-quantize. Types are numbers of `ggml_type`.

    Args:
        imatrix: tensor name to importance, as an imatrix file holds it.
        tensor_types: (pattern, type), as `--tensor-type`.
    """
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = file_type, 1
    params.pure, params.allow_requantize = pure, allow_requantize
    if output is not None:
        params.output_tensor_type = output
    if token_embedding is not None:
        params.token_embedding_type = token_embedding
    entries, patterns = _imatrix_array(imatrix or {}), _pattern_array(tensor_types)
    if imatrix is not None:
        params.imatrix = entries
    if tensor_types:
        params.tt_overrides = patterns
    forget_log()
    if llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(params)):
        raise RuntimeError("llama_model_quantize failed: " + reason())


def _imatrix_array(imatrix: Mapping[str, npt.NDArray[np.float32]]) -> Any:
    """Entries that end with an empty one."""
    entries = (llama_cpp.llama_model_imatrix_data * (len(imatrix) + 1))()
    for entry, (name, values) in zip(entries, imatrix.items(), strict=False):
        entry.name, entry.size = name.encode(), values.size
        entry.data = np.ascontiguousarray(values, np.float32).ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    return entries


def _pattern_array(tensor_types: Sequence[tuple[str, int]]) -> Any:
    patterns = (llama_cpp.llama_model_tensor_override * (len(tensor_types) + 1))()
    for item, (pattern, number) in zip(patterns, tensor_types, strict=False):
        item.pattern, item.type = pattern.encode(), number
    return patterns


class _ModelDescription(ctypes.Structure):
    """`llama_quant_model_desc` (src/llama-ext.h)."""

    _fields_ = [
        ("architecture", ctypes.c_char_p),
        *((name, ctypes.c_uint32) for name in ("n_embd", "n_ff", "n_layer", "n_head", "n_head_kv", "n_expert")),
        ("n_embd_head_k", ctypes.c_uint32),
        ("n_embd_head_v", ctypes.c_uint32),
    ]


class _ContextParams(ctypes.Structure):
    """`ggml_init_params` (ggml/include/ggml.h)."""

    _fields_ = [("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]


# The functions of src/llama-ext.h that llama.cpp's own test-quant-type-selection uses. They are C++: these are their
# names under gcc and clang.
_MODEL = "_Z31llama_quant_model_from_metadataPK22llama_quant_model_desc"
_INIT = "_Z16llama_quant_initPK11llama_modelPK27llama_model_quantize_params"
_FREE = "_Z16llama_quant_freeP19quantize_state_impl"
_TYPES = "_Z25llama_quant_compute_typesP19quantize_state_impl11llama_ftypePP11ggml_tensorP9ggml_typem"


def can_choose_types() -> bool:
    return all(hasattr(_llama(), name) for name in (_MODEL, _INIT, _FREE, _TYPES))


def choose_types(
    shapes: Mapping[str, Sequence[int]],
    file_type: int,
    *,
    architecture: str,
    n_layer: int,
    n_head: int,
    n_head_kv: int,
    n_expert: int = 0,
    tensor_types: Sequence[tuple[str, int]] = (),
    output: int | None = None,
    token_embedding: int | None = None,
    pure: bool = False,
) -> dict[str, int]:
    """`ggml_type` of each tensor, by llama.cpp's own choice, without a file and without an importance matrix.

    Args:
        shapes: in llama.cpp's order of tensors; shapes in numpy order.
    """
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.pure = file_type, pure
    params.output_tensor_type = params.output_tensor_type if output is None else output
    params.token_embedding_type = params.token_embedding_type if token_embedding is None else token_embedding
    patterns = _pattern_array(tensor_types)
    if tensor_types:
        params.tt_overrides = patterns
    description = _ModelDescription(architecture.encode(), 256, 512, n_layer, n_head, n_head_kv, n_expert, 64, 64)
    model = _call(_MODEL, ctypes.byref(description))
    state = _call(_INIT, model, ctypes.byref(params))
    with _tensors(shapes) as tensors:
        types = (ctypes.c_int * len(shapes))()
        _call(_TYPES, state, ctypes.c_int(file_type), tensors, types, ctypes.c_size_t(len(shapes)))
    _call(_FREE, state)
    llama_cpp.llama_model_free(ctypes.cast(model, llama_cpp.llama_model_p_ctypes))
    return dict(zip(shapes, types, strict=True))


def _llama() -> Any:
    return llama_cpp.llama_cpp._lib


def _call(name: str, *arguments: Any) -> ctypes.c_void_p:
    function = getattr(_llama(), name)
    function.restype = ctypes.c_void_p
    return ctypes.c_void_p(function(*arguments))


@contextlib.contextmanager
def _tensors(shapes: Mapping[str, Sequence[int]]) -> Iterator[Any]:
    """An array of `ggml_tensor` pointers, without data."""
    ggml = ctypes.CDLL(str(library_path()))
    ggml.ggml_init.argtypes, ggml.ggml_init.restype = [_ContextParams], ctypes.c_void_p
    ggml.ggml_new_tensor.restype = ctypes.c_void_p
    ggml.ggml_new_tensor.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.POINTER(ctypes.c_int64)]
    ggml.ggml_set_name.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
    ggml.ggml_free.argtypes = [ctypes.c_void_p]
    context = ggml.ggml_init(_ContextParams(1024 * (len(shapes) + 1), None, True))
    try:
        tensors = (ctypes.c_void_p * len(shapes))()
        for index, (name, shape) in enumerate(shapes.items()):
            extents = (ctypes.c_int64 * len(shape))(*shape[::-1])
            tensors[index] = ggml.ggml_new_tensor(context, F32, len(shape), extents)
            ggml.ggml_set_name(tensors[index], name.encode())
        yield tensors
    finally:
        ggml.ggml_free(context)
