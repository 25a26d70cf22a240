"""What strangers' files say reaches the terminal as text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from edgelora.cli import cli
from edgelora.cli.visible import visible
from tests.converters.folders import CONFIG, make_model, safetensors_bytes, weights


@pytest.mark.parametrize(
    ("text", "shown"),
    [("a\x1b[2Jb", r"a\x1b[2Jb"), ("a\r\x07", r"a\r\x07"), ("\u202eab", r"\u202eab"), ("\udc80", r"\udc80")],
)
def test_what_steers_a_terminal_is_spelled_out(text: str, shown: str) -> None:
    assert visible(text) == shown


def test_words_and_lines_stay() -> None:
    text = "ünï 日本語 😀\n  - (a, b) 'c'"
    assert visible(text) == text


def test_a_tensors_name_in_an_error(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    (folder / "model.safetensors").write_bytes(
        safetensors_bytes({**weights(CONFIG), "x\x1b]0;y\x07": np.zeros(4, np.float32)})
    )
    result = CliRunner().invoke(cli, ["convert", str(folder), "-o", str(tmp_path / "a.gguf")], color=True)
    assert result.exit_code == 3
    assert r"x\x1b]0;y\x07: no tensor" in result.output
    assert "\x1b]" not in result.output
