"""How people name a model of the Hugging Face hub, and how that is told from a path.

    Qwen/Qwen3-0.6B                                          owner/name
    Qwen/Qwen3-0.6B@v1.0                                     a branch, tag or commit of it
    hf:Qwen/Qwen3-0.6B, hf://gpt2                            surely the hub, whatever else is called so here
    https://huggingface.co/Qwen/Qwen3-0.6B/tree/main         what the browser shows

A path that exists is always the path. What could be a path that is mistyped is not looked up on the hub: it would be
a stranger's model under a name nobody meant.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from converters.errors import ConversionError, MissingFileError, UnsupportedError

DEFAULT_REVISION = "main"
HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co")
PREFIXES = ("hf://", "hf:")
OTHER_KINDS = ("datasets", "spaces", "kernels", "buckets")
FILE_SUFFIXES = (
    *(".gguf", ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".dat", ".imatrix"),
    *(".json", ".jsonl", ".csv", ".txt", ".md", ".toml", ".yaml", ".zip", ".tar", ".gz"),
)
_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?"
_REPOSITORY = re.compile(rf"(?:{_PART}/)?{_PART}")
_REVISION = re.compile(r"(?!.*\.\.)[A-Za-z0-9][A-Za-z0-9._/+=-]{0,254}")


@dataclass(frozen=True)
class HubReference:
    """A model on the hub.

    Attributes:
        repository: `owner/name` (or `name`, for the hub's first models).
        revision: a branch, a tag, or a commit (also abbreviated).
    """

    repository: str
    revision: str = DEFAULT_REVISION

    def __str__(self) -> str:
        return self.repository if self.revision == DEFAULT_REVISION else f"{self.repository}@{self.revision}"


def is_hub_id(text: str) -> bool:
    """Whether `text` names a model of the hub; never for a path that exists, or for what looks like one."""
    try:
        hub_reference(text)
    except ConversionError:
        return False
    return True


def hub_reference(text: str, revision: str | None = None) -> HubReference:
    """What `text` names on the hub.

    Args:
        text: any of the forms above.
        revision: a branch, tag or commit, where `text` does not name one itself.

    Raises:
        MissingFileError: a path; the message says why it was not read as a hub id.
        UnsupportedError: an address of something that is not a model, or a revision that cannot be one.
    """
    repository, named = _address(text) if _is_url(text) else _short(text)
    if named and revision and named != revision:
        raise UnsupportedError(
            f"{text}: names revision {named}; {revision} was asked for too", hint="Give one of them."
        )
    chosen = named or revision or DEFAULT_REVISION
    if not _REVISION.fullmatch(chosen):
        raise UnsupportedError(
            f"{text}: {chosen!r} cannot be a revision", hint="Give a branch, a tag or a commit: owner/name@v1.0."
        )
    return HubReference(repository, chosen)


def _is_url(text: str) -> bool:
    return text.startswith(("https://", "http://", *(f"{host}/" for host in HOSTS)))


def _short(text: str) -> tuple[str, str]:
    prefix = next((prefix for prefix in PREFIXES if text.startswith(prefix)), "")
    repository, _, revision = text.removeprefix(prefix).partition("@")
    if _exists(text):
        raise MissingFileError(f"{text}: is here, and not looked up on the Hugging Face hub")
    if prefix and not _valid(repository):
        raise MissingFileError(
            f"{text}: {repository!r} cannot be a hub id", hint="A hub id is owner/name, such as hf:Qwen/Qwen3-0.6B."
        )
    if not prefix and (reason := _why_a_path(repository)):
        surely = f"write hf:{repository}" if _valid(repository) else "write owner/name, such as Qwen/Qwen3-0.6B"
        raise MissingFileError(
            f"{text}: no such file or folder (and not taken for a Hugging Face hub id: {reason})",
            hint=f"Check the path. For a model of the hub, {surely}.",
        )
    return repository, revision


def _why_a_path(text: str) -> str:
    parent = text.rpartition("/")[0]
    return next((reason.format(parent=parent, text=text) for is_path, reason in _PATHS if is_path(text)), "")


def _valid(repository: str) -> bool:
    return (
        bool(_REPOSITORY.fullmatch(repository))
        and not any(part in repository for part in ("--", ".."))
        and not repository.endswith(".git")
    )


def _exists(text: str) -> bool:
    return os.path.exists(os.path.expanduser(text))


_PATHS: tuple[tuple[Callable[[str], bool], str], ...] = (
    (lambda text: text.startswith((".", "/", "~")) or "\\" in text, "it is written as a path"),
    (lambda text: Path(text).suffix.lower() in FILE_SUFFIXES, "it is called like a file"),
    (lambda text: "/" not in text, "that is owner/name, and {text} has no owner"),
    (lambda text: text.count("/") > 1, "that is owner/name, with one slash"),
    (lambda text: not _valid(text), "that is owner/name of letters, digits, and single - _ . inside"),
    (lambda text: _exists(text.partition("/")[0]), "the folder {parent} is here, without this in it"),
)


def _address(text: str) -> tuple[str, str]:
    """Repository and revision of a web address; the revision is empty where the address has none."""
    try:
        address = urlsplit(text if "://" in text else f"https://{text}")
    except ValueError as error:
        raise MissingFileError(f"{text}: not an address ({error})", hint="Give a hub id: owner/name.") from None
    if (address.hostname or "").lower() not in (*HOSTS, _own_host()):
        raise MissingFileError(
            f"{text}: not an address of the Hugging Face hub ({HOSTS[0]})",
            hint="Download it first and give its path, or give a hub id: owner/name.",
        )
    parts = [unquote(part) for part in address.path.strip("/").split("/")]
    if parts[0] in OTHER_KINDS:
        raise UnsupportedError(f"{text}: one of the hub's {parts[0]}, not a model", hint="Give a model: owner/name.")
    repository, in_revision = "/".join(parts[:2]), parts[2:3] in (["tree"], ["commit"])
    if not _valid(repository):
        raise UnsupportedError(f"{text}: not the address of a model", hint="Give a hub id: owner/name.")
    if len(parts) > (4 if in_revision else 2):
        raise UnsupportedError(
            f"{text}: names something inside a repository; a model is taken as a whole",
            hint=f"Give {repository}, or download the one file and give its path.",
        )
    return repository, "".join(parts[3:4])


def _own_host() -> str:
    """The host of a mirror or a private hub, as huggingface_hub is told it."""
    return (urlsplit(os.environ.get("HF_ENDPOINT", "")).hostname or HOSTS[0]).lower()
