"""KV memory and decode: the only place that calls `llama_decode`."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from edgelora.engine.model import Model
from edgelora.engine.native import Handle, InterruptFlag, forget_log, llama, reason
from edgelora.errors import EdgeloraError

DECODED, NO_SLOT, ABORTED = 0, 1, 2  # return values of llama_decode, llama.h


class Interrupted(Exception):
    """The decode was given up half way, because the flag was set. The KV of that call is not to be used."""


class Batch:
    """`llama_batch` for tokens of one sequence, on memory that Python owns."""

    def __init__(self, capacity: int) -> None:
        self._tokens: Any = (ctypes.c_int32 * capacity)()
        self._positions: Any = (ctypes.c_int32 * capacity)()
        self._wants_logits: Any = (ctypes.c_int8 * capacity)()
        self._sequence = ctypes.c_int32(0)
        self._counts = (ctypes.c_int32 * capacity)(*[1] * capacity)
        self._sequences = (ctypes.POINTER(ctypes.c_int32) * capacity)(*[ctypes.pointer(self._sequence)] * capacity)
        self.native = llama().llama_batch(
            0, self._tokens, None, self._positions, self._counts, self._sequences, self._wants_logits
        )

    def fill(self, sequence: int, tokens: Sequence[int], position: int, *, every: bool = False) -> Any:
        """Tokens from `position` on; the last one's logits are asked for, or those of `every` one."""
        count = len(tokens)
        self._tokens[:count] = tokens
        self._positions[:count] = range(position, position + count)
        self._wants_logits[:count] = b"\x01" * count if every else bytes(count - 1) + b"\x01"
        self._sequence.value = sequence
        self.native.n_tokens = count
        return self.native


class Context:
    """A llama.cpp context with `n_sequences` KV sequences of `n_ctx` tokens each.

    Sequences have streams of their own (not the unified cache): a lone one does not attend over its neighbours' cells.

    Args:
        on_node: llama.cpp's `cb_eval` as a Python function: (address of a node, asked before it is computed, nothing).

    Raises:
        EdgeloraError: not enough memory, with llama.cpp's reason.
    """

    def __init__(
        self,
        model: Model,
        *,
        n_ctx: int,
        n_sequences: int,
        threads: int,
        n_batch: int,
        on_node: Callable[[int, bool, Any], bool] | None = None,
    ) -> None:
        library = llama()
        params = library.llama_context_default_params()
        params.n_ctx, params.n_seq_max, params.kv_unified = n_ctx * n_sequences, n_sequences, False
        params.n_batch = params.n_ubatch = n_batch
        params.n_threads = params.n_threads_batch = threads
        if on_node:
            self._on_node = library.ggml_backend_sched_eval_callback(on_node)  # kept: llama.cpp holds its address only
            params.cb_eval = self._on_node
        forget_log()
        pointer = library.llama_init_from_model(model.pointer, params)
        if not pointer:
            raise EdgeloraError(
                f"no context of {n_ctx} tokens for {model.path}: {reason()}", hint="Give a smaller context window."
            )
        self._handle = Handle(pointer, library.llama_free)
        self._memory = library.llama_get_memory(pointer)
        self.n_batch, self.n_vocab = n_batch, model.n_vocab
        self._chunk, self._one = Batch(n_batch), Batch(1)
        self._adapter: tuple[Any, float] = (None, 0.0)

    @property
    def pointer(self) -> Any:
        return self._handle.pointer

    def use_adapter(self, adapter: Any, scale: float) -> None:
        """Apply one adapter (a native pointer) from the next decode on, or none (`None`). KV is not touched."""
        if self._adapter == (adapter, scale):
            return
        count = 0 if adapter is None else 1
        adapters = (llama().llama_adapter_lora_p_ctypes * 1)(adapter) if count else None
        scales = (ctypes.c_float * 1)(scale) if count else None
        llama().llama_set_adapters_lora(self.pointer, adapters, count, scales)
        self._adapter = (adapter, scale)

    def decode(self, sequence: int, tokens: Sequence[int], position: int, *, every: bool = False) -> None:
        """Run `tokens` (at most n_batch) at `position` of a sequence; the last one's logits can be sampled then.

        With `every`, all of their logits are made (`all_logits`).

        Raises:
            Interrupted: the flag given to `interrupt_with` was set.
            EdgeloraError: llama.cpp failed, with its reason.
        """
        batch = self._one if len(tokens) == 1 else self._chunk
        code = llama().llama_decode(self.pointer, batch.fill(sequence, tokens, position, every=every))
        if code != DECODED:
            self._raise(code, sequence, len(tokens), position)

    def _raise(self, code: int, sequence: int, count: int, position: int) -> None:
        if code == ABORTED:
            raise Interrupted
        why = "no room in the KV cache" if code == NO_SLOT else reason()
        raise EdgeloraError(
            f"llama.cpp could not decode {count} tokens at position {position} of sequence {sequence}: {why}"
        )

    def trim(self, sequence: int, length: int) -> bool:
        """Forget what a sequence holds from `length` on. False: this model's memory cannot be cut there."""
        return bool(llama().llama_memory_seq_rm(self._memory, sequence, length, -1))

    def logits(self) -> Any:
        """Pointer to the last decoded token's logits, float32 (n_vocab,), valid until the next decode."""
        return llama().llama_get_logits_ith(self.pointer, -1)

    def all_logits(self, count: int) -> npt.NDArray[np.float32]:
        """The logits of the last decode's `count` tokens, float32 (count, n_vocab), valid until the next one."""
        return np.ctypeslib.as_array(llama().llama_get_logits(self.pointer), (count, self.n_vocab))

    def interrupt_with(self, flag: InterruptFlag | None) -> None:
        """The flag that gives up a running decode, or none."""
        forget_log()
        function, data = flag.callback if flag else (llama().ggml_abort_callback(), None)
        llama().llama_set_abort_callback(self.pointer, function, data)

    def close(self) -> None:
        self._handle.close()
