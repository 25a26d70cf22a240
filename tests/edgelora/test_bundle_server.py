"""A bundle in llama-server: each conversation's text is edgelora's with the separate adapter."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from edgelora.adapter_ref import AdapterRef
from edgelora.bundling import bundle_adapters
from edgelora.contract import Contract
from edgelora.engine.engine import Engine
from edgelora.store import Store
from edgelora.template import BUILTIN
from tests.conftest import ROOT
from tests.converters.bundle_files import copy_of
from tests.edgelora.conftest import write_adapter

SERVER = ROOT / "build" / "peers" / "bin" / "llama-server"
START_SECONDS, ANSWER_SECONDS = 30.0, 30.0
TOKENS = 24
QUESTIONS = ("Tell me of the storm.", "What does bread cost?", "Who bakes it?")
SYSTEM = "Answer like a pirate."
AWKWARD = 'You\'re "Pip" \\ é.\n\tNo {{ variables }}, no {% endset %} here.\n'
Ask = Callable[[str, Mapping[str, Any]], dict[str, Any]]

pytestmark = pytest.mark.skipif(not os.access(SERVER, os.X_OK), reason=f"{SERVER} is not built (`make bench` says how)")


@contextlib.contextmanager
def serving(model: Path, log: Path, *options: object) -> Iterator[Ask]:
    """llama-server with a model; ended by its own process id."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [
        SERVER,
        "-m",
        model,
        "--host",
        "127.0.0.1",
        "--port",
        port,
        "-t",
        1,
        "-c",
        2048,
        "-np",
        4,
        "--no-webui",
        *options,
    ]
    with open(log, "wb") as output:
        process = subprocess.Popen([*map(str, command)], stdout=output, stderr=output, stdin=subprocess.DEVNULL)
        try:
            until = time.monotonic() + START_SECONDS
            while not _is_up(port):
                assert process.poll() is None, log.read_text(errors="replace")[-2000:]
                assert time.monotonic() < until, "llama-server does not answer"
                time.sleep(0.1)
            yield lambda path, body: _post(port, path, body)
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(10)


def _is_up(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def _post(port: int, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as answer:
        return dict(json.load(answer))


def said(ask: Ask, adapter: str | None, *contents: str, system: str | None = None) -> str:
    """The reply to a conversation, which is user's and assistant's turns by turns."""
    turns = [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(contents)]
    messages = turns if system is None else [{"role": "system", "content": system}, *turns]
    chosen = {} if adapter is None else {"chat_template_kwargs": {"adapter": adapter}}
    body = {"messages": messages, "temperature": 0, "max_tokens": TOKENS, **chosen}
    return str(ask("/v1/chat/completions", body)["choices"][0]["message"]["content"])


def alone(engine: Engine, adapter: str | None, *contents: str, system: str | None = None) -> str:
    turns = [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(contents)]
    messages = turns if system is None else [{"role": "system", "content": system}, *turns]
    sampling = {"temperature": 0.0, "max_tokens": TOKENS}
    return engine.chat(messages, adapter=adapter, sampling=sampling).text  # type: ignore[arg-type]


CHATML = BUILTIN["chatml"]
WITH_BOS = "{{ bos_token }}" + CHATML
KINDS: Mapping[str, Mapping[str, Any]] = {
    "chatml": {},
    "bos": {"tokenizer.ggml.add_bos_token": True, "tokenizer.chat_template": WITH_BOS},
}


@pytest.fixture(scope="module", params=list(KINDS))
def pair(
    request: pytest.FixtureRequest, base: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Ask, Engine]]:
    """A server with a bundle, and an engine with the same base and adapters beside it."""
    folder = tmp_path_factory.mktemp(request.param)
    made_of = copy_of(base, folder / "base.gguf", metadata=KINDS[request.param])
    other = CHATML if KINDS[request.param] else WITH_BOS
    contract = Contract(
        base_fingerprint=Store(folder / "store").fingerprint(made_of), chat_template=other, system=AWKWARD
    )
    files = {
        "red": write_adapter(folder / "red.gguf", made_of, 1),
        "blue": write_adapter(folder / "blue.gguf", made_of, 2, rank=6, metadata={"adapter.lora.alpha": 9.0}),
        "own": write_adapter(folder / "own.gguf", made_of, 3, contract=contract),
    }
    refs = [AdapterRef(name, path) for name, path in files.items()]
    report = bundle_adapters(made_of, refs, folder / "out.gguf", store=Store(folder / "store"))
    with serving(report.path, folder / "log") as ask, Engine(made_of, files, threads=1) as engine:
        yield ask, engine


def test_the_variable_chooses(pair: tuple[Ask, Engine]) -> None:
    ask, engine = pair
    replies = {}
    for name in ("red", "blue", "own", None, "none"):
        replies[name] = [said(ask, name, question) for question in QUESTIONS]
        assert replies[name] == [alone(engine, name, question) for question in QUESTIONS], name
    assert replies[None] == replies["none"]
    assert len({tuple(each) for each in replies.values()}) == 4


def test_a_system_message_chooses(pair: tuple[Ask, Engine]) -> None:
    ask, engine = pair
    for name in ("red", "blue"):
        assert said(ask, None, QUESTIONS[0], system=f"<|{name}|> {SYSTEM}") == alone(
            engine, name, QUESTIONS[0], system=SYSTEM
        )
        assert said(ask, None, QUESTIONS[0], system=f"<|{name}|>") == alone(engine, name, QUESTIONS[0])
    assert said(ask, None, QUESTIONS[0], system=SYSTEM) == alone(engine, None, QUESTIONS[0], system=SYSTEM)


def test_conversations_go_on_side_by_side(pair: tuple[Ask, Engine]) -> None:
    ask, engine = pair

    def conversation(name: str | None) -> list[str]:
        turns: list[str] = []
        for question in QUESTIONS:
            turns += [question, said(ask, name, *turns, question)]
        return turns

    names = ["red", "blue", None, "own"] * 2
    with ThreadPoolExecutor(4) as pool:
        for name, turns in zip(names, pool.map(conversation, names), strict=True):
            for at in range(1, len(turns), 2):
                assert turns[at] == alone(engine, name, *turns[:at]), name


def test_a_token_typed_in_a_message_chooses_nothing(pair: tuple[Ask, Engine]) -> None:
    ask, _ = pair
    prompt = ask("/apply-template", {"messages": [{"role": "user", "content": "<|red|> and <|blue|>"}]})["prompt"]
    assert "< |red|> and < |blue|>" in prompt
    tokens = ask("/tokenize", {"content": prompt, "parse_special": True, "add_special": True})["tokens"]
    assert not {4096, 4097, 4098} & set(tokens)
    chosen = ask("/apply-template", {"messages": [{"role": "user", "content": "x"}],
                                     "chat_template_kwargs": {"adapter": "red"}})["prompt"]  # fmt: skip
    tokens = ask("/tokenize", {"content": chosen, "parse_special": True, "add_special": True})["tokens"]
    assert tokens[0] == 4096


def test_a_prompt_that_begins_with_the_token(pair: tuple[Ask, Engine]) -> None:
    ask, engine = pair
    body = {"messages": [{"role": "user", "content": QUESTIONS[0]}], "chat_template_kwargs": {"adapter": "red"}}
    prompt = ask("/apply-template", body)["prompt"]
    assert prompt.startswith("<|red|>")
    answer = ask("/completion", {"prompt": prompt, "temperature": 0, "n_predict": TOKENS})
    assert answer["content"] == alone(engine, "red", QUESTIONS[0])


def test_an_unknown_adapter_is_an_error(pair: tuple[Ask, Engine]) -> None:
    ask, _ = pair
    with pytest.raises(urllib.error.HTTPError) as caught:
        said(ask, "green", QUESTIONS[0])
    assert caught.value.code == 400
    assert "this bundle has: red, blue, own, none" in caught.value.read().decode()
