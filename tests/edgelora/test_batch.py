"""The batch: bad rows, resuming, kill -9, a full disk, two processes; the engine is the real one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edgelora.batch import BatchOptions, BatchSummary, Defaults, Progress, run_batch
from edgelora.engine.engine import Engine
from edgelora.errors import DataFileError
from edgelora.results import encode, open_results
from tests.edgelora.batch_worker import WORKER, read_rows, some_rows, start_worker, write_rows
from tests.edgelora.conftest import write_adapter

DEFAULTS = Defaults(sampling={"temperature": 0.8, "max_tokens": 8})


@pytest.fixture(scope="module")
def engine(base: Path, adapters: dict[str, Path]) -> Iterator[Engine]:
    with Engine(base, adapters, threads=1, parallel=4, reproducible=True) as engine:
        yield engine


def user(content: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": content}]


def run(
    engine: Engine, rows: Path, out: Path | str, *, defaults: Defaults = DEFAULTS, on_row: Any = None, **options: Any
) -> BatchSummary:
    how = BatchOptions(**{"ordered": True, **options})
    return run_batch(engine, rows, out, defaults=defaults, options=how, on_row=on_row)


def test_each_row_is_answered_by_the_adapter_it_names(engine: Engine, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    summary = run(engine, write_rows(tmp_path / "in.jsonl", some_rows()), out)
    rows = read_rows(out)
    assert [row["id"] for row in rows] == list(range(9))
    for row, asked in zip(rows, some_rows(), strict=True):
        assert row["adapter"] == asked["adapter"]
        assert row["adapter_hash"] == (engine.adapter(asked["adapter"]).content_hash or None)
        assert row["finish_reason"] in ("stop", "length")
        assert 0 < row["usage"]["completion_tokens"] <= 8
        sampling = {"temperature": 0.8, "max_tokens": 8, "seed": int(row["key"][:8], 16)}
        asked_again = engine.chat(asked["prompt"], adapter=asked["adapter"], sampling=sampling, deterministic=True)
        assert row["text"] == asked_again.text
    assert (summary.rows, summary.written, summary.errors, summary.resumed) == (9, 9, 0, 0)
    assert summary.completion_tokens == sum(row["usage"]["completion_tokens"] for row in rows)
    assert {name: figures.rows for name, figures in summary.by_adapter.items()} == {"none": 3, "red": 3, "blue": 3}
    assert not out.with_name("out.jsonl.lock").exists()


def test_rows_without_a_seed_are_reproducible(engine: Engine, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "in.jsonl", [*some_rows(), {"id": "own", "prompt": "x", "seed": 5}])
    hot = {"temperature": 3.0, "max_tokens": 12}
    for name, more in (("a", {}), ("b", {"seed": None, "top_k": None}), ("c", {"seed": 5})):
        run(engine, rows, tmp_path / name, defaults=Defaults(sampling={**hot, **more}))
    a, b, c = ([row["text"] for row in read_rows(tmp_path / name)] for name in "abc")
    assert a == b
    assert a[:-1] != c[:-1]
    assert a[-1] == c[-1]


def test_a_row_has_its_own_settings(engine: Engine, adapters: dict[str, Path], tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "Who keeps the inn?"}]
    by_path = f"{adapters['red']}@0.5"
    rows = [
        {"prompt": "Who keeps the inn?", "max_tokens": 2},
        {"messages": messages, "max_tokens": 2},
        {"prompt": "x", "system": "Be brief.", "max_tokens": 2, "metadata": {"customer": 7}},
        {"prompt": "x", "adapter": by_path, "temperature": 0},
        {"prompt": "x", "adapter": "red", "scale": 0.5, "temperature": 0},
        {"prompt": "x", "adapter": "red", "temperature": 0, "stop": [" "]},
    ]
    out = tmp_path / "out.jsonl"
    assert run(engine, write_rows(tmp_path / "in.jsonl", rows), out).errors == 0
    short, same, system, path, scaled, stopped = read_rows(out)
    assert [row["line"] for row in read_rows(out)] == [1, 2, 3, 4, 5, 6]
    assert short["usage"] == same["usage"]
    assert short["usage"]["completion_tokens"] <= 2
    assert system["metadata"] == {"customer": 7}
    assert system["usage"]["prompt_tokens"] > engine.count_tokens("x")
    assert (path["text"], path["adapter"]) == (scaled["text"], by_path)
    assert " " not in stopped["text"]


def test_logprobs_are_written_where_a_row_asks_for_them(engine: Engine, tmp_path: Path) -> None:
    openai = {"custom_id": "q", "body": {"logprobs": True, "top_logprobs": 2, "messages": user("Hello!")}}
    for name, rows in (("plain", [{"prompt": "x"}, {"prompt": "x", "logprobs": 2}]), ("openai", [openai])):
        out = tmp_path / f"{name}.out"
        assert run(engine, write_rows(tmp_path / name, rows), out).errors == 0
        row = read_rows(out)[-1]
        found = row["logprobs"] if name == "plain" else row["response"]["body"]["choices"][0]["logprobs"]["content"]
        assert 0 < len(found) <= 8
        for token in found:
            assert len(token["top_logprobs"]) == 2
            assert token["logprob"] <= 0
            assert bytes(token["bytes"]).decode("utf-8", "replace") == token["token"]
    assert "logprobs" not in read_rows(tmp_path / "plain.out")[0]


def test_a_row_that_was_cut_to_fit_says_so_and_is_another_result(
    engine: Engine, base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    source, out = (
        write_rows(tmp_path / "in.jsonl", [{"prompt": "x"}, {"prompt": "word " * 1000}]),
        tmp_path / "out.jsonl",
    )
    assert run(engine, source, out).errors == 1
    usages = []
    for n_ctx in (256, 512):
        with Engine(
            base, adapters, threads=1, parallel=4, reproducible=True, on_overflow="truncate-middle", n_ctx=n_ctx
        ) as cutting:
            assert run(cutting, source, out, redo=True).errors == 0
            assert run(cutting, source, out).resumed == 2
        usages += [row["usage"] for row in read_rows(out)]
    assert [usage.get("dropped_tokens", 0) > 0 for usage in usages] == [False, True] * 2
    assert usages[1]["dropped_tokens"] > usages[3]["dropped_tokens"]


BAD_ROWS: dict[str, tuple[Any, str]] = {
    "not JSON": ("{bad", "not JSON"),
    "not an object": ("[1]", "a JSON list, expected an object"),
    "nothing to answer": ({"id": 1}, "expected either `prompt` or `messages`"),
    "two questions": ({"prompt": "a", "messages": []}, "expected either `prompt` or `messages`"),
    "a prompt that is no text": ({"prompt": 7}, "expected text in: prompt"),
    "an empty conversation": ({"messages": []}, "`messages` is empty"),
    "an unknown role": ({"messages": [{"role": "robot", "content": "x"}]}, "role 'robot'"),
    "an unknown field": ({"prompt": "x", "max_token": 3}, "unknown fields: max_token"),
    "a setting out of range": ({"prompt": "x", "top_p": 3}, "top_p is 3"),
    "an unknown adapter": ({"prompt": "x", "adapter": "green"}, "unknown adapter 'green'"),
    "an adapter that is none": ({"prompt": "x", "adapter": __file__}, "not a GGUF file"),
    "too long": ({"prompt": "word " * 1000}, "tokens long"),
    "two system prompts": ({"system": "a", "messages": [{"role": "system", "content": "b"}]}, "given twice"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_row_becomes_an_error_row_and_the_work_goes_on(case: str, engine: Engine, tmp_path: Path) -> None:
    bad, message = BAD_ROWS[case]
    out = tmp_path / "out.jsonl"
    summary = run(engine, write_rows(tmp_path / "in.jsonl", [{"prompt": "a"}, bad, {"prompt": "b"}]), out)
    first, error, last = read_rows(out)
    assert message in error["error"]
    assert "text" not in error
    assert "text" in first
    assert "text" in last
    assert (summary.written, summary.errors, summary.all_errors) == (3, 1, 1)


def test_an_id_used_twice_is_an_error_row(engine: Engine, tmp_path: Path) -> None:
    rows = write_rows(
        tmp_path / "in.jsonl", [{"id": "a", "prompt": "x"}, {"id": "b", "prompt": "x"}, {"id": "a", "prompt": "y"}]
    )
    out = tmp_path / "out.jsonl"
    assert run(engine, rows, out).errors == 1
    assert read_rows(out)[2]["error"] == "the id 'a' was used on line 1 already"
    assert read_rows(out)[2]["line"] == 3
    assert run(engine, rows, out).written == 0


def test_no_name_of_an_adapter_and_no_number_ends_the_batch(engine: Engine, tmp_path: Path) -> None:
    names = ["a\0b", "~nouser/x", "x" * 300, "x=" + "y" * 300, "x@1e999"]
    bad = [*({"prompt": "x", "adapter": name} for name in names), '{"prompt": "x", "seed": ' + "9" * 5000 + "}"]
    every = "".join(map(chr, [*range(0xE000, 0xF900)]))
    out = tmp_path / "out.jsonl"
    summary = run(engine, write_rows(tmp_path / "in.jsonl", [*bad, {"prompt": "fine"}, {"prompt": every}]), out)
    rows = read_rows(out)
    assert ["error" in row for row in rows] == [True] * len(bad) + [False, True]
    assert "tokens long" in rows[-1]["error"]
    assert summary.errors == len(bad) + 1


def test_an_empty_system_prompt_stands_for_none(engine: Engine, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "in.jsonl", [{"prompt": "x"}, {"prompt": "x", "system": ""}])
    out = tmp_path / "out.jsonl"
    run(engine, rows, out, defaults=Defaults(system="Be brief.", sampling=DEFAULTS.sampling))
    default, none = (row["usage"]["prompt_tokens"] for row in read_rows(out))
    assert none == engine.count_tokens("x") < default


@pytest.mark.parametrize("content", [bytes(range(256)) * 20, b"hello\nworld\n", b"[1]\n"])
def test_an_input_without_any_row_is_refused(content: bytes, engine: Engine, tmp_path: Path) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(content)
    with pytest.raises(DataFileError, match="no line is a row; line 1 is"):
        run(engine, source, out)
    assert not out.exists()


def test_a_pipe_as_input(engine: Engine, tmp_path: Path) -> None:
    rows, pipe = write_rows(tmp_path / "in.jsonl", some_rows()), tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_bytes(rows.read_bytes()))
    writer.start()
    assert run(engine, pipe, tmp_path / "out.jsonl").written == 9
    writer.join()


def test_csv_metadata_is_decoded_and_a_bad_byte_spoils_its_row_only(engine: Engine, tmp_path: Path) -> None:
    source, out = tmp_path / "in.csv", tmp_path / "out.jsonl"
    source.write_bytes(b'prompt,metadata\na,"{""n"": 1}"\n\xff,\nb,{\nc,\n')
    run(engine, source, out)
    good, bytes_, json_, last = read_rows(out)
    assert good["metadata"] == {"n": 1}
    assert bytes_["error"] == "not UTF-8 text"
    assert "column metadata" in json_["error"]
    assert "text" in last


def test_csv_rows(engine: Engine, tmp_path: Path) -> None:
    source = tmp_path / "in.csv"
    source.write_text('id,prompt,adapter,max_tokens,temperature\n1,"Who, then?",red,2,0\n2,x,,two,\n3,y,,3,0.5\n')
    out = tmp_path / "out.jsonl"
    assert run(engine, source, out).errors == 1
    one, two, three = read_rows(out)
    assert (one["id"], one["adapter"]) == ("1", "red")
    assert one["usage"]["completion_tokens"] <= 2
    assert two["error"] == "column max_tokens holds 'two', which cannot be read as max_tokens"
    assert three["usage"]["completion_tokens"] <= 3


def test_a_finished_batch_is_left_as_it_is(engine: Engine, tmp_path: Path) -> None:
    rows, out = write_rows(tmp_path / "in.jsonl", [*some_rows(), {"prompt": 7}]), tmp_path / "out.jsonl"
    run(engine, rows, out)
    before = out.read_bytes()
    summary = run(engine, rows, out)
    assert out.read_bytes() == before
    assert (summary.resumed, summary.written, summary.errors, summary.all_errors) == (10, 0, 0, 1)


@pytest.mark.parametrize("cut", [1, 40, 0])
def test_a_torn_last_line_is_done_again(cut: int, engine: Engine, tmp_path: Path) -> None:
    rows, out = write_rows(tmp_path / "in.jsonl", some_rows()), tmp_path / "out.jsonl"
    run(engine, rows, out)
    whole = out.read_bytes()
    lines = whole.splitlines(keepends=True)
    out.write_bytes(b"".join(lines[:4]) + lines[4][: -cut or None][: len(lines[4]) - cut])
    summary = run(engine, rows, out)
    assert out.read_bytes() == whole
    assert summary.resumed == (5 if cut == 0 else 4)


def test_rows_that_are_missing_are_done_and_no_other(engine: Engine, tmp_path: Path) -> None:
    rows, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    run(engine, write_rows(rows, some_rows(4)), out)
    assert run(engine, write_rows(rows, some_rows(9)), out).written == 5
    assert [row["id"] for row in read_rows(out)] == list(range(9))


@pytest.mark.parametrize("with_id", [True, False])
def test_an_edited_row_is_refused_and_done_again_with_redo(with_id: bool, engine: Engine, tmp_path: Path) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    rows = [row if with_id else {**row, "id": None} for row in some_rows()]
    run(engine, write_rows(source, rows), out)
    before = out.read_bytes()
    rows[4] = {**rows[4], "prompt": "Something else."}
    with pytest.raises(DataFileError, match=r"1 of its rows do not belong.*edited"):
        run(engine, write_rows(source, rows), out)
    assert out.read_bytes() == before
    assert run(engine, source, out, redo=True).written == 1
    old = before.splitlines(keepends=True)
    assert out.read_bytes().startswith(b"".join(old[:4] + old[5:]))
    assert len(read_rows(out)) == 9


def test_the_results_of_another_input_are_not_dropped(engine: Engine, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    run(engine, write_rows(tmp_path / "a.jsonl", some_rows()), out)
    before = out.read_bytes()
    other = write_rows(tmp_path / "b.jsonl", [{"id": i, "prompt": f"Other {i}."} for i in range(9)])
    with pytest.raises(DataFileError, match="9 of its rows do not belong"):
        run(engine, other, out)
    assert out.read_bytes() == before


def test_a_line_inserted_above_rows_without_id_costs_nothing(engine: Engine, tmp_path: Path) -> None:
    rows = [{"prompt": "a"}, {"prompt": "b"}, {"prompt": "a"}]
    out = tmp_path / "out.jsonl"
    run(engine, write_rows(tmp_path / "in.jsonl", rows), out)
    before = out.read_bytes()
    summary = run(engine, write_rows(tmp_path / "in.jsonl", [{"prompt": "new"}, *rows, {"prompt": "a"}]), out)
    assert (summary.resumed, summary.written) == (3, 2)
    assert out.read_bytes().startswith(before)
    assert [row["line"] for row in read_rows(out)] == [1, 2, 3, 1, 5]


def test_what_is_redone_is_kept_until_it_is_replaced(engine: Engine, tmp_path: Path) -> None:
    rows, out = write_rows(tmp_path / "in.jsonl", some_rows()), tmp_path / "out.jsonl"
    run(engine, rows, out)
    before = out.read_bytes()

    def stop(_row: Any, progress: Progress) -> None:
        if progress.done == 3:
            raise KeyboardInterrupt

    cold = {"redo": True, "defaults": Defaults(sampling={"temperature": 0, "max_tokens": 4})}
    with pytest.raises(KeyboardInterrupt, match=r"3 rows are in .*; run the same command to go on"):
        run(engine, rows, out, on_row=stop, **cold)
    assert out.read_bytes().startswith(before)
    summary = run(engine, rows, out, **cold)
    assert (summary.resumed, summary.written) == (3, 6)
    run(engine, rows, tmp_path / "fresh.jsonl", **cold)
    assert out.read_bytes() == (tmp_path / "fresh.jsonl").read_bytes()


def test_an_error_and_the_later_result_of_a_row_without_id(engine: Engine, tmp_path: Path) -> None:
    rows, out = write_rows(tmp_path / "in.jsonl", [{"prompt": "a"}]), tmp_path / "out.jsonl"
    run(engine, rows, out)
    good = out.read_bytes()
    bad = encode({"line": 1, "error": "it failed", **{k: read_rows(out)[0][k] for k in ("adapter", "key")}})
    for mixed in (bad + good, good + bad):
        out.write_bytes(mixed)
        assert run(engine, rows, out).written == 0
        assert out.read_bytes() == good


def test_errors_are_kept_unless_asked_or_answerable_now(
    engine: Engine, adapters: dict[str, Path], tmp_path: Path
) -> None:
    late = tmp_path / "late.gguf"
    rows = write_rows(tmp_path / "in.jsonl", [{"id": 1, "prompt": "x", "adapter": str(late)}, {"id": 2, "prompt": 7}])
    out = tmp_path / "out.jsonl"
    assert run(engine, rows, out).errors == 2
    assert run(engine, rows, out).written == 0
    assert run(engine, rows, out, retry_errors=True).written == 2
    late.write_bytes(adapters["red"].read_bytes())
    assert run(engine, rows, out).written == 1
    assert {row["id"]: "text" in row for row in read_rows(out)} == {1: True, 2: False}


def stranger_cases() -> dict[str, dict[str, Any]]:
    return {
        "other settings": {"defaults": Defaults(sampling={"temperature": 0.8, "max_tokens": 4})},
        "another system prompt": {"defaults": Defaults(system="Be brief.", sampling=DEFAULTS.sampling)},
        "a retrained adapter": {"retrain": True},
        "another type of KV": {"engine": {"kv_type": "q8_0"}},
        "another base": {"quant": "q8_0"},
        "another input": {"rows": [{"id": "z", "prompt": "x"}]},
    }


@pytest.mark.parametrize("case", stranger_cases())
def test_results_of_another_batch_are_refused_and_not_mixed(
    case: str, bases: dict[str, Path], adapters: dict[str, Path], tmp_path: Path
) -> None:
    change = stranger_cases()[case]
    own = {name: tmp_path / f"{name}.gguf" for name in adapters}
    for name, path in own.items():
        path.write_bytes(adapters[name].read_bytes())
    rows, out = write_rows(tmp_path / "in.jsonl", some_rows()), tmp_path / "out.jsonl"
    with Engine(bases["f32"], own, threads=1) as engine:
        run(engine, rows, out)
    before = out.read_bytes()
    if "retrain" in change:
        write_adapter(own["blue"], bases["f32"], seed=99)
    if "rows" in change:
        write_rows(rows, change["rows"])
    options = {key: value for key, value in change.items() if key == "defaults"}
    with Engine(bases[change.get("quant", "f32")], own, threads=1, **change.get("engine", {})) as engine:
        with pytest.raises(DataFileError, match="do not belong to this batch") as caught:
            run(engine, rows, out, **options)
        assert out.read_bytes() == before
        assert "--redo" in caught.value.hint
        redone = run(engine, rows, out, redo=True, **options)
        assert redone.written == {"a retrained adapter": 3, "another input": 1}.get(case, 9)
        fresh = tmp_path / "fresh.jsonl"
        run(engine, rows, fresh, **options)
    assert sorted(out.read_text().splitlines()) == sorted(fresh.read_text().splitlines())


@pytest.mark.parametrize(
    "content",
    [
        "hello\n",
        '{"id": 1}\n',
        "[1]\n",
        '{"id": 1, "text": "x"}\n',
        '{"id": 1, "prompt": "x"}',
        '{"id": 1, "prompt": "x',
        '{"id": 1, "prompt": "x"}\n{"id": 2, "prompt": "y"}',
        "my notes",
        "notes\nand a last line",
        '{"a": 1}\n{"b',
        "\x00",
    ],
)
def test_a_file_that_is_no_batch_output_is_not_touched(content: str, engine: Engine, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text(content)
    for redo in (False, True):
        with pytest.raises(DataFileError) as caught:
            run(engine, write_rows(tmp_path / "in.jsonl", some_rows()), out, redo=redo)
        assert "--redo" not in caught.value.hint
        assert out.read_text() == content


def test_a_refused_run_does_not_cut_a_torn_line(engine: Engine, tmp_path: Path) -> None:
    rows, out = write_rows(tmp_path / "in.jsonl", some_rows()), tmp_path / "out.jsonl"
    run(engine, rows, out)
    torn = out.read_bytes()[:-7]
    out.write_bytes(torn)
    with pytest.raises(DataFileError, match="do not belong"):
        run(engine, write_rows(rows, [{"id": "z", "prompt": "x"}]), out)
    assert out.read_bytes() == torn


def test_a_link_to_the_output_is_the_same_output(engine: Engine, tmp_path: Path) -> None:
    rows, out, link = write_rows(tmp_path / "in.jsonl", some_rows()), tmp_path / "out.jsonl", tmp_path / "link.jsonl"
    run(engine, rows, out)
    out.chmod(0o640)
    link.symlink_to(out)
    with open_results(out), pytest.raises(DataFileError, match="another process is writing it"):
        open_results(link)
    run(engine, rows, link, redo=True, defaults=Defaults(sampling={"temperature": 0, "max_tokens": 2}))
    assert link.is_symlink()
    assert out.stat().st_mode & 0o777 == 0o640
    assert len(read_rows(out)) == 9


def test_the_input_is_never_the_output(engine: Engine, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "in.jsonl", some_rows())
    with pytest.raises(DataFileError, match="is the input too"):
        run(engine, rows, rows)


@pytest.mark.parametrize("content", [None, "", "\n\n"])
def test_no_rows_at_all(content: str | None, engine: Engine, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    if content is not None:
        source.write_text(content)
    with pytest.raises(DataFileError, match=r"no rows|no such file"):
        run(engine, source, tmp_path / "out.jsonl")


def test_a_second_process_is_told(engine: Engine, tmp_path: Path) -> None:
    rows, out = write_rows(tmp_path / "in.jsonl", some_rows()), tmp_path / "out.jsonl"
    script = (
        "import sys; from edgelora.results import open_results\n"
        "results = open_results(sys.argv[1]); print('open', flush=True); input()"
    )
    other = subprocess.Popen([sys.executable, "-c", script, out], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdout is not None
    assert other.stdout.readline() == b"open\n"
    with pytest.raises(DataFileError, match="another process is writing it"):
        run(engine, rows, out)
    other.kill()
    other.communicate()
    assert run(engine, rows, out).written == 9  # a lock dies with its process


def test_ctrl_c_keeps_what_was_written(base: Path, adapters: dict[str, Path], engine: Engine, tmp_path: Path) -> None:
    rows, out = write_rows(tmp_path / "in.jsonl", some_rows(3000)), tmp_path / "out.jsonl"
    worker = start_worker(base, adapters, rows, out, "any")
    assert worker.stdout is not None
    worker.stdout.read(5)
    worker.send_signal(signal.SIGINT)
    _, error = worker.communicate(timeout=60)
    assert error.rstrip().endswith(b"run the same command to go on"), (error, len(read_rows(out)))
    assert out.read_bytes().endswith(b"\n")
    kept = len(read_rows(out))
    assert 5 <= kept < 3000
    assert not out.with_name("out.jsonl.lock").exists()
    seen = []

    def stop(_row: Any, progress: Progress) -> None:
        seen.append(progress.done)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(engine, rows, out, on_row=stop)
    assert seen == [kept + 1]


FULL = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))  # a disk with room for 1,000 bytes
from edgelora.errors import DataFileError
from edgelora.results import open_results
try:
    with open_results(sys.argv[1]) as results:
        for i in range(100):
            results.append({"id": i, "text": "x" * 40, "adapter": "none", "key": "k"})
except DataFileError as error:
    print(error.message, error.hint)
"""


def test_a_full_disk_keeps_whole_rows_and_says_so(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    run = subprocess.run([sys.executable, "-c", FULL, out], capture_output=True, text=True, check=True)
    rows = read_rows(out)
    assert 5 < len(rows) < 20
    assert out.stat().st_size == sum(len(encode(row)) for row in rows)
    assert f"after {len(rows)} rows of this run; every whole row is kept" in run.stdout
    assert "run the same command again" in run.stdout


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_device_is_an_error_too(engine: Engine, tmp_path: Path) -> None:
    with pytest.raises(DataFileError, match="/dev/full: No space left on device after 0 rows"):
        run(engine, write_rows(tmp_path / "in.jsonl", some_rows()), "/dev/full")


@pytest.mark.parametrize("output", ["missing/out.jsonl", "."])
def test_an_output_that_cannot_be_written(output: str, engine: Engine, tmp_path: Path) -> None:
    with pytest.raises(DataFileError, match="cannot be written"):
        run(engine, write_rows(tmp_path / "in.jsonl", some_rows()), tmp_path / output)


def test_standard_input_and_output(base: Path, adapters: dict[str, Path], engine: Engine, tmp_path: Path) -> None:
    rows, out = write_rows(tmp_path / "in.jsonl", some_rows()), tmp_path / "out.jsonl"
    run(engine, rows, out)
    script = WORKER.replace(', on_row=lambda *_: print(".", end="", flush=True)', "")
    command = [sys.executable, "-c", script, base, adapters["red"], adapters["blue"], "-", "-", "ordered"]
    piped = subprocess.run(command, input=rows.read_bytes(), capture_output=True, check=True)
    assert piped.stdout == out.read_bytes()
    assert piped.stderr == b""


def test_a_lone_surrogate_can_be_written(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    with open_results(out) as results:
        results.append({"id": "\ud800", "text": "é"})
    assert read_rows(out) == [{"id": "\ud800", "text": "é"}]


REWRITE = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from edgelora.errors import DataFileError
from edgelora.results import open_results
with open_results(sys.argv[1]) as results:
    resource.setrlimit(resource.RLIMIT_FSIZE, (5, 5))
    try:
        results.drop({1})
    except DataFileError as error:
        print(error.message)
"""


def test_a_rewrite_that_fails_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    out.write_bytes(encode({"id": 1}) + encode({"id": 2}))
    run = subprocess.run([sys.executable, "-c", REWRITE, out], capture_output=True, text=True, check=True)
    assert "is as it was" in run.stdout
    assert len(read_rows(out)) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]
