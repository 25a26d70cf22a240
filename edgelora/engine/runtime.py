"""Model, context, cache and adapters together. Lives on the engine's thread: nothing here is called from another."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgelora.adapter_ref import AdapterRef
from edgelora.engine.adapters import BARE, Adapter, Adapters
from edgelora.engine.cache import CHUNK, KVCache
from edgelora.engine.context import Context
from edgelora.engine.devices import backend_name
from edgelora.engine.generation import Generation, Plan
from edgelora.engine.model import Model
from edgelora.engine.prompt import encode_prompt
from edgelora.engine.stream import Completion, Request, Task
from edgelora.engine.threads import threads_for
from edgelora.errors import ContextOverflowError, ModelFileError, SettingsError
from edgelora.messages import Message, check_messages, user_message
from edgelora.sampling import Sampling
from edgelora.template import ChatTemplate

DEFAULT_N_CTX = 4096
MAX_SEQUENCES = 4
MAX_N_CTX = 2**31
KV_BUDGET_BYTES = 512 << 20
"""KV sequences beyond the first are kept while all of them fit in this: they save prefill when adapters alternate."""


@dataclass(frozen=True)
class Settings:
    """What an engine is made with; see `Engine`."""

    base: Path
    n_ctx: int | None = None
    threads: int | None = None
    gpu_layers: int = -1
    chat_template: ChatTemplate | None = None
    force: bool = False


class Runtime:
    """Everything native that one engine owns.

    Raises:
        ModelFileError: the base cannot be loaded.
        SettingsError: a context or thread count out of range.
    """

    def __init__(self, settings: Settings, keep_going: Callable[[], bool]) -> None:
        self.settings = settings
        self.model = Model(settings.base, gpu_layers=settings.gpu_layers, keep_going=keep_going)
        try:
            self.n_ctx = settings.n_ctx or min(self.model.n_ctx_train, DEFAULT_N_CTX)
            per_sequence = max(1, self.model.kv_bytes_per_token() * self.n_ctx)
            _check_context(self.n_ctx, per_sequence)
            n_sequences = max(1, min(MAX_SEQUENCES, KV_BUDGET_BYTES // per_sequence, (MAX_N_CTX - 1) // self.n_ctx))
            self.context = Context(
                self.model,
                n_ctx=self.n_ctx,
                n_sequences=n_sequences,
                threads=settings.threads or threads_for(settings.base.stat().st_size),
                n_batch=CHUNK,
            )
        except BaseException:
            self.model.close()
            raise
        self.cache = KVCache(n_sequences, self.context.trim)
        self.adapters = Adapters(self.model)
        self._base_template = self.model.chat_template()

    def close(self) -> None:
        """Free everything: the context lets go of the adapters, they of the model."""
        self.context.close()
        self.adapters.close()
        self.model.close()

    def load_adapter(self, ref: AdapterRef) -> Adapter:
        self.context.use_adapter(None, 0.0)
        return self.adapters.load(ref, force=self.settings.force)

    def unload_adapter(self, name: str) -> None:
        self.context.use_adapter(None, 0.0)
        self.adapters.unload(name)

    def describe(self) -> tuple[int, str, list[str]]:
        """The context window, the base's name, and what the user should know of them."""
        trained = self.model.n_ctx_train
        beyond = (
            [f"a context of {self.n_ctx} tokens; the base was trained with {trained}"] if self.n_ctx > trained else []
        )
        return self.n_ctx, self.model.name, beyond

    def run(self, task: Task) -> Completion:
        """Answer one request; its text goes to the task as it comes.

        Raises:
            EdgeloraError: the request cannot be answered. The runtime stays usable.
        """
        generation = Generation(
            self.plan(task.request), self.context, self.cache, self.model.tokenizer, task.items.put, task.submitted
        )
        return generation.run(task.interrupt)

    def plan(self, request: Request) -> Plan:
        adapter = self.adapters.get(request.adapter)
        tokens = self.encode(request.messages, adapter)
        if len(tokens) >= self.n_ctx:
            raise ContextOverflowError(
                f"the conversation is {len(tokens)} tokens long, and the reply needs room too; the context window is "
                f"{self.n_ctx} tokens",
                hint=f"Shorten it, or ask for a larger window (this base was trained with {self.model.n_ctx_train}).",
            )
        sampling = resolve_sampling(request.sampling, adapter)
        return Plan(adapter, _scale(request.scale, adapter), tokens, sampling, self.n_ctx, request.deterministic)

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
        return encode_prompt(self.model.tokenizer, self.template(adapter), conversation)

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


def _check_context(n_ctx: int, kv_bytes: int) -> None:
    """llama.cpp ends the process where it cannot allocate.

    Raises:
        SettingsError: a context beyond what llama.cpp counts, or the memory that is free.
    """
    import psutil

    hint = "Give a smaller context window."
    if n_ctx >= MAX_N_CTX:
        raise SettingsError(f"a context of {n_ctx} tokens; llama.cpp counts to {MAX_N_CTX - 1}", hint=hint)
    free = psutil.virtual_memory().available
    if kv_bytes > free and backend_name() == "CPU":
        gib = [f"{size / 2**30:.1f} GiB" for size in (kv_bytes, free)]
        raise SettingsError(f"a context of {n_ctx} tokens takes {gib[0]} of KV cache; {gib[1]} are free", hint=hint)


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


def _scale(given: float | None, adapter: Adapter) -> float:
    if adapter is BARE:
        return 0.0
    scale = adapter.scale if given is None else given
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not math.isfinite(scale):
        raise SettingsError(f"scale is {scale!r}, expected a finite number")
    return float(scale)
