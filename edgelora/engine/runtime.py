"""Model, context, cache and adapters together. Lives on the engine's thread: nothing here is called from another."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgelora.adapter_ref import AdapterRef
from edgelora.engine.adapters import BARE, Adapter, Adapters, Prepared
from edgelora.engine.cache import CHUNK, KVCache
from edgelora.engine.context import Context
from edgelora.engine.devices import backend_name
from edgelora.engine.generation import Plan
from edgelora.engine.mixing import Mixer, why_not
from edgelora.engine.model import Model
from edgelora.engine.prompt import encode_prompt
from edgelora.engine.scheduler import Scheduler
from edgelora.engine.stream import Request, Task
from edgelora.engine.threads import LoadFollower, threads_for
from edgelora.errors import ContextOverflowError, EdgeloraError, ModelFileError, SettingsError
from edgelora.messages import Message, check_messages, user_message
from edgelora.sampling import Sampling
from edgelora.template import ChatTemplate

DEFAULT_N_CTX = 4096
MAX_PARALLEL = 8
MAX_N_CTX = 2**31
KV_SHARE = 4
"""By default, KV sequences beyond the first take no more than this part of the free memory."""
ADAPTER_SHARE = 4
"""By default, adapters in memory take no more than this part of the free memory."""

CACHE_SHARE = 8
"""By default, copies of KV that had to make room take no more than this part of the free memory."""


@dataclass(frozen=True)
class Settings:
    """What an engine is made with; see `Engine`."""

    base: Path
    n_ctx: int | None = None
    threads: int | None = None
    gpu_layers: int = -1
    chat_template: ChatTemplate | None = None
    force: bool = False
    parallel: int | None = None
    mode: str = "auto"
    adapter_bytes: int | None = None
    cache_bytes: int | None = None
    reproducible: bool = False


class Runtime:
    """Everything native that one engine owns.

    Args:
        keep_going: asked while the base is loaded; False gives up.
        wake: called on another thread when there is something to do again.

    Raises:
        ModelFileError: the base cannot be loaded.
        SettingsError: a context or thread count out of range, or a mode that this machine does not have.
    """

    def __init__(
        self, settings: Settings, keep_going: Callable[[], bool], wake: Callable[[], None] = lambda: None
    ) -> None:
        self.settings = settings
        with ExitStack() as undo:
            self.model = Model(settings.base, gpu_layers=settings.gpu_layers, keep_going=keep_going)
            undo.callback(self.model.close)
            self.n_ctx = settings.n_ctx or min(self.model.n_ctx_train, DEFAULT_N_CTX)
            parallel = self._parallel()
            threads = settings.threads or threads_for(settings.base.stat().st_size)
            n_batch = max(CHUNK, parallel)
            self.mixer = self._mixer(n_batch)
            self.context = Context(
                self.model,
                n_ctx=self.n_ctx,
                n_sequences=parallel,
                threads=threads,
                n_batch=n_batch,
                callback=self.mixer.callback if self.mixer else None,
            )
            self.cache = KVCache(parallel, self.context, self._cache_bytes(), can_cut=not self.model.is_recurrent)
            self.adapters = Adapters(
                self.model, self.mixer, self._adapter_bytes(), lambda: self.context.apply(()), wake, threads
            )
            undo.callback(self.adapters.close)
            undo.callback(self.context.close)  # first: it lets go of the adapters, and they of the model
            reproducible = settings.reproducible and not self.model.is_recurrent
            self.scheduler = Scheduler(
                self.model,
                self.context,
                self.cache,
                self.adapters,
                self.mixer,
                LoadFollower(threads),
                reproducible=reproducible,
            )
            self._base_template = self.model.chat_template()
            self._undo = undo.pop_all()

    def close(self) -> None:
        """End every reply, and free everything."""
        self.scheduler.close(lambda: EdgeloraError("the engine was closed before this request was answered"))
        self._undo.close()

    def _parallel(self) -> int:
        per_sequence = max(1, self.model.kv_bytes_per_token() * self.n_ctx)
        wanted = self.settings.parallel
        _check_context(self.n_ctx, per_sequence, wanted or 1)
        return wanted or max(
            1, min(MAX_PARALLEL, _free_bytes() // KV_SHARE // per_sequence, (MAX_N_CTX - 1) // self.n_ctx)
        )

    def _mixer(self, n_batch: int) -> Mixer | None:
        problem = "" if self.settings.mode == "switching" else why_not()
        if problem and self.settings.mode == "mixed":
            raise SettingsError(f"adapters cannot be mixed here: {problem}", hint="Use mode='auto', or 'switching'.")
        return None if problem or self.settings.mode == "switching" else Mixer(self.model, n_batch)

    def _cache_bytes(self) -> int:
        given = self.settings.cache_bytes
        return _free_bytes() // CACHE_SHARE if given is None else given

    def _adapter_bytes(self) -> int:
        given = self.settings.adapter_bytes
        return _free_bytes() // ADAPTER_SHARE if given is None else given

    def add_adapter(self, prepared: Prepared) -> Adapter:
        return self.adapters.add(prepared, force=self.settings.force)

    def bundled(self) -> dict[str, Adapter]:
        """The adapters that the base has inside."""
        return {name: adapter for name in self.adapters if (adapter := self.adapters.get(name)).bundled}

    def load_adapter(self, ref: AdapterRef) -> Adapter:
        return self.adapters.load(ref, force=self.settings.force)

    def unload_adapter(self, name: str) -> None:
        self.adapters.unload(name)

    def describe(self) -> tuple[int, str, list[str]]:
        """The context window, the base's name, and what the user should know of them."""
        trained = self.model.n_ctx_train
        beyond = (
            [f"a context of {self.n_ctx} tokens; the base was trained with {trained}"] if self.n_ctx > trained else []
        )
        return self.n_ctx, self.model.name, beyond

    def submit(self, task: Task) -> None:
        """Let a request wait for its turn; one that makes no sense gets its error at once."""
        try:
            self.scheduler.submit(task, self.plan(task.request))
        except StopIteration as error:  # a stream that raised it would look finished
            task.items.put(RuntimeError(f"a bug: {error!r} escaped"))
        except BaseException as error:
            task.items.put(error)

    def plan(self, request: Request) -> Plan:
        adapters = self._adapters_of(request)
        first = adapters[0][0] if adapters else BARE
        inside = first if first.bundled else None
        tokens = self.encode(request.messages, first)
        if len(tokens) >= self.n_ctx:
            raise ContextOverflowError(
                f"the conversation is {len(tokens)} tokens long, and the reply needs room too; the context window is "
                f"{self.n_ctx} tokens",
                hint=f"Shorten it, or ask for a larger window (this base was trained with {self.model.n_ctx_train}).",
            )
        sampling = resolve_sampling(request.sampling, first)
        _check_numbers(request)
        return Plan(() if inside else adapters, tokens, sampling, self.n_ctx, request.deterministic, inside)

    def _adapters_of(self, request: Request) -> tuple[tuple[Adapter, float], ...]:
        """The request's adapters with their scales, none for the bare base."""
        wanted = request.adapter
        if not isinstance(wanted, Mapping):
            adapter = self.adapters.get(wanted)
            scale = adapter.scale if request.scale is None else _number(request.scale, "scale")
            return () if adapter is BARE else _as_bundled(((adapter, scale),))
        times = 1.0 if request.scale is None else _number(request.scale, "scale")
        blend = [
            (self.adapters.get(name), times * _number(scale, f"scale of {name}")) for name, scale in wanted.items()
        ]
        return _as_bundled(tuple((adapter, scale) for adapter, scale in blend if adapter is not BARE))

    def encode(self, messages: Sequence[Message] | str, adapter: Adapter) -> list[int]:
        """The prompt's tokens, with the adapter's system prompt where the conversation has none."""
        if not isinstance(messages, (str, Sequence)):
            raise SettingsError(f"messages are {messages!r}, expected text or a list of {{role, content}}")
        conversation = [user_message(messages)] if isinstance(messages, str) else list(messages)
        if problem := check_messages(conversation):
            raise SettingsError(problem)
        if conversation[0]["role"] != "system" and adapter.contract and adapter.contract.system:
            conversation.insert(0, {"role": "system", "content": adapter.contract.system})
        if conversation[0]["role"] == "system" and not conversation[0]["content"]:
            conversation.pop(0)
        tokens = encode_prompt(self.model.tokenizer, self.template(adapter), conversation)
        return adapter.bundled.placed(tokens, self.model.tokenizer.bos) if adapter.bundled else tokens

    def template(self, adapter: Adapter) -> ChatTemplate:
        """The explicit template, else the adapter's, else the base's.

        Raises:
            ModelFileError: there is none.
        """
        found = self.settings.chat_template or adapter.template or self._base_template
        if found is None:
            raise ModelFileError(
                f"{self.model.path} has no chat template"
                + ("" if adapter is BARE else f", nor has adapter {adapter.name}"),
                hint="Name one with --chat-template: chatml, llama2, plain, or a Jinja file.",
            )
        return found


def _as_bundled(adapters: tuple[tuple[Adapter, float], ...]) -> tuple[tuple[Adapter, float], ...]:
    """These adapters, as they are asked for; of a bundle, one at the scale it was put in at.

    Raises:
        SettingsError: several of a bundle, or another scale.
    """
    inside = [(adapter, scale) for adapter, scale in adapters if adapter.bundled]
    if inside and len(adapters) > 1:
        raise SettingsError(
            f"a blend of {', '.join(adapter.name for adapter, _ in adapters)}: a bundle has one adapter at a time",
            hint="Blend the files: edgelora convert --blend.",
        )
    for adapter, scale in inside:
        if not math.isclose(scale, adapter.scale, rel_tol=1e-6):
            raise SettingsError(
                f"adapter {adapter.name} is in the bundle at scale {adapter.scale:g} for good; asked for was {scale:g}",
                hint="Bundle it again at that scale: --adapter NAME=PATH@SCALE.",
            )
    return adapters


def _free_bytes() -> int:
    import psutil

    return int(psutil.virtual_memory().available)


def _check_context(n_ctx: int, kv_bytes: int, parallel: int) -> None:
    """llama.cpp ends the process where it cannot allocate.

    Raises:
        SettingsError: a context beyond what llama.cpp counts, or the memory that is free.
    """
    hint = "Give a smaller context window" + (", or fewer sequences." if parallel > 1 else ".")
    if n_ctx * parallel >= MAX_N_CTX:
        raise SettingsError(f"a context of {n_ctx * parallel} tokens; llama.cpp counts to {MAX_N_CTX - 1}", hint=hint)
    free = _free_bytes()
    if kv_bytes * parallel > free and backend_name() == "CPU":
        gib = [f"{size / 2**30:.1f} GiB" for size in (kv_bytes * parallel, free)]
        times = f"{parallel} x {n_ctx}" if parallel > 1 else str(n_ctx)
        raise SettingsError(f"a context of {times} tokens takes {gib[0]} of KV cache; {gib[1]} are free", hint=hint)


def _check_numbers(request: Request) -> None:
    """Priority and deadline are numbers.

    Raises:
        SettingsError: they are not.
    """
    if isinstance(request.priority, bool) or not isinstance(request.priority, int):
        raise SettingsError(f"priority is {request.priority!r}, expected a whole number")
    if request.deadline is not None and _number(request.deadline, "deadline") <= 0:
        raise SettingsError(f"deadline is {request.deadline!r}, expected seconds, more than 0")


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise SettingsError(f"{name} is {value!r}, expected a finite number")
    return float(value)


def resolve_sampling(given: Sampling | Mapping[str, Any] | None, adapter: Adapter) -> Sampling:
    """The request's settings over the adapter's defaults; the adapter's stop strings always hold.

    Raises:
        SettingsError: an unknown name or a value out of range.
    """
    if not isinstance(given, Sampling | Mapping | None):
        raise SettingsError(f"sampling is {given!r}, expected a Sampling or a mapping")
    contract = adapter.contract
    sampling = given if isinstance(given, Sampling) else Sampling.from_mapping(given or {}, adapter.sampling)
    stops = (*(contract.stop if contract else ()), *sampling.stop)
    return replace(sampling, stop=tuple(dict.fromkeys(stops)))
