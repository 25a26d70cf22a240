"""The adapters of one model: checked when they are named, in memory while they are used or there is room.

Two names for one content share its memory. A file is read when its adapter is added, or, where that one was evicted, by
a thread of its own when a request wants it again; what was replaced or removed stays until its last reply is written.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from converters.reader import GGUFHeader
from edgelora.adapter_ref import BASE_NAMES, AdapterRef
from edgelora.bundle_reading import BundledAdapter, bundled_adapters, check_no_bundle
from edgelora.contract import Contract
from edgelora.engine.low_rank import Weights, problem_of, read_weights
from edgelora.engine.mixer import Mixer
from edgelora.engine.mixing_proof import prove
from edgelora.engine.model import Model
from edgelora.engine.native import Handle, forget_log, llama, reason
from edgelora.engine.preflight import (
    INVOCATION,
    check_adapter,
    check_fingerprint,
    check_finite,
    check_repair,
    read_checked,
)
from edgelora.engine.prompt import encode_prompt
from edgelora.engine.trial import gives_numbers
from edgelora.errors import EdgeloraError, ModelFileError, SettingsError
from edgelora.sampling import Sampling
from edgelora.template import ChatTemplate


class AdapterFile:
    """The weights of one content, in memory or not.

    Attributes:
        digest: SHA-256 of the file in hex.
        problem: why it cannot share a decode with other adapters; empty if it can.
        claims: requests that name it, waiting or under way; it stays known until they are done.
        users: of these, the ones that have a place, or the next one; it stays in memory until they are done.
        last_used: a counter; the lowest is evicted first.
    """

    def __init__(self, header: GGUFHeader, digest: str, problem: str) -> None:
        self.header, self.digest, self.problem = header, digest, problem
        self.claims = self.users = self.last_used = 0
        self.weights: Weights | None = None
        self.handle: Handle | None = None
        self.loading: Future[Weights] | None = None

    @property
    def is_loaded(self) -> bool:
        return self.weights is not None or self.handle is not None

    @property
    def loaded_bytes(self) -> int:
        """What it takes in memory now: as weights that can be mixed, as llama.cpp's own, or both."""
        copies = (self.weights is not None or self.loading is not None) + (self.handle is not None)
        return copies * sum(tensor.size_bytes for tensor in self.header.tensors.values())


@dataclass(frozen=True)
class Adapter:
    """An adapter that requests can name, or the bare base (`BARE`), which needs no file.

    Attributes:
        content_hash: SHA-256 of the file in hex; empty for the bare base.
        contract: what it carries; None where another tool made it.
        template: the contract's chat template.
        sampling: the contract's sampling defaults.
        notices: what could not be checked, or was overruled.
        invocation: the tokens from which on an activated LoRA acts; empty for any other.
        bundled: where the base has it inside: its place there, for good at its own scale.
    """

    name: str
    ref: AdapterRef | None
    content_hash: str
    contract: Contract | None
    template: ChatTemplate | None
    sampling: Sampling = field(default_factory=Sampling)
    notices: tuple[str, ...] = ()
    file: AdapterFile | None = field(default=None, repr=False, compare=False)
    bundled: BundledAdapter | None = None
    invocation: tuple[int, ...] = ()

    @property
    def scale(self) -> float:
        return self.bundled.scale if self.bundled else self.ref.scale if self.ref else 1.0

    @property
    def is_mixable(self) -> bool:
        """Whether it can share a decode with other adapters."""
        return self.file is not None and not self.file.problem

    @property
    def weights(self) -> Weights:
        assert self.file is not None
        assert self.file.weights is not None
        return self.file.weights

    @property
    def pointer(self) -> Any:
        """llama.cpp's own.

        Raises:
            ModelFileError: it could not be read when mixing was given up.
        """
        assert self.file is not None
        if self.file.handle is None:
            raise ModelFileError(f"{self.file.header.path}: cannot be read any more", hint="Load it again.")
        return self.file.handle.pointer


BARE = Adapter("none", None, "", None, None)
Scaled = Sequence[tuple[Adapter, float]]


def find_adapter(name: str | None, loaded: Mapping[str, Adapter]) -> Adapter:
    """The adapter of that name; None, "none" and "base" are the bare base.

    Raises:
        SettingsError: unknown; the hint lists the names.
    """
    if not isinstance(name, str | None):
        raise SettingsError(f"adapter is {name!r}, expected a loaded adapter's name")
    if name is None or name in BASE_NAMES:
        return BARE
    if name not in loaded:
        raise SettingsError(f"unknown adapter {name!r}", hint=f"Loaded: {', '.join([*loaded, 'none'])}.")
    return loaded[name]


@dataclass(frozen=True)
class Prepared:
    """An adapter that was read and checked, and is not yet known to the engine."""

    ref: AdapterRef
    header: GGUFHeader
    digest: str
    contract: Contract | None
    weights: Weights | None


def prepare(ref: AdapterRef, base: GGUFHeader, *, mixing: bool) -> Prepared:
    """Read and check an adapter file; on any thread, for llama.cpp is not asked.

    Args:
        mixing: read the weights too, where they can be mixed.

    Raises:
        ModelFileError, BaseMismatchError: see `preflight`.
    """
    before = _state(ref.path)
    header = read_checked(ref.path, "adapter")
    check_no_bundle(ref.path, base)
    check_adapter(header, base)
    contract = Contract.from_metadata(header.metadata, str(ref.path))
    data = _read(ref.path)
    if _state(ref.path) != before:
        raise ModelFileError(f"{ref.path}: changed while it was being loaded", hint="Try again.")
    check_finite(header, data)
    weights = read_weights(header, data) if mixing and not problem_of(header) else None
    return Prepared(ref, header, hashlib.sha256(data).hexdigest(), contract, weights)


def _state(path: Path) -> tuple[int, ...] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ModelFileError(f"{path}: cannot be read ({error.strerror})") from None


class Adapters:
    """The adapters of one model, by name. Lives on the engine's thread, but for the reading of evicted files.

    Args:
        mixer: where adapters share a decode; None where llama.cpp applies its own.
        budget_bytes: of weights in memory. What is in use, or pinned, stays beyond it.
        detach: lets every context go of llama.cpp's own adapters.
        wake: called, on another thread, when a file was read that a request waits for.
        threads: to try mixing with.
        must_mix: also where it is slower than taking turns.
    """

    def __init__(
        self,
        model: Model,
        mixer: Mixer | None = None,
        budget_bytes: int = 1 << 62,
        detach: Callable[[], None] = lambda: None,
        wake: Callable[[], None] = lambda: None,
        threads: int = 1,
        must_mix: bool = False,
    ) -> None:
        self._model, self.mixer, self._budget = model, mixer, budget_bytes
        self._detach, self._wake, self._threads, self._must_mix = detach, wake, threads, must_mix
        self.mixing_problem = "" if mixer else "this engine does not mix adapters"
        self._tried: set[tuple[str, float]] = set()  # content and scale of what gives numbers
        self._proven: dict[str, bool] = {}  # matrix that adapters were seen to be mixed on: whether the graph uses it
        self._named: dict[str, Adapter] = {adapter.name: adapter for adapter in _bundled(model)}
        self._pinned: set[str] = set()
        self._files: dict[str, AdapterFile] = {}
        self._clock = 0
        self._readers = ThreadPoolExecutor(1, thread_name_prefix="edgelora-adapter")

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._named))

    def get(self, name: str | None) -> Adapter:
        """See `find_adapter`."""
        return find_adapter(name, self._named)

    def load(self, ref: AdapterRef, *, force: bool = False) -> Adapter:
        """`prepare` and `add` in one."""
        return self.add(prepare(ref, self._model.header, mixing=self.mixer is not None), force=force)

    def add(self, prepared: Prepared, *, force: bool = False, tried: Collection[str] | None = None) -> Adapter:
        """Make an adapter known; one of the same name is replaced, and its replies go on with the old one.

        Args:
            tried: see `Engine.load_adapter`.

        Raises:
            ModelFileError, BaseMismatchError: see `preflight`; golden tokens that come out otherwise on this base; or
                logits that are no numbers.
        """
        ref, contract = prepared.ref, prepared.contract
        template = ChatTemplate(contract.chat_template) if contract and contract.chat_template else None
        notices = [*_check_contract(ref, contract, template, self._model, force)]
        sampling = _sampling(ref, contract)
        file = self._files.get(prepared.digest)
        if file is None:
            file = AdapterFile(prepared.header, prepared.digest, self._problem(prepared.header))
        if not file.problem and prepared.weights and self.mixer:
            notices += self._prove(ref.name, file, prepared.weights)
        file.header = prepared.header  # the newest path of this content
        if not file.is_loaded:
            self._install(file, prepared.weights)
        if tried is not None and file.digest not in tried:
            self._try(file, ref)
        self._files[prepared.digest] = file
        invocation = tuple(map(int, prepared.header.metadata.get(INVOCATION, ())))
        replaced = self._named.get(ref.name)
        self._named[ref.name] = Adapter(
            ref.name, ref, prepared.digest, contract, template, sampling, tuple(notices), file, invocation=invocation
        )
        self._touch(file)
        self._free_if_nameless(replaced.file if replaced else None)
        self._shrink()
        return self._named[ref.name]

    def check(self, prepared: Prepared, *, force: bool = False) -> None:
        """Everything that `add` looks at, and a trial; nothing stays.

        Raises:
            ModelFileError, BaseMismatchError: as `add`.
        """
        nameless = replace(prepared.ref, name="")  # which no request can name
        self.add(replace(prepared, ref=nameless), force=force, tried=())
        self.unload(nameless.name)

    def unload(self, name: str) -> None:
        """Forget a name; replies that are under way go on.

        Raises:
            SettingsError: no such adapter.
        """
        if self.get(name) is BARE:
            raise SettingsError("the bare base cannot be unloaded")
        if self.get(name).bundled:
            raise SettingsError(f"adapter {name} is a part of the base {self._model.path}, and cannot be unloaded")
        self._pinned.discard(name)
        self._free_if_nameless(self._named.pop(name).file)

    def pin(self, name: str, pinned: bool = True) -> None:
        """Keep an adapter in memory whatever the budget is, or no longer.

        Raises:
            SettingsError: no such adapter.
        """
        if self.get(name) is BARE:
            raise SettingsError("the bare base is always in memory")
        (self._pinned.add if pinned else self._pinned.discard)(name)

    def claim(self, adapters: Scaled) -> None:
        """A request names these: they stay known until `disclaim`."""
        for file in _files_of(adapters):
            file.claims += 1

    def disclaim(self, adapters: Scaled) -> None:
        for file in _files_of(adapters):
            file.claims -= 1
            if not file.claims and not file.users:
                file.loading = None
            self._free_if_nameless(file)

    def use(self, adapters: Scaled) -> None:
        """A request will be computed with these: once in memory, they stay until `release`."""
        for file in _files_of(adapters):
            file.users += 1

    def release(self, adapters: Scaled) -> None:
        for file in _files_of(adapters):
            file.users -= 1
            self._free_if_nameless(file)
        self._shrink()

    def ready(self, adapters: Scaled, *, mixed: bool) -> bool:
        """Whether these can be computed with now. False: one is being read, and `wake` will be called.

        Args:
            mixed: in a decode with others; not: as llama.cpp's own.

        Raises:
            ModelFileError: a file that is gone, or holds something else by now.
        """
        if not all([self._ready(file, mixed) for file in _files_of(adapters)]):
            return False
        if not mixed or self.mixer is None:
            return True
        used = [file.weights for file in self._files.values() if file.users and file.weights]
        return self.mixer.is_ready(used, self._wake)

    def stop_mixing(self, problem: str) -> None:
        """Let llama.cpp apply its own adapters from now on, also in what is under way."""
        mixer, self.mixer, self.mixing_problem = self.mixer, None, problem
        for file in self._files.values():
            if file.weights and mixer:
                mixer.unplug(file.weights)
            file.problem = file.problem or problem
            file.weights = file.loading = None
            if file.users:
                with suppress(ModelFileError):  # gone: its own requests are told so
                    file.handle = file.handle or _init(self._model, file)
        if mixer:
            mixer.stand_aside()
            self._detach()
            mixer.close()

    @property
    def loaded_bytes(self) -> int:
        """Of weights in memory."""
        return sum(file.loaded_bytes for file in self._files.values())

    def loaded(self) -> list[str]:
        """Names of the adapters whose weights are in memory."""
        return [name for name, adapter in self._named.items() if adapter.file and adapter.file.is_loaded]

    def close(self) -> None:
        """Free all; before the model is, and after every context."""
        self._readers.shutdown(wait=True, cancel_futures=True)
        self._detach = lambda: None  # the contexts are gone
        self._named.clear()
        for file in list(self._files.values()):
            file.users = file.claims = 0
            self._free_if_nameless(file)
        if self.mixer:
            self.mixer.close()

    def _problem(self, header: GGUFHeader) -> str:
        return problem_of(header) if self.mixer else self.mixing_problem

    def _prove(self, name: str, file: AdapterFile, weights: Weights) -> Iterator[str]:
        """Try matrices that no adapter changed before; notices of what came out."""
        new = [matrix for matrix in weights.pairs if matrix not in self._proven]
        if new:
            proof = prove(self._model, new, self._threads)
            problem = proof.problem
            if proof.is_slower and not self._must_mix:
                problem = (
                    f"a token each of two adapters takes {proof.mixed_seconds * 1e3:.0f} ms in one decode and "
                    f"{proof.switching_seconds * 1e3:.0f} ms by turns"
                )
            if problem:
                file.problem = problem
                yield f"{name}: it does not share decodes with other adapters: {problem}"
                return
            self._proven |= {matrix: matrix not in proof.unused for matrix in new}
        if unused := [matrix for matrix in weights.pairs if not self._proven[matrix]]:
            yield (
                f"{name}: llama.cpp never applies {len(unused)} of its {len(weights.pairs)} matrices on this model: "
                f"{', '.join(unused[:8])}{' ...' if len(unused) > 8 else ''}"
            )

    def _try(self, file: AdapterFile, ref: AdapterRef) -> None:
        """Compute a few tokens with it, where that was not done before."""
        if (file.digest, ref.scale) in self._tried:
            return
        pointer = file.handle.pointer if file.handle else None
        try:
            if not gives_numbers(self._model, file.weights, pointer, ref.scale, self._threads):
                raise ModelFileError(
                    f"{ref.path}: with it the model's output is not a number: its weights are damaged or too large"
                )
        except EdgeloraError:
            self._free_if_nameless(file)
            raise
        self._tried.add((file.digest, ref.scale))

    def _ready(self, file: AdapterFile, mixed: bool) -> bool:
        self._touch(file)
        if not mixed:
            file.handle = file.handle or _init(self._model, file)
        elif file.weights is None:
            if file.loading is None:
                file.loading = self._readers.submit(_read_again, file)
                file.loading.add_done_callback(lambda _: self._wake())
            if not file.loading.done():
                return False
            reading, file.loading = file.loading, None
            self._install(file, reading.result())
        self._shrink()
        return True

    def _install(self, file: AdapterFile, weights: Weights | None) -> None:
        if file.problem:
            file.handle = _init(self._model, file)
            return
        assert self.mixer is not None
        assert weights is not None
        old = self.mixer.plug(weights)
        file.weights = weights
        if old:
            self._detach()
            old.close()

    def _touch(self, file: AdapterFile) -> None:
        self._clock += 1
        file.last_used = self._clock

    def _shrink(self) -> None:
        """Evict whoever was not used for longest until the budget holds, or nobody can be spared."""
        excess = self.loaded_bytes - self._budget
        if excess <= 0:
            return
        pinned = {self._named[name].content_hash for name in self._pinned if name in self._named}
        spare = [file for digest, file in self._files.items() if not file.users and digest not in pinned]
        for file in sorted(spare, key=lambda file: file.last_used):
            if excess <= 0:
                return
            excess -= file.loaded_bytes
            self._evict(file)

    def _evict(self, file: AdapterFile) -> None:
        if file.weights and self.mixer:
            self.mixer.unplug(file.weights)
        if file.handle:
            self._detach()
            file.handle.close()
        file.weights = file.handle = file.loading = None

    def _free_if_nameless(self, file: AdapterFile | None) -> None:
        """A name has let go of it: it is read from the path of one that is left from now on, or freed."""
        if file is None:
            return
        paths = [adapter.ref.path for adapter in self._named.values() if adapter.file is file and adapter.ref]
        if paths and file.header.path not in paths:
            file.header = replace(file.header, path=paths[-1])
        elif not paths and not file.claims and not file.users:
            self._evict(file)
            self._files.pop(file.digest, None)


def _files_of(adapters: Scaled) -> list[AdapterFile]:
    return [adapter.file for adapter, _ in adapters if adapter.file]


def _read_again(file: AdapterFile) -> Weights:
    path = file.header.path
    data = _read(path)
    _check_same(path, hashlib.sha256(data).hexdigest(), file.digest)
    return read_weights(file.header, data)


def _check_same(path: Path, found: str, digest: str) -> None:
    if found != digest:
        raise ModelFileError(
            f"{path}: holds something else than when it was loaded",
            hint="Load it again under its name, or put it back.",
        )


def _init(model: Model, file: AdapterFile) -> Handle:
    """llama.cpp's own adapter, of just the content that was checked."""
    path, library = file.header.path, llama()
    forget_log()
    pointer = library.llama_adapter_lora_init(model.pointer, os.fsencode(path))
    if not pointer:  # a NULL pointer object is not None
        raise ModelFileError(f"{path}: llama.cpp cannot load it: {reason()}")
    handle = Handle(pointer, library.llama_adapter_lora_free)
    try:
        _check_same(path, hashlib.sha256(_read(path)).hexdigest(), file.digest)
    except ModelFileError:
        handle.close()
        raise
    return handle


def _bundled(model: Model) -> Iterator[Adapter]:
    """The adapters that a base has inside."""
    for each in bundled_adapters(model.header):
        contract = each.contract
        template = ChatTemplate(contract.chat_template) if contract and contract.chat_template else None
        sampling = _sampling(AdapterRef(each.name, model.path), contract)
        yield Adapter(each.name, None, each.content_hash, contract, template, sampling, bundled=each)


def _sampling(ref: AdapterRef, contract: Contract | None) -> Sampling:
    try:
        return Sampling.from_mapping(contract.sampling if contract else {})
    except SettingsError as error:
        raise ModelFileError(
            f"{ref.path}: its contract is damaged: {error.message}", hint="Convert it again."
        ) from None


def _check_contract(
    ref: AdapterRef, contract: Contract | None, template: ChatTemplate | None, model: Model, force: bool
) -> Iterator[str]:
    """Notices; with `force` a failed check becomes one."""
    if contract is None:
        yield (
            f"{ref.name}: {ref.path} carries no contract (another tool made it): whether {model.name} is its base, and "
            "its chat template, stop strings and system prompt, could not be checked"
        )
        return
    checks = (
        partial(check_fingerprint, contract, ref.path, model.header),
        partial(check_repair, contract, ref.path, model.header),
        partial(check_golden, ref.path, contract, template, model),
    )
    for check in checks:
        try:
            check()
        except ModelFileError as error:
            if not force:
                raise
            yield f"{ref.name}: {error.message} (used all the same: force)"


def check_golden(path: Path, contract: Contract, template: ChatTemplate | None, model: Model) -> None:
    """The contract's conversation becomes on this base the tokens that it became in training.

    Raises:
        ModelFileError: it becomes others.
    """
    if template is None or not contract.golden_messages or not contract.golden_tokens:
        return
    made = encode_prompt(model.tokenizer, template, contract.golden_messages)
    wanted = list(contract.golden_tokens)
    if made != wanted:
        at = next(
            (i for i, (a, b) in enumerate(zip(made, wanted, strict=False)) if a != b), min(len(made), len(wanted))
        )
        raise ModelFileError(
            f"{path}: its test conversation becomes {len(made)} tokens on {model.path}, in training it was "
            f"{len(wanted)}; they part at token {at} (here {made[at : at + 4]}, in training {wanted[at : at + 4]})",
            hint="The base's tokenizer is not the one it was trained with: convert the base again, or use --force.",
        )
