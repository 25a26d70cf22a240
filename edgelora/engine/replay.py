"""Tokens through a base, with one adapter and without, and the logits of every position: what `verify` compares.

It runs as serving does: the same context settings, the same chunks of `CHUNK` tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgelora.adapter_ref import AdapterRef
from edgelora.engine.adapters import Adapters
from edgelora.engine.cache import CHUNK
from edgelora.engine.context import Context, python_callback
from edgelora.engine.coverage import Counter, Coverage
from edgelora.engine.devices import backend_name
from edgelora.engine.model import Model
from edgelora.engine.native import InterruptFlag
from edgelora.engine.planning import first_adapted
from edgelora.engine.prompt import encode_prompt
from edgelora.engine.threads import threads_for
from edgelora.errors import SettingsError
from edgelora.messages import Message
from edgelora.template import ChatTemplate

Logits = npt.NDArray[np.float32]


@dataclass(frozen=True)
class ReplaySettings:
    """What to run and how.

    Attributes:
        n_ctx: the longest row of tokens that will be read.
        threads: None for as many as serving takes.
        gpu_layers: layers to put on the GPU, -1 for all.
    """

    base: Path
    adapter: AdapterRef
    n_ctx: int
    threads: int | None = None
    gpu_layers: int = -1


class Replay:
    """A base and an adapter in memory. A context manager: frees both.

    Args:
        flag: gives up loading and decoding when it is set.

    Raises:
        ModelFileError, BaseMismatchError: a base or adapter that cannot be run. What the adapter's contract says is not
            compared here.
        SettingsError: tokens beyond what the base was made for.
    """

    def __init__(self, settings: ReplaySettings, flag: InterruptFlag) -> None:
        with ExitStack() as undo:
            self.model = Model(settings.base, gpu_layers=settings.gpu_layers, keep_going=lambda: not flag.is_set())
            undo.callback(self.model.close)
            if settings.n_ctx > self.model.n_ctx_train:
                raise SettingsError(
                    f"{settings.n_ctx} tokens are to be read; {settings.base} was trained with {self.model.n_ctx_train}"
                )
            adapters = Adapters(self.model)
            undo.callback(adapters.close)
            self._adapter = adapters.load(settings.adapter, force=True)
            self._counter = Counter(_tensors(settings.adapter.path))
            self._context = Context(
                self.model,
                n_ctx=settings.n_ctx,
                n_sequences=1,
                threads=settings.threads or threads_for(self.model.header.size_bytes),
                n_batch=CHUNK,
                callback=python_callback(self._counter),
            )
            undo.callback(self._context.close)
            self._context.interrupt_with(flag)
            self._close = undo.pop_all()

    def __enter__(self) -> Replay:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._close.close()

    @property
    def n_vocab(self) -> int:
        return self._context.n_vocab

    @property
    def backend(self) -> str:
        """What it runs on: "CPU", "CUDA", "Metal" ..."""
        return backend_name()

    def encode(self, messages: Sequence[Message], template: ChatTemplate) -> list[int]:
        """See `encode_prompt`."""
        return encode_prompt(self.model.tokenizer, template, messages)

    def logits(self, tokens: Sequence[int], *, adapted: bool) -> Iterator[tuple[int, Logits]]:
        """Read `tokens` from an empty memory: (position of the first, float32 (n, n_vocab)), chunk by chunk.

        An activated LoRA acts from its invocation on, as it does in serving.

        Raises:
            SettingsError: `tokens` do not hold that invocation.
            Interrupted: the flag was set.
            EdgeloraError: llama.cpp failed, with its reason.
        """
        on = ((self._adapter.pointer, self._adapter.scale),) if adapted else ()
        begins = first_adapted([(self._adapter, self._adapter.scale)], tokens) if adapted else 0
        self._context.trim(0, 0)
        for first, last, applied in ((0, begins, ()), (begins, len(tokens), on)):
            self._context.apply(applied)
            for start in range(first, last, CHUNK):
                chunk = tokens[start : min(start + CHUNK, last)]
                self._context.decode(0, chunk, start, every=True)
                yield start, self._context.all_logits(len(chunk))

    def coverage(self) -> Coverage:
        """Which of the adapter's tensors were computed with so far."""
        return self._counter.coverage()


def _tensors(adapter: Path) -> list[str]:
    from converters.reader import read_header

    return list(read_header(adapter).tensors)
