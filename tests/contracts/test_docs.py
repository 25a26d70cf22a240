"""What the documents and the help say is so: every example parses, every file named exists, no block is stale."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest

from edgelora.cli import cli
from tests.contracts.generated_docs import README, ROOT, rendered

COMMANDS = "train|convert|bundle|eval|fit|chat|batch|doctor"
COMMAND_LINE = re.compile(rf"^(?:\$ | {{4,}}|\s*)(edgelora (?:{COMMANDS})\b[^|&#\n]*)", re.MULTILINE)
CONTINUED = re.compile(r"\\\n[> ]*")  # a backslash at a line's end, and the prompt of the next
DOCUMENTS = [README, ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", *(ROOT / "examples").rglob("*.md")]


def examples() -> list[str]:
    texts = [path.read_text(encoding="utf-8") for path in DOCUMENTS]
    texts += [command.help or "" for command in (cli, *cli.commands.values())]
    whole = [CONTINUED.sub(" ", text) for text in texts]
    found = {match[1].strip() for text in whole for match in COMMAND_LINE.finditer(text)}
    return sorted(line for line in found if "[OPTIONS]" not in line and "--help" not in line)


@pytest.mark.parametrize("line", examples())
def test_every_example_parses(line: str) -> None:
    _, name, *arguments = shlex.split(line)
    command = cli.commands[name]
    command.make_parser(click.Context(command, **cli.context_settings)).parse_args(arguments)


def test_there_are_examples_and_a_wrong_one_would_fail() -> None:
    assert len(examples()) > 12
    command = cli.commands["chat"]
    with pytest.raises(click.NoSuchOption):
        command.make_parser(click.Context(command, **cli.context_settings)).parse_args(["--adaptor", "x.gguf"])


def test_no_generated_block_is_stale() -> None:
    text = README.read_text(encoding="utf-8")
    assert rendered(text) == text
    damaged = text.replace("| `edgelora chat [PROMPT]` |", "| `edgelora talk` |")
    assert damaged != text
    assert rendered(damaged) == text


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", document.read_text(encoding="utf-8")):
        assert (document.parent / target).exists(), target


def test_the_layout_that_contributing_names_exists() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:edgelora|converters|tests)/[\w./]+)`", text))
    assert len(named) > 8
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []
