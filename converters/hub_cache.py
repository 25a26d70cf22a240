"""huggingface_hub's cache: where a repository's files lie, and whether they are all there.

~/.cache/huggingface/hub/models--Qwen--Qwen3-0.6B/
  refs/main                 the commit a branch or tag stood at when it was downloaded
  snapshots/<commit>/       the files by their names, as links into blobs/
  blobs/<digest>            the contents; `<digest>.incomplete` while a download is under way
"""

from __future__ import annotations

import re
from pathlib import Path

_SNAPSHOT = re.compile(r"models--(?:([^/]+?)--)?([^/]+)/snapshots/[^/]+/?$")
_MODEL_WEIGHTS = re.compile(r"model[^/]*\.safetensors|pytorch_model[^/]*\.bin")
_COMMIT_START = re.compile(r"[0-9a-f]{7,40}")
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")


def repository_of(folder: Path) -> str:
    """`owner/name` (or `name`, for the hub's first models) of a snapshot folder; empty for any other folder."""
    snapshot = _SNAPSHOT.search(folder.as_posix())
    return "/".join(part for part in snapshot.groups() if part) if snapshot else ""


def repository_folder(repository: str) -> Path:
    """Where the cache keeps `owner/name`, whether or not it is there; follows HF_HOME and HF_HUB_CACHE."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).expanduser() / "--".join(["models", *repository.split("/")])


def cached_snapshot(repository: str, revision: str) -> Path | None:
    """The folder of a branch, tag or commit (also abbreviated) as it was last downloaded; perhaps incomplete."""
    folder = repository_folder(repository)
    reference = folder / "refs" / revision
    commit = reference.read_text(encoding="utf-8").strip() if reference.is_file() else revision
    snapshot = folder / "snapshots" / commit
    if snapshot.is_dir():
        return snapshot
    if _COMMIT_START.fullmatch(commit):
        matches = list((folder / "snapshots").glob(f"{commit}*"))
        return matches[0] if len(matches) == 1 else None
    return None


def is_adapter(names: set[str]) -> bool:
    """Whether a repository's file names are those of an adapter: its configuration, and no weights of a model."""
    return ADAPTER_CONFIG in names and not any(_MODEL_WEIGHTS.fullmatch(name) for name in names)


def missing_from(folder: Path) -> list[str]:
    """What a downloaded model or adapter lacks to be used; empty where it is complete.

    Raises:
        FormatError: the index of the weights is broken.
    """
    names = {path.name for path in folder.iterdir() if path.exists()}  # a link whose blob was deleted is no file
    needed = [ADAPTER_WEIGHTS] if is_adapter(names) else ["config.json", *_shards_of(folder)]
    missing = [name for name in needed if not (folder / name).exists()]
    if is_adapter(names) or names & set(TOKENIZERS):
        return missing
    return [*missing, TOKENIZERS[0]]


def _shards_of(folder: Path) -> list[str]:
    from converters.checkpoint import INDEX, WEIGHTS

    return shards_named_by(folder / INDEX) if (folder / INDEX).is_file() else [WEIGHTS]


def shards_named_by(index: Path) -> list[str]:
    """The files that `model.safetensors.index.json` names.

    Raises:
        FormatError: not JSON, or no `weight_map` of tensor names to file names.
    """
    from converters.checkpoint import read_json
    from converters.errors import FormatError

    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise FormatError(f"{index}: no weight_map of tensor names to file names")
    return sorted(set(names.values()))
