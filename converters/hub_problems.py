"""What can go wrong between here and the hub, in words that say what to do next.

huggingface_hub's errors, those of the HTTP client under it (httpx) and the disk's become `converters.errors`. One table
says what each answer of the hub means: https://huggingface.co/docs/huggingface_hub/package_reference/utilities#errors
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from converters.errors import ConversionError, DiskFullError, DownloadError, WriteError
from converters.hub_cache import repository_folder
from converters.hub_reference import HubReference

MORE_SPACE = "Make room, or point HF_HOME at a disk with more."
KEPT = "What has arrived is kept: run it again to go on."


@contextmanager
def translated(reference: HubReference) -> Iterator[None]:
    """Errors of huggingface_hub, and of the disk below it, as ours."""
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    try:
        yield
    except (HTTPError, OSError) as error:
        raise _disk_problem(error) or _hub_problem(reference, error) from None


def _disk_problem(error: Exception) -> ConversionError | None:
    number, path = getattr(error, "errno", None), getattr(error, "filename", None)
    if number in (errno.ENOSPC, errno.EDQUOT):
        return DiskFullError(f"{path or 'the Hugging Face cache'}: the disk is full", hint=f"{MORE_SPACE} {KEPT}")
    if path is None:
        return None
    return WriteError(
        f"{path}: cannot be used ({getattr(error, 'strerror', error)})", hint="Point HF_HOME at a folder of yours."
    )


# By the error's class (its nearest first), then by the answer's status; "" is an answer that never came.
_ANSWERS: Mapping[str, tuple[str, str]] = {
    "GatedRepoError": (
        "its owner wants to be asked before it is downloaded",
        "Ask for access on {page}, then log in: hf auth login (or set HF_TOKEN).",
    ),
    "DisabledRepoError": ("the hub has disabled it", "{page} says why."),
    "RevisionNotFoundError": (
        "there is no revision {revision}",
        "{page}/tree/main lists branches and tags; commits are named in full.",
    ),
    "RepositoryNotFoundError": (
        "neither a file or folder here, nor a model that {endpoint} shows you",
        "Check the spelling. A private model needs a login: hf auth login (or set HF_TOKEN).",
    ),
    "401": ("{endpoint} does not take your token", "Log in again: hf auth login. A public model needs no HF_TOKEN."),
    "403": ("{endpoint} refuses ({reason})", "Your token may lack the right to read it: hf auth whoami, and {page}."),
    "404": ("{endpoint} does not have it ({reason})", "Check the spelling, and HF_ENDPOINT where it is set."),
    "4xx": ("{endpoint} refuses ({reason})", "Look at {page}."),
    "429": ("{endpoint} wants fewer requests", "Wait some minutes; after hf auth login more are allowed."),
    "5xx": ("{endpoint} has trouble of its own ({reason})", "Try again later; what has arrived is kept. {without}"),
    "": ("{endpoint} cannot be reached ({reason})", "Check the network; what has arrived is kept. {without}"),
}


def _hub_problem(reference: HubReference, error: BaseException) -> DownloadError:
    from huggingface_hub import constants
    from huggingface_hub.errors import LocalEntryNotFoundError

    while isinstance(error, LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    status = str(getattr(getattr(error, "response", None), "status_code", ""))
    keys = [*(kind.__name__ for kind in type(error).__mro__), status, f"{status[:1]}xx", ""]
    message, hint = next(_ANSWERS[key] for key in keys if key in _ANSWERS)
    fields = {
        "endpoint": endpoint(),
        "page": f"{constants.ENDPOINT}/{reference.repository}",
        "revision": reference.revision,
        "reason": _reason(error),
        "without": without_network(reference),
    }
    return DownloadError(f"{reference}: {message.format(**fields)}", hint=hint.format(**fields))


def _reason(error: BaseException) -> str:
    said = getattr(error, "server_message", None) or str(error) or type(error).__name__
    return str(said).strip().splitlines()[0]


def no_hub(reference: HubReference) -> DownloadError:
    """Something answers, and it is not a hub."""
    return DownloadError(
        f"{reference}: {endpoint()} does not answer as a Hugging Face hub does",
        hint="Check HF_ENDPOINT and the proxy; without HF_ENDPOINT, https://huggingface.co is asked.",
    )


def endpoint() -> str:
    """The hub that is asked, and that it was chosen, where it was."""
    from huggingface_hub import constants

    return f"{constants.ENDPOINT} (HF_ENDPOINT)" if "HF_ENDPOINT" in os.environ else constants.ENDPOINT


def without_network(reference: HubReference) -> str:
    """How to come by a model on a machine without a network."""
    name, folder = reference.repository.rpartition("/")[2], repository_folder(reference.repository)
    return (
        f"Without a network here: on a machine that has one, run `hf download {reference.repository} --revision "
        f"{reference.revision} --local-dir {name}`, copy the folder {name} here and give its path; or copy "
        f"{folder.name} from that machine's Hugging Face cache to {folder}."
    )
