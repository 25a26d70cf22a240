"""Which adapters there are: those of the command line, the folder's, and what was loaded by hand.

A file that appears in the folder is loaded under its stem, one that changes takes the place of the old one once that
one's streams have ended, one that is gone is forgotten, and one that fails its checks stays out and says why. What was
done by hand (names loaded, names unloaded) is kept in `.edgelora-serve.json` in the folder and done again at the next
start.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
import time
from asyncio.subprocess import DEVNULL, PIPE
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from edgelora.adapter_ref import AdapterRef, check_name
from edgelora.errors import EdgeloraError, ModelFileError, SettingsError
from edgelora.serve.problems import ApiError, unknown_model
from edgelora.serve.process import EngineDiedError, EngineDownError, EngineProcess
from edgelora.serve.suspects import Suspects
from edgelora.whole_file import write_whole

log = logging.getLogger("edgelora.serve")

STATE_FILE = ".edgelora-serve.json"
UPLOAD, ABANDONED_SECONDS = ".upload", 86_400
"""How files end that come in, and when one counts as left behind by a server that was killed."""
READY, REFUSED, QUARANTINED = "ready", "refused", "quarantined"
Signature = tuple[int, int, int]
"""Of a file: inode, size and time of change in nanoseconds."""


@dataclass(frozen=True)
class Entry:
    """One adapter by name.

    Attributes:
        generation: grows with every file that takes this name.
        state: "ready"; or "refused" or "quarantined", with the `problem`.
        by_hand: it was loaded by a client, and not found in the folder.
        about: what the engine said of it: content hash, contract, notices.
    """

    name: str
    path: Path
    scale: float = 1.0
    generation: int = 1
    state: str = READY
    problem: str = ""
    by_hand: bool = False
    signature: Signature | None = None
    about: Mapping[str, Any] = field(default_factory=dict)


class Registry:
    """The adapters of one server. Lives on its event loop; changes follow each other.

    Args:
        given: those of the command line.
        folder: watched; None for none.
    """

    def __init__(self, given: tuple[AdapterRef, ...], folder: Path | None) -> None:
        self._given = {ref.name: ref for ref in given}
        self.folder = None if folder is None else folder.resolve()
        self._entries: dict[str, Entry] = {}
        self._unloaded: set[str] = set()
        self._changing = asyncio.Lock()
        self._suspects = Suspects()
        self._generations: dict[str, int] = {}
        self._held: set[str] = set()  # what the engine's process has under these names
        self.engine: EngineProcess | None = None
        self._by_hand: dict[str, AdapterRef] = self._read_state()

    def __iter__(self) -> Any:
        return iter(sorted(self._entries.values(), key=lambda entry: entry.name))

    def get(self, name: str) -> Entry:
        """An adapter that requests can use.

        Raises:
            ApiError: 404 for an unknown one; 503 for one that is kept out.
        """
        entry = self._entries.get(name)
        if entry is None or entry.state == REFUSED:
            raise unknown_model(name)
        if entry.state == QUARANTINED:
            raise ApiError(503, f"The model {name!r} is out of service", type="server_error", code="quarantined")
        return entry

    async def restore(self) -> None:
        """Load everything that there is to be into an engine that has just started."""
        async with self._changing:
            self._held.clear()
            self._sweep()
            for name, ref in {**self._given, **self._by_hand}.items():
                if name not in self._unloaded and not self._is_out(name):
                    await self._load(ref, by_hand=name in self._by_hand)
            await self._look_around(afresh=True)

    async def watch(self) -> None:
        """Follow the folder, until cancelled."""
        if self.folder is None:
            return
        from watchfiles import awatch

        while True:
            try:
                async for _ in awatch(self.folder, recursive=False, debounce=400, step=50):
                    await self.rescan()
            except OSError as error:  # the folder is gone; it may come back
                log.error("%s cannot be watched: %s", self.folder, error)
            await asyncio.sleep(5)

    async def rescan(self) -> None:
        """Make what is loaded follow the folder."""
        async with self._changing:
            try:
                await self._look_around()
            except (EngineDownError, EngineDiedError):
                return  # the next start looks around as well

    async def load(
        self,
        name: str,
        path: Path,
        scale: float = 1.0,
        if_generation: int | None = None,
        incoming: Path | None = None,
    ) -> Entry:
        """Load or replace by hand.

        Args:
            incoming: a file that takes the place of `path` first, where the generation is the wanted one.

        Raises:
            ApiError: 409 where the generation is another; what the file lacks.
            OSError: the file cannot be moved.
        """
        async with self._changing:
            self.check_generation(name, if_generation)
            if incoming is not None:
                os.replace(incoming, path)
            ref = AdapterRef(name, path, scale)
            entry = await self._load(ref, by_hand=True)
            if entry.state != READY:
                raise ApiError(400, f"{name}: {entry.problem}", param="lora_path", code="adapter_refused")
            self._unloaded.discard(name)
            self._by_hand[name] = ref
            self._write_state()
            return entry

    async def unload(self, name: str, if_generation: int | None = None) -> None:
        """Forget a name; streams that use it go on.

        Raises:
            ApiError: 404 for an unknown one, 409 where the generation is another.
        """
        async with self._changing:
            if name not in self._entries:
                raise unknown_model(name)
            self.check_generation(name, if_generation)
            await self._forget(name)
            self._by_hand.pop(name, None)
            self._unloaded.add(name)
            self._write_state()

    async def check(self, path: Path, base: Path | None) -> None:
        """Whether a file could be loaded; with `base`, also whether its certificate holds on it here.

        Raises:
            ApiError: what is wrong with it.
        """
        assert self.engine is not None
        try:
            await self.engine.call("check", path=str(path))
        except ModelFileError as error:
            problem = error.message.replace(str(path), "the file")
            raise ApiError(400, f"The adapter is refused: {problem}", code="adapter_refused") from None
        if base is not None:
            await _verify(path, base)

    def died(self, suspects: frozenset[str]) -> None:
        """The engine's process died, perhaps for one of these."""
        for name in self._suspects.died(suspects):
            if entry := self._entries.get(name):
                problem = "the engine's process died of it twice; a new file under this name is tried again"
                self._entries[name] = replace(entry, state=QUARANTINED, problem=problem)
                log.error("adapter %s is quarantined: %s", name, problem)

    def inside(self, given: str) -> Path:
        """A path in the folder that a client named.

        Raises:
            ApiError: it leads elsewhere, or there is no folder.
        """
        if self.folder is None:
            raise ApiError(400, "This server was started without --adapter-dir", param="lora_path")
        try:
            path = (self.folder / given).resolve()
        except (OSError, ValueError):
            path = Path("/")
        if not path.is_relative_to(self.folder) or path == self.folder or path.suffix != ".gguf":
            raise ApiError(400, "lora_path has to be a GGUF file in the server's adapter folder", param="lora_path")
        return path

    def check_generation(self, name: str, wanted: int | None) -> None:
        entry = self._entries.get(name)
        found = entry.generation if entry else 0
        if wanted is not None and wanted != found:
            raise ApiError(
                409, f"{name} is at generation {found}, not {wanted}", param="if_generation", code="generation_mismatch"
            )

    def _is_out(self, name: str) -> bool:
        entry = self._entries.get(name)
        return entry is not None and entry.state == QUARANTINED and entry.signature == signature_of(entry.path)

    async def _look_around(self, afresh: bool = False) -> None:
        """Compare the folder with what is loaded."""
        if self.folder is None:
            return
        found = dict[str, Path]()
        for path in sorted(self.folder.glob("*.gguf")):
            try:
                found[check_name(path.stem)] = path
            except SettingsError:
                log.warning("%s is left alone: its name could not be typed in a request", path.name)
        for name, entry in list(self._entries.items()):
            if entry.path.parent == self.folder and not entry.path.exists() and name not in self._given:
                await self._forget(name)
                self._by_hand.pop(name, None)
        for name, path in found.items():
            named = self._entries.get(name)
            if name in self._unloaded or name in self._given or (name in self._by_hand and named is None):
                continue
            ref = AdapterRef(name, path, named.scale if named else 1.0)
            if named is None or (named.signature != signature_of(path) and named.path == path):
                await self._load(ref, by_hand=name in self._by_hand)
            elif afresh and named.path == path and name not in self._by_hand and not self._is_out(name):
                await self._load(ref, by_hand=False)
        for name, entry in list(self._entries.items()):  # of the command line, or loaded under another name
            if name not in found and entry.signature != (now := signature_of(entry.path)) and now is not None:
                await self._load(AdapterRef(name, entry.path, entry.scale), by_hand=entry.by_hand)

    async def _load(self, ref: AdapterRef, *, by_hand: bool) -> Entry:
        """Have the engine load a file; what it says of it."""
        assert self.engine is not None
        signature, known = signature_of(ref.path), self._entries.get(ref.name)
        is_new = known is None or known.signature != signature or known.path != ref.path
        generation = self._generations.get(ref.name, 0) + is_new
        entry = Entry(ref.name, ref.path, ref.scale, generation, READY, "", by_hand, signature)
        try:
            about = await self.engine.call(
                "load", name=ref.name, path=str(ref.path), scale=ref.scale, tried=_tried(known, ref)
            )
        except (EngineDiedError, EngineDownError):
            problem = "the engine died while it read it"
            self._entries.setdefault(ref.name, replace(entry, state=REFUSED, problem=problem))
            raise
        except EdgeloraError as error:
            problem = error.message.replace(str(ref.path), ref.path.name)
            log.warning("adapter %s stays out: %s", ref.name, error.message)
            if known is None or ref.name not in self._held:
                self._entries[ref.name] = replace(entry, state=REFUSED, problem=problem)
            elif not by_hand and is_new and signature is not None:
                # The old content goes on under its name until a file comes that can be used.
                self._entries[ref.name] = replace(known, problem=problem, signature=signature)
            return replace(entry, state=REFUSED, problem=problem)
        self._generations[ref.name] = generation
        self._held.add(ref.name)
        if is_new:
            self._suspects.cleared(ref.name)
        self._entries[ref.name] = entry = replace(entry, about=about)
        log.info("adapter %s, generation %d: %s", ref.name, generation, ref.path.name)
        return entry

    async def _forget(self, name: str) -> None:
        assert self.engine is not None
        entry = self._entries.pop(name)
        self._held.discard(name)
        if entry.state != REFUSED:
            with suppress(SettingsError, EngineDiedError, EngineDownError):  # it is not there any more
                await self.engine.call("unload", name=name)
        log.info("adapter %s is gone", name)

    def _sweep(self) -> None:
        """Free the disk of uploads that nobody goes on with; another server may be at a younger one."""
        for left in self.folder.glob(f".*{UPLOAD}") if self.folder else ():
            with suppress(OSError):
                if time.time() - left.stat().st_mtime > ABANDONED_SECONDS:
                    left.unlink()

    def _read_state(self) -> dict[str, AdapterRef]:
        if self.folder is None:
            return {}
        try:
            state = json.loads((self.folder / STATE_FILE).read_text(encoding="utf-8"))
            loaded = {name: (str(path), float(scale)) for name, (path, scale) in state["loaded"].items()}
            self._unloaded = {str(name) for name in state["unloaded"]}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            log.error("%s cannot be read (%s); adapters loaded by hand are not restored", STATE_FILE, error)
            return {}
        return {name: AdapterRef(name, self.folder / path, scale) for name, (path, scale) in loaded.items()}

    def _write_state(self) -> None:
        if self.folder is None:
            return
        loaded = {
            name: [str(ref.path.relative_to(self.folder)), ref.scale]
            for name, ref in self._by_hand.items()
            if ref.path.is_relative_to(self.folder)
        }
        text = json.dumps({"loaded": loaded, "unloaded": sorted(self._unloaded)}, indent=2)
        try:
            write_whole(self.folder / STATE_FILE, text + "\n")
        except OSError as error:
            log.error("%s cannot be written (%s); this change does not outlive the server", STATE_FILE, error)


def _tried(known: Entry | None, ref: AdapterRef) -> list[str]:
    """The content that this name had at this scale: an engine before this one has computed with it."""
    return [known.about["content_hash"]] if known and known.about and known.scale == ref.scale else []


async def _verify(path: Path, base: Path) -> None:
    """Replay an adapter's certificate on this base, in a process of its own.

    Raises:
        ApiError: it has none, or does not do here what it did where it was trained.
    """
    command = [sys.executable, "-m", "edgelora", "verify", f"uploaded={path}", "--base", str(base), "--json"]
    verify = await asyncio.create_subprocess_exec(*command, stdout=PIPE, stderr=DEVNULL)
    try:
        told, _ = await verify.communicate()
    finally:
        if verify.returncode is None:
            verify.kill()
    try:
        report = json.loads(told)
        failed, is_certified = report["failed"], bool(report["recorded"])
    except (ValueError, KeyError, TypeError):
        failed, is_certified = ["it could not be replayed"], True
    if not is_certified:
        raise ApiError(400, "The adapter carries no certificate that could be replayed", code="not_certified")
    if failed or verify.returncode != 0:
        raise ApiError(400, f"The adapter's certificate does not hold here: {', '.join(failed)}", code="not_verified")


def signature_of(path: Path) -> Signature | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns
