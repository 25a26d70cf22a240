"""What `edgelora convert` adds to the converters: the contract, names, the store; PEFT folders used as they are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from converters.base import convert_base
from converters.errors import ConversionError
from converters.reader import read_header
from edgelora.adapter_conversion import adapter_from_folder
from edgelora.adapter_ref import AdapterRef
from edgelora.adapter_settings import AdapterSettings
from edgelora.base_settings import BaseSettings
from edgelora.contract import GOLDEN_MESSAGES, Contract
from edgelora.conversion import ConvertOptions, convert
from edgelora.errors import BaseMismatchError, BaseNotFoundError, ModelFileError, SettingsError
from edgelora.resolution import contract_of, resolve_files
from edgelora.store import Store
from edgelora.template import BUILTIN
from tests.conftest import TINY_BASE
from tests.peft_folders import write_lora


@pytest.fixture(scope="module")
def gguf_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert_base(TINY_BASE, tmp_path_factory.mktemp("base") / "tiny-q8_0.gguf", quant="q8_0").path


@pytest.fixture
def store(own_store: Path) -> Store:
    return Store()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A PEFT folder that edgelora did not train: no contract."""
    return write_lora(tmp_path / "peft" / "mine", TINY_BASE, seed=3)


def contract_in(path: Path) -> Contract:
    contract = contract_of(path)
    assert contract is not None
    return contract


def test_default_names_and_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: Path, store: Store
) -> None:
    monkeypatch.chdir(tmp_path)
    base = convert(TINY_BASE, options=ConvertOptions(quant="q8_0"))
    assert base.path.name == f"{TINY_BASE.name}-q8_0.gguf"
    assert store.registered_bases() == [base.path.resolve()]
    (tmp_path / "out").mkdir()
    assert convert(folder, tmp_path / "out").path == tmp_path / "out" / "mine.gguf"
    with pytest.raises(ModelFileError, match="no such folder"):
        convert(folder, f"{tmp_path}/nowhere/")


def test_an_adapter_from_elsewhere_gets_the_contract_of_its_base(folder: Path, tmp_path: Path, store: Store) -> None:
    contract = contract_in(convert(folder, tmp_path / "a.gguf").path)
    assert contract.base_fingerprint == store.fingerprint(TINY_BASE)
    assert contract.chat_template == (TINY_BASE / "chat_template.jinja").read_text(encoding="utf-8")
    assert contract.golden_messages == GOLDEN_MESSAGES
    assert len(contract.golden_tokens) > 20


def test_the_golden_ids_are_those_of_transformers(folder: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    contract = contract_in(convert(folder, tmp_path / "a.gguf").path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY_BASE)
    ids = tokenizer.apply_chat_template(list(GOLDEN_MESSAGES), add_generation_prompt=True, return_dict=False)
    assert list(contract.golden_tokens) == ids


def test_against_a_gguf_base(folder: Path, gguf_base: Path, tmp_path: Path) -> None:
    of_folder = convert(folder, tmp_path / "a.gguf")
    of_gguf = convert(folder, tmp_path / "b.gguf", ConvertOptions(base=gguf_base))
    assert contract_in(of_gguf.path).chat_template == contract_in(of_folder.path).chat_template
    assert contract_in(of_gguf.path).base_fingerprint == contract_in(of_folder.path).base_fingerprint


def test_another_template_is_carried(folder: Path, tmp_path: Path) -> None:
    contract = contract_in(convert(folder, tmp_path / "a.gguf", ConvertOptions(chat_template="plain")).path)
    assert contract.chat_template == BUILTIN["plain"]
    with pytest.raises(SettingsError, match="unknown chat template"):
        convert(folder, tmp_path / "b.gguf", ConvertOptions(chat_template="plane"))
    base = convert(TINY_BASE, tmp_path / "base.gguf", ConvertOptions(quant="q8_0", chat_template="plain"))
    assert read_header(base.path).metadata["tokenizer.chat_template"] == BUILTIN["plain"]


def test_what_training_wrote_down_wins(folder: Path, tmp_path: Path, store: Store) -> None:
    trained = Contract(
        base_name="tiny", base_fingerprint=store.fingerprint(TINY_BASE), chat_template="{{ 1 }}", system="Hi."
    )
    trained.save(folder)
    contract = contract_in(convert(folder, tmp_path / "a.gguf").path)
    assert (contract.chat_template, contract.system, contract.base_name) == ("{{ 1 }}", "Hi.", "tiny")


def test_trained_on_another_base(folder: Path, tmp_path: Path) -> None:
    Contract(base_name="elsewhere", base_fingerprint="0" * 64, chat_template="{{ 1 }}").save(folder)
    with pytest.raises(BaseNotFoundError, match="was made for elsewhere"):  # the folder it names is no longer that base
        convert(folder, tmp_path / "a.gguf")
    with pytest.raises(BaseMismatchError, match="was trained on elsewhere"):
        convert(folder, tmp_path / "a.gguf", ConvertOptions(base=TINY_BASE))
    assert not (tmp_path / "a.gguf").exists()
    assert convert(folder, tmp_path / "a.gguf", ConvertOptions(base=TINY_BASE, force=True)).path.exists()


def test_a_base_named_by_its_hub_id_is_found_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: Store
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    folder = write_lora(tmp_path / "peft", TINY_BASE, seed=3, base_model_name_or_path="acme/tiny")
    with pytest.raises(BaseNotFoundError) as caught:
        convert(folder, tmp_path / "a.gguf")
    assert "It was trained on acme/tiny." in caught.value.hint
    cached = tmp_path / "models--acme--tiny"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40)
    shutil.copytree(TINY_BASE, cached / "snapshots" / ("0" * 40))
    assert convert(folder, tmp_path / "a.gguf").base_fingerprint == store.fingerprint(TINY_BASE)


def test_options_that_do_not_belong(folder: Path, gguf_base: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="--quant goes with a base"):
        convert(folder, tmp_path / "a.gguf", ConvertOptions(quant="q8_0"))
    with pytest.raises(SettingsError, match="--base goes with an adapter"):
        convert(TINY_BASE, tmp_path / "b.gguf", ConvertOptions(base=gguf_base))
    several = BaseSettings(untie=True, check=gguf_base)
    with pytest.raises(SettingsError, match="--untie, --check go with a base"):
        convert(folder, tmp_path / "a.gguf", ConvertOptions(settings=several))
    with pytest.raises(ConversionError, match="is quantized already"):
        convert(gguf_base, tmp_path / "c.gguf")
    adapter = convert(folder, tmp_path / "adapter.bin").path
    with pytest.raises(SettingsError, match="--quant goes with a base"):
        convert(adapter, tmp_path / "e.gguf", ConvertOptions(quant="q8_0"))
    with pytest.raises(SettingsError, match="--rank: for adapters"):
        convert(TINY_BASE, tmp_path / "f.gguf", ConvertOptions(adapter=AdapterSettings(rank=3)))
    assert sorted(path.name for path in tmp_path.glob("*.gguf")) == []


def test_a_peft_folder_is_converted_once_for_each_content(folder: Path, gguf_base: Path, store: Store) -> None:
    first = adapter_from_folder(folder, gguf_base, store)
    stamp = first.stat().st_mtime_ns
    assert adapter_from_folder(folder, gguf_base, store) == first
    assert first.stat().st_mtime_ns == stamp
    write_lora(folder, TINY_BASE, seed=4)
    second = adapter_from_folder(folder, gguf_base, store)
    assert second != first
    assert second.read_bytes() != first.read_bytes()


def test_resolve_files(folder: Path, gguf_base: Path, store: Store) -> None:
    store.register(gguf_base)
    shutil.rmtree(folder.parent / "model", ignore_errors=True)
    contract = Contract(base_name="tiny", base_fingerprint=store.fingerprint(gguf_base))
    contract.save(folder)
    files = resolve_files([AdapterRef("mine", folder, 0.5)], None, store)
    assert files.base == gguf_base.resolve()
    assert "earlier convert" in files.base_note
    (adapter,) = files.adapters
    assert (adapter.name, adapter.scale) == ("mine", 0.5)
    assert read_header(adapter.path).kind == "adapter"


def test_two_adapters_of_one_name(folder: Path, gguf_base: Path) -> None:
    with pytest.raises(SettingsError, match="two adapters are called mine"):
        resolve_files([AdapterRef("mine", folder), AdapterRef("mine", folder)], gguf_base)


def test_the_variable_names_the_base_of_a_bare_chat(gguf_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsError, match="no base and no adapter"):
        resolve_files([], None)
    monkeypatch.setenv("EDGELORA_BASE", str(gguf_base))
    assert resolve_files([], None).base == gguf_base


def test_a_contract_of_the_future_is_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "edgelora.json").write_text(json.dumps({"version": 2}))
    with pytest.raises(ModelFileError, match="version 2"):
        convert(folder, tmp_path / "a.gguf")
