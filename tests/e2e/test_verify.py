"""`edgelora verify` on the real command line: trained here, certified by training, replayed through GGUF."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import TINY_BASE
from tests.edgelora.adapter_damage import scaled, write_damaged

EDGELORA = str(Path(sys.executable).with_name("edgelora"))
RECIPE = "learning-rate = 0.005\nbatch-size = 4\ngradient-accumulation = 1\nmax-steps = 12\ndropout = 0.0\n"


def run(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [EDGELORA, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=cwd, stdin=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a trained adapter, its GGUF, and two bases."""
    folder = tmp_path_factory.mktemp("work")
    rows = [
        {"messages": [{"role": "user", "content": f"Door {n}?"}, {"role": "assistant", "content": "Seven."}]}
        for n in range(12)
    ]
    (folder / "doors.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "recipe.toml").write_text(RECIPE)
    for command in (
        ("train", "doors.jsonl", "--base", TINY_BASE, "-o", "doors", "--config", "recipe.toml"),
        ("convert", TINY_BASE, "--quant", "q8_0", "-o", "base-q8_0.gguf"),
        ("convert", TINY_BASE, "--quant", "q4_k_m", "-o", "base-q4_k_m.gguf"),
        ("convert", "doors"),
    ):
        result = run(*command, cwd=folder)
        assert result.returncode == 0, result.stderr
    return folder


@pytest.mark.train
def test_a_trained_adapter_is_proven(work: Path) -> None:
    result = run("verify", "doors.gguf", "--base", "base-q4_k_m.gguf", cwd=work)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0] == "doors.gguf on base-q4_k_m.gguf (CPU)"
    assert lines[1].startswith("recorded with peft ")
    assert "8 probes" in lines[1]
    assert any(line.startswith("  weights as trained") and line.endswith("ok") for line in lines)
    assert lines[-1].startswith("passed in ")
    assert "\x1b" not in result.stdout
    assert all(line == line.rstrip() for line in lines)


@pytest.mark.train
def test_the_folder_itself_and_the_base_that_is_found(work: Path) -> None:
    result = run("verify", "doors", "--json", cwd=work)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert (report["passed"], report["failed"]) == (True, [])
    assert "found beside the adapter" in result.stderr


@pytest.mark.train
def test_damage_is_exit_code_1(work: Path) -> None:
    damaged = write_damaged(work / "doors.gguf", work / "twice.gguf", scaled(2.0))
    result = run("verify", damaged, "--base", "base-q8_0.gguf", cwd=work)
    assert result.returncode == 1
    assert "FAIL" in result.stdout
    assert "off: model.layers.0.self_attn.q_proj.weight" in result.stdout
    assert result.stdout.splitlines()[-1].startswith("FAILED: weights")
    as_json = run("verify", damaged, "--base", "base-q8_0.gguf", "--json", cwd=work)
    assert as_json.returncode == 1
    assert "weights" in json.loads(as_json.stdout)["failed"]


@pytest.mark.train
def test_a_threshold_is_an_option(work: Path) -> None:
    result = run("verify", "doors.gguf", "--base", "base-q8_0.gguf", "--max-kl", "1e-9", cwd=work)
    assert (result.returncode, result.stdout.splitlines()[-1]) == (1, "FAILED: kl")
    assert run("verify", "doors.gguf", "--base", "base-q8_0.gguf", "--max-kl", "-1", cwd=work).returncode == 2


@pytest.mark.train
def test_no_certificate_where_none_is_asked_for(work: Path, tmp_path: Path) -> None:
    settings = ("--config", work / "recipe.toml", "--max-steps", "1", "--certificate-probes", "0")
    trained = run("train", work / "doors.jsonl", "--base", TINY_BASE, "-o", "plain", *settings, cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    assert "certificate" not in json.loads((tmp_path / "plain" / "edgelora.json").read_text())
    result = run("verify", "plain", "--base", work / "base-q8_0.gguf", cwd=tmp_path)
    assert result.returncode == 0
    assert result.stdout.count("the adapter has no certificate") == 1
    assert "checks could not be made" in result.stdout


def test_another_base_and_what_is_no_adapter(adapter: Path, other_base: Path, tiny_q8: Path, tmp_path: Path) -> None:
    refused = run("verify", adapter, "--base", other_base, cwd=tmp_path)
    assert refused.returncode == 1
    assert "--force replays all the same" in refused.stdout
    forced = run("verify", adapter, "--base", other_base, "--force", cwd=tmp_path)
    assert (forced.returncode, forced.stdout.splitlines()[-1].split(";")[0]) == (1, "FAILED: fingerprint")
    assert run("verify", tiny_q8, "--base", tiny_q8, cwd=tmp_path).returncode == 3
    assert run("verify", tmp_path / "nowhere.gguf", "--base", tiny_q8, cwd=tmp_path).returncode == 3


@pytest.mark.train
def test_a_peft_folder_on_another_base(work: Path, other_base: Path) -> None:
    refused = run("verify", "doors", "--base", other_base, cwd=work)
    assert refused.returncode == 3
    assert "was trained on" in refused.stderr
    forced = run("verify", "doors", "--base", other_base, "--force", "--json", cwd=work)
    assert forced.returncode == 1
    assert json.loads(forced.stdout)["failed"][0] == "fingerprint"


@pytest.mark.train
def test_it_needs_no_torch(work: Path) -> None:
    code = (
        "import sys\n"
        "from edgelora.cli import cli\n"
        "cli(['verify', 'doors.gguf', '--base', 'base-q8_0.gguf'], standalone_mode=False)\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'peft')))"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=work, capture_output=True, text=True, timeout=60, env=environment
    )
    assert result.returncode == 0, result.stderr
