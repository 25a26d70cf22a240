"""llama.cpp's own converter, run in a process of its own: it brings its own `gguf` package.

The source package is unpacked by `make reference` into build/reference; EDGELORA_REFERENCE names another place.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).parent / "reference_worker.py"
SECONDS_EACH = 60


def reference_root() -> Path:
    """The folder with convert_hf_to_gguf.py; skips where it is absent."""
    root = Path(os.environ.get("EDGELORA_REFERENCE") or ROOT / "build" / "reference")
    if not (root / "convert_hf_to_gguf.py").is_file():
        pytest.skip(f"llama.cpp's converter is not in {root}: run `make reference`")
    return root


def convert(
    folders: Mapping[str, Path], out: Path, *, outtype: str = "f32", pre: str = "gpt-2", fused: bool = False
) -> dict[str, Path]:
    """Convert model folders, all in one process.

    Args:
        folders: by a name that the output file gets.
        outtype: as convert_hf_to_gguf.py knows it.
        pre: what it is to take a pre-tokenizer for whose hash it does not know: those of tokenizers trained for a test.
        fused: as its --fuse-qkv, and --fuse-gate-up-exps where the family can have such tensors.

    Returns:
        The GGUF file of each.

    Raises:
        RuntimeError: it failed; the message has what it said, for each.
    """
    root, answer = reference_root(), out / "answer.json"
    job = {
        "root": str(root),
        "outtype": outtype,
        "pre": pre,
        "fused": fused,
        "models": [[name, str(folder), str(out / f"{name}.gguf")] for name, folder in folders.items()],
    }
    done = subprocess.run(
        [sys.executable, str(WORKER), json.dumps(job), str(answer)],
        capture_output=True,
        text=True,
        timeout=60 + SECONDS_EACH * len(folders),
        check=False,
    )
    if not answer.is_file():
        raise RuntimeError(f"llama.cpp's converter ended with {done.returncode}: {done.stderr[-2000:]}")
    failed = {name: why for name, why in json.loads(answer.read_text()).items() if why}
    if failed:
        raise RuntimeError(f"llama.cpp's converter failed: {failed}")
    return {name: out / f"{name}.gguf" for name in folders}
