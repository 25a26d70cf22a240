"""`edgelora chat` as a person uses it: a real pseudo-terminal, keys typed, the screen read."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pexpect
import pytest

EDGELORA = str(Path(sys.executable).with_name("edgelora"))
TIMEOUT_S = 60


@pytest.fixture
def chat(adapter: Path, tiny_q8: Path) -> Iterator[pexpect.spawn]:
    arguments = ["chat", "--adapter", str(adapter), "--base", str(tiny_q8), "--temperature", "0", "--max-tokens", "40"]
    child = pexpect.spawn(EDGELORA, arguments, encoding="utf-8", timeout=TIMEOUT_S, dimensions=(40, 200))
    child.expect("/help lists the commands")
    child.expect("> ")
    yield child
    child.close(force=True)


def say(chat: pexpect.spawn, line: str) -> str:
    """Type a line; what the screen shows until the next prompt."""
    chat.sendline(line)
    chat.expect_exact(line)
    chat.expect(r"\r\n(?:\x1b\[\?2004h)?> ")
    return str(chat.before).replace("\x1b[?2004l", "").replace("\r", "").strip()


def plain(text: str) -> str:
    """Without colours."""
    return re.sub(r"\x1b\[\d*m", "", text)


def one_shot(*arguments: object) -> str:
    command = [EDGELORA, "chat", "--temperature", "0", "--max-tokens", "40", *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, stdin=subprocess.DEVNULL)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_a_conversation_with_a_switch_in_the_middle(chat: pexpect.spawn, adapter: Path, tiny_q8: Path) -> None:
    with_adapter = say(chat, "Hello!")
    assert with_adapter == one_shot("--adapter", adapter, "--base", tiny_q8, "Hello!").strip()
    assert "no adapter" in say(chat, "/adapter none")
    say(chat, "/reset")
    bare = say(chat, "Hello!")
    assert bare == one_shot("--base", tiny_q8, "Hello!").strip()
    assert bare != with_adapter
    say(chat, "/adapter adapter")
    say(chat, "/reset")
    assert say(chat, "Hello!") == with_adapter


def test_compare_system_scale_help_save(chat: pexpect.spawn, tmp_path: Path) -> None:
    reply = say(chat, "Hello!")
    compared = say(chat, "/compare")
    names, first, *_ = plain(compared).splitlines()
    assert names.split() == ["[none]", "[adapter]"]
    assert reply[:20] in first
    assert plain(say(chat, "/compare adapter")).removeprefix("[adapter] ").strip() == reply
    assert "System prompt set" in say(chat, "/system Be kind.")
    assert "at scale 0.5" in say(chat, "/scale 0.5")
    assert "adapter is applied at scale 1.5" in say(chat, "/scale adapter 1.5")
    assert "/compare [A,B] [QUESTION]" in say(chat, "/help")
    saved = tmp_path / "talk.jsonl"
    assert "Appended" in say(chat, f"/save {saved}")
    (row,) = map(json.loads, saved.read_text(encoding="utf-8").splitlines())
    assert row["messages"][0] == {"role": "user", "content": "Hello!"}
    assert row["messages"][1]["content"].strip() == reply


@pytest.mark.parametrize(
    ("line", "told"),
    [("/nonsense", "unknown command"), ("/adapter nobody", "no adapter 'nobody'"), ("/scale much", "not a scale")],
)
def test_a_mistake_is_told_and_the_chat_goes_on(chat: pexpect.spawn, line: str, told: str) -> None:
    assert told in say(chat, line)
    assert say(chat, "Hello!")


def test_several_lines(chat: pexpect.spawn, tmp_path: Path) -> None:
    chat.sendline('"""Hello')
    chat.expect_exact("... ")
    chat.sendline('there."""')
    chat.expect(r"\r\n(?:\x1b\[\?2004h)?> ")
    say(chat, f"/save {tmp_path / 'talk.jsonl'}")
    question, _ = json.loads((tmp_path / "talk.jsonl").read_text(encoding="utf-8"))["messages"]
    assert question["content"] == "Hello\nthere."


def test_ctrl_d_leaves_with_0(chat: pexpect.spawn) -> None:
    chat.sendeof()
    chat.expect(pexpect.EOF)
    chat.wait()
    assert chat.exitstatus == 0


def test_exit_leaves_with_0(chat: pexpect.spawn) -> None:
    chat.sendline("/exit")
    chat.expect(pexpect.EOF)
    chat.wait()
    assert chat.exitstatus == 0


def test_ctrl_c_at_the_prompt_asks_once_and_leaves_with_130(chat: pexpect.spawn) -> None:
    chat.sendintr()
    chat.expect("Ctrl-C again")
    chat.expect("> ")
    chat.sendintr()
    chat.expect(pexpect.EOF)
    chat.wait()
    assert chat.exitstatus == 130


def test_ctrl_c_stops_an_answer_and_keeps_what_there_was(adapter: Path, tiny_q8: Path, tmp_path: Path) -> None:
    """At this temperature every token is as likely as another, the one that ends a reply too: it babbles for long."""
    arguments = ["chat", "--adapter", str(adapter), "--base", str(tiny_q8), "--ctx-size", "16384", "--seed", "3"]
    arguments += ["--temperature", "100", "--top-k", "0", "--top-p", "1", "--min-p", "0"]
    child = pexpect.spawn(EDGELORA, arguments, encoding="utf-8", timeout=TIMEOUT_S)
    child.expect("/help lists")
    child.expect("> ")
    child.sendline("Hello!")
    child.expect(r"Hello!\r\n(?s:.{20})")
    child.sendintr()
    child.expect_exact("Stopped.")
    child.expect("> ")
    child.sendline(f"/save {tmp_path / 'talk.jsonl'}")
    child.expect_exact("Appended to")
    child.close(force=True)
    question, reply = json.loads((tmp_path / "talk.jsonl").read_text(encoding="utf-8"))["messages"]
    assert question == {"role": "user", "content": "Hello!"}
    assert 0 < len(reply["content"]) < 60_000


def test_one_shot_writes_the_answer_alone_to_stdout(adapter: Path, tiny_q8: Path) -> None:
    command = [EDGELORA, "chat", "--adapter", str(adapter), "--base", str(tiny_q8), "--temperature", "0"]
    piped = subprocess.run(
        [*command, "--max-tokens", "40", "--stats"], input="Hello!\n", capture_output=True, text=True, timeout=TIMEOUT_S
    )
    assert piped.returncode == 0
    assert piped.stdout == one_shot("--adapter", adapter, "--base", tiny_q8, "Hello!")
    assert "tokens/s" in piped.stderr
    assert "first token after" in piped.stderr


def test_the_base_is_found_beside_the_adapter(adapter: Path, tiny_q8: Path) -> None:
    """The same answer without `--base`: fixtures lie in one folder, and the contract says which of the files fits."""
    assert tiny_q8.parent == adapter.parent
    assert one_shot("--adapter", adapter, "Hello!") == one_shot("--adapter", adapter, "--base", tiny_q8, "Hello!")


def test_what_was_said_is_found_again_unless_it_is_not_to_be_kept(adapter: Path, tiny_q8: Path) -> None:
    files = ("--adapter", adapter, "--base", tiny_q8)
    reply = one_shot(*files, "Where do kingfishers live?").strip()
    one_shot(*files, "--no-log", "A secret about herons")
    listed = one_shot("--history")
    assert "Where do kingfishers live?" in listed
    assert "herons" not in listed
    number = listed.split()[0]
    assert one_shot("--history", "kingfishers LIVE").split()[0] == number
    shown = one_shot("--history", number)
    assert "user\nWhere do kingfishers live?" in shown
    assert f"assistant (adapter)\n{reply}" in shown
    missing = subprocess.run([EDGELORA, "chat", "--history", "999"], capture_output=True, text=True)
    assert (missing.returncode, "no conversation 999" in missing.stderr) == (2, True)
