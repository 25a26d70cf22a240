"""Engine: one thread owns llama.cpp; callers on any thread send requests and read streams."""

from __future__ import annotations

import math
import threading
import weakref
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Self, TypeVar

from edgelora.adapter_ref import AdapterRef, check_name
from edgelora.engine.adapters import Adapter, Prepared, find_adapter, prepare
from edgelora.engine.fit import KV_TYPES
from edgelora.engine.planning import ERROR, ON_OVERFLOW
from edgelora.engine.preflight import base_fingerprint
from edgelora.engine.runtime import Runtime, Settings
from edgelora.engine.scoring import ReplyScore, Speed, Wanted
from edgelora.engine.stream import Completion, Item, Request, Stream, Task
from edgelora.errors import EdgeloraError, SettingsError
from edgelora.messages import Message
from edgelora.sampling import Sampling
from edgelora.template import ChatTemplate, resolve

__all__ = ["Completion", "Engine", "Request", "Stream"]

Result = TypeVar("Result")
AdaptersGiven = Mapping[str, str | Path | AdapterRef] | Sequence[str | Path | AdapterRef]
AdapterNamed = str | Mapping[str, float] | None
Messages = Sequence[Message] | str
MAX_THREADS = 512  # GGML_MAX_N_THREADS, ggml/include/ggml.h: more is a crash
MODES = ("auto", "mixed", "switching")
MAX_PARALLEL = 256  # LLAMA_MAX_SEQ, src/llama-cparams.h
BATCH_WINDOW = 32
"""Requests of `Engine.batch` that wait in the queue: enough to keep the thread busy."""


class Engine:
    """One base in memory, and requests that each name their adapter; they are answered together.

    Args:
        base: a GGUF base.
        adapters: name to path, or references as on the command line: `"support.gguf"`, `"vip=tenants/7.gguf@0.5"`.
        n_ctx: tokens that a conversation and its reply may take; None is what the base was trained with, at most 4096.
        threads: to decode with; None is one for each physical core.
        gpu_layers: layers to put on the GPU, where llama.cpp was built for one; -1 is all, None as many as fit.
        chat_template: a built-in template's name, a Jinja file, or a compiled template, instead of the adapter's and
            the base's own.
        force: use adapters whose contract does not fit the base; a notice takes the place of the error.
        parallel: replies that are written at the same time; None is as many as a quarter of the free memory holds the
            KV cache of, at most 8. More requests wait.
        mode: how requests with different adapters share the machine. "mixed": in one decode, each row with its own;
            "switching": adapter after adapter; "auto": mixed wherever it works.
        adapter_bytes: of adapter weights kept in memory; None is a quarter of the free memory. Who was not used for
            longest is evicted, and read again when a request wants it.
        cache_bytes: for copies of KV that had to make room for other conversations; None is an eighth of the free
            memory.
        on_overflow: what becomes of a conversation that does not fit: "error", or "truncate-middle", which leaves out
            its oldest exchanges, and the middle of a message that is too long alone (`Completion.dropped_tokens`).
        kv_type: how keys and values are kept, "f16", "q8_0" (half of it) or "q4_0"; None is F16, or Q8_0 where only
            that has room for `n_ctx`.
        cache_dir: a folder in which KV outlives the engine, within `cache_bytes`: the next one begins where this one
            ended. It holds the tokens of conversations; None keeps nothing.
        max_waiting: requests that may wait for their turn beside the `parallel` ones under way; None is any number.
        reproducible: every decode has `parallel` rows, so that with a seed (or temperature 0) a `deterministic` request
            gives the same text however many others are under way, without being decoded alone.

    Attributes:
        base_name: what the base calls itself.
        template_source: the text of the explicit chat template; empty where there is none.
        on_overflow: as it was given.

    Raises:
        ModelFileError, BaseMismatchError: a base or adapter that is missing, broken, or does not fit.
        SettingsError: a setting out of range.
    """

    def __init__(
        self,
        base: str | Path,
        adapters: AdaptersGiven = (),
        *,
        n_ctx: int | None = None,
        threads: int | None = None,
        gpu_layers: int | None = None,
        chat_template: str | ChatTemplate | None = None,
        force: bool = False,
        parallel: int | None = None,
        mode: str = "auto",
        adapter_bytes: int | None = None,
        cache_bytes: int | None = None,
        reproducible: bool = False,
        on_overflow: str = ERROR,
        kv_type: str | None = None,
        cache_dir: str | Path | None = None,
        max_waiting: int | None = None,
    ) -> None:
        references = _references(adapters)
        _check_settings(base, n_ctx, threads, gpu_layers, chat_template)
        template = ChatTemplate(resolve(chat_template)) if isinstance(chat_template, str) else chat_template
        self.base = Path(base).expanduser()
        self.template_source = template.source if template else ""
        self.on_overflow = on_overflow
        self._adapters: dict[str, Adapter] = {}
        settings = Settings(
            self.base,
            n_ctx,
            threads,
            gpu_layers,
            template,
            force,
            parallel=parallel,
            mode=mode,
            adapter_bytes=adapter_bytes,
            cache_bytes=cache_bytes,
            reproducible=reproducible,
            on_overflow=on_overflow,
            kv_type=kv_type,
            cache_dir=None if cache_dir is None else Path(cache_dir).expanduser(),
            max_waiting=max_waiting,
        )
        _check_sharing(settings)
        self._worker = _Worker(settings)
        self._close = weakref.finalize(self, _Worker.stop, self._worker)
        try:
            self._worker.start()
            self.n_ctx, self.base_name, self._notices = self._call(Runtime.describe)
            self._header = self._call(lambda runtime: runtime.model.header)
            self._adapters |= self._call(Runtime.bundled)
            for reference in references:
                self._load(reference)
        except BaseException:
            self.close()
            raise

    @property
    def adapters(self) -> list[str]:
        """Names of the loaded adapters."""
        return list(self._adapters)

    @property
    def notices(self) -> list[str]:
        """What could not be checked, or was overruled with `force`: worth showing to the user."""
        return [
            *self._notices,
            *self._call(Runtime.mode)[1],
            *(notice for adapter in list(self._adapters.values()) for notice in adapter.notices),
        ]

    @property
    def base_fingerprint(self) -> str:
        """Equal for every quantization of the same base."""
        return base_fingerprint(self.base)

    def adapter(self, name: str | None) -> Adapter:
        """A loaded adapter's content hash, contract, sampling defaults and scale; of the bare base for None or "none".

        Raises:
            SettingsError: unknown name.
        """
        return find_adapter(name, self._adapters)

    def load_adapter(
        self, name: str, path: str | Path, scale: float = 1.0, *, tried: Collection[str] | None = None
    ) -> Adapter:
        """Load an adapter, or replace the one of that name; requests that are under way finish on the old one.

        Args:
            tried: content hashes of adapters that are known to give numbers at their scale. Any other is computed with
                first, for a few tokens, unless this engine has done so before. None tries nothing.

        Raises:
            ModelFileError, BaseMismatchError: missing, broken, does not fit the base, or gives no numbers.
            SettingsError: a name that requests could not carry.
        """
        if not isinstance(path, str | Path):
            raise SettingsError(f"the path of adapter {name!r} is {path!r}, expected text or a path")
        return self._load(AdapterRef(check_name(name), Path(path).expanduser(), scale), tried)

    def check_adapter(self, path: str | Path) -> None:
        """Read, check and try a file as `load_adapter` does, and load nothing.

        Raises:
            ModelFileError, BaseMismatchError: missing, broken, does not fit the base, or gives no numbers.
        """
        prepared = self._prepared(AdapterRef("checked", Path(path).expanduser()))
        self._call(lambda runtime: runtime.check_adapter(prepared))

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter and free its memory.

        Raises:
            SettingsError: no such adapter.
        """

        def unload(runtime: Runtime) -> None:
            runtime.unload_adapter(name)
            del self._adapters[name]

        self._call(unload)

    def pin_adapter(self, name: str, pinned: bool = True) -> None:
        """Keep an adapter in memory whatever `adapter_bytes` is, or no longer.

        Raises:
            SettingsError: no such adapter.
        """
        self._call(lambda runtime: runtime.adapters.pin(name, pinned))

    @property
    def mode(self) -> str:
        """How requests with different adapters share the machine: "mixed" or "switching"."""
        return self._call(Runtime.mode)[0]

    @property
    def parallel(self) -> int:
        """How many replies are written at the same time."""
        return self._call(lambda runtime: runtime.context.n_sequences)

    @property
    def kv_type(self) -> str:
        """How keys and values are kept: "f16", "q8_0" or "q4_0"."""
        return self._call(lambda runtime: runtime.kv_type)

    @property
    def deterministic_rows(self) -> int:
        """How many rows each decode of a `deterministic` request has: its text is the same for the same number."""
        return self._call(lambda runtime: runtime.context.n_sequences if runtime.scheduler.reproducible else 1)

    @property
    def turn(self) -> int:
        """How many steps and jobs its thread has begun and ended: an odd number while it is in one. Never waits."""
        return self._worker.turn

    def state(self) -> dict[str, Any]:
        """What the engine is and does now, as JSON: sizes in bytes, counts of requests and adapters."""
        return self._call(Runtime.state)

    def stream(
        self,
        messages: Messages,
        *,
        adapter: AdapterNamed = None,
        scale: float | None = None,
        sampling: Sampling | Mapping[str, Any] | None = None,
        deterministic: bool = False,
        priority: int = 0,
        deadline: float | None = None,
        tenant: str | None = None,
    ) -> Stream:
        """A reply, piece by piece; the arguments are those of `Request`.

        Raises, while the stream is read:
            SettingsError: an unknown adapter or sampling setting, or messages that are none.
            ContextOverflowError: the conversation does not fit.
            EngineBusyError: more requests wait than may (`max_waiting`).
            ModelFileError: no chat template, or one that refuses the conversation.
        """
        return self.submit(Request(messages, adapter, scale, sampling, deterministic, priority, deadline, tenant))

    def chat(
        self,
        messages: Messages,
        *,
        adapter: AdapterNamed = None,
        scale: float | None = None,
        sampling: Sampling | Mapping[str, Any] | None = None,
        deterministic: bool = False,
        priority: int = 0,
        deadline: float | None = None,
        tenant: str | None = None,
    ) -> Completion:
        """A whole reply; arguments and errors as for `stream`."""
        return self.submit(
            Request(messages, adapter, scale, sampling, deterministic, priority, deadline, tenant)
        ).completion

    def submit(self, request: Request, deliver: Callable[[Item], None] | None = None) -> Stream:
        """`stream` for a request that is made already.

        Args:
            deliver: called on the engine's thread with each piece, and at last with the completion or an error; it must
                not wait. The stream then yields nothing; dropping it cancels the reply all the same.
        """
        task = Task(request, deliver)
        self._worker.put(task)
        return Stream(task, self)

    def batch(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """A reply for each request, in order; requests are taken a few ahead, so the iterable may be endless.

        Raises:
            EdgeloraError: the first request that cannot be answered.
        """
        streams: deque[Stream] = deque()
        for request in requests:
            streams.append(self.submit(request))
            if len(streams) >= BATCH_WINDOW:
                yield streams.popleft().completion
        while streams:
            yield streams.popleft().completion

    def count_tokens(self, messages: Messages, adapter: str | None = None) -> int:
        """How many tokens the conversation takes, with the template and system prompt it would be given."""
        return self._call(lambda runtime: len(runtime.planner.encode(messages, runtime.adapters.get(adapter))))

    def score(self, request: Request, reply: str, wanted: Wanted | None = None) -> ReplyScore:
        """How likely the model takes a reply that is given to a request's conversation, token by token, as the chat
        template writes it. The numbers are the same whatever ran before; replies under way pause meanwhile.

        Args:
            wanted: what to report beside the losses.

        Raises:
            SettingsError, ContextOverflowError, ModelFileError: as `stream`.
        """
        return self._call(lambda runtime: runtime.score(request, reply, wanted))

    def measure_speed(self, adapter: str | None = None) -> Speed:
        """Tokens a second that one conversation is read and written with, alone on this machine, in a second or two."""
        return self._call(lambda runtime: runtime.speed(adapter))

    def embed(self, inputs: Sequence[str | Sequence[int]], adapter: str | None = None) -> tuple[list[list[float]], int]:
        """Vectors of texts (or token ids), each of length 1, and how many tokens they had together. Replies under way
        pause for a text at a time.

        Raises:
            SettingsError: the base is none for embeddings, or an unknown adapter.
            ContextOverflowError: a text that is too long.
        """

        def embed(text: str | Sequence[int]) -> tuple[list[float], int]:
            return self._call(lambda runtime: runtime.embed(text, adapter))

        made = [embed(text) for text in inputs]
        return [vector for vector, _ in made], sum(count for _, count in made)

    def close(self) -> None:
        """Cancel what is under way, free everything, join the thread. May be called again."""
        self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _load(self, reference: AdapterRef, tried: Collection[str] | None = None) -> Adapter:
        prepared = self._prepared(reference)

        def add(runtime: Runtime) -> Adapter:
            self._adapters[reference.name] = adapter = runtime.add_adapter(prepared, tried)
            return adapter

        return self._call(add)

    def _prepared(self, reference: AdapterRef) -> Prepared:
        """Read and checked on the caller's thread: replies go on meanwhile."""
        return prepare(reference, self._header, mixing=self.mode == "mixed")

    def _call(self, function: Callable[[Runtime], Result]) -> Result:
        """Run a short function on the thread, after what is queued before it."""
        call = _Call(function)
        self._worker.put(call)
        result: Result = call.future.result()
        return result


def _check_settings(base: object, n_ctx: object, threads: object, gpu_layers: object, chat_template: object) -> None:
    def whole(value: object, least: int, most: int) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most

    checks = (
        ("base", base, isinstance(base, str | Path), "a path"),
        ("n_ctx", n_ctx, n_ctx is None or whole(n_ctx, 1, 2**31 - 1), "a whole number, 1 or more, below 2**31"),
        (
            "threads",
            threads,
            threads is None or whole(threads, 1, MAX_THREADS),
            f"a whole number from 1 to {MAX_THREADS}",
        ),
        (
            "gpu_layers",
            gpu_layers,
            gpu_layers is None or whole(gpu_layers, -1, 2**31 - 1),
            "a whole number, or -1 for all layers",
        ),
        (
            "chat_template",
            chat_template,
            isinstance(chat_template, str | ChatTemplate | None),
            "a name, file or template",
        ),
    )
    if problems := [f"{name} is {value!r}, expected {wanted}" for name, value, ok, wanted in checks if not ok]:
        raise SettingsError("; ".join(problems))


def _check_sharing(settings: Settings) -> None:
    def whole(value: object, least: int, most: float) -> bool:
        return value is None or (isinstance(value, int) and not isinstance(value, bool) and least <= value <= most)

    parallel, number_wanted = f"a whole number from 1 to {MAX_PARALLEL}", "a whole number, 0 or more"
    checks = (
        ("parallel", settings.parallel, whole(settings.parallel, 1, MAX_PARALLEL), parallel),
        ("mode", settings.mode, settings.mode in MODES, " or ".join(MODES)),
        ("adapter_bytes", settings.adapter_bytes, whole(settings.adapter_bytes, 0, math.inf), number_wanted),
        ("cache_bytes", settings.cache_bytes, whole(settings.cache_bytes, 0, math.inf), number_wanted),
        ("max_waiting", settings.max_waiting, whole(settings.max_waiting, 0, math.inf), number_wanted),
        ("kv_type", settings.kv_type, settings.kv_type in (None, *KV_TYPES), " or ".join(KV_TYPES)),
        ("on_overflow", settings.on_overflow, settings.on_overflow in ON_OVERFLOW, " or ".join(ON_OVERFLOW)),
    )
    if problems := [f"{name} is {value!r}, expected {wanted}" for name, value, ok, wanted in checks if not ok]:
        raise SettingsError("; ".join(problems))


def _references(adapters: AdaptersGiven) -> list[AdapterRef]:
    if isinstance(adapters, str) or not isinstance(adapters, Mapping | Sequence):
        raise SettingsError(
            f"adapters are {adapters!r}, expected a mapping or a list", hint="Write [PATH], or {NAME: PATH}."
        )
    if isinstance(adapters, Mapping):
        return [_named(name, value) for name, value in adapters.items()]
    found = [value if isinstance(value, AdapterRef) else AdapterRef.parse(str(value)) for value in adapters]
    names = [reference.name for reference in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise SettingsError(f"adapter names given twice: {', '.join(twice)}", hint="Name them apart: NAME=PATH.")
    return found


def _named(name: str, value: str | Path | AdapterRef) -> AdapterRef:
    reference = value if isinstance(value, AdapterRef) else AdapterRef.parse(f"{check_name(name)}={value}")
    return AdapterRef(check_name(name), reference.path, reference.scale)


class _Call:
    """A function to be run on the thread, and its result."""

    def __init__(self, function: Callable[[Runtime], Any]) -> None:
        self.function = function
        self.future: Future[Any] = Future()

    def run(self, runtime: Runtime) -> None:
        try:
            self.future.set_result(self.function(runtime))
        except BaseException as error:
            self.future.set_exception(error)


class _Worker:
    """The thread and its queue. Knows nothing of the Engine, so that a dropped Engine can be collected."""

    def __init__(self, settings: Settings) -> None:
        self._queue: SimpleQueue[_Call | Task | None] = SimpleQueue()
        self._lock = threading.RLock()  # the collector may run `stop` on the thread that holds it
        self._stopping = False
        self._tasks: weakref.WeakSet[Task] = weakref.WeakSet()
        self._loaded: Future[None] = Future()
        self._settings = settings
        self._thread = threading.Thread(target=self._run, name="edgelora-engine", daemon=True)
        self.turn = 0

    def start(self) -> None:
        """Start, and wait until the base is loaded.

        Raises:
            EdgeloraError: it cannot be.
        """
        self._thread.start()
        self._loaded.result()

    def put(self, job: _Call | Task) -> None:
        with self._lock:
            if self._stopping:
                raise EdgeloraError("the engine is closed")
            if isinstance(job, Task):
                self._tasks.add(job)
            self._queue.put(job)

    def stop(self) -> None:
        """Cancel, free, join; also run when the Engine is collected, or at the interpreter's exit."""
        with self._lock:
            self._stopping = True
            self._queue.put(None)
            tasks = list(self._tasks)
        for task in tasks:
            task.interrupt.set()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        try:
            # A None wakes the thread: it looks whether it is to stop, and goes on.
            runtime = Runtime(self._settings, lambda: not self._stopping, lambda: self._queue.put(None))
        except BaseException as error:
            self._loaded.set_exception(error)
            return
        self._loaded.set_result(None)
        try:
            self._serve(runtime)
        finally:
            with self._lock:
                self._stopping = True
            try:
                runtime.close()
            finally:
                self._refuse()

    def _serve(self, runtime: Runtime) -> None:
        """Take what came in, then decode one step: until there is nothing to do, and then wait."""
        busy = False
        while not self._stopping:
            while not self._stopping and not (busy and self._queue.empty()):
                job = self._queue.get()
                self.turn += 1
                if isinstance(job, Task):
                    runtime.submit(job)
                elif job is not None:
                    job.run(runtime)
                busy = not runtime.scheduler.is_idle
                self.turn += 1
            if not self._stopping:
                self.turn += 1
                busy = runtime.scheduler.step() and not runtime.scheduler.is_idle
                self.turn += 1

    def _refuse(self) -> None:
        """Whatever is still in the queue will not be done."""
        error = EdgeloraError("the engine was closed before this request was answered")
        while not self._queue.empty():
            job = self._queue.get()
            if isinstance(job, Task):
                job.put(error)
            elif job is not None:
                job.future.set_exception(error)
