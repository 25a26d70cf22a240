"""A live server and the clients that people use: OpenAI's own, and plain HTTP."""

from __future__ import annotations

import json
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from edgelora.engine.engine import Engine
from tests.edgelora.serve.conftest import Served, serving

QUESTION = "Where does the miller live?"
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 12}
# A grammar without an end: the reply is as long as it may be.
ENDLESS: dict[str, Any] = {"temperature": 1.0, "max_tokens": 400, "grammar": "root ::= [a-z ] root"}


@pytest.fixture(scope="session")
def said(base: Path, adapters: dict[str, Path]) -> dict[str, str]:
    """What the engine says to the question."""
    with Engine(base, adapters, threads=1, n_ctx=512) as engine:
        return {name: engine.chat(QUESTION, adapter=name, sampling=GREEDY).text for name in (*adapters, "base")}


@pytest.fixture(scope="session")
def client(served: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=60)


def asked(model: str, **more: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": QUESTION}], **GREEDY, **more}


# OpenAI's client


def test_each_model_says_what_its_adapter_says(client: openai.OpenAI, said: dict[str, str]) -> None:
    for name, text in said.items():
        done = client.chat.completions.create(**asked(name))
        assert done.choices[0].message.content == text
        assert done.usage is not None
        assert done.usage.completion_tokens == GREEDY["max_tokens"] or done.choices[0].finish_reason == "stop"
    assert len(set(said.values())) == 3
    assert client.chat.completions.create(**asked("base:red")).choices[0].message.content == said["red"]


def test_a_stream_is_the_same_text_with_usage_at_its_end(client: openai.OpenAI, said: dict[str, str]) -> None:
    chunks = list(client.chat.completions.create(**asked("red"), stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == said["red"]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage is not None
    assert not chunks[-1].choices
    assert chunks[-2].choices[0].finish_reason in ("stop", "length")


def test_several_choices_with_seeds_and_log_probabilities(client: openai.OpenAI) -> None:
    settings = {"temperature": 1.5, "seed": 5, "n": 3, "logprobs": True, "top_logprobs": 2}
    done, again = (client.chat.completions.create(**asked("blue", **settings)) for _ in range(2))
    texts = [choice.message.content for choice in done.choices]
    assert [choice.index for choice in done.choices] == [0, 1, 2]
    assert texts == [choice.message.content for choice in again.choices]
    assert len(set(texts)) > 1
    for choice in done.choices:
        assert choice.logprobs is not None
        assert len(choice.logprobs.content or ()) > 0
        assert all(len(token.top_logprobs) == 2 for token in choice.logprobs.content or ())
    streamed = client.chat.completions.create(**asked("blue", **settings), stream=True)
    parts: dict[int, str] = {}
    for chunk in streamed:
        for choice in chunk.choices:
            parts[choice.index] = parts.get(choice.index, "") + (choice.delta.content or "")
    assert [parts[index] for index in range(3)] == texts


def test_json_that_fits_a_schema(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer"}},
        "required": ["n"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "number", "schema": schema, "strict": True}}
    done = client.chat.completions.create(**asked("red", response_format=form, max_tokens=60, temperature=1.0, seed=1))
    assert set(json.loads(done.choices[0].message.content or "")) == {"n"}


def test_texts_are_continued(client: openai.OpenAI, base: Path, adapters: dict[str, Path]) -> None:
    from edgelora.engine.stream import Request

    with Engine(base, adapters, threads=1, n_ctx=512) as engine:
        want = engine.submit(Request("The miller", "red", sampling=GREEDY, raw=True)).completion.text
    done = client.completions.create(model="red", prompt="The miller", temperature=0, max_tokens=12)
    assert done.choices[0].text == want
    both = client.completions.create(
        model="red", prompt=["The miller", "Boats"], temperature=0, max_tokens=12, echo=True
    )
    assert both.choices[0].text == "The miller" + want
    assert both.choices[1].text.startswith("Boats")


def test_scales_and_blends(served: Served, client: openai.OpenAI, said: dict[str, str]) -> None:
    def text(model: str, **more: Any) -> str:
        return client.chat.completions.create(**asked(model), extra_body=more).choices[0].message.content or ""

    assert text("red", lora_scale=0.0) == said["base"]
    assert text("base", adapters={"red": 1.0}) == said["red"]
    assert text("base", adapters={"red": 0.5, "blue": 0.5}) not in said.values()


def test_what_does_not_exist_is_not_found(client: openai.OpenAI) -> None:
    for model in ("nobody", "base:nobody", "gpt-4", "red.gguf", "../red"):
        with pytest.raises(openai.NotFoundError) as caught:
            client.chat.completions.create(**asked(model))
        assert caught.value.body is not None
        assert caught.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(**asked("base"), extra_body={"adapters": {"nobody": 1.0}})


def test_what_makes_no_sense_is_refused_in_openais_shape(client: openai.OpenAI, served: Served) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**asked("red", temperature=-1))
    assert caught.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="red", messages=[{"role": "user", "content": "miller " * 2000}])
    assert caught.value.code == "context_length_exceeded"
    for data, kind, status in (
        (b"{", "application/json", 400),
        (b"{}", "text/plain", 415),
        (b"[]", "application/json", 400),
    ):
        answer = httpx.post(f"{served.url}/v1/chat/completions", content=data, headers={"Content-Type": kind})
        assert answer.status_code == status
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    large = httpx.post(
        f"{served.url}/v1/chat/completions", content=b" " * 9_000_000, headers={"Content-Type": "application/json"}
    )
    assert large.status_code == 413


def test_unknown_fields_are_ignored_and_listed(served: Served, said: dict[str, str]) -> None:
    answer = served.post("/v1/chat/completions", asked("red", banana=1, user="me"))
    assert answer.json()["choices"][0]["message"]["content"] == said["red"]
    assert answer.headers["X-Edgelora-Ignored"] == "banana"
    for names, listed in (
        ({"a b": 1, "": 2, " ": 3}, "a%20b, %20"),
        ({"": 1}, None),
        ({"\r\nSet-Cookie: x": 1}, "%0D%0ASet-Cookie%3A%20x"),
    ):
        answer = served.post("/v1/chat/completions", asked("red", **names))
        assert answer.headers.get("X-Edgelora-Ignored") == listed


def test_models_are_listed_with_their_roots(client: openai.OpenAI, served: Served) -> None:
    found = {model.id: model for model in client.models.list()}
    assert set(found) == {"base", "red", "blue"}
    about = served.models()["red"]
    assert about["root"] == "red.gguf"
    assert about["parent"] == "base"
    assert client.models.retrieve("red").id == "red"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody")


def test_every_answer_has_an_id_and_a_line_in_the_log(served: Served) -> None:
    answer = served.post("/v1/chat/completions", asked("red"), headers={"X-Request-Id": "mine-7"})
    assert answer.headers["X-Request-Id"] == "mine-7"
    assert len(served.get("/health").headers["X-Request-Id"]) == 32
    line = served.until(lambda: next((line for line in served.logged() if line.get("id") == "mine-7"), None))
    assert (line["status"], line["method"], line["message"]) == (200, "POST", "/v1/chat/completions")


def test_methods(served: Served) -> None:
    for path in ("/health", "/v1/models", "/metrics", "/"):
        got, head = served.get(path), httpx.head(served.url + path)
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["content-type"] == got.headers["content-type"]
    served.until(lambda: "HEAD" in {line.get("method") for line in served.logged()})
    for method in ("GET", "HEAD", "OPTIONS", "DELETE"):
        answer = httpx.request(method, f"{served.url}/v1/chat/completions")
        assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
    assert served.post("/v1/models", {}).status_code == 405
    assert served.get("/v1/nothing").status_code == served.post("/nothing", {}).status_code - 1 == 404


def test_figures(served: Served) -> None:
    served.chat(QUESTION, "red")
    text = served.get("/metrics").text
    assert 'edgelora_requests_total{adapter="red",outcome="length"}' in text or 'outcome="stop"' in text
    assert 'edgelora_first_token_seconds_count{adapter="red"}' in text
    assert "edgelora_engine_up 1.0" in text
    served.post("/v1/chat/completions", asked("nobody-at-all"))
    assert "nobody-at-all" not in served.get("/metrics").text
    assert served.get("/ready").status_code == 200
    assert served.state()["state"] == "ready"


def test_web_pages_of_others_are_kept_out(served: Served) -> None:
    """Without keys: neither a page that calls (CORS), nor one that has given its name this address."""
    answer = served.post("/v1/chat/completions", asked("red"), headers={"Host": "evil.example"})
    assert answer.status_code == 403
    preflight = httpx.options(
        f"{served.url}/v1/chat/completions",
        headers={"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"},
    )
    assert "access-control-allow-origin" not in preflight.headers
    assert served.post("/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "red.gguf"}).status_code == 403


def test_who_leaves_frees_the_place(served: Served) -> None:
    for stream in (True, False):
        with httpx.Client() as http:
            try:
                with http.stream(
                    "POST",
                    f"{served.url}/v1/chat/completions",
                    json=asked("red", **ENDLESS, stream=stream),
                    timeout=1.0,
                ) as answer:
                    for _ in answer.iter_lines():
                        break
            except httpx.ReadTimeout:
                assert not stream
        served.until(lambda: served.state()["running"] == 0, 5)


def test_a_deadline_is_told(served: Served) -> None:
    answer = served.post("/v1/chat/completions", asked("red", **{**ENDLESS, "max_tokens": 480}, timeout=0.05))
    assert answer.status_code == 408
    assert answer.json()["error"]["code"] == "timeout"


# The folder


def test_the_folder_is_followed(base: Path, adapters: dict[str, Path], tmp_path: Path, said: dict[str, str]) -> None:
    folder = tmp_path / "adapters"
    folder.mkdir()
    with serving(base, folder) as served:
        assert set(served.models()) == {"base"}
        shutil.copy(adapters["red"], folder / "mine.gguf")
        served.until(lambda: "mine" in served.models())
        assert served.chat(QUESTION, "mine")["choices"][0]["message"]["content"] == said["red"]
        shutil.copy(adapters["blue"], folder / "new.partial")
        (folder / "new.partial").replace(folder / "mine.gguf")
        served.until(lambda: served.models()["mine"]["edgelora"]["generation"] == 2)
        assert served.chat(QUESTION, "mine")["choices"][0]["message"]["content"] == said["blue"]
        (folder / "broken.gguf").write_bytes(b"GGUF" + bytes(100))
        broken = served.until(lambda: served.models(everything=True).get("broken"))
        assert broken["edgelora"]["state"] == "refused"
        assert broken["edgelora"]["problem"]
        assert str(folder) not in json.dumps(broken)
        assert "broken" not in served.models()
        assert served.post("/v1/chat/completions", asked("broken")).status_code == 404
        (folder / "mine.gguf").write_bytes(b"no adapter any more")  # the old one goes on
        served.until(lambda: served.models(everything=True)["mine"]["edgelora"]["problem"])
        assert served.chat(QUESTION, "mine")["choices"][0]["message"]["content"] == said["blue"]
        (folder / "mine.gguf").unlink()
        served.until(lambda: "mine" not in served.models())
        assert served.post("/v1/chat/completions", asked("mine")).status_code == 404


def test_a_file_that_is_replaced_under_a_stream_ends_it_with_the_old_one(
    base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "adapters"
    folder.mkdir()
    shutil.copy(adapters["red"], folder / "mine.gguf")
    body = asked("mine", temperature=0, max_tokens=300, stream=True)
    with serving(base, folder) as served:

        def text(during: Any = None) -> str:
            parts = []
            with httpx.stream("POST", f"{served.url}/v1/chat/completions", json=body, timeout=60) as answer:
                for line in answer.iter_lines():
                    if line.startswith("data: {"):
                        parts.append(json.loads(line[6:])["choices"][0]["delta"].get("content") or "")
                        if during and len(parts) == 3:
                            during()
            return "".join(parts)

        def replace() -> None:
            shutil.copy(adapters["blue"], folder / "x.partial")
            (folder / "x.partial").replace(folder / "mine.gguf")

        red = text()
        assert text(replace) == red
        served.until(lambda: served.models()["mine"]["edgelora"]["generation"] == 2)
        assert text() != red


# Keeping going


def test_a_full_queue_says_when_to_come_back(base: Path, shelf: Path, tmp_path: Path) -> None:
    with serving(base, shelf, "--max-waiting", "1", "--parallel", "1") as served:
        answers = list[httpx.Response]()
        body = asked("red", **{**ENDLESS, "max_tokens": 100})
        threads = [
            threading.Thread(target=lambda: answers.append(served.post("/v1/chat/completions", body))) for _ in range(6)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        codes = sorted(answer.status_code for answer in answers)
        assert codes[0] == 200
        assert codes[-1] == 429
        refused = next(answer for answer in answers if answer.status_code == 429)
        assert int(refused.headers["Retry-After"]) >= 1
        assert refused.json()["error"]["code"] == "queue_full"


def test_who_wants_vectors_waits_in_no_endless_queue(base: Path, tmp_path: Path) -> None:
    from tests.edgelora.engine.gguf_copies import write_copy

    (tmp_path / "adapters").mkdir()
    write_copy(base, tmp_path / "embedder.gguf", {}, metadata={"llama.pooling_type": 1})
    body = {"model": "base", "input": ["the miller lives on a hill " * 40] * 8}
    with serving(tmp_path / "embedder.gguf", tmp_path / "adapters", "--max-waiting", "1") as served:
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda _: served.post("/v1/embeddings", body), range(8)))
        assert {answer.status_code for answer in answers} == {200, 429}
        refused = next(answer for answer in answers if answer.status_code == 429)
        assert refused.json()["error"]["code"] == "queue_full"
        assert served.post("/v1/embeddings", body).status_code == 200


def test_killed_the_engine_comes_back_and_streams_end_with_an_error(
    base: Path, shelf: Path, said: dict[str, str], tmp_path: Path
) -> None:
    import os
    import signal

    with serving(base, shelf, "--max-waiting", "100", "--ctx-size", "4096") as served:
        ends = list[str]()

        def stream() -> None:
            body = asked("red", **{**ENDLESS, "max_tokens": 4000}, stream=True)  # none is done before the kill
            try:
                with httpx.stream("POST", f"{served.url}/v1/chat/completions", json=body, timeout=60) as answer:
                    lines = [line for line in answer.iter_lines() if line]
                    ends.append(lines[-1] if answer.status_code == 200 else str(answer.status_code))
            except httpx.HTTPError as error:
                ends.append(repr(error))

        threads = [threading.Thread(target=stream) for _ in range(50)]
        for thread in threads:
            thread.start()
        served.until(lambda: served.state()["running"] >= 4)
        os.kill(served.engine_pid(), signal.SIGKILL)
        began = time.monotonic()
        down = served.until(lambda: next((a for a in [served.get("/ready")] if a.status_code == 503), None), 2)
        assert int(down.headers["Retry-After"]) >= 1
        for thread in threads:
            thread.join()
        assert len(ends) == 50
        assert all(end == "503" or "engine_died" in end for end in ends), set(ends)
        assert any("engine_died" in end for end in ends)
        served.until(lambda: served.get("/ready").status_code == 200)
        assert time.monotonic() - began < 15
        assert served.chat(QUESTION, "red")["choices"][0]["message"]["content"] == said["red"]
        assert served.state()["restarts"] == 1


def test_sigterm_lets_replies_end(base: Path, shelf: Path, tmp_path: Path) -> None:
    import signal

    with serving(base, shelf) as served:
        answers = list[httpx.Response]()
        body = asked("red", **{**ENDLESS, "max_tokens": 200})
        thread = threading.Thread(target=lambda: answers.append(served.post("/v1/chat/completions", body)))
        thread.start()
        served.until(lambda: served.state()["running"] == 1)
        served.process.send_signal(signal.SIGTERM)
        assert served.process.wait(30) == 0
        thread.join()
        assert answers[0].status_code == 200
        assert answers[0].json()["usage"]["completion_tokens"] > 50


def test_the_grace_has_an_end(base: Path, shelf: Path, tmp_path: Path) -> None:
    import signal

    with serving(base, shelf, "--grace", "0.2", "--ctx-size", "4096") as served:
        body = asked("red", **{**ENDLESS, "max_tokens": 4000}, stream=True)
        lines = list[str]()

        def stream() -> None:
            with httpx.stream("POST", f"{served.url}/v1/chat/completions", json=body, timeout=60) as answer:
                lines.extend(line for line in answer.iter_lines() if line)

        thread = threading.Thread(target=stream)
        thread.start()
        served.until(lambda: served.state()["running"] == 1)
        served.process.send_signal(signal.SIGTERM)
        assert served.process.wait(20) == 0
        thread.join(20)
        assert "error" in json.loads(lines[-1].removeprefix("data: "))


def test_an_address_for_others_needs_keys(base: Path, tmp_path: Path) -> None:
    import subprocess
    import sys

    command = [sys.executable, "-m", "edgelora", "serve", "--base", str(base), "--host", "0.0.0.0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "without --keys, only this machine may ask" in done.stderr


# Tools

HERMES = (
    "{% if tools %}<tools>{% for tool in tools %}{{ tool | tojson }}{% endfor %}</tools>{% endif %}"
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}"
    "{% for call in m.tool_calls or [] %}<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}\n'
    "</tool_call>{% endfor %}\n{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Fennick", "Oslo"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


def test_tools_are_called_and_answered(base: Path, shelf: Path, tmp_path: Path) -> None:
    (tmp_path / "hermes.jinja").write_text(HERMES)
    with serving(base, shelf, "--chat-template", str(tmp_path / "hermes.jinja")) as served:
        client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=60)
        forced = asked("red", tools=[WEATHER], tool_choice="required", parallel_tool_calls=False, max_tokens=60)
        forced["logprobs"] = True  # of content, which there is none of
        done = client.chat.completions.create(**forced)
        (call,) = done.choices[0].message.tool_calls or ()
        assert call.function.name == "weather"
        assert json.loads(call.function.arguments)["city"] in ("Fennick", "Oslo")
        assert done.choices[0].finish_reason == "tool_calls"
        assert done.choices[0].logprobs is None
        chunks = list(client.chat.completions.create(**forced, stream=True))
        streamed = [c for chunk in chunks for c in chunk.choices[0].delta.tool_calls or ()]
        assert [c.function.arguments for c in streamed if c.function] == [call.function.arguments]
        assert {choice.logprobs for chunk in chunks for choice in chunk.choices} == {None}
        degrees = {"name": "d", "schema": {"type": "object", "properties": {"d": {"const": 4}}, "required": ["d"]}}
        either = asked("red", tools=[WEATHER], response_format={"type": "json_schema", "json_schema": degrees})
        (choice,) = client.chat.completions.create(**{**either, "max_tokens": 60}).choices
        assert choice.message.tool_calls or json.loads(choice.message.content or "") == {"d": 4}
        turns = [
            {"role": "user", "content": QUESTION},
            {"role": "assistant", "content": None, "tool_calls": [call.model_dump()]},
            {"role": "tool", "tool_call_id": call.id, "content": "4 degrees"},
        ]
        again = client.chat.completions.create(model="red", messages=turns, tools=[WEATHER], max_tokens=8)
        assert again.choices[0].finish_reason in ("stop", "length")
        with pytest.raises(openai.BadRequestError, match="tool_call_id"):
            client.chat.completions.create(model="red", messages=[{**turns[2], "tool_call_id": "x"}], max_tokens=8)


def test_tools_of_a_template_without_them_are_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="tools"):
        client.chat.completions.create(**asked("red", tools=[WEATHER]))


def test_embeddings_of_other_bases_are_refused_and_those_of_such_are_vectors(
    client: openai.OpenAI, base: Path, shelf: Path, tmp_path: Path
) -> None:
    from tests.edgelora.engine.gguf_copies import write_copy

    with pytest.raises(openai.BadRequestError, match="not a base for embeddings"):
        client.embeddings.create(model="base", input="hello")
    write_copy(base, tmp_path / "embedder.gguf", {}, metadata={"llama.pooling_type": 1})
    with serving(tmp_path / "embedder.gguf", shelf) as served:
        other = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=60)
        one, two = (other.embeddings.create(model=name, input=["hello", "boats"]) for name in ("base", "red"))
        assert [each.index for each in one.data] == [0, 1]
        assert sum(x * x for x in one.data[0].embedding) == pytest.approx(1, abs=1e-4)
        assert one.data[0].embedding != two.data[0].embedding
        assert one.usage.prompt_tokens > 0
