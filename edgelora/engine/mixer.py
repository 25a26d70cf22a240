"""What puts different adapters into one decode, as the scheduler sees it: `mixing_rows` on the CPU, `mixing_stack` on
any backend. llama.cpp is given one adapter, the *socket*, so that its graph has the places where adapters act.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from converters.block_types import TYPES
from converters.writer import TensorSpec, Value, header_bytes
from edgelora.engine.low_rank import Bits, Weights
from edgelora.engine.model import Model
from edgelora.engine.native import Handle, forget_log, llama, reason
from edgelora.errors import EdgeloraError

Parts = tuple[tuple[Weights, float], ...]
"""The adapters of a row, each with its scale; empty for the bare base."""
Runs = Sequence[tuple[int, Parts]]
"""The rows of a batch: how many follow each other with the same adapters, and which."""


class Mixer(Protocol):
    """The adapters of one context. Lives on the engine's thread.

    A decode is `fill`, then `Context.apply(socket)`, the decode itself, and a look at `problem`.
    """

    rows_are_independent: bool
    """Whether a row's bits depend neither on the other rows' adapters nor on which others are in memory."""

    @property
    def callback(self) -> tuple[Any, Any]:
        """`cb_eval` and its argument."""

    @property
    def socket(self) -> Any:
        """The adapter to set on the context, None while there is none to mix."""

    @property
    def problem(self) -> str:
        """After a decode: in what its graph was not as expected, so that its logits are wrong; empty if it was."""

    def plug(self, weights: Weights) -> Handle | None:
        """Make room for an adapter. Where that needs another socket, the old one is returned, to be closed once no
        context has it set.

        Raises:
            EdgeloraError: llama.cpp refuses the socket, or the adapter cannot be mixed in this way.
        """

    def unplug(self, weights: Weights) -> None:
        """Forget an adapter that no row uses any more."""

    def is_ready(self, used: Sequence[Weights], wake: Callable[[], None]) -> bool:
        """Whether the next decodes can have these, all that are in use. False: `wake` will be called when to ask again.

        Raises:
            EdgeloraError: there is no room for them.
        """

    def fill(self, rows: Runs, outputs: Runs) -> None:
        """Say which adapters the rows of the next decode have, and those of its rows whose logits are wanted."""

    def stand_aside(self) -> None:
        """Adapters of llama.cpp's own are set for the next decode; its graph is left as it is."""

    def unseen(self) -> list[str]:
        """Matrices whose adapters no graph has applied so far."""

    def close(self) -> None:
        """Free the socket; no context may have it set."""


def make_adapter(model: Model, pairs: Mapping[str, tuple[Bits, Bits]]) -> Handle:
    """An adapter of llama.cpp's own from arrays: matrix to A, (rank, n_in), and B, (n_out, rank), both float32, or both
    float16.

    Raises:
        EdgeloraError: llama.cpp refuses it, or there is no room for it.
    """
    return load_adapter(model, adapter_file(model.architecture, pairs), list(pairs))


def adapter_file(architecture: str, pairs: Mapping[str, tuple[Bits, Bits]]) -> bytes:
    """A GGUF adapter without a factor (its alpha is 0), of arrays as in `make_adapter`."""
    tensors = {
        f"{name}.lora_{side}": array for name, pair in pairs.items() for side, array in zip("ab", pair, strict=True)
    }
    metadata: dict[str, Value] = {
        "general.type": "adapter",
        "general.architecture": architecture,
        "adapter.type": "lora",
        "adapter.lora.alpha": 0.0,
    }
    specs = [
        TensorSpec(name, array.shape, TYPES["F32" if array.dtype == np.float32 else "F16"])
        for name, array in tensors.items()
    ]
    parts = [header_bytes(metadata, specs)]
    for array in tensors.values():
        parts += [array.tobytes(), bytes(-array.nbytes % 32)]
    return b"".join(parts)


def load_adapter(model: Model, file: bytes, matrices: Sequence[str]) -> Handle:
    """Give llama.cpp an adapter on these matrices.

    Raises:
        EdgeloraError: llama.cpp refuses it, or there is no room for it.
    """
    with _readable(file) as path:
        forget_log()
        pointer = llama().llama_adapter_lora_init(model.pointer, os.fsencode(path))
    if not pointer:
        shown = ", ".join(matrices[:4]) + (" ..." if len(matrices) > 4 else "")
        raise EdgeloraError(f"llama.cpp refuses a LoRA on {shown}: {reason()}")
    return Handle(pointer, llama().llama_adapter_lora_free)


@contextmanager
def _readable(data: bytes) -> Iterator[str]:
    """A path under which the bytes can be read: of memory where the system has such, or of a temporary file."""
    if hasattr(os, "memfd_create"):
        descriptor, path = os.memfd_create("edgelora-socket"), ""
    else:
        descriptor, path = tempfile.mkstemp(prefix="edgelora-socket-", suffix=".gguf")
    try:
        with open(descriptor, "wb", closefd=False) as file:
            file.write(data)
        yield path or f"/proc/self/fd/{descriptor}"
    except OSError as error:
        raise EdgeloraError(f"there is no room for a LoRA of {len(data)} bytes: {error.strerror}") from None
    finally:
        with suppress(OSError):
            os.close(descriptor)
        if path:
            Path(path).unlink(missing_ok=True)
