"""Model, context, cache and adapters together. Lives on the engine's thread: nothing here is called from another."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from edgelora.adapter_ref import AdapterRef
from edgelora.engine.adapters import Adapter, Adapters, Prepared, Scaled
from edgelora.engine.cache import KVCache
from edgelora.engine.context import Applied, Context
from edgelora.engine.devices import backend_name, devices
from edgelora.engine.embedding import Embedder
from edgelora.engine.fit import DEFAULT_N_CTX, KV_TYPES, KVFit, fit_gpu_layers, fit_kv, kv_values_per_token
from edgelora.engine.kv_files import KVFiles
from edgelora.engine.mixer import Mixer
from edgelora.engine.mixing import make_mixer, why_not
from edgelora.engine.model import Model
from edgelora.engine.native import llama
from edgelora.engine.planning import ERROR, Planner
from edgelora.engine.preflight import base_fingerprint, read_checked
from edgelora.engine.scheduler import READ, Scheduler
from edgelora.engine.scoring import ReplyScore, Scorer, Speed, Wanted
from edgelora.engine.stream import Request, Task
from edgelora.engine.threads import LoadFollower, threads_for
from edgelora.errors import EdgeloraError, EngineBusyError, SettingsError
from edgelora.template import ChatTemplate

Result = TypeVar("Result")
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
    gpu_layers: int | None = None
    chat_template: ChatTemplate | None = None
    force: bool = False
    parallel: int | None = None
    mode: str = "auto"
    adapter_bytes: int | None = None
    cache_bytes: int | None = None
    reproducible: bool = False
    on_overflow: str = ERROR
    kv_type: str | None = None
    cache_dir: Path | None = None
    max_waiting: int | None = None


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
        self._scorer: Scorer | None = None
        with ExitStack() as undo:
            self.model = Model(settings.base, gpu_layers=_gpu_layers(settings), keep_going=keep_going)
            undo.callback(self.model.close)
            fit = self._fit()
            self.n_ctx, parallel, self._notices = fit.n_ctx, fit.parallel, list(fit.notices)
            self.kv_type = fit.kv_type
            threads = settings.threads or threads_for(settings.base.stat().st_size)
            n_batch = max(READ, parallel)
            self.mixer = self._mixer(n_batch)
            self.context = Context(
                self.model,
                n_ctx=self.n_ctx,
                n_sequences=parallel,
                threads=threads,
                n_batch=n_batch,
                callback=self.mixer.callback if self.mixer else None,
                kv_type=KV_TYPES[fit.kv_type][0],
            )
            self._files = self._kv_files(fit.kv_type)
            self.cache = KVCache(
                parallel,
                self.context,
                self._cache_bytes(),
                can_cut=not self.model.is_recurrent,
                kept=self._files.entries() if self._files else (),
            )
            self.adapters = Adapters(
                self.model,
                self.mixer,
                self._adapter_bytes(),
                self._detach,
                wake,
                threads,
                must_mix=settings.mode == "mixed",
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
            self.planner = Planner(self.model, self.adapters, self.n_ctx, settings.chat_template, settings.on_overflow)
            self._threads = threads
            self._embedder: Embedder | None = None
            undo.callback(self._close_embedder)
            undo.callback(self._close_scorer)
            self._undo = undo.pop_all()

    def close(self) -> None:
        """End every reply, and free everything."""
        self.scheduler.close(lambda: EdgeloraError("the engine was closed before this request was answered"))
        if self._files:
            self._files.save(self.cache.all())
        self._undo.close()

    def _close_embedder(self) -> None:
        if self._embedder:
            self._embedder.close()

    def _close_scorer(self) -> None:
        if self._scorer:
            self._scorer.close()

    def _detach(self) -> None:
        """Let every context go of llama.cpp's own adapters."""
        self.context.apply(())
        if self._scorer:
            self._scorer.release()

    def _fit(self) -> KVFit:
        settings = self.settings
        return fit_kv(
            self.model.kv_bytes_per_token() // 2,
            self.model.n_ctx_train,
            _free_bytes() if backend_name() == "CPU" else 0,
            n_ctx=settings.n_ctx,
            parallel=settings.parallel,
            kv_type=settings.kv_type,
        )

    def _mixer(self, n_batch: int) -> Mixer | None:
        problem = "" if self.settings.mode == "switching" else why_not()
        if problem and self.settings.mode == "mixed":
            raise SettingsError(f"adapters cannot be mixed here: {problem}", hint="Use mode='auto', or 'switching'.")
        return None if problem or self.settings.mode == "switching" else make_mixer(self.model, n_batch)

    def _kv_files(self, kv_type: str) -> KVFiles | None:
        folder = self.settings.cache_dir
        if folder is None:
            return None
        base = self.model.header
        tensors = [(name, tensor.type_name, tensor.shape, tensor.offset) for name, tensor in base.tensors.items()]
        states = [path.stat() for path in sorted({tensor.path for tensor in base.tensors.values()})]
        files = [(state.st_size, state.st_mtime_ns) for state in states]  # another content of one shape and fingerprint
        build = llama().llama_print_system_info().decode() + version("llama-cpp-python")
        parts = [base_fingerprint(base.path), files, tensors, kv_type, build]
        return KVFiles(folder, hashlib.sha256(repr(parts).encode()).hexdigest(), self._cache_bytes())

    def _cache_bytes(self) -> int:
        given = self.settings.cache_bytes
        return _free_bytes() // CACHE_SHARE if given is None else given

    def _adapter_bytes(self) -> int:
        given = self.settings.adapter_bytes
        return _free_bytes() // ADAPTER_SHARE if given is None else given

    def add_adapter(self, prepared: Prepared, tried: Collection[str] | None = None) -> Adapter:
        return self.adapters.add(prepared, force=self.settings.force, tried=tried)

    def check_adapter(self, prepared: Prepared) -> None:
        self.adapters.check(prepared, force=self.settings.force)

    def embed(self, text: str | Sequence[int], adapter: str | None) -> tuple[list[float], int]:
        """The vector of a text, and how many tokens it has; see `Engine.embed`."""
        named = self.adapters.get(adapter)
        tokens = self.planner.raw_tokens(text, named)
        if self._embedder is None:
            self._embedder = Embedder(self.model, self.n_ctx, self._threads)
        acting = ((named, named.scale),) if named.file else ()
        self.adapters.use(acting)
        try:
            self.adapters.ready(acting, mixed=False)
            applied = tuple((each.pointer, scale) for each, scale in acting)
            return self._embedder.embed(tokens, applied).tolist(), len(tokens)
        finally:
            self._embedder.release()
            self.adapters.release(acting)

    def score(self, request: Request, reply: str, wanted: Wanted | None) -> ReplyScore:
        """How likely a reply is; see `Engine.score`."""
        plan = self.planner.plan(request)
        tokens = self.planner.reply_tokens(request, reply)
        return self._scoring(
            plan.adapters, lambda scorer, own: scorer.score(plan.tokens, tokens, own, plan.begins, wanted)
        )

    def speed(self, adapter: str | None) -> Speed:
        """See `Engine.measure_speed`."""
        named = self.adapters.get(adapter)
        return self._scoring(((named, named.scale),) if named.file else (), lambda scorer, own: scorer.speed(own))

    def _scoring(self, acting: Scaled, work: Callable[[Scorer, Applied], Result]) -> Result:
        if self._scorer is None:
            self._scorer = Scorer(self.model, self.n_ctx, self._threads)
        self.adapters.use(acting)
        try:
            self.adapters.ready(acting, mixed=False)
            return work(self._scorer, tuple((adapter.pointer, scale) for adapter, scale in acting))
        finally:
            self._scorer.release()
            self.adapters.release(acting)

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
        beyond = [f"a context of {self.n_ctx} tokens; the base was trained with {trained}"]
        return self.n_ctx, self.model.name, [*(beyond if self.n_ctx > trained else []), *self._notices]

    def state(self) -> dict[str, Any]:
        """See `Engine.state`."""
        waiting, running = self.scheduler.counts
        return {
            "base": self.model.name,
            "base_fingerprint": base_fingerprint(self.settings.base),
            "n_ctx": self.n_ctx,
            "parallel": self.context.n_sequences,
            "kv_type": self.kv_type,
            "mode": self.mode()[0],
            "waiting": waiting,
            "running": running,
            "adapters": list(self.adapters),
            "adapters_in_memory": self.adapters.loaded(),
            "adapter_bytes": self.adapters.loaded_bytes,
            "kept_kv_bytes": self.cache.kept_bytes,
            "notices": self._notices,
        }

    def mode(self) -> tuple[str, list[str]]:
        """How requests share the machine now; a notice, where mixing was given up on the way."""
        mixes, problem = self.adapters.mixer is not None, self.adapters.mixing_problem
        given_up = not mixes and self.mixer is not None
        return "mixed" if mixes else "switching", [f"adapters take turns from now on: {problem}"] if given_up else []

    def submit(self, task: Task) -> None:
        """Let a request wait for its turn; one that makes no sense gets its error at once."""
        try:
            self._check_room()
            self.scheduler.submit(task, self.planner.plan(task.request))
        except StopIteration as error:  # a stream that raised it would look finished
            task.put(RuntimeError(f"a bug: {error!r} escaped"))
        except BaseException as error:
            task.put(error)

    def _check_room(self) -> None:
        most, backlog = self.settings.max_waiting, self.scheduler.backlog
        if most is not None and backlog >= most:
            raise EngineBusyError(
                f"the queue is full: {backlog} of at most {most} requests wait",
                hint="Try again later, or raise max_waiting.",
            )


def _free_bytes() -> int:
    import psutil

    return int(psutil.virtual_memory().available)


def _gpu_layers(settings: Settings) -> int:
    """As many as were asked for, or as fit."""
    if settings.gpu_layers is not None:
        return settings.gpu_layers
    if backend_name() == "CPU":
        return -1
    header = read_checked(settings.base, "base")
    return fit_gpu_layers(header, devices(), kv_values_per_token(header), settings.n_ctx or DEFAULT_N_CTX)
