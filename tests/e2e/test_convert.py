"""`edgelora convert` on the real command line: every way to ask for a base, what is printed where, and what is left."""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

from converters.base_file import read_base_header
from converters.imatrix import ImportanceMatrix, read_imatrix
from converters.reader import read_header
from edgelora.cli import cli
from tests.conftest import TINY_BASE
from tests.converters.hub_server import Hub, Repository, serving
from tests.converters.test_imatrix import legacy_bytes
from tests.e2e.test_bad_input import EDGELORA, make_large, refused
from tests.e2e.test_bad_input import run as run_process
from tests.equivalence.gguf_models import stored
from tests.peft_folders import write_lora

WORDS = ["the", "miller", "of", "Fennick", "told", "a", "fisherman", "that", "bread", "and", "boats", "need", "Storm"]
IN_LAYERS = "blk."


def run(*arguments: object, cwd: Path | None = None, **options: object) -> subprocess.CompletedProcess[str]:
    """The command line, in this process where nothing about the process is asked for: it starts in no time."""
    if options:
        return run_process(*arguments, cwd=cwd, **options)
    with contextlib.chdir(cwd or Path.cwd()):
        result = CliRunner().invoke(cli, [*map(str, arguments)])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return subprocess.CompletedProcess([], result.exit_code, result.stdout, result.stderr)


def converted(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    """A conversion that has to work: the path alone is on stdout, with its size."""
    result = run("convert", *arguments, **options)
    assert result.returncode == 0, result.stderr
    return result


def types(path: Path) -> dict[str, str]:
    return {name: tensor.type_name for name, tensor in read_base_header(path).tensors.items()}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of a few windows."""
    path = tmp_path_factory.mktemp("text") / "held out.txt"
    path.write_text(" ".join(random.Random(0).choices(WORDS, k=3000)))
    return path


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    random_ = random.Random(1)
    messages = [
        {
            "messages": [
                {"role": role, "content": " ".join(random_.choices(WORDS, k=20))} for role in ("user", "assistant")
            ]
        }
        for _ in range(60)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in messages))
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """A folder with what several tests look at: `bf16.gguf`, and `iq2.gguf` with its `imatrix.gguf`."""
    folder = tmp_path_factory.mktemp("made")
    converted(TINY_BASE, "--quant", "bf16", "-o", folder / "bf16.gguf")
    measure = ("--calibrate", text, "--calibrate-chunks", 2, "--save-imatrix", folder / "imatrix.gguf")
    converted(TINY_BASE, "--quant", "iq2_xs", *measure, "-o", folder / "iq2.gguf")
    return folder


@pytest.fixture(scope="module")
def peft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lora(tmp_path_factory.mktemp("peft") / "strong", TINY_BASE, seed=1, strength=1.0)


# From where


def test_a_gguf_is_quantized_as_its_folder_is(made: Path, tmp_path: Path) -> None:
    result = run_process("convert", made / "bf16.gguf", "--quant", "q4_k_m", "-o", tmp_path / "again.gguf")
    assert result.returncode == 0
    assert result.stdout == f"{tmp_path}/again.gguf  1.9 MB\n"
    assert f"Next: edgelora chat --base {tmp_path}/again.gguf" in result.stderr
    converted(TINY_BASE, "--quant", "q4_k_m", "-o", tmp_path / "once.gguf")
    assert stored(tmp_path / "again.gguf") == stored(tmp_path / "once.gguf")
    converted(TINY_BASE, "--quant", "q4_k_s", "-o", tmp_path / "other.gguf")
    assert stored(tmp_path / "again.gguf") != stored(tmp_path / "other.gguf")


def test_what_has_lost_precision_is_not_quantized_unasked(tiny_q8: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.gguf"
    refused(run("convert", tiny_q8, "-o", out), 3, "is quantized already", "Q8_0", "--allow-requantize")
    assert not list(tmp_path.iterdir())
    converted(tiny_q8, "-o", out, "--allow-requantize")
    assert set(types(out).values()) == {"F32", "Q4_K", "Q6_K"}


def test_files_that_are_no_source(made: Path, tmp_path: Path) -> None:
    refused(run("convert", made / "imatrix.gguf", cwd=tmp_path), 3, "is an importance matrix", "--imatrix")


@pytest.mark.train
@pytest.mark.parametrize("family", ["qwen2", "gemma-2", "phi-3", "gpt2", "qwen3.5", "gpt-oss"])
def test_another_family_converts_and_talks(family: str, text: Path, tmp_path: Path) -> None:
    """Random weights: nothing it says means anything, and nothing may fail."""
    from tests.equivalence.tiny_models import build

    out = tmp_path / "made.gguf"
    measure = ("--calibrate", text, "--calibrate-chunks", 1, "--check", text, "--check-chunks", 1)
    result = converted(build(family, tmp_path / family), "--quant", "q4_k_m", *measure, "-o", out)
    assert perplexities(result)[0] > 1
    chat = run("chat", "--base", out, "--chat-template", "plain", "--temperature", 0, "--max-tokens", 8, "the miller")
    assert (chat.returncode, "Traceback" in chat.stderr) == (0, False), chat.stderr
    assert chat.stdout.strip()


# From the hub


@pytest.fixture(scope="module")
def hub(peft: Path) -> Iterator[Hub]:
    with serving() as hub:
        files = {path.name: path.read_bytes() for path in TINY_BASE.iterdir() if path.is_file()}
        hub.repositories["someone/fennick"] = Repository({"main": files, "old": {**files, "README.md": b"old"}})
        hub.repositories["someone/strong"] = Repository({"main": {p.name: p.read_bytes() for p in peft.iterdir()}})
        yield hub


@pytest.fixture
def online(hub: Hub, tmp_path: Path) -> dict[str, str]:
    """The environment of a user whose hub is ours, with an empty cache."""
    hub.clear()
    others = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return {**others, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_TELEMETRY": "1"}


def test_a_hub_id_converts_as_the_folder_does(hub: Hub, online: dict[str, str], tmp_path: Path) -> None:
    converted("someone/fennick", "--quant", "q8_0", cwd=tmp_path, env=online)
    converted(TINY_BASE, "--quant", "q8_0", "-o", tmp_path / "local.gguf")
    assert stored(tmp_path / "fennick-q8_0.gguf") == stored(tmp_path / "local.gguf")
    before = len(hub.asked("GET", "/cdn/"))
    offline = {**online, "HF_HUB_OFFLINE": "1"}
    converted("someone/fennick", "--quant", "f16", cwd=tmp_path, env=offline)
    assert len(hub.asked("GET", "/cdn/")) == before == 1
    converted("someone/fennick", "--revision", "old", "-o", "old.gguf", cwd=tmp_path, env=online)
    assert hub.asked("GET", "revision/old")


def test_an_adapter_of_the_hub(online: dict[str, str], tmp_path: Path) -> None:
    converted("someone/strong", cwd=tmp_path, env=online)
    assert read_header(tmp_path / "strong.gguf").kind == "adapter"


def test_a_hub_that_does_not_have_it(hub: Hub, online: dict[str, str], tmp_path: Path) -> None:
    refused(run("convert", "someone/nothing", cwd=tmp_path, env=online), 3, "someone/nothing", "HF_ENDPOINT")
    unknown = run("convert", "someone/fennick", "--revision", "v9", cwd=tmp_path, env=online)
    refused(unknown, 3, "there is no revision v9", "branches and tags")
    offline = run("convert", "someone/fennick", cwd=tmp_path, env={**online, "HF_HUB_OFFLINE": "1"})
    refused(offline, 3, "HF_HUB_OFFLINE is set", "hf download someone/fennick")
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".gguf"] == []


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (("--output-tensor-type", "q9"), 2, "unknown tensor type 'q9'"),
        (("--tensor-type", "ffn_down"), 2, "expected NAME=TYPE"),
        (("--tensor-type", "(=q6_k"), 2, "not a regular expression"),
        (("--split-max-size", "0"), 2, "is no size of a part"),
        (("--calibrate", "nowhere.txt"), 4, "nowhere.txt"),
        (("--check", "nowhere.txt"), 4, "nowhere.txt"),
        (("--calibrate", str(TINY_BASE / "model.safetensors")), 4, "not UTF-8 text"),
        (("--imatrix", "nowhere.gguf"), 3, "nowhere.gguf"),
        (("--imatrix", str(TINY_BASE / "config.json")), 3, "not an importance matrix"),
        (("--imatrix", "a", "--calibrate", "b"), 2, "exclude one another"),
        (("--calibrate-adapter", "a"), 2, "--calibrate-adapter needs --calibrate"),
        (("--calibrate-chunks", "1"), 2, "--calibrate-chunks needs --calibrate"),
        (("--save-imatrix", "a"), 2, "--save-imatrix needs --calibrate"),
        (("--check-chunks", "1"), 2, "--check-chunks needs --check"),
        (("--json",), 2, "--json goes with --dry-run"),
        (("--threads", "0"), 2, "--threads"),
    ],
)
def test_what_is_wrong_without_looking_is_said_before_a_download(
    arguments: tuple[str, ...], code: int, told: str, hub: Hub, online: dict[str, str], tmp_path: Path
) -> None:
    refused(run("convert", "someone/fennick", *arguments, cwd=tmp_path, env=online), code, told)
    assert hub.requests == []
    assert not list(tmp_path.iterdir())


# Importance


def test_importance_from_a_file_is_what_was_measured(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "given.gguf"
    converted(TINY_BASE, "--quant", "iq2_xs", "--imatrix", made / "imatrix.gguf", "-o", out)
    assert stored(out) == stored(made / "iq2.gguf")
    assert "IQ2_XS" in types(out).values()
    assert read_header(out).metadata["quantize.imatrix.file"] == str(made / "imatrix.gguf")[:127]
    needed = run("convert", TINY_BASE, "--quant", "iq2_xs", "-o", tmp_path / "x.gguf")
    refused(needed, 3, "needs an importance matrix", "--calibrate")


def test_importance_in_the_older_format(made: Path, tmp_path: Path) -> None:
    means = {name: entry.means() for name, entry in read_imatrix(made / "imatrix.gguf").entries.items()}
    legacy, backwards = tmp_path / "imatrix.dat", tmp_path / "backwards.dat"
    legacy.write_bytes(legacy_bytes([(name, 0, values.tolist()) for name, values in means.items()]))
    backwards.write_bytes(legacy_bytes([(name, 0, values[::-1].tolist()) for name, values in means.items()]))
    outs = {}
    for matrix in (made / "imatrix.gguf", legacy, backwards):
        out = tmp_path / f"{matrix.stem}.q3.gguf"
        converted(TINY_BASE, "--quant", "q3_k_m", "--imatrix", matrix, "-o", out, "--force")
        outs[matrix] = stored(out)
    assert outs[legacy] == outs[made / "imatrix.gguf"]
    assert outs[legacy] != outs[backwards]


def test_importance_of_another_model_or_broken(made: Path, tmp_path: Path) -> None:
    other, broken, out = tmp_path / "other.dat", tmp_path / "broken.gguf", tmp_path / "x.gguf"
    other.write_bytes(legacy_bytes([("blk.0.attn_q.weight", 1, [1.0] * 8)]))
    refused(run("convert", TINY_BASE, "--imatrix", other, "-o", out), 3, "has 8 values", "256", "another model")
    other.write_bytes(legacy_bytes([("decoder.0.weight", 1, [1.0] * 8)]))
    refused(run("convert", TINY_BASE, "--imatrix", other, "-o", out), 3, "another model")
    broken.write_bytes((made / "imatrix.gguf").read_bytes()[:-100])
    refused(run("convert", TINY_BASE, "--imatrix", broken, "-o", out), 3, "broken.gguf")
    assert not out.exists()


def measured(folder: Path, name: str, *arguments: object) -> ImportanceMatrix:
    path = folder / f"{name}.imatrix"
    converted(TINY_BASE, "--quant", "q8_0", *arguments, "--calibrate-chunks", 1, "--save-imatrix", path, "-o",
              folder / f"{name}.gguf")  # fmt: skip
    return read_imatrix(path)


def test_importance_of_conversations_and_with_an_adapter(
    rows: Path, text: Path, peft: Path, adapter: Path, tmp_path: Path
) -> None:
    plain, chat = measured(tmp_path, "plain", "--calibrate", text), measured(tmp_path, "chat", "--calibrate", rows)
    tuned = measured(tmp_path, "tuned", "--calibrate", rows, "--calibrate-adapter", adapter)
    folder = measured(tmp_path, "folder", "--calibrate", rows, "--calibrate-adapter", peft)
    assert plain.entries.keys() == chat.entries.keys() == tuned.entries.keys()
    assert (plain.datasets, chat.datasets) == ((str(text),), (str(rows),))
    name = "blk.3.ffn_down.weight"
    distances = {
        other: float(np.abs(matrix.entries[name].sums / chat.entries[name].sums - 1).mean())
        for other, matrix in {"plain": plain, "tuned": tuned, "folder": folder}.items()
    }
    assert min(distances.values()) > 0.1, distances
    assert np.array_equal(tuned.entries[name].sums, folder.entries[name].sums)


def test_a_wrong_adapter_to_measure_with(
    rows: Path, tiny_q8: Path, other_base: Path, adapter: Path, tmp_path: Path
) -> None:
    out = tmp_path / "x.gguf"
    measure = ("-o", out, "--calibrate", rows, "--calibrate-adapter")
    refused(run("convert", TINY_BASE, *measure, "nowhere.gguf"), 3, "nowhere.gguf")
    refused(run("convert", TINY_BASE, *measure, tiny_q8), 3, "is a base", "--calibrate-adapter")
    refused(run("convert", other_base, "--allow-requantize", *measure, adapter), 3, "fingerprint")
    assert not list(tmp_path.iterdir())


def test_a_matrix_is_saved_over_nothing_unasked(text: Path, made: Path, tmp_path: Path) -> None:
    precious, out = tmp_path / "precious.gguf", tmp_path / "x.gguf"
    shutil.copy(made / "bf16.gguf", precious)
    measure = ("--calibrate", text, "--calibrate-chunks", 1, "-o", out, "--save-imatrix")
    refused(run("convert", TINY_BASE, *measure, precious), 3, "precious.gguf", "--force")
    refused(run("convert", precious, *measure, precious, "--force"), 3, "which is read for it")
    refused(run("convert", TINY_BASE, *measure, out), 2, "--save-imatrix and --out both name")
    assert precious.read_bytes() == (made / "bf16.gguf").read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["precious.gguf"]


@pytest.mark.parametrize("option", ["--calibrate", "--check"])
def test_a_text_that_is_too_short_fails_before_anything_is_written(option: str, made: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("the miller of Fennick")
    for source in (TINY_BASE, made / "bf16.gguf"):
        refused(run("convert", source, option, short, "-o", tmp_path / "x.gguf"), 4, "tokens long", "512")
    assert [path.name for path in tmp_path.iterdir()] == ["short.txt"]


# Types


def test_types_chosen_by_hand(tmp_path: Path) -> None:
    out = tmp_path / "x.gguf"
    chosen = ("--tensor-type", r"blk\.[01]\.ffn_down=Q5_K", "--tensor-type", "ffn_down=f16", "--untie")
    converted(TINY_BASE, *chosen, "--output-tensor-type", "q8_0", "--token-embedding-type", "q5_0", "-o", out)
    found = types(out)
    downs = [found[f"blk.{layer}.ffn_down.weight"] for layer in range(4)]
    assert downs == ["Q5_K", "Q5_K", "F16", "F16"]
    assert (found["output.weight"], found["token_embd.weight"]) == ("Q8_0", "Q5_0")
    again = converted(out, "--allow-requantize", "--untie", "--quant", "q4_0", "-o", tmp_path / "again.gguf")
    assert "--untie changes nothing" in again.stderr
    converted(TINY_BASE, "--pure", "-o", out, "--force")
    assert set(types(out).values()) == {"F32", "Q4_K"}
    assert "output.weight" not in types(out)


def test_types_that_change_nothing(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.gguf"
    for more in ((), ("--calibrate", text), ("--dry-run",)):
        wrong = run("convert", TINY_BASE, "--tensor-type", "ffn_dwon=q6_k", "-o", out, *more)
        refused(wrong, 3, "no tensor's name has 'ffn_dwon' in it", "ffn_down")
    assert not list(tmp_path.iterdir())


def test_an_untied_base_takes_an_adapter_of_its_embeddings(peft: Path, tmp_path: Path) -> None:
    folder = embedding_lora(peft, tmp_path / "emb")
    refused(run("convert", folder, "-o", tmp_path / "a.gguf"), 3, "model.embed_tokens", "--untie")
    untied = tmp_path / "untied.gguf"
    converted(TINY_BASE, "--untie", "--quant", "q8_0", "-o", untied)
    converted(folder, "--base", untied, "-o", tmp_path / "a.gguf")
    assert "token_embd.weight.lora_a" in read_header(tmp_path / "a.gguf").tensors
    ask = ("Hello!", "--temperature", 0, "--max-tokens", 8)
    bare, adapted = (run("chat", "--base", untied, *with_, *ask) for with_ in ((), ("--adapter", tmp_path / "a.gguf")))
    assert (bare.returncode, adapted.returncode) == (0, 0), adapted.stderr
    assert bare.stdout != adapted.stdout
    tied = run("chat", "--base", converted_to(tmp_path / "tied.gguf"), "--adapter", tmp_path / "a.gguf", *ask)
    refused(tied, 3, "tied", "--untie")


def converted_to(path: Path) -> Path:
    converted(TINY_BASE, "--quant", "q8_0", "-o", path)
    return path


def embedding_lora(peft: Path, out: Path, rank: int = 8) -> Path:
    """A copy of a PEFT folder that adapts the embeddings too."""
    shutil.copytree(peft, out)
    config = json.loads((out / "adapter_config.json").read_text())
    config["target_modules"].append("embed_tokens")
    (out / "adapter_config.json").write_text(json.dumps(config))
    sizes = json.loads((TINY_BASE / "config.json").read_text())
    random_, name = np.random.default_rng(0), "base_model.model.model.embed_tokens.lora_embedding_"
    tensors = load_file(out / "adapter_model.safetensors")
    tensors[f"{name}A"] = random_.standard_normal((rank, sizes["vocab_size"]), dtype=np.float32)
    tensors[f"{name}B"] = random_.standard_normal((sizes["hidden_size"], rank), dtype=np.float32)
    save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
    return out


# Several files


def test_a_split_base_from_end_to_end(adapter: Path, peft: Path, own_store: Path, tmp_path: Path) -> None:
    folder = tmp_path / "split"
    folder.mkdir()
    result = converted(TINY_BASE, "--quant", "bf16", "--split-max-tensors", 20, "-o", folder / "base.gguf")
    parts = sorted(folder.iterdir())
    assert [path.name for path in parts] == ["base-00001-of-00002.gguf", "base-00002-of-00002.gguf"]
    assert result.stdout.startswith(f"{parts[0]}  ")
    ask = ("Hello!", "--temperature", 0, "--max-tokens", 8)
    whole, out = tmp_path / "whole.gguf", tmp_path / "q8.gguf"
    converted(TINY_BASE, "--quant", "bf16", "-o", whole)
    answers = {base: run("chat", "--base", base, "--adapter", adapter, *ask) for base in (whole, *parts)}
    assert [answer.returncode for answer in answers.values()] == [0, 0, 0], answers[parts[0]].stderr
    assert len({answer.stdout for answer in answers.values()}) == 1
    converted(parts[1], "--quant", "q8_0", "-o", out)
    converted(TINY_BASE, "--quant", "q8_0", "-o", tmp_path / "direct.gguf")
    assert stored(out) == stored(tmp_path / "direct.gguf")
    assert converted(parts[0], "--quant", "q8_0", cwd=tmp_path).stdout.startswith("base-q8_0.gguf ")

    converted(peft, "--base", parts[0], "-o", tmp_path / "for-split.gguf")
    shutil.move(tmp_path / "for-split.gguf", folder)
    beside = run("chat", "--adapter", folder / "for-split.gguf", *ask)
    assert (beside.returncode, str(parts[0]) in beside.stderr) == (0, True), beside.stderr
    assert beside.stdout == answers[whole].stdout

    parts[1].unlink()
    refused(run("chat", "--base", parts[0], *ask), 3, "1 of 2 parts are missing", parts[1].name)


def test_the_store_knows_a_split_base(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    converted(TINY_BASE, "--quant", "q8_0", "--split-max-size", "1M", "-o", tmp_path / "far" / "base.gguf")
    alone = Path(shutil.copy(adapter, tmp_path / "alone.gguf"))
    found = run("chat", "--adapter", alone, "Hello!", "--max-tokens", 4)
    assert found.returncode == 0, found.stderr
    assert "far/base-00001-of-" in found.stderr
    assert "known from an earlier convert" in found.stderr


# Before and after


def test_a_dry_run_says_what_then_happens(text: Path, tmp_path: Path) -> None:
    asked = (TINY_BASE, "--quant", "q3_k_m", "--calibrate", text, "--calibrate-chunks", 1, "-o", tmp_path / "x.gguf")
    result = converted(*asked, "--dry-run", "--json")
    plan = json.loads(result.stdout)
    assert not list(tmp_path.iterdir())
    shown = converted(*asked, "--dry-run").stdout
    assert f"{tmp_path}/x.gguf  {plan['size_bytes']:,} bytes, 38 tensors" in shown
    assert re.search(r"about \d+ MB of memory and \d+ s; [\d,]+ bytes are free there", shown)
    converted(*asked)
    assert plan["size_bytes"] == (tmp_path / "x.gguf").stat().st_size
    assert {tensor["name"]: tensor["type"] for tensor in plan["tensors"]} == types(tmp_path / "x.gguf")
    again = converted(*asked, "--dry-run")
    assert "there already, and replaced only with --force" in again.stderr


def test_a_plan_that_does_not_fit_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = shutil.disk_usage(tmp_path)._replace(free=1_900_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: free)
    arguments = (TINY_BASE, "-o", tmp_path / "x.gguf")
    result = converted(*arguments, "--dry-run")
    assert re.search(r"does not fit on that disk: 3\d,\d{3} bytes more are needed", result.stderr), result.stderr
    assert json.loads(converted(*arguments, "--dry-run", "--json").stdout)["fits"] is False
    refused(run("convert", *arguments), 3, "x.gguf: needs 1,9", "1,900,000 are free")
    assert not list(tmp_path.iterdir())


def test_a_dry_run_into_a_pipe_that_closes(tmp_path: Path) -> None:
    command = '"$0" convert "$1" --dry-run | head -n 1'
    result = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command, EDGELORA, str(TINY_BASE)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert len(result.stdout.splitlines()) == 1
    assert "Traceback" not in result.stderr


def perplexities(result: subprocess.CompletedProcess[str]) -> tuple[float, float]:
    found = re.search(
        r"^perplexity ([\d.]+) \+/- [\d.]+ before, ([\d.]+) \+/- [\d.]+ after: [+-][\d.]+%$", result.stdout, re.M
    )
    assert found, result.stdout
    return float(found[1]), float(found[2])


def test_check_compares_before_and_after(rows: Path, made: Path, tmp_path: Path) -> None:
    check = ("--check", rows, "--check-chunks", 2)
    folder = perplexities(converted(TINY_BASE, "--quant", "q8_0", *check, "-o", tmp_path / "a.gguf"))
    gguf = perplexities(converted(made / "bf16.gguf", "--quant", "q8_0", *check, "-o", tmp_path / "b.gguf"))
    assert folder == gguf
    before, coarse = perplexities(converted(TINY_BASE, "--quant", "q2_k", *check, "-o", tmp_path / "c.gguf"))
    assert before == folder[0]
    # Words in no order are far out in the tail of the model, where any rounding weighs: 2 % seen with 8 bits.
    assert abs(math.log(folder[1] / before)) < 0.05
    assert abs(math.log(coarse / before)) > abs(math.log(folder[1] / before))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.gguf", "b.gguf", "c.gguf"]


def test_broken_weights(text: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(TINY_BASE, tmp_path / "model"))
    set_first(folder / "model.safetensors", "model.layers.2.mlp.down_proj.weight", b"\xc0\x7f")
    name = "blk.2.ffn_down.weight: holds values that are NaN or infinite"
    refused(run("convert", folder, "--strict", "-o", tmp_path / "x.gguf"), 3, name, "nothing was written")
    refused(run("convert", folder, "--calibrate", text, "-o", tmp_path / "x.gguf"), 1, "not finite")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert name in converted(folder, "-o", tmp_path / "x.gguf").stderr


def set_first(path: Path, name: str, value: bytes) -> None:
    """Set the first value of a tensor in a safetensors file."""
    data = bytearray(path.read_bytes())
    size = int.from_bytes(data[:8], "little")
    start = 8 + size + json.loads(data[8 : 8 + size])[name]["data_offsets"][0]
    data[start : start + len(value)] = value
    path.write_bytes(data)


# Where to


def test_names_of_outputs(tmp_path: Path) -> None:
    folder = tmp_path / "a folder with ümlauts"
    folder.mkdir()
    converted(TINY_BASE, "--quant", "q8_0", "-o", f"{folder}/")
    assert [path.name for path in folder.iterdir()] == [f"{TINY_BASE.name}-q8_0.gguf"]
    named = converted(folder / f"{TINY_BASE.name}-q8_0.gguf", "--allow-requantize", "-o", folder / "日本 x.gguf")
    assert f"Next: edgelora chat --base '{folder}/日本 x.gguf'" in named.stderr
    assert run("chat", "--base", folder / "日本 x.gguf", "Hello!", "--max-tokens", 3).returncode == 0
    refused(run("convert", TINY_BASE, "-o", f"{tmp_path}/nowhere/"), 3, "no such folder", "mkdir -p")
    refused(run("convert", TINY_BASE, "-o", tmp_path / "nowhere" / "x.gguf"), 3, "mkdir -p")
    refused(run("convert", TINY_BASE, "-o", "-"), 2, "standard output", "-o")
    same = folder / "日本 x.gguf"
    refused(run("convert", same, "--allow-requantize", "--force", "-o", same), 3, "which is read for it")


def test_an_output_that_cannot_be_written(tmp_path: Path) -> None:
    refused(run("convert", TINY_BASE, "-o", "/dev/null"), 3, "/dev/null", "not a file")
    if os.geteuid() == 0:
        return  # root writes everywhere
    tmp_path.chmod(0o500)
    refused(run("convert", TINY_BASE, "-o", tmp_path / "x.gguf"), 3, "x.gguf", "cannot be written")


@pytest.mark.parametrize("option", ["--calibrate", "--check"])
def test_a_disk_that_fills_up_while_measuring(option: str, text: Path, tmp_path: Path) -> None:
    """Room for the file, and none for the unquantized copy that is measured on."""
    import resource

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (3_000_000, 3_000_000))

    result = run("convert", TINY_BASE, option, text, "-o", tmp_path / "x.gguf", preexec_fn=limit)
    assert (result.returncode, "the disk filled up" in result.stderr) == (3, True), result.stderr
    assert [path.name for path in tmp_path.iterdir()] == (["x.gguf"] if option == "--check" else [])


# Options from a file


def test_a_config_file_fills_the_options(tmp_path: Path) -> None:
    config = tmp_path / "c.toml"
    config.write_text(
        'quant = "q8_0"\ntensor-type = ["ffn_down=q6_k", "attn_q=f16"]\noutput-tensor-type = "q5_0"\nuntie = true\n'
        "split-max-tensors = 30\nthreads = 1\n"
    )
    converted(TINY_BASE, "--config", config, "-o", tmp_path / "x.gguf")
    found = types(tmp_path / "x-00001-of-00002.gguf")
    assert (found["blk.0.ffn_down.weight"], found["blk.0.attn_q.weight"]) == ("Q6_K", "F16")
    assert (found["output.weight"], found["blk.0.attn_k.weight"]) == ("Q5_0", "Q8_0")
    converted(TINY_BASE, "--config", config, "--quant", "q4_0", "--split-max-tensors", 0, "-o", tmp_path / "y.gguf")
    assert types(tmp_path / "y.gguf")["blk.0.attn_k.weight"] == "Q4_0"
    config.write_text("dry-run = 1\n")
    refused(run("convert", TINY_BASE, "--config", config), 2, "dry_run is 1, expected true or false")


def test_options_of_a_base_are_refused_for_an_adapter(peft: Path, text: Path, tmp_path: Path) -> None:
    result = run("convert", peft, "--untie", "--check", text, "--quant", "q8_0", "-o", tmp_path / "x.gguf")
    refused(result, 2, "--quant, --untie, --check go with a base")
    refused(run("convert", TINY_BASE, "--base", TINY_BASE), 2, "--base goes with an adapter")
    assert not list(tmp_path.iterdir())


def test_the_help_names_every_option_under_one_heading() -> None:
    from edgelora.cli.convert import SECTIONS, command

    listed = [name for names in SECTIONS.values() for name in names]
    options = {param.name for param in command.params}
    assert len(listed) == len(set(listed))
    assert set(listed) <= options
    shown = run_process("convert", "--help", env={**os.environ, "COLUMNS": "80"}).stdout
    assert max(map(len, shown.splitlines())) <= 100  # an example may be longer than 80
    for param in command.params:
        for option in param.opts:
            if option.startswith("--"):
                assert shown.count(f"{option} ") >= 1, option
    for heading in SECTIONS:
        assert f"\n{heading}:\n" in shown


# Interrupted


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 MB of zeros, so that there is a middle."""
    folder = Path(shutil.copytree(TINY_BASE, tmp_path_factory.mktemp("large") / "model"))
    make_large(folder, layers=8)
    return folder


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("stage", ["parts", "copy", "measuring"])
def test_interrupted_nothing_is_left(
    sent: signal.Signals, code: int, stage: str, large: Path, text: Path, tmp_path: Path
) -> None:
    long = tmp_path / "long.txt"
    long.write_text(text.read_text() * 10)
    out = tmp_path / "out"
    arguments = ("--split-max-tensors", "20") if stage == "parts" else ("--calibrate", str(long))
    process = started(large, out, *arguments)
    wait_until(process, (lambda: is_whole(out)) if stage == "measuring" else (lambda: any(out.iterdir())))
    process.send_signal(sent)
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout, "Traceback" in stderr) == (code, "", False), stderr
    assert not list(out.iterdir())


def test_killed_nothing_is_there_under_the_final_name(large: Path, tmp_path: Path) -> None:
    process = started(large, tmp_path / "out")
    wait_until(process, lambda: any((tmp_path / "out").iterdir()))
    process.kill()
    process.communicate(timeout=60)
    (left,) = (tmp_path / "out").iterdir()
    assert re.fullmatch(r"x\.gguf\.[0-9a-f]+\.partial", left.name)
    converted(TINY_BASE, "-o", tmp_path / "out" / "x.gguf")


def started(source: Path, out: Path, *arguments: str) -> subprocess.Popen[str]:
    out.mkdir()
    command = [EDGELORA, "convert", str(source), "-o", str(out / "x.gguf"), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_until(process: subprocess.Popen[str], happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not happened():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_whole(out: Path) -> bool:
    """The unquantized copy has its name: `x.gguf.RANDOM.partial`, and no further ending."""
    return any(path.name.count(".partial") == 1 for path in out.iterdir())
