"""Runs on several files: formats, weights, tools and plain text, and what of it a resumed run must have again."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from edgelora.contract import Contract
from edgelora.dataset import DataSource
from edgelora.errors import DataFileError, SettingsError
from edgelora.train import Recipe, train
from tests.edgelora.test_tools import HERMES_TEMPLATE

from .conftest import Watcher, chat, write_rows
from .test_served_text import USES, WEATHER

pytestmark = pytest.mark.train

SETTINGS = Recipe(rank=2, max_steps=1, batch_size=4, gradient_accumulation=1, certificate_probes=2, device="cpu")
TEXT = "Is it waterproof? Yes, the Pebble lamp is waterproof. "


@pytest.fixture
def sources(tmp_path: Path) -> list[DataSource]:
    talks = write_rows(tmp_path / "talks.jsonl", [{"messages": chat(f"Lamp {n}?", "Yes.")} for n in range(8)])
    tools = write_rows(tmp_path / "tools.jsonl", [{"messages": USES, "tools": [WEATHER]}])
    text = tmp_path / "book.txt"
    text.write_text(TEXT)
    return [DataSource(str(talks), 0.5), DataSource(str(tools), 2), DataSource(str(text))]


def test_files_of_several_formats_are_trained_in_their_shares(
    base: Path, sources: list[DataSource], tmp_path: Path
) -> None:
    template = tmp_path / "tools.jinja"
    template.write_text(HERMES_TEMPLATE)
    watcher = Watcher()
    recipe = Recipe.from_mapping({**SETTINGS.to_dict(), "chat_template": str(template), "max_length": 2048})
    report = train(sources, str(base), tmp_path / "out", recipe, progress=watcher)
    assert report.rows == 4 + 2 + 1
    contract = Contract.load(tmp_path / "out")
    assert contract is not None
    assert contract.chat_template == HERMES_TEMPLATE
    assert contract.certificate
    files = [[hashlib.sha256(Path(s.name).read_bytes()).hexdigest(), s.weight] for s in sources]
    assert contract.training["data_sha256"] == hashlib.sha256(json.dumps(files).encode()).hexdigest()
    reweighted = [DataSource(source.name) for source in sources]
    with pytest.raises(SettingsError, match="data"):
        train(reweighted, str(base), tmp_path / "out", recipe, resume=True)
    assert train(sources, str(base), tmp_path / "out", recipe, resume=True).rows == report.rows


def test_tools_under_a_template_that_does_not_show_them(base: Path, sources: list[DataSource], tmp_path: Path) -> None:
    with pytest.raises(DataFileError) as caught:
        train(sources, str(base), tmp_path / "out", SETTINGS)
    assert f"{sources[1].name}:1: tools cannot be used with this chat template" in caught.value.message
    assert "--chat-template" in caught.value.hint


def test_plain_text_alone_needs_no_template_and_is_certified_on_general_prompts(
    sources: list[DataSource], base: Path, tmp_path: Path
) -> None:
    report = train(sources[2], str(base), tmp_path / "out", SETTINGS)
    assert report.rows == 1
    assert not [note for note in report.notes if "certificate" in note]
    contract = Contract.load(tmp_path / "out")
    assert contract is not None
    assert contract.certificate


def test_the_command_takes_several_files(base: Path, sources: list[DataSource], tmp_path: Path) -> None:
    from click.testing import CliRunner

    from edgelora.cli import cli

    talks, _, text = (source.name for source in sources)
    options: list[Any] = ["--base", base, "-o", tmp_path / "out", "--max-steps", 1, "--certificate-probes", 0]
    result = CliRunner().invoke(cli, [*map(str, ["train", f"{talks}@0.25", text, *options])])
    assert result.exit_code == 0, result.output
    assert "lora, 3 rows, 1 steps" in result.stderr
