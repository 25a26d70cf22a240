"""What each layer may import, in fresh interpreters: a laptop has no torch, and `--help` loads nothing heavy."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXTRAS = ("torch", "transformers", "peft", "trl", "datasets", "accelerate", "safetensors", "fastapi", "uvicorn")
HEAVY = ("numpy", "gguf", "llama_cpp", "tokenizers", "huggingface_hub", "rich", "jinja2", "psutil", "sqlite3", *EXTRAS)
MAX_TIMES_CLICK = 2.0
"""`edgelora --help` against `import click`. Click takes 42 ms on the reference machine and 70 on a slow one, so this
keeps help under 150 ms; one stray numpy (+80 ms) or gguf (+130 ms) breaks it."""

WITHOUT_EXTRAS = f"""
import sys
class Without:
    def __init__(self, finder): self.finder = finder
    def __getattr__(self, name): return getattr(self.finder, name)
    def find_spec(self, name, *rest):
        return None if name.partition(".")[0] in {EXTRAS!r} else self.finder.find_spec(name, *rest)
sys.meta_path[:] = map(Without, sys.meta_path)
"""


def modules(*packages: str) -> list[str]:
    paths = (path for package in packages for path in (ROOT / package).rglob("*.py"))
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in paths}
    return sorted(names - {"edgelora.__main__"})


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)


def loaded_after(code: str) -> set[str]:
    result = python(f"import sys\n{code}\nprint(*{{name.partition('.')[0] for name in sys.modules}})")
    assert result.returncode == 0, result.stderr
    return set(result.stdout.split())


def test_everything_but_train_and_serve_imports_without_the_extras() -> None:
    names = [n for n in modules("edgelora", "converters") if not n.startswith(("edgelora.train.", "edgelora.serve."))]
    assert len(names) > 30
    code = WITHOUT_EXTRAS + f"import importlib\nfor name in {names!r}: importlib.import_module(name)"
    result = python(code)
    assert result.returncode == 0, result.stderr


def test_without_the_extras_they_really_are_away() -> None:
    result = python(WITHOUT_EXTRAS + "import torch")
    assert "No module named 'torch'" in result.stderr


@pytest.mark.parametrize("code", ["import edgelora", "import edgelora.cli"])
def test_light_imports(code: str) -> None:
    assert not loaded_after(code) & set(HEAVY)


def test_only_the_engine_imports_llama_cpp() -> None:
    importers = [
        p
        for p in (ROOT / "edgelora").rglob("*.py")
        if "import llama_cpp" in p.read_text() or "from llama_cpp" in p.read_text()
    ]
    assert {p.parent.name for p in importers} == {"engine"}
    assert "llama_cpp" in loaded_after("from edgelora.engine.native import llama; llama()")


def test_converters_never_import_edgelora() -> None:
    names = modules("converters")
    loaded = loaded_after(f"import importlib\nfor name in {names!r}: importlib.import_module(name)")
    assert not loaded & {"edgelora", "llama_cpp", "click", "rich", *EXTRAS}


def cpu_seconds(*command: str, compiled: Path) -> float:
    """User and system time of one run: what it costs, not what else the machine is doing.

    Args:
        compiled: keeps Python's compiled modules from run to run, as for anybody who runs a program twice.
    """
    own = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=60, env={**own, "PYTHONPYCACHEPREFIX": str(compiled)}
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert result.returncode == 0, result.stderr
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_help_starts_quickly(tmp_path: Path) -> None:
    """Compared with Click itself in the same minute, so that a slow or busy machine is not a failure."""
    script = str(Path(sys.executable).with_name("edgelora"))
    commands = ((sys.executable, "-c", "import click"), (script, "--help"))
    runs = [tuple(cpu_seconds(*command, compiled=tmp_path) for command in commands) for _ in range(9)]
    click_alone, help_text = (min(times) for times in zip(*runs, strict=True))
    assert help_text < MAX_TIMES_CLICK * click_alone, f"{help_text:.3f} s, and {click_alone:.3f} s for click alone"


def test_public_names_resolve() -> None:
    import edgelora

    assert all(getattr(edgelora, name) is not None for name in edgelora.__all__)
    assert set(edgelora._HOMES) | {"__version__"} == set(edgelora.__all__)


def test_missing_extra_names_the_command_that_installs_it(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    argv = ["train", str(data), "--base", str(tmp_path), "-o", str(tmp_path / "out")]
    result = python(WITHOUT_EXTRAS + f"from edgelora.cli import cli; cli({argv!r}, prog_name='edgelora')")
    assert result.returncode == 5
    assert "edgelora[train]" in result.stderr
