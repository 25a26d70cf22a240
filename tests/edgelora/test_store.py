"""Finding the base an adapter belongs to: where it is looked for, in which order, and what is said when none fits."""

from __future__ import annotations

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from converters.base import convert_base
from edgelora.contract import Contract
from edgelora.errors import BaseNotFoundError
from edgelora.store import Store
from tests.conftest import TINY_BASE


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert_base(TINY_BASE, tmp_path_factory.mktemp("base") / "tiny-q8_0.gguf", quant="q8_0").path


@pytest.fixture
def store(own_store: Path) -> Store:
    return Store()


@pytest.fixture
def contract(base: Path, store: Store) -> Contract:
    return Contract(base_name="tiny", base_fingerprint=store.fingerprint(base))


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    path = tmp_path / "alone" / "support.gguf"
    path.parent.mkdir()
    path.touch()
    return path


def test_nothing_is_created_by_reading(own_store: Path, store: Store, adapter: Path) -> None:
    assert store.registered_bases() == []
    with pytest.raises(BaseNotFoundError):
        store.find_base(None, adapter)
    assert not list(own_store.iterdir())


def test_registered(store: Store, contract: Contract, adapter: Path, base: Path) -> None:
    store.register(base)
    found = Store().find_base(contract, adapter)
    assert found.path == base.resolve()
    assert "earlier convert" in found.how


def test_beside_the_adapter_wins_over_the_index(store: Store, contract: Contract, adapter: Path, base: Path) -> None:
    store.register(base)
    beside = Path(shutil.copy(base, adapter.parent / "copy.gguf"))
    assert store.find_base(contract, adapter).path == beside


def test_the_variable_wins_over_all(
    store: Store, contract: Contract, adapter: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(base, adapter.parent / "copy.gguf")
    monkeypatch.setenv("EDGELORA_BASE", str(base))
    assert store.find_base(contract, adapter).path == base


def test_a_base_that_does_not_fit_is_passed_over_and_named(store: Store, adapter: Path, base: Path) -> None:
    store.register(base)
    wanted = Contract(base_name="mistral-7b", base_fingerprint="f" * 64)
    with pytest.raises(BaseNotFoundError) as caught:
        store.find_base(wanted, adapter)
    assert "was made for mistral-7b (fingerprint ffffffffffff)" in caught.value.message
    assert f"{base.resolve()} (fingerprint {store.fingerprint(base)[:12]})" in caught.value.message
    assert "edgelora convert mistral-7b" in caught.value.hint


def test_without_a_contract_only_what_lies_beside_is_trusted(store: Store, adapter: Path, base: Path) -> None:
    store.register(base)
    with pytest.raises(BaseNotFoundError, match="does not say which base"):
        store.find_base(None, adapter)
    beside = Path(shutil.copy(base, adapter.parent / "copy.gguf"))
    assert store.find_base(None, adapter).path == beside
    shutil.copy(base, adapter.parent / "copy-2.gguf")
    with pytest.raises(BaseNotFoundError):  # two of them: not ours to choose
        store.find_base(None, adapter)


def test_a_moved_file_is_forgotten_and_a_changed_one_looked_at_again(
    store: Store, contract: Contract, adapter: Path, base: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copy(base, tmp_path / "copy.gguf"))
    store.register(copy)
    copy.write_bytes(b"GGUF, but no longer")
    with pytest.raises(BaseNotFoundError):
        store.find_base(contract, adapter)
    copy.unlink()
    assert store.registered_bases() == []


def test_the_fingerprint_is_computed_once(store: Store, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = store.fingerprint(base)
    monkeypatch.setattr("converters.fingerprint.fingerprint", lambda path: pytest.fail("computed again"))
    assert Store().fingerprint(base) == first


def test_many_writers(store: Store, base: Path, tmp_path: Path) -> None:
    copies = [Path(shutil.copy(base, tmp_path / f"{n}.gguf")) for n in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda path: Store().register(path), copies))
    assert {path.name for path in store.registered_bases()} == {path.name for path in copies}


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_store_that_cannot_be_written_only_costs_time(base: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert Store(tmp_path / "store").fingerprint(base)
