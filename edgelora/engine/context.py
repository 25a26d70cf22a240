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

F16 = 1  # enum ggml_type
DECODED, NO_SLOT, ABORTED = 0, 1, 2  # return values of llama_decode, llama.h
Applied = tuple[tuple[Any, float], ...]
"""Adapters as llama.cpp applies them, each (native pointer, scale); empty for the bare base."""

State = npt.NDArray[np.uint8]
"""What a sequence holds, as bytes."""


class Interrupted(Exception):
    """The decode was given up half way, because the flag was set. The KV of that call is not to be used."""


class Batch:
    """`llama_batch` on memory that Python owns; a token belongs to one sequence."""

    def __init__(self, capacity: int) -> None:
        self._tokens: Any = (ctypes.c_int32 * capacity)()
        self._positions: Any = (ctypes.c_int32 * capacity)()
        self._wants_logits: Any = (ctypes.c_int8 * capacity)()
        self._ids: Any = (ctypes.c_int32 * capacity)()
        self._counts = (ctypes.c_int32 * capacity)(*[1] * capacity)
        start, size = ctypes.addressof(self._ids), ctypes.sizeof(ctypes.c_int32)
        addresses = (ctypes.c_void_p * capacity)(*range(start, start + capacity * size, size))
        self._sequences = ctypes.cast(addresses, ctypes.POINTER(ctypes.POINTER(ctypes.c_int32)))
        self._keep = addresses
        self.native = llama().llama_batch(
            0, self._tokens, None, self._positions, self._counts, self._sequences, self._wants_logits
        )

    def fill(self, sequence: int, tokens: Sequence[int], position: int, *, every: bool = False) -> Any:
        """Tokens of one sequence from `position` on; the last one's logits are asked for, or those of `every` one."""
        count = len(tokens)
        self._tokens[:count] = tokens
        self._positions[:count] = range(position, position + count)
        self._wants_logits[:count] = b"\x01" * count if every else bytes(count - 1) + b"\x01"
        self._ids[:count] = [sequence] * count
        self.native.n_tokens = count
        return self.native

    def fill_rows(self, first: int, rows: Sequence[Sequence[int]], positions: Sequence[int]) -> Any:
        """As many tokens of each sequence from `first` on, from its position on; the last ones' logits are wanted."""
        each, count = len(rows[0]), len(rows) * len(rows[0])
        self._tokens[:count] = [token for row in rows for token in row]
        self._positions[:count] = [at for position in positions for at in range(position, position + each)]
        self._wants_logits[:count] = (bytes(each - 1) + b"\x01") * len(rows)
        self._ids[:count] = [first + index for index in range(len(rows)) for _ in range(each)]
        self.native.n_tokens = count
        return self.native


class Context:
    """A llama.cpp context with `n_sequences` KV sequences of `n_ctx` tokens each.

    Sequences have streams of their own (not the unified cache): none attends over its neighbours' cells. A decode is
    one micro-batch, whose rows lie in the batch's order: tokens of one sequence, or as many of each of several that
    follow each other (llama-batch.cpp, `split_equal`).

    Args:
        n_batch: the most tokens in a decode.
        callback: llama.cpp's `cb_eval` and its argument.
        kv_type: of keys and values, in `enum ggml_type`.
        embeddings: make vectors of texts, and no logits.

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
        callback: tuple[Any, Any] | None = None,
        kv_type: int = F16,
        embeddings: bool = False,
    ) -> None:
        library = llama()
        params = library.llama_context_default_params()
        params.n_ctx, params.n_seq_max, params.kv_unified = n_ctx * n_sequences, n_sequences, False
        params.n_batch = params.n_ubatch = n_batch
        params.type_k = params.type_v = kv_type
        params.embeddings = embeddings
        params.n_threads = params.n_threads_batch = threads
        if callback:
            params.cb_eval, params.cb_eval_user_data = callback
        self._callback = callback  # kept: llama.cpp holds its address only
        forget_log()
        pointer = library.llama_init_from_model(model.pointer, params)
        if not pointer:
            raise EdgeloraError(
                f"no context of {n_ctx} tokens for {model.path}: {reason()}", hint="Give a smaller context window."
            )
        self._handle = Handle(pointer, library.llama_free)
        self._memory = library.llama_get_memory(pointer)
        self.n_batch, self.n_vocab, self.n_sequences = n_batch, model.n_vocab, n_sequences
        self._chunk, self._one = Batch(n_batch), Batch(1)
        self._applied: Applied = ()
        self._flag: InterruptFlag | None = None
        self._threads = threads

    @property
    def pointer(self) -> Any:
        return self._handle.pointer

    def apply(self, adapters: Applied) -> None:
        """Apply these adapters from the next decode on, to every row. KV is not touched."""
        if self._applied == adapters:
            return
        count = len(adapters)
        pointers = (llama().llama_adapter_lora_p_ctypes * count)(*(pointer for pointer, _ in adapters))
        scales = (ctypes.c_float * count)(*(scale for _, scale in adapters))
        llama().llama_set_adapters_lora(self.pointer, pointers, count, scales)
        self._applied = adapters

    def decode(self, sequence: int, tokens: Sequence[int], position: int, *, every: bool = False) -> None:
        """Run `tokens` (at most n_batch) at `position` of a sequence; the last one's logits can be sampled then.

        With `every`, all of their logits are made (`all_logits`).

        Raises:
            Interrupted: the flag given to `interrupt_with` was set.
            EdgeloraError: llama.cpp failed, with its reason.
        """
        batch = self._one if len(tokens) == 1 else self._chunk
        where = f"at position {position} of sequence {sequence}"
        self._run(batch.fill(sequence, tokens, position, every=every), where)

    def decode_rows(self, first: int, tokens: Sequence[int], positions: Sequence[int]) -> None:
        """Run one token each of the sequences `first`, `first` + 1 ...; the logits of row i are `logits(i)`.

        Raises:
            Interrupted, EdgeloraError: as `decode`.
        """
        self.decode_together(first, [[token] for token in tokens], positions)

    def decode_together(self, first: int, rows: Sequence[Sequence[int]], positions: Sequence[int]) -> None:
        """Run as many tokens (n each, n_batch in all) of each of the sequences `first`, `first` + 1 ..., from its
        position on; the logits of the last one of row i are `logits(n * (i + 1) - 1)`.

        Raises:
            Interrupted, EdgeloraError: as `decode`.
        """
        where = f"at positions {list(positions)} of the sequences from {first} on"
        self._run(self._chunk.fill_rows(first, rows, positions), where)

    def _run(self, batch: Any, where: str) -> None:
        forget_log()
        code = llama().llama_decode(self.pointer, batch)
        if code == DECODED:
            return
        if code == ABORTED:
            raise Interrupted
        why = "no room in the KV cache" if code == NO_SLOT else reason()
        raise EdgeloraError(f"llama.cpp could not decode {batch.n_tokens} tokens {where}: {why}")

    def trim(self, sequence: int, length: int) -> bool:
        """Forget what a sequence holds from `length` on. False: this model's memory cannot be cut there."""
        return bool(llama().llama_memory_seq_rm(self._memory, sequence, length, -1))

    def clear(self) -> None:
        """Forget all sequences, and what their memory held."""
        llama().llama_memory_clear(self._memory, True)

    def state(self, sequence: int) -> State:
        """A copy of all that the memory holds of a sequence, bit for bit."""
        size = llama().llama_state_seq_get_size(self.pointer, sequence)
        copy = np.empty(size, np.uint8)
        written = llama().llama_state_seq_get_data(self.pointer, _bytes_of(copy), size, sequence)
        return copy[:written]

    def put_state(self, sequence: int, state: State) -> bool:
        """Make a sequence hold a state that this context gave. False: there was no room, and it holds nothing."""
        self.trim(sequence, 0)
        return bool(llama().llama_state_seq_set_data(self.pointer, _bytes_of(state), state.size, sequence))

    def logits(self, row: int = -1) -> Any:
        """Pointer to the logits of a row of the last decode, float32 (n_vocab,), valid until the next decode."""
        return llama().llama_get_logits_ith(self.pointer, row)

    def all_logits(self, count: int) -> npt.NDArray[np.float32]:
        """The logits of the last decode's `count` tokens, float32 (count, n_vocab), valid until the next one."""
        return np.ctypeslib.as_array(llama().llama_get_logits(self.pointer), (count, self.n_vocab))

    def use_threads(self, count: int) -> None:
        """How many threads compute from the next decode on."""
        if count != self._threads:
            llama().llama_set_n_threads(self.pointer, count, count)
            self._threads = count

    def interrupt_with(self, flag: InterruptFlag | None) -> None:
        """The flag that gives up a running decode, or none."""
        if flag is self._flag:
            return
        self._flag = flag  # kept: llama.cpp holds its address only
        function, data = flag.callback if flag else (llama().ggml_abort_callback(), None)
        llama().llama_set_abort_callback(self.pointer, function, data)

    def close(self) -> None:
        self._handle.close()


def _bytes_of(array: State) -> Any:
    return array.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))


def python_callback(on_node: Callable[[int, bool, Any], bool]) -> tuple[Any, Any]:
    """A Python function as `cb_eval`: (address of a node, asked before it is computed, nothing)."""
    return llama().ggml_backend_sched_eval_callback(on_node), None
