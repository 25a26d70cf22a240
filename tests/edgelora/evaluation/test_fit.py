"""`edgelora fit`: each quantization's numbers are those of an evaluation of that file alone, and one is picked."""

from __future__ import annotations

import importlib
import itertools
import json
import tempfile
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
import pytest
from click.testing import CliRunner, Result

from converters.base import convert_base
from converters.reader import read_header
from edgelora.adapter_conversion import adapter_from_folder
from edgelora.adapter_ref import AdapterRef
from edgelora.adapter_settings import AdapterSettings
from edgelora.cli import cli
from edgelora.cli.fit import MemorySize
from edgelora.contract import Contract
from edgelora.conversion import ConvertOptions, convert
from edgelora.engine.fit import serving_bytes
from edgelora.engine.model import Model
from edgelora.engine.scoring import Speed
from edgelora.evaluation.bootstrap import Interval, RowSums
from edgelora.evaluation.comparison import compare
from edgelora.evaluation.evaluate import EvalSettings, evaluate
from edgelora.evaluation.metrics import Metric
from edgelora.evaluation.quant_bench import Bench
from edgelora.evaluation.quant_candidate import Candidate, SweepSettings
from edgelora.evaluation.quant_repair import Repairs
from edgelora.evaluation.quant_sweep import explain, sweep
from edgelora.evaluation.rows import RowSettings
from edgelora.evaluation.settings import EngineSettings
from edgelora.resolution import contract_of
from edgelora.store import Store
from tests.conftest import ROOT, TINY_BASE
from tests.peft_folders import write_lora

ROWS = ROOT / "examples" / "data" / "support-eval.jsonl"
ENGINE = EngineSettings(threads=1, n_ctx=256, parallel=1)
SETTINGS = SweepSettings(
    ram_bytes=10**9, quants=("q8_0", "q3_k_m"), rows=RowSettings(limit=4), engine=ENGINE, resamples=200
)
LOSS = Metric("perplexity", lambda answer, row: None, is_share=False, is_lower_better=True, transform=np.exp)


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary files go."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def test_each_is_measured_as_an_evaluation_would(adapters: dict[str, Path], temporary: Path, tmp_path: Path) -> None:
    adapter, seen = AdapterRef("red", adapters["red"]), []

    def look(done: int, total: int, what: str) -> None:
        seen.append((done, total, what, len(list(temporary.rglob("*.gguf")))))

    found = sweep(ROWS, TINY_BASE, adapter, SETTINGS, look)
    assert [(each.name, each.fits) for each in found.candidates] == [("q8_0", True), ("q3_k_m", True)]
    for each in found.candidates:
        file = convert_base(TINY_BASE, tmp_path / f"{each.quant}.gguf", quant=each.quant).path
        alone = evaluate(
            ROWS,
            file,
            [adapter],
            settings=EvalSettings(rows=SETTINGS.rows, engine=ENGINE, metrics=("perplexity",), resamples=200),
        )
        assert each.file_bytes == file.stat().st_size
        assert each.interval == alone.measured["perplexity"]["red"].interval
        assert each.speed
        assert each.speed.decode > 0
    values = {each.name: each.interval.value for each in found.candidates if each.interval}
    assert found.picked.name == min(values, key=values.__getitem__)
    # One at a time, nothing in between, and nothing left.
    assert [each[:3] for each in seen] == [(0, 2, "q8_0"), (1, 2, "q3_k_m"), (2, 2, "")]
    assert max(each[3] for each in seen) <= 1
    assert not list(temporary.iterdir())


def test_what_does_not_fit_is_not_made(temporary: Path, tmp_path: Path) -> None:
    whole = sweep(ROWS, TINY_BASE, None, SETTINGS)
    large, small = whole.candidates
    out = tmp_path / "picked.gguf"
    tight = replace(SETTINGS, ram_bytes=large.memory_bytes - 1, out=out)
    made: list[str] = []
    found = sweep(ROWS, TINY_BASE, None, tight, lambda done, total, what: made.append(what))
    assert made == ["q3_k_m", ""]
    assert (found.candidates[0].fits, found.candidates[0].interval) == (False, None)
    assert (found.picked.name, found.adapter, found.path) == ("q3_k_m", "none", out)
    assert "q8_0 would need more" in found.why
    assert small.interval == found.picked.interval
    assert [path.name for path in tmp_path.iterdir() if path != temporary] == ["picked.gguf"]
    assert out.read_bytes() == convert_base(TINY_BASE, tmp_path / "own.gguf", quant="q3_k_m").path.read_bytes()


def test_importance_is_tried_beside(base: Path, tmp_path: Path) -> None:
    from converters.imatrix import write_imatrix
    from edgelora.engine.calibration import compute_imatrix

    text = " ".join(json.loads(line)["messages"][1]["content"] for line in ROWS.read_text().splitlines())
    write_imatrix(tmp_path / "im.gguf", compute_imatrix(base, text, chunk_size=64, chunks=2, threads=1))
    settings = replace(SETTINGS, quants=("q8_0", "q2_k", "iq2_m"), imatrix=tmp_path / "im.gguf")
    planned = Bench(base, None, settings, tmp_path).plan()
    assert sorted(each.name for each in planned) == ["iq2_m imatrix", "q2_k", "q2_k imatrix", "q8_0"]
    found = sweep(ROWS, base, None, replace(settings, quants=("q2_k",)))
    values = {each.name: each.interval.value for each in found.candidates if each.interval}
    assert values["q2_k"] != values["q2_k imatrix"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of weak effect: what quantization does to the base beneath it decides."""
    return write_lora(tmp_path_factory.mktemp("adapter") / "support", TINY_BASE, seed=1, strength=0.01)


@pytest.fixture(scope="module")
def talk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Conversations of the kind that the base was trained on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "examples" / "tiny-base")
        conversations = importlib.import_module("world").conversations(12345)
    path = tmp_path_factory.mktemp("talk") / "talk.jsonl"
    lines = [json.dumps({"messages": messages}) for messages in itertools.islice(conversations, 40)]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


FULL = 256  # all ranks: the base as it was before it was quantized
REPAIRED = replace(SETTINGS, quants=("f16", "q2_k"), repair_ranks=(4, FULL, FULL), rows=RowSettings(limit=12))


def tensors(path: Path) -> dict[str, bytes]:
    data = path.read_bytes()
    found = read_header(path).tensors.values()
    return {each.name: data[each.offset : each.offset + each.size_bytes] for each in found}


def test_repairs_are_tried_beside(folder: Path, talk: Path, temporary: Path, tmp_path: Path) -> None:
    out, adapter = tmp_path / "best.gguf", AdapterRef("support", folder)
    made: list[str] = []
    settings = replace(REPAIRED, quants=("q2_k",), out=out)
    found = sweep(talk, TINY_BASE, adapter, settings, lambda done, total, what: made.append(what))
    assert made == ["q2_k + repair 256", "q2_k + repair 4", "q2_k", ""]
    most, few, plain = found.candidates
    values = [each.interval.value for each in found.candidates if each.interval]
    assert values == sorted(values)
    assert values[0] < 0.98 * values[-1]
    assert (found.picked.name, found.path) == ("q2_k + repair 256", out)
    assert found.adapter_path == tmp_path / "best-support.gguf"
    assert sorted(path.name for path in tmp_path.iterdir() if path != temporary) == ["best-support.gguf", "best.gguf"]
    alone = evaluate(
        talk,
        out,
        [AdapterRef("support", found.adapter_path)],
        settings=EvalSettings(rows=REPAIRED.rows, engine=ENGINE, metrics=("perplexity",), resamples=200),
    )
    assert most.interval == alone.measured["perplexity"]["support"].interval
    unrepaired = convert(folder, tmp_path / "plain.gguf", ConvertOptions(base=TINY_BASE)).path
    added = found.adapter_path.stat().st_size - unrepaired.stat().st_size
    assert most.repair_bytes == most.file_bytes - plain.file_bytes == most.memory_bytes - plain.memory_bytes == added
    assert 0 < few.repair_bytes < added


@pytest.mark.slow
def test_repairs_are_what_convert_makes(folder: Path, talk: Path, tmp_path: Path) -> None:
    out = tmp_path / "best.gguf"
    settings = replace(REPAIRED, quants=("q2_k",), repair_ranks=(FULL,), out=out)
    found = sweep(talk, TINY_BASE, AdapterRef("support", folder), settings)
    asked = AdapterSettings(repair_rank=FULL, repair_text=talk)
    own = convert(folder, tmp_path / "own.gguf", ConvertOptions(base=out, adapter=asked)).path
    assert found.adapter_path
    assert tensors(found.adapter_path) == tensors(own)
    written, asked_for = (contract_of(path) for path in (found.adapter_path, own))
    assert written
    assert asked_for
    assert written.repair == asked_for.repair


def test_a_repair_counts_as_memory(folder: Path, talk: Path, tmp_path: Path) -> None:
    adapter = AdapterRef("support", folder)
    bench = Bench(TINY_BASE, adapter, REPAIRED, tmp_path)
    planned = {each.name: each for each in bench.plan()}
    assert sorted(planned) == ["f16", "q2_k", "q2_k + repair 256", "q2_k + repair 4"]  # nothing took from f16
    # Names and metadata are not planned: what fitted to the byte does not when it is made, and is left out.
    tight = replace(REPAIRED, quants=("q2_k",), ram_bytes=planned["q2_k + repair 4"].memory_bytes)
    found = sweep(talk, TINY_BASE, adapter, tight)
    assert [(each.name, each.fits, each.interval is None) for each in found.candidates] == [
        ("q2_k + repair 256", False, True),
        ("q2_k + repair 4", False, True),
        ("q2_k", True, False),
    ]
    assert (found.picked.name, found.adapter_path) == ("q2_k", None)


def test_a_repair_without_its_parts_is_refused_by_name(base: Path, folder: Path, tmp_path: Path) -> None:
    quantized = convert_base(TINY_BASE, tmp_path / "q2.gguf", quant="q2_k").path
    repaired = tmp_path / "repaired.gguf"
    Repairs((4,), TINY_BASE, AdapterRef("it", adapter_from_folder(folder, TINY_BASE, Store())), Contract(), "f16",
            None).write(quantized, 4, repaired)  # fmt: skip
    common = [ROWS, "--limit", 2, "--threads", 1, "--ctx-size", 256, "--repair-ranks"]
    for argv, said in (
        (["4", "--base", TINY_BASE], "--repair-ranks: there is no adapter whose ranks"),
        (["4", "--base", base], f"{base} is a GGUF file"),
        (["4", "--base", base], "there is no adapter"),  # both at once
        (["4", "--base", TINY_BASE, "--adapter", f"{folder}@0.5"], "the scale of adapter support, 0.5, would be"),
        (["4", "--base", TINY_BASE, "--adapter", repaired], "repairs a base already"),
        (["4,0", "--base", TINY_BASE], "0 is not in the range"),
        (["4,x", "--base", TINY_BASE], "'x' is not a valid integer"),
    ):
        failed = run(*common, *argv)
        assert (failed.exit_code, said in " ".join(failed.output.split())) == (2, True), failed.output


def test_the_repaired_adapter_is_told(folder: Path, talk: Path, tmp_path: Path) -> None:
    out = tmp_path / "best.gguf"
    argv = [talk, "--base", TINY_BASE, "--adapter", folder, "--limit", 12, "--threads", 1, "--ctx-size", 256,
            "--quants", "q2_k", "--repair-ranks", FULL, "-o", out]  # fmt: skip
    beside = tmp_path / "best-support.gguf"
    beside.touch()
    refused = run(*argv)
    assert (refused.exit_code, "best-support.gguf" in refused.output, out.exists()) == (3, True, False), refused.output
    result = run(*argv, "--force")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-2:] == [str(out), str(beside)]


def test_kv_is_what_llama_cpp_would_take(base: Path) -> None:
    header, model = read_header(base), Model(base)
    try:
        less, more = (serving_bytes(header, 1000, 10, n_ctx) for n_ctx in (100, 300))
        assert more - less == 200 * model.kv_bytes_per_token()
    finally:
        model.close()
    assert serving_bytes(header, 2000, 30, 100) - less == 1020
    assert serving_bytes(header, 0, 0, 300, "q8_0") - serving_bytes(header, 0, 0, 100, "q8_0") < more - less


@pytest.mark.parametrize(
    ("text", "size"),
    [("6GB", 6 * 10**9), ("6g", 6 * 10**9), ("5.5GiB", int(5.5 * 2**30)), ("800 MB", 8 * 10**8), ("123", 123)],
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert MemorySize().convert(text, None, None) == size


@pytest.mark.parametrize("text", ["6XB", "", "-1G", "0", "six", "GB", "1e9"])
def test_what_is_no_size_is_told(text: str) -> None:
    with pytest.raises(click.BadParameter, match="is no size"):
        MemorySize().convert(text, None, None)


def candidate(name: str, size: int, losses: list[float], *, fits: bool = True) -> Candidate:
    sums = RowSums(np.array(losses), np.ones(len(losses)), np.exp)
    interval = Interval(sums.value, sums.value, sums.value)
    return Candidate(name, False, size, size, fits, sums if fits else None, interval if fits else None, Speed(1, 1))


def test_the_reason_names_what_is_smaller_and_as_good() -> None:
    rows = [float(n % 5) for n in range(40)]
    noise = [value + (0.3 if n % 2 else -0.29) for n, value in enumerate(rows)]
    best, smaller, least = (candidate("q8_0", 100, rows), candidate("q4_k_m", 60, noise),
                            candidate("q2_k", 40, [value + 1 for value in rows]))  # fmt: skip
    too_large = candidate("f16", 200, rows, fits=False)
    made = [too_large, best]
    for each in (smaller, least):
        assert each.sums
        assert best.sums
        made.append(replace(each, compared=compare(LOSS, each.sums, best.sums, "q8_0", resamples=500)))
    said = explain(made, best, LOSS, 150_000_000)
    assert said == (
        "q8_0 has the best perplexity of the 3 that fit into 150 MB; f16 would need more. "
        "q4_k_m is 40% smaller, and not measurably worse on these rows."
    )
    assert explain([best], best, LOSS, 6 * 10**9) == ("q8_0 has the best perplexity, the only one that fits into 6 GB.")


def run(*argv: object) -> Result:
    return CliRunner().invoke(cli, ["fit", *map(str, argv)])


def test_as_it_is_typed(adapters: dict[str, Path], tmp_path: Path) -> None:
    common = [ROWS, "--base", TINY_BASE, "--adapter", adapters["red"], "--limit", 3, "--threads", 1, "--ctx-size", 256]
    out = tmp_path / "best.gguf"
    result = run(*common, "--quants", "q4_k_m", "--ram", "1GB", "-o", out)
    assert result.exit_code == 0, result.output
    assert "picked" in result.stdout
    assert result.stdout.splitlines()[-1] == str(out)
    assert run(*common, "--quants", "q4_k_m", "-o", out).exit_code == 3  # there already
    told = json.loads(run(*common, "--quants", "q4_k_m", "--json").stdout)
    assert (told["picked"], told["adapter"], told["candidates"][0]["file_bytes"]) == (
        "q4_k_m",
        "red",
        out.stat().st_size,
    )
    for argv, code, said in (
        (["--ram", "1MB"], 1, "nothing fits into 1 MB: the smallest, q2_k, takes"),
        (["--quants", "q9"], 2, "q9"),
        (["--metric", "bleu"], 2, "unknown metric"),
        (["--quants", "iq2_xxs"], 3, "imatrix"),
        (["-o", tmp_path / "missing" / "best.gguf"], 3, "there is no folder"),
        (["--base", adapters["red"]], 3, "is an adapter, not a base"),
    ):
        failed = run(*common, *argv)
        assert (failed.exit_code, said in failed.output) == (code, True), failed.output
