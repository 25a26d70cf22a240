"""`show`, `list`, `add` and `remove` on the real command line: one screen, aligned, JSON, exit codes."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from edgelora.cli import cli
from edgelora.contract import Contract
from edgelora.store import Store
from tests.conftest import TINY_BASE
from tests.e2e.test_bad_input import refused
from tests.e2e.test_bad_input import run as run_process
from tests.edgelora.conftest import write_adapter
from tests.peft_folders import write_lora

SCREEN_LINES, SCREEN_COLUMNS = 40, 100


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(cli, [*map(str, arguments)])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def answer(*arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.stderr
    return result.stdout


@pytest.fixture
def shelf(tmp_path: Path, tiny_q8: Path) -> Path:
    """A folder with a base, an adapter that fits it, one that fits another, and a PEFT folder."""
    folder = tmp_path / "shelf"
    folder.mkdir()
    base = Path(shutil.copy(tiny_q8, folder / "tiny-q8_0.gguf"))
    contract = Contract(
        base_name="Fennick",
        base_fingerprint=Store().fingerprint(base),
        chat_template="{{ messages }}\n" * 50,
        stop=("\x1b[31m", "###"),
        sampling={"temperature": 0.0},
        system="Be \x1b]0;kind\x07.\n" * 80,
        training={f"setting_{n}": n for n in range(60)},
        exactness={"kind": "exact", "rounding": 4e-4, "scales": {"attn_q": [2.0]}},
    )
    write_adapter(folder / "support.gguf", base, 1, contract=contract)
    other = contract.with_changes(base_name="big", base_fingerprint="e" * 64)
    write_adapter(folder / "other.gguf", base, 2, contract=other)
    write_lora(folder / "extract", TINY_BASE, seed=3)
    return folder


@pytest.mark.parametrize("name", ["tiny-q8_0.gguf", "support.gguf", "other.gguf", "extract", str(TINY_BASE)])
def test_show_fits_on_a_screen(shelf: Path, name: str) -> None:
    answer("add", shelf)
    lines = answer("show", shelf / name).splitlines()
    assert 8 < len(lines) <= SCREEN_LINES
    assert all(line[:2] == "  " and line[15] == " " != line[16] for line in lines[2:])  # labels, and values beside them


def test_show_says_what_matters(shelf: Path) -> None:
    answer("add", shelf)
    said = answer("show", shelf / "support.gguf")
    for part in ("Fennick", "tiny-q8_0.gguf", "rank 4, scale 2", "exact, rounding 4.0e-04", "temperature 0",
                 f"edgelora chat --adapter {shelf / 'support.gguf'}"):  # fmt: skip
        assert part in said
    assert "no base known here" in answer("show", shelf / "other.gguf")
    assert "support" in answer("show", shelf / "tiny-q8_0.gguf")
    assert f"edgelora convert {shelf / 'extract'}" in answer("show", "extract")


def test_a_file_cannot_steer_the_terminal(shelf: Path) -> None:
    said = answer("show", shelf / "support.gguf")
    assert "\x1b" not in said
    assert "\x07" not in said
    assert "\\x1b" in said
    hostile = Contract(base_name="\x1b[2Jbig\n\n", base_fingerprint="\x1b]0;" + "d" * 60)
    write_adapter(shelf / "a\x1b[2Jb\nc.gguf", shelf / "tiny-q8_0.gguf", 5, contract=hostile)
    for command in (("add", shelf), ("list",), ("show", shelf / "a\x1b[2Jb\nc.gguf"), ("remove", shelf)):
        result = run(*command)
        assert result.exit_code == 0, result.stderr
        assert "\x1b" not in result.stdout + result.stderr


def test_list_in_columns(shelf: Path) -> None:
    assert "edgelora add FOLDER" in answer("list")
    answer("add", shelf)
    lines = answer("list").splitlines()
    assert lines[0].startswith("Fennick 2.6m  fingerprint ")
    rows = [line for line in lines if line.startswith("  ")]
    assert [row.split()[:2] for row in rows] == [
        ["base", "q8_0"], ["base", "bf16"], ["adapter", "extract"], ["adapter", "support"], ["adapter", "other"],
    ]  # fmt: skip
    assert "big  fingerprint eeeeeeeeeeee: no base here that fits" in lines
    ends = {row.index(unit) for row in rows for unit in (" MB", " kB") if unit in row}
    assert len(ends) == 1


def test_json_says_the_same(shelf: Path) -> None:
    added = json.loads(answer("add", shelf, "--json"))
    assert [entry["name"] for entry in added["added"]] == ["other", "support", "Fennick 2.6m", "extract"]
    listing = json.loads(answer("list", "--json"))
    assert [entry["name"] for entry in listing["models"][0]["adapters"]] == ["extract", "support"]
    assert listing["waiting"][0]["fingerprint"] == "e" * 64
    shown = json.loads(answer("show", shelf / "support.gguf", "--json"))
    assert shown["groups"][0]["ranks"] == [4]
    removed = json.loads(answer("remove", "support", "--json"))
    assert [(entry["name"], entry["deleted"]) for entry in removed["removed"]] == [("support", False)]


def test_gone_and_back(shelf: Path) -> None:
    answer("add", shelf)
    moved = shutil.move(shelf, shelf.with_name("moved"))
    gone = run("list")
    assert "Gone from where they were" in gone.stdout
    assert "edgelora add NEW_PLACE" in gone.stderr
    answer("show", Path(moved) / "support.gguf")
    assert "Gone" not in answer("list")


def test_what_cannot_be_used_is_counted_and_named_when_asked(shelf: Path) -> None:
    answer("add", shelf / "support.gguf")
    (shelf / "support.gguf").write_bytes(b"GGUF")
    assert "1 file or folder could not be used" in run("list").stderr
    assert "support.gguf: 4 bytes is too short" in run("list", "--verbose").stderr


def test_errors_have_a_message_and_a_code(shelf: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no model")
    refused(run_process("show", tmp_path / "notes.txt"), 3, "notes.txt", "Expected")
    refused(run_process("show", "nobody"), 3, "nobody")
    refused(run_process("add", tmp_path / "notes.txt", "nowhere"), 3, "notes.txt", "nowhere")
    refused(run_process("remove", "nobody", "noone"), 3, "nobody", "noone", "edgelora list")
    refused(run_process("add"), 2, "PATH")
    (shelf / "extract" / "adapter_config.json").write_text("{")
    refused(run_process("show", shelf / "extract"), 3, "not valid JSON")


def test_a_terminal_gets_lines_that_fit(shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pexpect

    answer("add", shelf)
    environment = {**os.environ, "COLUMNS": str(SCREEN_COLUMNS), "LINES": str(SCREEN_LINES), "TERM": "dumb"}
    monkeypatch.chdir(shelf)
    command = shutil.which("edgelora") or str(Path(os.sys.executable).with_name("edgelora"))  # type: ignore[attr-defined]
    screen = pexpect.run(f"{command} show support.gguf", env=environment, encoding="utf-8", timeout=60)
    lines = screen.replace("\x1b[0m", "").replace("\x1b[1m", "").replace("\x1b[2m", "").splitlines()
    assert 8 < len(lines) <= SCREEN_LINES
    assert max(map(len, lines)) <= SCREEN_COLUMNS
