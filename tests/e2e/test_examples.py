"""The examples run as their docstrings say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT


def test_python_engine(tiny_q8: Path, adapter: Path) -> None:
    command = [sys.executable, str(ROOT / "examples" / "python_engine.py"), str(tiny_q8), f"mine={adapter}"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    sections = result.stdout.split("-- ")[1:]
    assert len(sections) == 4
    whole, streamed = sections[0].splitlines()[1], sections[1].split("\n", 1)[1].strip()
    assert whole.startswith(f"mine: {streamed.splitlines()[0]}")
    assert sections[3].startswith("one question")
    assert "\nnone: " in sections[3]
    assert "\nmine: " in sections[3]


def test_python_engine_without_arguments_says_how() -> None:
    command = [sys.executable, str(ROOT / "examples" / "python_engine.py")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    assert "python examples/python_engine.py" in result.stderr


def test_the_demo_data_is_what_its_script_makes(tmp_path: Path) -> None:
    """`make_data.py` is deterministic: running a copy of it beside a copy of its inputs gives the committed files."""
    import shutil

    folder = Path(shutil.copytree(ROOT / "examples" / "data", tmp_path / "examples" / "data"))
    words = tmp_path / "examples" / "tiny-base"
    words.mkdir()
    for name in ("words.py", "words.txt"):
        shutil.copy(ROOT / "examples" / "tiny-base" / name, words)
    made = sorted(path.name for suffix in (".jsonl", ".csv") for path in folder.glob(f"*{suffix}"))
    for name in made:
        (folder / name).unlink()
    result = subprocess.run([sys.executable, str(folder / "make_data.py")], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert len(made) == 6
    for name in made:
        assert (folder / name).read_bytes() == (ROOT / "examples" / "data" / name).read_bytes()
