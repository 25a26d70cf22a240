"""Engine as callers see it: threads, streams, cancelling, limits, errors, and the end of its life."""

from __future__ import annotations

import gc
import signal
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from edgelora.adapter_ref import AdapterRef
from edgelora.contract import Contract
from edgelora.engine.engine import Engine, Request
from edgelora.errors import ContextOverflowError, EdgeloraError, ModelFileError, SettingsError
from edgelora.messages import Message
from edgelora.sampling import Sampling
from edgelora.template import BUILTIN
from tests.edgelora.conftest import MakeAdapter

QUESTION = "Tell me about Fennick."
GREEDY = {"temperature": 0, "max_tokens": 24}
# A prompt that leads the random adapters into endless text; tests that need a long reply ask for one.
ENDLESS = {"temperature": 5, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "seed": 3}


def test_chat_and_stream_say_the_same(engine: Engine) -> None:
    for adapter in (None, "red", "blue"):
        whole = engine.chat(QUESTION, adapter=adapter, sampling=GREEDY)
        stream = engine.stream(QUESTION, adapter=adapter, sampling=GREEDY)
        assert "".join(stream) == stream.completion.text == whole.text
        assert whole.text


def test_each_adapter_says_something_else(engine: Engine) -> None:
    said = {name: engine.chat(QUESTION, adapter=name, sampling=GREEDY).text for name in ("none", "red", "blue")}
    assert len(set(said.values())) == 3
    assert engine.chat(QUESTION, adapter="base", sampling=GREEDY).text == said["none"]
    assert engine.chat(QUESTION, adapter="red", scale=0.0, sampling=GREEDY).text == said["none"]


def test_the_completion_accounts_for_the_reply(engine: Engine, adapters: dict[str, Path]) -> None:
    import hashlib

    done = engine.chat(QUESTION, adapter="red", sampling={"temperature": 0, "max_tokens": 5, "seed": 1})
    assert (done.adapter, done.finish_reason, done.completion_tokens) == ("red", "length", 5)
    assert done.adapter_hash == hashlib.sha256(adapters["red"].read_bytes()).hexdigest()
    assert done.prompt_tokens == engine.count_tokens(QUESTION, "red")
    assert 0 <= done.cached_tokens < done.prompt_tokens
    assert done.seconds_to_first_token > 0
    assert done.tokens_per_second > 0
    bare = engine.chat(QUESTION, sampling={"max_tokens": 1})
    assert (bare.adapter, bare.adapter_hash) == ("none", "")


def test_the_same_seed_gives_the_same_text_and_another_seed_another(engine: Engine) -> None:
    def say(seed: int) -> str:
        sampling = {"temperature": 1.5, "seed": seed, "max_tokens": 24}
        return engine.chat(QUESTION, adapter="red", sampling=sampling, deterministic=True).text

    first = say(1)
    engine.chat("something else", adapter="blue", sampling=GREEDY)
    assert say(1) == first
    assert len({say(seed) for seed in range(6)}) > 1


def test_a_conversation_reuses_what_it_has_said(engine: Engine) -> None:
    messages: list[Message] = [{"role": "user", "content": QUESTION}]
    first = engine.chat(messages, adapter="red", sampling=GREEDY)
    messages += [{"role": "assistant", "content": first.text}, {"role": "user", "content": "And then?"}]
    second = engine.chat(messages, adapter="red", sampling=GREEDY)
    assert second.cached_tokens >= first.prompt_tokens


def test_a_stop_string_ends_the_reply_before_it(engine: Engine) -> None:
    text = engine.chat(QUESTION, sampling=GREEDY).text
    stop = text[len(text) // 2 :][:4]
    done = engine.chat(QUESTION, sampling={**GREEDY, "stop": [stop]})
    assert done.finish_reason == "stop"
    assert done.text == text[: text.index(stop)]


def test_a_stop_string_may_be_a_control_token(engine: Engine, base: Path) -> None:
    ended = engine.chat(QUESTION, sampling={"temperature": 0})
    assert ended.finish_reason == "stop"
    assert "<|im_end|>" not in ended.text
    assert engine.chat(QUESTION, sampling={"temperature": 0, "stop": "<|im_end|>"}).text == ended.text


def test_a_reply_ends_where_the_context_does(base: Path) -> None:
    with Engine(base, n_ctx=32, threads=1) as engine:
        done = engine.chat(QUESTION, sampling=ENDLESS)
        assert done.finish_reason == "length"
        assert done.prompt_tokens + done.completion_tokens == 32


def test_a_conversation_that_does_not_fit_is_refused_with_both_numbers(base: Path) -> None:
    with Engine(base, n_ctx=32, threads=1) as engine:
        n_tokens = engine.count_tokens("word " * 50)
        with pytest.raises(ContextOverflowError, match=rf"{n_tokens} tokens long.*window is 32 tokens"):
            engine.chat("word " * 50)
        assert engine.chat("hi", sampling={"max_tokens": 2}).completion_tokens


def test_a_window_beyond_the_base_is_noted(base: Path) -> None:
    with Engine(base, n_ctx=1024, threads=1) as engine:
        assert engine.n_ctx == 1024
        assert "trained with 512" in engine.notices[0]
    with Engine(base, threads=1) as engine:
        assert (engine.n_ctx, engine.notices) == (512, [])


@pytest.mark.parametrize(
    ("messages", "options", "error"),
    [
        ("hi", {"adapter": "green"}, "unknown adapter 'green'"),
        ("hi", {"sampling": {"temprature": 1}}, "unknown sampling settings: temprature"),
        ("hi", {"sampling": {"top_p": 7}}, "top_p is 7"),
        ("hi", {"adapter": "red", "scale": float("nan")}, "scale is nan"),
        ([], {}, "`messages` is empty"),
        ([{"role": "robot", "content": "x"}], {}, "role 'robot'"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused(
    messages: object, options: dict[str, object], error: str, engine: Engine
) -> None:
    with pytest.raises(SettingsError, match=error):
        engine.chat(messages, **options)  # type: ignore[arg-type]
    assert engine.chat("hi", sampling={"max_tokens": 1}).completion_tokens == 1


def test_cancelling_ends_the_reply_and_leaves_the_engine_usable(engine: Engine) -> None:
    before = engine.chat(QUESTION, adapter="red", sampling=GREEDY, deterministic=True)
    stream = engine.stream(QUESTION, adapter="red", sampling=ENDLESS)
    shown = next(stream)
    stream.cancel()
    shown += "".join(stream)
    assert stream.completion.finish_reason == "cancelled"
    assert stream.completion.text == shown
    again = engine.chat(QUESTION, adapter="red", sampling=GREEDY, deterministic=True)
    assert again.text == before.text


def test_a_stream_that_is_dropped_is_cancelled(engine: Engine) -> None:
    stream = engine.stream(QUESTION, sampling=ENDLESS)
    next(stream)
    task = stream._task
    del stream
    gc.collect()
    assert task.interrupt.is_set()
    with engine.stream(QUESTION, sampling=ENDLESS) as left:
        next(left)
    assert left.completion.finish_reason == "cancelled"


def test_requests_queue_and_each_caller_gets_its_own(engine: Engine) -> None:
    want = {
        name: engine.chat(QUESTION, adapter=name, sampling=GREEDY, deterministic=True).text
        for name in ("none", "red", "blue")
    }
    names = list(want) * 6
    with ThreadPoolExecutor(6) as pool:
        ask = lambda name: engine.chat(QUESTION, adapter=name, sampling=GREEDY, deterministic=True).text  # noqa: E731
        assert list(pool.map(ask, names)) == [want[name] for name in names]


def test_batch_answers_in_order(engine: Engine) -> None:
    names = ["red", "none", "blue"] * 8
    done = list(engine.batch(Request(QUESTION, name, sampling={"max_tokens": 1}) for name in names))
    assert [completion.adapter for completion in done] == names


def test_reading_one_stream_while_another_waits_does_not_lock_up(engine: Engine) -> None:
    first = engine.stream(QUESTION, adapter="red", sampling=GREEDY)
    second = engine.chat(QUESTION, adapter="blue", sampling=GREEDY)
    assert first.completion.adapter == "red"
    assert second.adapter == "blue"


def test_adapters_come_and_go_while_the_engine_runs(base: Path, adapters: dict[str, Path]) -> None:
    with Engine(base, [f"one={adapters['red']}", AdapterRef("two", adapters["blue"], 0.5)], threads=1) as engine:
        assert engine.adapters == ["one", "two"]
        red = engine.chat(QUESTION, adapter="one", sampling=GREEDY, deterministic=True).text
        engine.load_adapter("twin", adapters["red"])
        engine.unload_adapter("one")
        assert engine.chat(QUESTION, adapter="twin", sampling=GREEDY, deterministic=True).text == red
        engine.load_adapter("twin", adapters["blue"])
        assert engine.chat(QUESTION, adapter="twin", sampling=GREEDY, deterministic=True).text != red
        half = engine.chat(QUESTION, adapter="two", sampling=GREEDY, deterministic=True).text
        assert engine.chat(QUESTION, adapter="twin", scale=0.5, sampling=GREEDY, deterministic=True).text == half
        with pytest.raises(SettingsError, match="unknown adapter 'one'"):
            engine.chat(QUESTION, adapter="one")
        with pytest.raises(SettingsError, match="unknown adapter 'one'"):
            engine.unload_adapter("one")


def test_names_are_checked(base: Path, adapters: dict[str, Path]) -> None:
    with pytest.raises(SettingsError, match="given twice: red"):
        Engine(base, [adapters["red"], adapters["red"]])
    with pytest.raises(SettingsError, match="names the bare base"):
        Engine(base, {"none": adapters["red"]})


def test_the_contract_brings_template_stops_sampling_and_system_prompt(base: Path, make_adapter: MakeAdapter) -> None:
    contract = Contract(
        chat_template="{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}",
        stop=("er",),
        sampling={"temperature": 0, "max_tokens": 6},
        system="You are Pip.",
    )
    with Engine(base, {"pip": make_adapter(contract=contract)}, threads=1) as engine:
        n_tokens = engine.count_tokens("hello", "pip")
        spoken = [{"role": "system", "content": "You are Pip."}, {"role": "user", "content": "hello"}]
        assert engine.count_tokens(spoken, "pip") == n_tokens
        silent = [{"role": "system", "content": ""}, {"role": "user", "content": "hello"}]
        assert engine.count_tokens(silent, "pip") < n_tokens
        assert engine.count_tokens(silent, "none") == engine.count_tokens("hello", "none")
        done = engine.chat("hello", adapter="pip")
        assert done.completion_tokens <= 6
        assert (
            engine.chat("hello", adapter="pip", sampling=Sampling(temperature=0, max_tokens=40)).text.count("er") == 0
        )
        assert engine.adapter("pip").contract == contract


def test_an_explicit_template_wins_and_none_at_all_is_refused(base: Path, tmp_path: Path) -> None:
    import gguf

    with Engine(base, chat_template="plain", threads=1) as engine:
        assert engine.count_tokens("hello") < 4
        assert engine.template_source == BUILTIN["plain"]
    bare = tmp_path / "no-template.gguf"
    bare.write_bytes(base.read_bytes().replace(b"tokenizer.chat_template", b"tokenizer.chat_tEmplate"))
    assert gguf.GGUFReader(bare).get_field("tokenizer.chat_template") is None
    with Engine(bare, threads=1) as engine, pytest.raises(ModelFileError, match="has no chat template") as caught:
        engine.chat("hello")
    assert "--chat-template" in caught.value.hint


def test_weights_that_overflow_end_the_reply_with_an_error(base: Path, make_adapter: MakeAdapter) -> None:
    with Engine(base, {"huge": make_adapter(strength=1e30)}, threads=1) as engine:
        with pytest.raises(ModelFileError, match="not a number"):
            engine.chat("hello", adapter="huge")
        assert engine.chat("hello", sampling={"max_tokens": 1}).completion_tokens == 1


def test_a_closed_engine_says_so_and_its_streams_end(base: Path) -> None:
    engine = Engine(base, threads=1, parallel=1)
    running, waiting = engine.stream(QUESTION, sampling=ENDLESS), engine.stream(QUESTION)
    next(running)
    engine.close()
    engine.close()
    assert running.completion.finish_reason == "cancelled"
    with pytest.raises(EdgeloraError, match="closed before this request was answered"):
        _ = waiting.completion
    with pytest.raises(EdgeloraError, match="engine is closed"):
        engine.chat("hello")


def test_an_engine_that_is_dropped_is_freed(base: Path) -> None:
    engine = Engine(base, threads=1)
    thread = next(t for t in threading.enumerate() if t.name == "edgelora-engine" and t is engine._worker._thread)
    dead = weakref.ref(engine)
    del engine
    gc.collect()
    thread.join(10)
    assert dead() is None
    assert not thread.is_alive()


def test_a_failed_constructor_leaves_no_thread(base: Path, tmp_path: Path) -> None:
    before = threading.active_count()
    for arguments in ((tmp_path / "missing.gguf", ()), (base, {"x": tmp_path / "missing.gguf"})):
        with pytest.raises(ModelFileError):
            Engine(*arguments)
    assert threading.active_count() == before


def test_ctrl_c_cancels_the_reply_and_the_engine_goes_on(base: Path) -> None:
    """A real SIGINT in a real process, while it waits for the reply."""
    script = (
        "import sys\n"
        "from edgelora.engine.engine import Engine\n"
        f"sampling = {ENDLESS!r}\n"
        "engine = Engine(sys.argv[1], n_ctx=100_000, threads=1)\n"
        "stream = engine.stream('hello', sampling=sampling)\n"
        "try:\n"
        "    for piece in stream:\n"
        "        print('.', end='', flush=True)\n"
        "except KeyboardInterrupt:\n"
        "    stream.cancel()  # it may have come while a piece was printed\n"
        "    print('interrupted', stream.completion.finish_reason)\n"
        "print(engine.chat('hello', sampling={'max_tokens': 1}).completion_tokens)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, base], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.read(1) == b"."
    process.send_signal(signal.SIGINT)
    start = time.monotonic()
    out, err = process.communicate(timeout=60)
    assert err == b""
    assert out.decode().lstrip(".").split() == ["interrupted", "cancelled", "1"]
    assert time.monotonic() - start < 10
    assert process.returncode == 0
