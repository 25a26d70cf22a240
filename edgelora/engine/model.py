"""A loaded base: weights mapped from the file, its vocabulary, its sizes."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from converters.reader import GGUFHeader
from edgelora.bundle_reading import base_template, is_bundle
from edgelora.engine.base_check import check_base
from edgelora.engine.native import Handle, forget_log, llama, reason
from edgelora.engine.preflight import read_checked
from edgelora.engine.tokenizer import open_tokenizer
from edgelora.errors import EdgeloraError, ModelFileError
from edgelora.template import ChatTemplate


class Model:
    """A base in memory. The weights are mapped, so that a second process pays nothing for them.

    Args:
        path: a GGUF base.
        gpu_layers: layers to put on the GPU, -1 for all of them.
        keep_going: asked while loading; False gives up.
        vocab_only: load no weights; the file may have none.

    Raises:
        ModelFileError: missing, truncated, an adapter, no vocabulary, or refused by llama.cpp with its reason.
    """

    def __init__(
        self,
        path: Path,
        *,
        gpu_layers: int = -1,
        keep_going: Callable[[], bool] = lambda: True,
        vocab_only: bool = False,
    ) -> None:
        self.header: GGUFHeader = read_checked(path, "base")
        self.path = self.header.path  # of a split base, llama.cpp opens the first part
        check_base(self.header)
        self._handle = _load(self.path, gpu_layers, keep_going, vocab_only)
        try:
            self.vocab = llama().llama_model_get_vocab(self.pointer)
            self.tokenizer = open_tokenizer(self.vocab, self.header.metadata)
        except BaseException:
            self.close()
            raise
        self.n_ctx_train: int = llama().llama_model_n_ctx_train(self.pointer)
        if vocab_only:  # llama.cpp reads no sizes then
            self.n_ctx_train = int(self.header.metadata.get(f"{self.architecture}.context_length", 0))
        self.n_vocab = self.tokenizer.size

    @property
    def pointer(self) -> Any:
        return self._handle.pointer

    @property
    def name(self) -> str:
        return str(self.header.metadata.get("general.name") or self.path.stem)

    @property
    def architecture(self) -> str:
        return self.header.architecture

    def chat_template(self) -> ChatTemplate | None:
        """The template in the base's own metadata; a bundle's base's, where nothing is said of adapters."""
        is_inside = is_bundle(self.header)
        source = base_template(self.header) if is_inside else self.header.metadata.get("tokenizer.chat_template")
        return ChatTemplate(source) if isinstance(source, str) and source else None

    @property
    def is_recurrent(self) -> bool:
        """Whether some layers keep a state instead of KV: it cannot be cut back to an earlier token."""
        library = llama()
        return bool(library.llama_model_is_recurrent(self.pointer) or library.llama_model_is_hybrid(self.pointer))

    def kv_bytes_per_token(self) -> int:
        """Bytes of KV cache (F16) that a token takes in all layers; an upper bound where windows slide."""
        library, pointer = llama(), self.pointer
        heads, kv_heads = library.llama_model_n_head(pointer), library.llama_model_n_head_kv(pointer)
        width = library.llama_model_n_embd(pointer) // max(heads, 1)
        width = self.header.metadata.get(f"{self.architecture}.attention.key_length", width)
        return int(library.llama_model_n_layer(pointer) * kv_heads * width * 2 * 2)

    def close(self) -> None:
        """Free it; contexts and adapters made from it must be gone before."""
        self._handle.close()


def _load(path: Path, gpu_layers: int, keep_going: Callable[[], bool], vocab_only: bool) -> Handle:
    library = llama()
    params = library.llama_model_default_params()
    params.n_gpu_layers, params.vocab_only = gpu_layers, vocab_only
    progress = library.llama_progress_callback(lambda _fraction, _data: keep_going())
    params.progress_callback = progress
    forget_log()
    pointer = library.llama_model_load_from_file(os.fsencode(path), params)
    if pointer:
        return Handle(pointer, library.llama_model_free)
    if not keep_going():
        raise EdgeloraError(f"{path}: loading was interrupted")
    raise ModelFileError(
        f"{path}: llama.cpp cannot load it: {reason()}", hint="Convert the base again, or check `edgelora doctor`."
    )
