"""Bases and adapters that other programs keep on this machine. Read-only: nothing is written there, and nothing that
lies outside of their folders is opened, wherever a link leads.

    Hugging Face cache   hub/models--owner--name/snapshots/<commit>/     GGUF files, model folders, adapter folders
    LM Studio            ~/.lmstudio/models/publisher/repository/*.gguf
    Ollama               ~/.ollama/models/manifests/<host>/<namespace>/<model>/<tag>    JSON, which names layers in
                         ~/.ollama/models/blobs/sha256-<digest>                         GGUF, without the ending

`EDGELORA_DISCOVERY=0` turns it off.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from converters.hub_cache import ADAPTER_CONFIG
from converters.split import part_name

VARIABLE = "EDGELORA_DISCOVERY"
MAX_DEPTH = 8
MAX_LOOKED = 50_000  # names in folders, for one walk
MAX_MANIFEST_BYTES = 1 << 20
OLLAMA_SERVICE = Path("/usr/share/ollama/.ollama/models")  # where its Linux service keeps models
_OLLAMA_LAYERS = ("application/vnd.ollama.image.model", "application/vnd.ollama.image.adapter")
_DIGEST = re.compile(r"sha256[:-]([0-9a-f]{64})")
Notice = Callable[[str], None]


@dataclass(frozen=True)
class Found:
    """A file or folder that may be a base or an adapter; `name` where it is not to be seen from the path."""

    path: Path
    name: str = ""


@dataclass
class Walk:
    """One walk through a folder's GGUF files, model folders and adapter folders.

    Attributes:
        within: links that lead out of this folder are not followed; None follows links to files.
        notice: told of what could not be looked at.
        looked: names seen so far, at most `MAX_LOOKED`.
    """

    within: Path | None
    notice: Notice
    looked: int = field(default=0)

    def models_in(self, folder: Path, depth: int = MAX_DEPTH) -> Iterator[Path]:
        """`folder` itself if it is a model or adapter, and those below it, in the order of their names."""
        entries = self.entries(folder)
        names = {entry.name for entry in entries}
        is_adapter = ADAPTER_CONFIG in names
        if is_adapter or ("config.json" in names and any(name.endswith(".safetensors") for name in names)):
            if all(self._stays(Path(entry)) for entry in entries if entry.is_symlink()):
                yield folder
            else:
                self.notice(f"{folder}: holds links that lead out of {self.within}")
        yield from self._files(entries)
        for entry in entries:
            is_hidden = entry.name.startswith(".") or (is_adapter and entry.name.startswith("checkpoint-"))
            if entry.is_dir(follow_symlinks=False) and not is_hidden:
                if depth == 0:
                    self.notice(f"{entry.path}: lies more than {MAX_DEPTH} folders deep, and was not looked at")
                else:
                    yield from self.models_in(Path(entry), depth - 1)

    def _files(self, entries: list[os.DirEntry[str]]) -> Iterator[Path]:
        for path in map(Path, entries):
            named = part_name(path)
            is_later_part = named is not None and named.number > 1
            if path.suffix != ".gguf" or is_later_part or not path.is_file():
                continue
            if self._stays(path):
                yield path
            else:
                self.notice(f"{path}: is a link that leads out of {self.within}")

    def entries(self, folder: Path) -> list[os.DirEntry[str]]:
        """What is in a folder, by name; nothing once the walk has seen its share."""
        if self.looked >= MAX_LOOKED:
            return []
        try:
            with os.scandir(folder) as scan:
                entries = sorted(scan, key=lambda entry: entry.name)
        except OSError as error:
            self.notice(f"{folder}: cannot be read ({error.strerror or error})")
            return []
        self.looked += len(entries)
        if self.looked >= MAX_LOOKED:
            self.notice(f"{folder}: the search ended here, after {MAX_LOOKED:,} names")
        return entries

    def _stays(self, path: Path) -> bool:
        return self.within is None or path.resolve().is_relative_to(self.within)


@dataclass(frozen=True)
class Source:
    """A program whose models are found: its name, its place in a sentence, where that is, and how models lie there."""

    origin: str
    place: str
    roots: Callable[[], list[Path]]
    find: Callable[[Path, Notice], Iterator[Found]]

    def found(self, notice: Notice) -> Iterator[Found]:
        """Everything in its folders that are there; nothing where discovery is turned off."""
        for root in self.folders():
            yield from self.find(root.resolve(), notice)

    def folders(self) -> list[Path]:
        if os.environ.get(VARIABLE) == "0":
            return []
        return [root for root in self.roots() if root.is_dir()]


def _hub_roots() -> list[Path]:
    from huggingface_hub import constants

    return [Path(constants.HF_HUB_CACHE).expanduser()]


def _in_hub(root: Path, notice: Notice) -> Iterator[Found]:
    walk = Walk(root, notice)
    for snapshot in sorted(root.glob("models--*/snapshots/*")):
        if snapshot.is_dir() and not snapshot.is_symlink():
            yield from map(Found, walk.models_in(snapshot))


def _lm_studio_roots() -> list[Path]:
    """Its models folder: the one chosen in its settings, else `models` in its home, which a file may point to."""
    pointer = _first_line(Path.home() / ".lmstudio-home-pointer")
    homes = [Path(pointer)] if pointer else []
    homes += [Path.home() / ".lmstudio", Path.home() / ".cache" / "lm-studio"]
    roots = [Path(chosen) if (chosen := _chosen_folder(home)) else home / "models" for home in homes]
    return list(dict.fromkeys(roots))


def _chosen_folder(home: Path) -> str:
    settings = _read_manifest(home / "settings.json")
    chosen = settings.get("downloadsFolder") if isinstance(settings, dict) else None
    return chosen if isinstance(chosen, str) and Path(chosen).is_absolute() else ""


def _in_lm_studio(root: Path, notice: Notice) -> Iterator[Found]:
    yield from map(Found, Walk(root, notice).models_in(root))


def _ollama_roots() -> list[Path]:
    if chosen := os.environ.get("OLLAMA_MODELS"):
        return [Path(chosen).expanduser()]
    return [Path.home() / ".ollama" / "models", OLLAMA_SERVICE]


def _in_ollama(root: Path, notice: Notice) -> Iterator[Found]:
    for folder in sorted(path for path in root.glob("manifest*") if not path.is_symlink()):
        for path in _manifests(folder, Walk(root, notice)):
            manifest = _read_manifest(path) if path.resolve().is_relative_to(root) else None
            if manifest is None:
                notice(f"{path}: not a manifest of Ollama's")
            else:
                yield from _blobs(root, manifest, _ollama_name(path.relative_to(folder)), notice)


def _manifests(folder: Path, walk: Walk, depth: int = 4) -> Iterator[Path]:
    for entry in walk.entries(folder):
        if entry.is_dir(follow_symlinks=False) and depth:
            yield from _manifests(Path(entry), walk, depth - 1)
        elif entry.is_file() and not entry.name.startswith("."):
            yield Path(entry)


def _blobs(root: Path, manifest: Any, name: str, notice: Notice) -> Iterator[Found]:
    layers = manifest.get("layers") if isinstance(manifest, dict) else None
    for layer in layers if isinstance(layers, list) else []:
        values = layer if isinstance(layer, dict) else {}
        digest = _DIGEST.fullmatch(str(values.get("digest")))
        if values.get("mediaType") in _OLLAMA_LAYERS and digest:
            blob = root / "blobs" / f"sha256-{digest[1]}"
            if blob.is_file() and blob.resolve().is_relative_to(root):
                yield Found(blob, name)
            else:
                notice(f"{name}: {blob} is not there")


def _ollama_name(path: Path) -> str:
    """`llama3.2:1b`, or with its namespace where that is not Ollama's own library."""
    *before, model, tag = path.parts if len(path.parts) > 1 else (path.name, "latest")
    namespace = "" if not before or before[-1] == "library" else f"{before[-1]}/"
    return f"{namespace}{model}:{tag}"


def _read_manifest(path: Path) -> Any:
    """JSON, or None for what is none, is not there or too large."""
    try:
        with open(path, "rb") as file:
            text = file.read(MAX_MANIFEST_BYTES + 1)
        return json.loads(text) if len(text) <= MAX_MANIFEST_BYTES else None
    except (OSError, ValueError, RecursionError):
        return None


def _first_line(path: Path) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            return file.readline(4096).strip()
    except (OSError, UnicodeDecodeError):
        return ""


SOURCES = (
    Source("Hugging Face cache", "the Hugging Face cache", _hub_roots, _in_hub),
    Source("LM Studio", "LM Studio's models", _lm_studio_roots, _in_lm_studio),
    Source("Ollama", "Ollama's models", _ollama_roots, _in_ollama),
)
