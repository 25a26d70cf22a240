"""A text through a base, window by window: what importance matrices and perplexity have in common.

The text becomes one row of tokens, which is cut into windows of `chunk_size`; what is left over at the end is not read.
Each window starts from an empty KV cache, with the token for the beginning of a text in place of its first token, where
the vocabulary asks for one. Windows go through the model side by side as sequences of one batch, in the same shape as
in llama.cpp's tools (tools/imatrix/imatrix.cpp, `compute_imatrix`; tools/perplexity/perplexity.cpp, `perplexity`), so
that results can be compared to the last digits.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from edgelora.adapter_ref import AdapterRef, default_name
from edgelora.calibration_text import CalibrationText
from edgelora.engine.adapters import BARE, Adapter, Adapters
from edgelora.engine.context import ABORTED, DECODED, Interrupted
from edgelora.engine.devices import backend_name
from edgelora.engine.model import Model
from edgelora.engine.native import Handle, InterruptFlag, forget_log, llama, reason
from edgelora.engine.preflight import listed
from edgelora.engine.prompt import encode_prompt
from edgelora.engine.threads import usable_cores
from edgelora.errors import DataFileError, EdgeloraError, ModelFileError, SettingsError
from edgelora.messages import Conversation
from edgelora.template import BUILTIN, ChatTemplate

BATCH_TOKENS, UBATCH_TOKENS = 2048, 512
"""llama.cpp's tools decode so many tokens at a time, and compute so many at once (`common_params`, common.h)."""
LOGITS_BUDGET_BYTES = 512 << 20
"""Where the logits of a whole batch take more, a batch is one window: what the tools do with `-b CHUNK_SIZE`."""
CHECKED_CHARACTERS = 100_000  # of a plain text, to see that it fills a window
MIN_CHUNK_SIZE = 16  # llama-imatrix looks at no fewer rows at once

Source = CalibrationText | str | Sequence[int]
Progress = Callable[[int, int], None]
"""Called with windows done and windows in all, on the thread that computes."""
Result = TypeVar("Result")


@dataclass(frozen=True)
class WindowSettings:
    """What to run and how.

    Attributes:
        base: a GGUF base.
        chunk_size: tokens in a window.
        chunks: how many windows to read; None for all.
        adapter: a GGUF adapter to have active.
        threads: None for all physical cores.
        gpu_layers: layers to put on the GPU, -1 for all.
        batch_tokens: tokens in one decode; None for what the tools use, within `LOGITS_BUDGET_BYTES`.
        chat_template: for conversations; None for the adapter's own, or else the base's.
    """

    base: Path
    chunk_size: int = 512
    chunks: int | None = None
    adapter: Path | None = None
    adapter_scale: float = 1.0
    threads: int | None = None
    gpu_layers: int = 0
    batch_tokens: int | None = None
    chat_template: ChatTemplate | None = None

    def __post_init__(self) -> None:
        least = {"chunk_size": MIN_CHUNK_SIZE, "chunks": 1, "threads": 1, "batch_tokens": MIN_CHUNK_SIZE}
        for name, smallest in least.items():
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < smallest):
                raise SettingsError(f"{name} is {value!r}, expected a whole number, {smallest} or more")


@dataclass(frozen=True)
class Outputs:
    """What one decode gave: float32 logits, in the order of `windows` and, in each, of positions.

    Attributes:
        windows: numbers of the windows that were decoded side by side.
        positions: positions of the first and after the last token that logits were made for, in every window.
        logits: address of float32 (len(windows) * (positions[1] - positions[0]), n_vocab); valid until the next decode.
    """

    windows: range
    positions: tuple[int, int]
    logits: Any


@dataclass
class Callback:
    """A Python function as llama.cpp's `cb_eval`. What it raises gives up the decode, and is raised from there.

    Attributes:
        wants: called with a node's address before it is computed; True to see its values.
        see: called with it afterwards.
    """

    wants: Callable[[int], bool]
    see: Callable[[int], None]
    error: BaseException | None = None
    stop: InterruptFlag = field(default_factory=InterruptFlag)

    def __call__(self, address: int, ask: bool, _user_data: Any) -> bool:
        if self.error is not None:
            return False
        try:
            if ask:
                return self.wants(address)
            self.see(address)
        except BaseException as error:
            self.error = error
            self.stop.set()
            return False
        return True


def interruptible(work: Callable[[InterruptFlag], Result]) -> Result:
    """Run `work` on a thread of its own; Ctrl-C here sets its flag, and is raised once it has ended.

    So no exception is ever raised inside a callback from C, where Python could only print it.
    """
    flag = InterruptFlag()
    with ThreadPoolExecutor(1, "edgelora-windows") as pool:
        future = pool.submit(work, flag)
        try:
            return future.result()
        except BaseException:
            flag.set()
            raise


class Windows:
    """A base, perhaps with an adapter, and the context that reads windows with it. A context manager: frees both.

    Args:
        flag: gives up loading and decoding when it is set.
        callback: sees the nodes of each decode.

    Raises:
        ModelFileError, BaseMismatchError: a base or adapter that cannot be used.
        SettingsError: windows that are longer than what the base was made for, or than memory allows.
    """

    def __init__(self, settings: WindowSettings, flag: InterruptFlag, callback: Callback | None = None) -> None:
        self.settings, self._flag, self._callback = settings, flag, callback
        if callback:
            callback.stop = flag
        with ExitStack() as undo:
            self.model = Model(settings.base, gpu_layers=settings.gpu_layers, keep_going=lambda: not flag.is_set())
            undo.callback(self.model.close)
            adapters = Adapters(self.model)
            undo.callback(adapters.close)
            self.adapter = _load_adapter(adapters, settings)
            self._encoder = Encoder(self.model, settings, self.adapter.template)
            self.shape = BatchShape.of(settings, self.model)
            self._context = self._open_context()
            undo.callback(self._context.close)
            self._batch = _Batch(self.shape)
            self._close = undo.pop_all()

    def __enter__(self) -> Windows:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._close.close()

    def _open_context(self) -> Handle:
        library, shape, settings = llama(), self.shape, self.settings
        params = library.llama_context_default_params()
        params.n_ctx, params.n_seq_max, params.kv_unified = shape.sequences * shape.chunk_size, shape.sequences, False
        params.n_batch, params.n_ubatch = shape.batch_tokens, UBATCH_TOKENS
        params.n_threads = params.n_threads_batch = settings.threads or usable_cores()
        params.swa_full = False  # as in the tools
        params.abort_callback, params.abort_callback_data = self._flag.callback
        if self._callback:
            self._native_callback = library.ggml_backend_sched_eval_callback(self._callback)
            params.cb_eval = self._native_callback
        forget_log()
        pointer = library.llama_init_from_model(self.model.pointer, params)
        if not pointer:
            raise EdgeloraError(f"no context of {params.n_ctx} tokens for {settings.base}: {reason()}")
        handle = Handle(pointer, library.llama_free)
        if not library.llama_get_memory(pointer):
            handle.close()
            raise ModelFileError(
                f"{settings.base} is no model that predicts the next token (architecture {self.model.architecture})"
            )
        if self.adapter is not BARE:
            one = (library.llama_adapter_lora_p_ctypes * 1)(self.adapter.pointer)
            library.llama_set_adapters_lora(pointer, one, 1, (ctypes.c_float * 1)(self.adapter.scale))
        return handle

    @property
    def bos(self) -> int | None:
        """The token that every window begins with, if the vocabulary asks for one."""
        return self._encoder.bos

    def tokens(self, source: Source) -> list[int]:
        """See `Encoder.tokens`."""
        return self._encoder.tokens(source)

    def count(self, tokens: Sequence[int]) -> int:
        """How many windows are read."""
        whole = len(tokens) // self.shape.chunk_size
        return min(whole, self.settings.chunks or whole)

    def decode(self, tokens: Sequence[int], first: int = 0, progress: Progress | None = None) -> Iterator[Outputs]:
        """Read every window; logits are made from position `first` of each on.

        Raises:
            Interrupted: the flag was set.
            EdgeloraError: llama.cpp failed, with its reason; or what the callback raised.
        """
        total, shape = self.count(tokens), self.shape
        memory = llama().llama_get_memory(self._context.pointer)
        for start in range(0, total, shape.sequences):
            windows = range(start, min(start + shape.sequences, total))
            llama().llama_memory_clear(memory, True)
            for begin in range(0, shape.chunk_size, shape.batch_tokens):
                end = min(begin + shape.batch_tokens, shape.chunk_size)
                self._decode(self._batch.fill([self._window(tokens, w)[begin:end] for w in windows], begin, first))
                logits = llama().llama_get_logits(self._context.pointer) if end > first else None
                yield Outputs(windows, (max(begin, first), max(end, first)), logits)
            if progress:
                progress(windows.stop, total)

    def _window(self, tokens: Sequence[int], number: int) -> list[int]:
        size = self.shape.chunk_size
        window = list(tokens[number * size : (number + 1) * size])
        return window if self.bos is None else [self.bos, *window[1:]]

    def _decode(self, batch: Any) -> None:
        forget_log()
        code = llama().llama_decode(self._context.pointer, batch)
        if self._callback and self._callback.error is not None:
            raise self._callback.error
        if code == ABORTED or self._flag.is_set():
            raise Interrupted
        if code != DECODED:
            raise EdgeloraError(f"llama.cpp could not decode {batch.n_tokens} tokens: {reason()}")


@dataclass(frozen=True)
class Encoder:
    """What a text is in tokens, for a base.

    Attributes:
        template: of an adapter; that of `settings` wins over it, and it over the base's own.
    """

    model: Model
    settings: WindowSettings
    template: ChatTemplate | None = None

    @property
    def bos(self) -> int | None:
        """The token that every window begins with, if the vocabulary asks for one."""
        library, vocab = llama(), self.model.vocab
        token = int(library.llama_vocab_bos(vocab))
        return token if library.llama_vocab_get_add_bos(vocab) and token >= 0 else None

    def tokens(self, source: Source) -> list[int]:
        """The tokens of a text, of conversations one after the other, or those that are given; led by `bos`.

        Raises:
            DataFileError: too few for one window, or ids the base does not have, or conversations that its chat
                template refuses.
            ModelFileError: conversations, and no chat template.
        """
        tokens = list(self._encode(source))
        if strange := [token for token in tokens if type(token) is not int or not 0 <= token < self.model.n_vocab]:
            raise DataFileError(f"token {strange[0]!r}: {self.settings.base} has {self.model.n_vocab} tokens")
        if self.bos is not None and tokens[:1] != [self.bos]:
            tokens.insert(0, self.bos)
        if len(tokens) < self.settings.chunk_size:
            name = source.name if isinstance(source, CalibrationText) else "the text"
            raise DataFileError(
                f"{name} is {len(tokens)} tokens long; a window takes {self.settings.chunk_size}",
                hint="Give a longer text.",
            )
        return tokens

    def _encode(self, source: Source) -> Sequence[int]:
        if isinstance(source, CalibrationText) and source.conversations:
            return self._conversation_tokens(source.conversations)
        text = source.text if isinstance(source, CalibrationText) else source
        return self.model.tokenizer.encode(text, special=False) if isinstance(text, str) else text

    def _conversation_tokens(self, conversations: Sequence[Conversation]) -> list[int]:
        own = self.settings.chat_template or self.template or self.model.chat_template()
        tokens: list[int] = []
        problems = []
        enough = self.settings.chunks and self.settings.chunks * self.settings.chunk_size
        for conversation in conversations:
            if enough and len(tokens) >= enough:
                break  # the rest is not read
            template = None if conversation.plain else own
            template = template or (None if conversation.templated else ChatTemplate(BUILTIN["plain"]))
            if template is None:
                raise ModelFileError(
                    f"{self.settings.base} has no chat template, which {conversation.source} needs",
                    hint="Name one with --chat-template, or give plain text.",
                )
            try:
                tokens += encode_prompt(
                    self.model.tokenizer,
                    template,
                    conversation.messages,
                    add_generation_prompt=False,
                    tools=conversation.tools or None,
                )
            except ModelFileError as error:
                problems.append(f"{conversation.source}: {error.message}")
        if problems:
            raise DataFileError(listed("conversations that the chat template refuses", problems))
        return tokens


def check_text(
    path: Path, source: Source, base: Path, chunks: int | None = None, chat_template: ChatTemplate | None = None
) -> None:
    """Refuse a text that `Windows.tokens` would refuse, with no more of a model than its vocabulary.

    Args:
        path: a GGUF base, or a file with the metadata of one and no weights.
        base: what messages call it.
        chunks: how many windows will be read, None for all.

    Raises:
        DataFileError: too few tokens for one window, or conversations that the chat template refuses.
        SettingsError: windows longer than what the base was made for.
        ModelFileError: conversations, and no chat template; or a vocabulary that llama.cpp cannot load.
    """
    settings = WindowSettings(base, chunks=chunks, chat_template=chat_template)
    model = Model(path, vocab_only=True)
    try:
        _check_length(settings, model.n_ctx_train)
        if isinstance(source, CalibrationText) and not source.conversations:
            source = replace(source, text=source.text[:CHECKED_CHARACTERS])
        Encoder(model, settings).tokens(source)
    finally:
        model.close()


def _load_adapter(adapters: Adapters, settings: WindowSettings) -> Adapter:
    if settings.adapter is None:
        return BARE
    adapters.load(ref := AdapterRef(default_name(settings.adapter), settings.adapter, settings.adapter_scale))
    return adapters.get(ref.name)


@dataclass(frozen=True)
class BatchShape:
    """How windows are laid into decodes: `sequences` side by side, `batch_tokens` in each decode.

    One of the two holds: a decode takes whole windows, or a part of one.
    """

    chunk_size: int
    sequences: int
    batch_tokens: int

    @classmethod
    def of(cls, settings: WindowSettings, model: Model) -> BatchShape:
        """The tools' shape (`main` in tools/imatrix/imatrix.cpp), within what the model and memory allow.

        Raises:
            SettingsError: windows longer than the base's context, or more memory than is free.
        """
        size = settings.chunk_size
        _check_length(settings, model.n_ctx_train)
        logits = 4 * model.n_vocab
        fits = BATCH_TOKENS * logits <= LOGITS_BUDGET_BYTES
        batch = settings.batch_tokens or (BATCH_TOKENS if fits else min(size, BATCH_TOKENS))
        sequences = max(1, batch // size)
        shape = cls(size, sequences, min(batch, sequences * size))
        _check_memory(shape.batch_tokens * logits + sequences * size * model.kv_bytes_per_token(), size)
        return shape


def _check_length(settings: WindowSettings, trained: int) -> None:
    if settings.chunk_size > trained:
        raise SettingsError(
            f"windows of {settings.chunk_size} tokens; {settings.base} was trained with {trained}",
            hint="Give a smaller chunk size.",
        )


def _check_memory(needed: int, chunk_size: int) -> None:
    import psutil

    free = psutil.virtual_memory().available
    if needed > free and backend_name() == "CPU":
        gib = [f"{size / 2**30:.1f} GiB" for size in (needed, free)]
        raise SettingsError(
            f"windows of {chunk_size} tokens take {gib[0]} of KV cache and logits; {gib[1]} are free",
            hint="Give a smaller chunk size.",
        )


class _Batch:
    """`llama_batch` for windows side by side, on memory that Python owns."""

    def __init__(self, shape: BatchShape) -> None:
        capacity = shape.batch_tokens
        self._tokens: Any = (ctypes.c_int32 * capacity)()
        self._positions: Any = (ctypes.c_int32 * capacity)()
        self._wants_logits: Any = (ctypes.c_int8 * capacity)()
        self._sequences: Any = (ctypes.c_int32 * shape.sequences)(*range(shape.sequences))
        self._counts = (ctypes.c_int32 * capacity)(*[1] * capacity)
        self._sequence_of = (ctypes.POINTER(ctypes.c_int32) * capacity)()
        self.native = llama().llama_batch(
            0, self._tokens, None, self._positions, self._counts, self._sequence_of, self._wants_logits
        )

    def fill(self, windows: Sequence[Sequence[int]], position: int, first: int) -> Any:
        """Tokens of equally long (parts of) windows, which begin at `position`; logits from position `first` on."""
        at, stride = 0, ctypes.sizeof(ctypes.c_int32)
        for sequence, tokens in enumerate(windows):
            count = len(tokens)
            pointer = ctypes.cast(ctypes.byref(self._sequences, sequence * stride), ctypes.POINTER(ctypes.c_int32))
            self._tokens[at : at + count] = tokens
            self._positions[at : at + count] = range(position, position + count)
            self._sequence_of[at : at + count] = [pointer] * count
            self._wants_logits[at : at + count] = [int(position + i >= first) for i in range(count)]
            at += count
        self.native.n_tokens = at
        return self.native
