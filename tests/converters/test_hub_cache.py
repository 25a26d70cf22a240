"""Snapshot folders of the hub's cache are called by their repository, not by their revision."""

from __future__ import annotations

from pathlib import Path

import pytest

from converters.hub_cache import repository_of


@pytest.mark.parametrize(
    ("folder", "repository"),
    [
        ("/c/hub/models--Qwen--Qwen3-0.6B/snapshots/0123abc", "Qwen/Qwen3-0.6B"),
        ("/c/hub/models--gpt2/snapshots/0123abc", "gpt2"),
        ("/c/hub/models--a--b--c/snapshots/0123abc", "a/b--c"),
        ("/c/hub/models--gpt2/blobs/0123abc", ""),
        ("/home/me/my-model", ""),
    ],
)
def test_repository_of(folder: str, repository: str) -> None:
    assert repository_of(Path(folder)) == repository
