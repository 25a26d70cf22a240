"""`edgelora train --export`: adapter, bases and proof in one go, and everything kept where the proof fails."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from converters.base import convert_base
from converters.reader import read_header
from edgelora.cli import cli
from edgelora.entry import quantization_of
from edgelora.errors import SettingsError
from edgelora.export import ITSELF, Exported, export, plan_export
from edgelora.store import HOME_VARIABLE, Store
from edgelora.train import Recipe, train

pytestmark = pytest.mark.train
Run = Callable[..., Result]
SETTINGS = ("--max-steps", "2", "--rank", "4", "--batch-size", "4", "--gradient-accumulation", "1", "--device", "cpu")


@pytest.fixture(scope="module")
def trained(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "lamps"
    train(data, str(base), out, Recipe(rank=4, max_steps=2, batch_size=4, certificate_probes=2, device="cpu"))
    return out


@pytest.fixture
def folder(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "lamps"))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def exported(wanted: str, base: Path, folder: Path, store: Store) -> Exported:
    return export(plan_export(wanted, base, folder, store), "adapter", store)


def test_every_quantization_is_made_and_verified(base: Path, folder: Path, store: Store) -> None:
    made = exported("q8_0,f16", base, folder, store)
    assert made.adapter == folder.with_name("lamps.gguf")
    assert [path.name for path in made.bases] == ["tiny-llama-q8_0.gguf", "tiny-llama-f16.gguf"]
    assert [quantization_of(read_header(path)) for path in made.bases] == ["q8_0", "f16"]
    assert [report.base for report in made.reports] == [str(path) for path in made.bases]
    assert made.passed
    assert store.registered_bases() != []


def test_a_base_that_is_known_is_not_made_again(base: Path, folder: Path, store: Store, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    known = convert_base(base, tmp_path / "elsewhere" / "mine.gguf", quant="q8_0").path
    store.register(known)
    assert exported("q8_0", base, folder, store).bases == (known,)
    assert not folder.with_name("tiny-llama-q8_0.gguf").exists()


def test_a_gguf_is_served_as_it_is(base: Path, folder: Path, store: Store, tmp_path: Path) -> None:
    gguf = convert_base(base, tmp_path / "tiny-q8_0.gguf", quant="q8_0").path
    for wanted in (ITSELF, "q8_0"):
        assert plan_export(wanted, gguf, folder, store).targets[0].path == gguf
    with pytest.raises(SettingsError, match="is q8_0, and quantizing it again would lose more"):
        plan_export("q4_0", gguf, folder, store)


def test_what_stands_in_the_way_is_said_before_training(base: Path, folder: Path, store: Store) -> None:
    with pytest.raises(SettingsError, match="unknown quantizations: q9, q10") as caught:
        plan_export("q9,q8_0,q10", base, folder, store)
    assert "q4_k_m" in caught.value.hint
    with pytest.raises(SettingsError, match="no GGUF file, which could be served as it is"):
        plan_export(ITSELF, base, folder, store)
    folder.with_name("lamps.gguf").touch()
    with pytest.raises(SettingsError, match=r"lamps\.gguf: in the way"):
        plan_export("q8_0", base, folder, store)
    assert plan_export("q8_0", base, folder, store, replace=True).adapter.name == "lamps.gguf"
    folder.with_name("tiny-llama-f16.gguf").touch()
    with pytest.raises(SettingsError, match=r"tiny-llama-f16\.gguf exists, and is not"):
        plan_export("f16", base, folder, store, replace=True)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path / "store"))
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(cli, ["train", *map(str, arguments), *SETTINGS])


def test_one_command_from_rows_to_proof(base: Path, data: Path, run: Run, tmp_path: Path) -> None:
    gguf = convert_base(base, tmp_path / "tiny-q8_0.gguf", quant="q8_0").path
    result = run(data, "--base", gguf, "-o", "lamps", "--export")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines() == ["lamps", str(tmp_path / "lamps.gguf"), str(gguf)]
    assert f"verified on {gguf}: passed" in result.stderr


def test_a_failing_proof_is_exit_1_with_everything_kept(base: Path, data: Path, run: Run, tmp_path: Path) -> None:
    """The base that is to be served has the right fingerprint, and an output with its rows in another order."""
    known = convert_base(base, tmp_path / "tiny-llama-q8_0.gguf", quant="q8_0").path
    tensor = read_header(known).tensors["output.weight"]
    with open(known, "r+b") as file:
        file.seek(tensor.offset)
        rows = [file.read(tensor.size_bytes // tensor.shape[0]) for _ in range(tensor.shape[0])]
        file.seek(tensor.offset)
        file.write(b"".join(reversed(rows)))
    result = run(data, "--base", base, "-o", "lamps", "--export", "q8_0", "--learning-rate", "0.05")
    assert result.exit_code == 1, result.output
    assert "FAILED: " in result.stderr
    assert f"everything is kept; for the details: edgelora verify {tmp_path / 'lamps.gguf'} --base {known}" in (
        result.stderr
    )
    assert (tmp_path / "lamps" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "lamps.gguf").is_file()


def test_nothing_is_trained_where_the_export_cannot_be(base: Path, data: Path, run: Run, tmp_path: Path) -> None:
    result = run(data, "--base", base, "-o", "lamps", "--export", "q4")
    assert result.exit_code == 2, result.output
    assert "unknown quantizations: q4" in result.stderr
    result = run(data, "--base", base, "-o", "lamps", "--export", "q8_0", "--certificate-probes", 0)
    assert result.exit_code == 2, result.output
    assert "--certificate-probes 0 records none" in result.stderr
    assert not (tmp_path / "lamps").exists()
