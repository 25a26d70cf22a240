"""Models and adapters of the Hugging Face hub, brought into huggingface_hub's own cache: what is needed and no more.

`fetch("Qwen/Qwen3-0.6B")` gives the folder that `fetch("./qwen3")` would give for a copy on disk. Copies of the weights
in other formats, pictures and code stay on the hub; pickles are refused. What other programs downloaded is used, and
they use what is downloaded here. Endpoint, cache and token are huggingface_hub's: HF_ENDPOINT, HF_HOME, HF_TOKEN or
`hf auth login`.

API: https://huggingface.co/docs/huggingface_hub/guides/download, and `HfApi.model_info` for the listing.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from converters.errors import (
    ConversionError,
    DownloadError,
    FormatError,
    UnsupportedError,
    listed,
)
from converters.hub_cache import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    TOKENIZERS,
    cached_snapshot,
    is_adapter,
    missing_from,
    shards_named_by,
)
from converters.hub_problems import no_hub, translated, without_network
from converters.hub_reference import HubReference, hub_reference, is_hub_id
from converters.hub_transfer import CONNECTIONS, HubFile, Progress, Transfer

__all__ = ["Kind", "fetch", "fetch_adapter", "fetch_model", "is_hub_id"]

Notice = Callable[[str], None]


class Kind(Enum):
    """What a repository holds, and what a caller wants of it; the value is how messages call it."""

    MODEL = "a model"
    ADAPTER = "an adapter"


SIDE_FILES = (
    "README.md",  # the model card: name, license, base
    *TOKENIZERS,
    "tokenizer_config.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
)
FILES: Mapping[Kind, tuple[str, ...]] = {
    Kind.MODEL: ("config.json", "generation_config.json", *SIDE_FILES),
    Kind.ADAPTER: (ADAPTER_CONFIG, "edgelora.json", *SIDE_FILES),
}


def fetch(
    source: str, *, revision: str | None = None, progress: Progress | None = None, notice: Notice | None = None
) -> Path:
    """The folder of a model or an adapter, whichever `source` holds; downloaded where it is on the hub.

    Args:
        source: a path that exists, which is given back; or `owner/name`, with the forms that `hub_reference` draws.
        revision: a branch, tag or commit on the hub.
        progress: called with bytes there, bytes in all, and the name of the file.
        notice: called with a sentence where the cache stands in for a hub that cannot be asked.

    Raises:
        MissingFileError: no such path, and not a hub id; the message has both readings.
        DownloadError: the hub cannot be reached or refuses, and the cache does not have it all.
        UnsupportedError: weights only as pickles or GGUF, or a revision of something that has none.
        FormatError: neither a model nor an adapter, or an index that does not fit its repository.
        DiskFullError, WriteError: the cache cannot hold it.
    """
    return _fetch(source, revision, None, progress, notice)


def fetch_model(
    source: str, *, revision: str | None = None, progress: Progress | None = None, notice: Notice | None = None
) -> Path:
    """`fetch`, where a base is wanted: an adapter is an error."""
    return _fetch(source, revision, Kind.MODEL, progress, notice)


def fetch_adapter(
    source: str, *, revision: str | None = None, progress: Progress | None = None, notice: Notice | None = None
) -> Path:
    """`fetch`, where an adapter is wanted: a model is an error."""
    return _fetch(source, revision, Kind.ADAPTER, progress, notice)


def _fetch(
    source: str, revision: str | None, wanted: Kind | None, progress: Progress | None, notice: Notice | None
) -> Path:
    if os.path.exists(local := os.path.expanduser(source)):
        if revision:
            hint = f"For the hub's, write hf:{source}." if is_hub_id(f"hf:{source}") else "Leave the revision out."
            raise UnsupportedError(f"{source}: is here, and has no revision {revision}", hint=hint)
        return Path(local)
    reference = hub_reference(source, revision)
    if _is_offline():
        offline = DownloadError(
            f"{reference}: not looked up, as HF_HUB_OFFLINE is set", hint=without_network(reference)
        )
        return _from_cache(reference, wanted, offline)
    try:
        listing = _listing(reference)
    except DownloadError as problem:
        folder = _from_cache(reference, wanted, problem)
        if notice is not None:
            notice(f"{problem.message}; using the copy that was downloaded before ({folder})")
        return folder
    return _download(listing, wanted, progress)


def _is_offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _from_cache(reference: HubReference, wanted: Kind | None, problem: DownloadError) -> Path:
    """What was downloaded before, if it is complete; else `problem`, with what is missing."""
    with translated(reference):
        folder = cached_snapshot(reference.repository, reference.revision)
        missing = missing_from(folder) if folder is not None else []
    if folder is None:
        raise DownloadError(f"{problem.message}; nor is it in the cache", hint=problem.hint)
    if missing:
        raise DownloadError(
            f"{problem.message}; in the cache it is incomplete, without {', '.join(missing)}", hint=problem.hint
        )
    found = Kind.ADAPTER if is_adapter(set(os.listdir(folder))) else Kind.MODEL
    _check_kind(str(reference), found, wanted)
    return folder


def _check_kind(name: str, found: Kind, wanted: Kind | None) -> None:
    if wanted is not None and wanted is not found:
        raise FormatError(f"{name}: {found.value}, and {wanted.value} is wanted here")


@dataclass(frozen=True)
class Listing:
    """What the hub says a repository holds: `commit` is what the revision stands at, `files` are by name."""

    reference: HubReference
    commit: str
    files: Mapping[str, HubFile]

    @property
    def names(self) -> set[str]:
        return set(self.files)

    @property
    def kind(self) -> Kind:
        return Kind.ADAPTER if is_adapter(self.names) else Kind.MODEL


def _listing(reference: HubReference) -> Listing:
    from huggingface_hub import HfApi, constants

    with translated(reference):
        try:
            info = HfApi().model_info(
                reference.repository,
                revision=reference.revision,
                files_metadata=True,
                timeout=constants.HF_HUB_ETAG_TIMEOUT,
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, OSError):  # a status of 400 is both
                raise
            raise no_hub(reference) from None
    files = [_hub_file(sibling) for sibling in info.siblings or ()]
    listing = Listing(reference, str(info.sha), {file.name: file for file in files if file.is_valid})
    if not _COMMIT.fullmatch(listing.commit) or (files and not listing.files):
        raise no_hub(reference)
    return listing


_COMMIT = re.compile(r"[0-9a-f]{40}")


def _hub_file(sibling: Any) -> HubFile:
    digest = sibling.lfs.sha256 if sibling.lfs else sibling.blob_id
    return HubFile(str(sibling.rfilename), -1 if sibling.size is None else int(sibling.size), str(digest))


def _download(listing: Listing, wanted: Kind | None, progress: Progress | None) -> Path:
    _check_kind(str(listing.reference), listing.kind, wanted)
    with translated(listing.reference):
        files = _needed(listing)
        Transfer(listing.reference.repository, listing.commit, progress).fetch(files)
        return _linked(listing, files)


def _needed(listing: Listing) -> list[HubFile]:
    weights = _adapter_weights(listing) if listing.kind is Kind.ADAPTER else _model_weights(listing)
    patterns = FILES[listing.kind]
    names = [name for name in listing.files if any(fnmatchcase(name, pattern) for pattern in patterns)]
    return [listing.files[name] for name in dict.fromkeys([*names, *weights])]


def _adapter_weights(listing: Listing) -> list[str]:
    if ADAPTER_WEIGHTS not in listing.files:
        raise _no_weights(listing, ADAPTER_WEIGHTS)
    return [ADAPTER_WEIGHTS]


def _model_weights(listing: Listing) -> list[str]:
    from converters.checkpoint import INDEX, WEIGHTS

    if INDEX not in listing.files and WEIGHTS not in listing.files:
        raise _no_weights(listing, WEIGHTS)
    if "config.json" not in listing.files:
        raise FormatError(f"{listing.reference}: neither a model (no config.json) nor an adapter (no {ADAPTER_CONFIG})")
    if INDEX not in listing.files:
        return [WEIGHTS]
    transfer = Transfer(listing.reference.repository, listing.commit)
    transfer.fetch([listing.files[INDEX]])
    shards = shards_named_by(transfer.path(listing.files[INDEX]))
    if absent := [shard for shard in shards if shard not in listing.files]:
        raise FormatError(
            f"{listing.reference}: {INDEX} names files that are not there:{listed(absent)}",
            hint="The upload may not be finished; an earlier commit may be whole: owner/name@COMMIT.",
        )
    return [INDEX, *shards]


# What stands in place of weights that can be read, by the ends of names: what it is called, and what to do.
_OTHER_WEIGHTS: tuple[tuple[tuple[str, ...], str, str], ...] = (
    (
        (".bin", ".pt", ".pth", ".ckpt", ".pkl"),
        "only pickles, which can run code when they are opened, and are not downloaded",
        "Look for a safetensors copy. https://huggingface.co/spaces/safetensors/convert makes one, as a pull request "
        "that can be named: {repository}@refs/pr/NUMBER.",
    ),
    (
        (".gguf",),
        "GGUF files, which are converted already",
        "Download the one you want and give its path: hf download {repository} FILE --local-dir .",
    ),
    (("",), "no weights that can be read", "Look for the same model with a model.safetensors."),
)


def _no_weights(listing: Listing, wanted: str) -> ConversionError:
    repository, names = listing.reference.repository, sorted(listing.names - {"training_args.bin"})
    ends, what, hint = next(row for row in _OTHER_WEIGHTS if row[0] == ("",) or any(n.endswith(row[0]) for n in names))
    found = [name for name in names if name.endswith(ends)]
    return UnsupportedError(
        f"{listing.reference}: no {wanted}, {what}:{listed(found)}", hint=hint.format(repository=repository)
    )


def _linked(listing: Listing, files: Sequence[HubFile]) -> Path:
    """The snapshot folder, made by huggingface_hub out of contents that are all there."""
    from huggingface_hub import snapshot_download

    folder = Path(
        snapshot_download(
            listing.reference.repository,
            revision=listing.reference.revision,
            allow_patterns=[glob.escape(file.name) for file in files],
            max_workers=CONNECTIONS,
            tqdm_class=_no_bar(),
        )
    )
    if folder.name != listing.commit:
        raise DownloadError(f"{listing.reference}: changed on the hub meanwhile", hint="Run it again.")
    return folder


def _no_bar() -> type[Any]:
    from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]

    class NoBar(tqdm):
        def __init__(self, *args: Any, **settings: Any) -> None:
            super().__init__(*args, **{**settings, "disable": True})  # type: ignore[no-untyped-call]

    return NoBar
