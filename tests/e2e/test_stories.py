"""The stories under examples/stories/ come true: each command works and prints what the story shows."""

from __future__ import annotations

import socket
from contextlib import closing
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.e2e.stories import Command, missing_lines, read_story, run_story

STORIES = sorted(path for path in (ROOT / "examples" / "stories").glob("*.md") if path.name != "README.md")
STEPS = ("data check", "train", "verify", "eval", "chat", "batch", "serve")


@pytest.mark.slow
@pytest.mark.train
@pytest.mark.parametrize("story", STORIES, ids=lambda path: path.stem)
def test_a_story_comes_true(story: Path, tmp_path: Path) -> None:
    """How good the result is, the story's own `edgelora eval --min` holds."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    for command, output in run_story(read_story(story.read_text(encoding="utf-8")), tmp_path):
        assert not missing_lines(command, output), f"{command.text}\n{output}"


@pytest.mark.parametrize("story", STORIES, ids=lambda path: path.stem)
def test_a_story_is_whole(story: Path) -> None:
    """From looking at the data to serving, with a threshold that its evaluation has to keep."""
    commands = [command.text for command in read_story(story.read_text(encoding="utf-8"))]
    for step in STEPS:
        assert any(text.startswith(f"edgelora {step} ") for text in commands), step
    assert any(text.startswith("edgelora eval ") and " --min " in text for text in commands)


def test_three_stories() -> None:
    assert [path.stem for path in STORIES] == ["classifier", "json-extractor", "support-persona"]


STORY = """
```console
$ printf 'loss 0.5 in 3 s\\nnot shown\\n%s\\n' \\
    end
loss 0.038  in 62.5 s
...
end
```
Between them is text.
```console
$ cat missing.txt
$ echo 'one
> two'
> three
```
"""


def test_what_is_read_and_compared(tmp_path: Path) -> None:
    first, second, third = read_story(STORY)
    assert first.printed == ("loss 0.038  in 62.5 s", "...", "end")
    assert second == Command("cat missing.txt", ())
    assert third == Command("echo 'one\ntwo'\nthree", ())
    [(command, output)] = run_story([first], tmp_path)
    assert output == "loss 0.5 in 3 s\nnot shown\nend\n"
    assert missing_lines(command, output) == []
    assert missing_lines(command, output.replace("loss", "gain")) == ["loss 0.038  in 62.5 s"]


def test_a_command_that_fails_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"cat missing\.txt"):
        list(run_story(read_story(STORY)[1:2], tmp_path))


def test_a_service_is_there_for_the_commands_below_it_and_ends_with_them(tmp_path: Path) -> None:
    (tmp_path / "hello.txt").write_text("hello")
    story = [
        Command("python -m http.server --bind 127.0.0.1 8080 &", ()),
        Command("curl -s http://127.0.0.1:8080/hello.txt", ("hello",)),
        Command("expr 8080 + 1", ()),
    ]
    outputs = [output for _, output in run_story(story, tmp_path)]
    assert outputs[1] == "hello"
    with closing(socket.socket()) as probe:
        assert probe.connect_ex(("127.0.0.1", int(outputs[2]) - 1)) != 0
