"""How rows go through the engine: how many at once, in which order, and in how much memory; the engine is a fake."""

from __future__ import annotations

import gc
import itertools
import json
import subprocess
import sys
import threading
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from edgelora.batch import BatchOptions, BatchSummary, Defaults, Selection, run_batch
from edgelora.errors import DataFileError, EdgeloraError, SettingsError
from edgelora.results import parallel_of
from tests.edgelora.fake_engine import FakeEngine, FakeStream


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def ids(path: Path) -> list[int]:
    return [json.loads(line)["id"] for line in path.read_text().splitlines()]


def run(engine: FakeEngine, source: Path, out: Path, **options: Any) -> BatchSummary:
    return run_batch(engine, source, out, options=BatchOptions(**options))  # type: ignore[arg-type]


def numbered(n: int, **more: Any) -> list[dict[str, Any]]:
    return [{"id": i, "prompt": f"{i:05}", **more} for i in range(n)]


class Late:
    """Lets no reply end before the one that is waited for, which comes last."""

    def __init__(self, last: str) -> None:
        self.last, self.others, self.release = last, 0, threading.Event()

    def __call__(self, stream: FakeStream) -> None:
        if self.last in stream.request.messages[-1]["content"]:  # type: ignore[index]
            self.release.wait(20)


def test_rows_are_written_as_they_are_done(tmp_path: Path) -> None:
    late = Late("00003")
    engine = FakeEngine(tmp_path, before_end=late)
    source, out = write_rows(tmp_path / "in.jsonl", numbered(200)), tmp_path / "out.jsonl"

    def seen(_row: Any, progress: Any) -> None:
        if progress.done == 199:
            late.release.set()

    run_batch(engine, source, out, on_row=seen)  # type: ignore[arg-type]
    assert sorted(ids(out)) == list(range(200))
    assert ids(out)[-1] == 3


def test_ordered_rows_wait_for_the_earlier_one_and_the_engine_for_them(tmp_path: Path) -> None:
    late = Late("00000")
    engine = FakeEngine(tmp_path, before_end=late)
    source, out = write_rows(tmp_path / "in.jsonl", numbered(3000)), tmp_path / "out.jsonl"
    worker = threading.Thread(target=lambda: run(engine, source, out, ordered=True))
    worker.start()
    held, under_way = 64, 32
    for _ in range(400):
        if len(engine.ended) >= held:
            break
        threading.Event().wait(0.01)
    threading.Event().wait(0.1)
    assert held <= len(engine.begun) <= held + under_way  # 2,900 rows were not even begun
    assert ids(out) == []
    late.release.set()
    worker.join(20)
    assert ids(out) == list(range(3000))


@pytest.mark.parametrize(("parallel", "under_way"), [(1, 32), (8, 32), (40, 80)])
def test_the_engine_has_twice_as_many_rows_as_it_writes_at_once(parallel: int, under_way: int, tmp_path: Path) -> None:
    full = threading.Event()

    def wait(_stream: FakeStream) -> None:
        if engine.most_under_way >= under_way:
            full.set()
        full.wait(5)

    engine = FakeEngine(tmp_path, parallel, before_end=wait)
    run(engine, write_rows(tmp_path / "in.jsonl", numbered(300)), tmp_path / "out.jsonl")
    assert engine.most_under_way == under_way


def test_neighbours_share_adapter_and_system_prompt_and_are_of_like_length(tmp_path: Path) -> None:
    rows = [
        {"prompt": "x" * (1 + i * 7 % 11), "adapter": ("red", "none", "blue")[i % 3], "system": f"s{i % 2}"}
        for i in range(120)
    ]
    engine = FakeEngine(tmp_path)
    run(engine, write_rows(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl")
    adapters = [text.partition(":")[0] for text in engine.begun]
    assert adapters == sorted(adapters)
    lengths = [len(text) for text in engine.begun]
    assert sum(a < b for a, b in itertools.pairwise(lengths)) <= 5  # six runs, each from long to short


def test_a_failure_of_the_engine_ends_the_batch_and_keeps_what_was_written(tmp_path: Path) -> None:
    def fail(stream: FakeStream) -> None:
        if "00050" in stream.request.messages[-1]["content"]:  # type: ignore[index]
            raise EdgeloraError("the device is gone")

    source, out = write_rows(tmp_path / "in.jsonl", numbered(300)), tmp_path / "out.jsonl"
    with pytest.raises(EdgeloraError, match="the device is gone"):
        run(FakeEngine(tmp_path, before_end=fail), source, out)
    kept = ids(out)
    assert 0 < len(kept) < 300
    summary = run(FakeEngine(tmp_path), source, out)
    assert (summary.resumed, sorted(ids(out))) == (len(kept), list(range(300)))


def test_ctrl_c_cancels_what_is_under_way(tmp_path: Path) -> None:
    cancelled = []

    def wait(stream: FakeStream) -> None:
        if "00001" not in stream.request.messages[-1]["content"]:  # type: ignore[index]
            cancelled.append(stream.cancelled.wait(20))

    def stop(_row: Any, _progress: Any) -> None:
        raise KeyboardInterrupt

    source = write_rows(tmp_path / "in.jsonl", numbered(300))
    with pytest.raises(KeyboardInterrupt, match="1 rows are in"):
        run_batch(FakeEngine(tmp_path, before_end=wait), source, tmp_path / "out.jsonl", on_row=stop)  # type: ignore[arg-type]
    assert len(cancelled) == 31
    assert all(cancelled)


def test_rows_decoded_in_another_number_are_not_mixed(tmp_path: Path) -> None:
    source, out = write_rows(tmp_path / "in.jsonl", numbered(20)), tmp_path / "out.jsonl"
    assert parallel_of(out) is None
    run(FakeEngine(tmp_path, parallel=3), source, out)
    assert parallel_of(out) == 3
    assert run(FakeEngine(tmp_path, parallel=3), source, out).resumed == 20
    with pytest.raises(DataFileError, match=r"decoded 3 rows at a time and not 4 \(--parallel\)"):
        run(FakeEngine(tmp_path, parallel=4), source, out)


@pytest.mark.parametrize("content", ["", "[1]\n", "{\n", '{"key": "a.b.c", "adapter": "red"}\n'])
def test_a_file_that_is_no_output_says_nothing_of_it(content: str, tmp_path: Path) -> None:
    (tmp_path / "out.jsonl").write_text(content)
    assert parallel_of(tmp_path / "out.jsonl") is None
    assert parallel_of("-") is None


def test_an_input_that_changes_meanwhile_is_noticed(tmp_path: Path) -> None:
    source, out = write_rows(tmp_path / "in.jsonl", numbered(2000)), tmp_path / "out.jsonl"

    def edit(_row: Any, progress: Any) -> None:
        if progress.done == 1:
            write_rows(source, numbered(2000, system="Be brief."))

    with pytest.raises(DataFileError, match="changed while the batch was running"):
        run_batch(FakeEngine(tmp_path), source, out, on_row=edit)  # type: ignore[arg-type]


class Forgetful(list[str]):
    def append(self, _item: str) -> None:
        pass


def kept_bytes(folder: Path, n: int, **options: Any) -> int:
    """Python's own memory as the last of `n` rows is written, and nothing is under way; of a run that does them all,
    or of one that finds all but one done, whichever is more."""
    engine, out, kept = FakeEngine(folder), folder / f"{n}.out.jsonl", list[int]()
    engine.begun = engine.ended = Forgetful()

    def measure(_row: Any, progress: Any) -> None:
        if progress.done == progress.total:
            gc.collect()
            kept.append(tracemalloc.get_traced_memory()[0])

    tracemalloc.start()
    try:
        for n_rows in (n, n + 1):
            source = write_rows(folder / f"{n}.jsonl", numbered(n_rows))
            run_batch(engine, source, out, options=BatchOptions(**options), on_row=measure)  # type: ignore[arg-type]
    finally:
        tracemalloc.stop()
    return max(kept)


@pytest.mark.parametrize("ordered", [False, True])
def test_memory_does_not_grow_with_the_rows(ordered: bool, tmp_path: Path) -> None:
    """40 bytes a row are less than any trace of one: a digest alone is 49."""
    kept_bytes(tmp_path, 10, ordered=ordered)
    few, many = (kept_bytes(tmp_path, n, ordered=ordered) for n in (600, 4600))
    assert many < few + 160_000


@pytest.mark.slow
def test_a_hundred_thousand_rows_take_no_more_memory_than_a_few(tmp_path: Path) -> None:
    """The whole process: SQLite fills its cache of 4 MiB, and then writes to its file."""
    few, many = (int(subprocess.check_output([sys.executable, "-c", PEAK, tmp_path, str(n)])) for n in (1000, 100_000))
    assert many < few + 16 * 1024


PEAK = """
import json, resource, sys
from pathlib import Path
from edgelora.batch import run_batch
from tests.edgelora.fake_engine import FakeEngine
from tests.edgelora.test_batch_flow import Forgetful
folder, n = Path(sys.argv[1]), int(sys.argv[2])
engine = FakeEngine(folder, 8)
engine.begun = engine.ended = Forgetful()
with open(folder / f"{n}.jsonl", "w") as file:
    file.writelines(json.dumps({"id": f"row-{i}", "prompt": f"Tell me about {i}."}) + "\\n" for i in range(n))
for _ in range(2):  # and once more, with everything done
    run_batch(engine, folder / f"{n}.jsonl", folder / f"{n}.out")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)  # KiB
"""


def test_a_limit_is_the_first_rows_and_a_later_run_goes_on(tmp_path: Path) -> None:
    engine, out = FakeEngine(tmp_path), tmp_path / "out.jsonl"
    source = write_rows(tmp_path / "in.jsonl", numbered(50))
    first = run(engine, source, out, selection=Selection(limit=10))
    assert (first.rows, first.written, sorted(ids(out))) == (10, 10, list(range(10)))
    assert run(engine, source, out).written == 40
    assert run(engine, source, out, selection=Selection(limit=10)).written == 0  # what is beyond is no stranger
    assert sorted(ids(out)) == list(range(50))


def test_a_sample_is_the_same_in_every_run_and_grows(tmp_path: Path) -> None:
    engine, source = FakeEngine(tmp_path), write_rows(tmp_path / "in.jsonl", numbered(400))
    drawn = {}
    for name, selection in (
        ("a", Selection(sample=40)),
        ("b", Selection(sample=40)),
        ("other", Selection(sample=40, seed=1)),
        ("more", Selection(sample=80)),
        ("of the first", Selection(sample=40, limit=100)),
    ):
        run(engine, source, tmp_path / name, selection=selection)
        drawn[name] = set(ids(tmp_path / name))
    assert drawn["a"] == drawn["b"] != drawn["other"]
    assert drawn["a"] < drawn["more"]
    assert [len(rows) for rows in drawn.values()] == [40, 40, 40, 80, 40]
    assert max(drawn["of the first"]) < 100
    assert 100 < sum(drawn["a"]) / 40 < 300  # from everywhere, not from one end
    resumed = run(engine, source, tmp_path / "a", selection=Selection(sample=80))
    assert (resumed.resumed, resumed.written) == (40, 40)


def test_equal_rows_are_drawn_apart(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.jsonl", [{"prompt": "same"}] * 100)
    summary = run(FakeEngine(tmp_path), source, tmp_path / "out.jsonl", selection=Selection(sample=30))
    assert summary.written == 30
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 30


def test_a_row_outside_the_selection_keeps_what_it_has(tmp_path: Path) -> None:
    engine, source, out = FakeEngine(tmp_path), write_rows(tmp_path / "in.jsonl", numbered(20)), tmp_path / "out.jsonl"
    run(engine, source, out)
    write_rows(source, [*numbered(19), {"id": 19, "prompt": "edited"}])
    before = out.read_bytes()
    run(engine, source, out, selection=Selection(limit=10), redo=True, retry_errors=True)
    assert out.read_bytes() == before
    with pytest.raises(DataFileError, match="id 19, whose row was edited"):
        run(engine, source, out)


def test_a_template_makes_the_prompts(tmp_path: Path) -> None:
    source, out = tmp_path / "in.csv", tmp_path / "out.jsonl"
    source.write_text("id,review,stars,adapter\n1,It broke.,1,red\n2,,5,\n")
    defaults = Defaults(prompt="{stars}: {review}")
    summary = run_batch(FakeEngine(tmp_path), source, out, defaults=defaults)  # type: ignore[arg-type]
    rows = {row["id"]: row for row in map(json.loads, out.read_text().splitlines())}
    assert (summary.errors, rows["1"]["text"], rows["2"]["text"]) == (0, "red: 1: It broke.", "none: 5: ")
    with pytest.raises(DataFileError, match="do not belong"):  # another template is another batch
        run_batch(FakeEngine(tmp_path), source, out, defaults=Defaults(prompt="{review}"))  # type: ignore[arg-type]


def test_a_column_that_no_row_has_ends_the_batch_before_it_begins(tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("review,stars\nx,1\n")
    write_rows(tmp_path / "in.jsonl", [{"review": "x"}, {"review": "y"}])
    defaults = Defaults(prompt="{reveiw}")
    cases = (("in.csv", SettingsError, "review, stars"), ("in.jsonl", DataFileError, "review"))
    for name, kind, known in cases:  # a header says at once what there is; without one, every row was asked
        with pytest.raises(kind, match=rf"names {{reveiw}}; the columns are {known}"):
            run_batch(FakeEngine(tmp_path), tmp_path / name, tmp_path / "out.jsonl", defaults=defaults)  # type: ignore[arg-type]
        assert not (tmp_path / "out.jsonl").exists()


def test_a_column_that_some_rows_lack_is_their_error(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.jsonl", [{"a": "x"}, {"b": "y"}, {"a": "x", "messages": []}])
    defaults, out = Defaults(prompt="{a}"), tmp_path / "out.jsonl"
    assert run_batch(FakeEngine(tmp_path), source, out, defaults=defaults).errors == 2  # type: ignore[arg-type]
    errors = {row["line"]: row.get("error", "") for row in map(json.loads, out.read_text().splitlines())}
    assert errors[1] == ""
    assert "names {a}; the columns are b" in errors[2]
    assert "only one of them can be the prompt" in errors[3]
