"""Folders in huggingface_hub's cache, which are named after a revision: `models--owner--name/snapshots/<revision>`."""

from __future__ import annotations

import re
from pathlib import Path

_SNAPSHOT = re.compile(r"models--(?:([^/]+?)--)?([^/]+)/snapshots/[^/]+/?$")


def repository_of(folder: Path) -> str:
    """`owner/name` (or `name`, for the hub's first models) of a snapshot folder; empty for any other folder."""
    snapshot = _SNAPSHOT.search(folder.as_posix())
    return "/".join(part for part in snapshot.groups() if part) if snapshot else ""
