"""What every test shares: no network, a store of its own, and where the data lives."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported anywhere
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ROOT = Path(__file__).parents[1]
TINY_BASE = ROOT / "examples" / "tiny-base" / "fennick-2.6m"
SHARED = ROOT.parent / "shared" / "data"


@pytest.fixture(autouse=True)
def own_store(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store for this test alone; nothing is read from or written to the user's."""
    folder = tmp_path_factory.mktemp("store")
    monkeypatch.setenv("EDGELORA_HOME", str(folder))
    monkeypatch.delenv("EDGELORA_BASE", raising=False)
    monkeypatch.setenv("EDGELORA_DISCOVERY", "0")  # nor from the models that other programs have on this machine
    return folder


def pytest_runtest_setup(item: pytest.Item) -> None:
    missing = [name for name in ("torch", "transformers", "peft", "trl") if find_spec(name) is None]
    if item.get_closest_marker("train") and missing:
        pytest.skip(f"needs the extra `train` ({', '.join(missing)} not installed)")
    if item.get_closest_marker("gpu") and not _has_cuda(missing):
        pytest.skip("needs a CUDA device")


def _has_cuda(missing: list[str]) -> bool:
    if missing:
        return False
    import torch

    return torch.cuda.is_available()
