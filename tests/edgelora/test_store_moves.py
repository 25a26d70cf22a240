"""Files that move, change, come back or break: what the store knows of them afterwards."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from converters.base import convert_base
from converters.options import QuantizeOptions
from edgelora import entry as entry_module
from edgelora.contract import Contract
from edgelora.entry import content_of, examine, place_of, state_of
from edgelora.errors import ModelFileError
from edgelora.registration import add, remove
from edgelora.store import Store
from tests.conftest import TINY_BASE
from tests.edgelora.conftest import write_adapter
from tests.peft_folders import write_lora


@pytest.fixture
def models(tmp_path: Path, bases: dict[str, Path]) -> Path:
    """A folder with a base, and an adapter and a PEFT folder in a folder below."""
    folder = tmp_path / "models"
    (folder / "more").mkdir(parents=True)
    base = Path(shutil.copy(bases["q8_0"], folder / "tiny-q8_0.gguf"))
    contract = Contract(base_name="tiny", base_fingerprint=Store().fingerprint(base))
    write_adapter(folder / "more" / "support.gguf", bases["f32"], 1, contract=contract)
    write_lora(folder / "more" / "extract", TINY_BASE, seed=3)
    return folder


def origins(store: Store) -> dict[str, str]:
    return {str(entry.path): entry.origin for entry in store.registered()}


def test_a_moved_file_is_known_again_when_it_is_looked_at(models: Path, tmp_path: Path) -> None:
    base = models / "tiny-q8_0.gguf"
    Store().register(base)
    moved = Path(shutil.move(base, tmp_path / "renamed.gguf"))
    assert [entry.is_there for entry in Store().known()] == [False]
    Store().fingerprint(moved)
    assert origins(Store()) == {str(moved): "convert"}


def test_a_copy_is_not_a_move(models: Path, tmp_path: Path) -> None:
    base = models / "tiny-q8_0.gguf"
    Store().register(base)
    Store().fingerprint(Path(shutil.copy(base, tmp_path / "copy.gguf")))
    assert origins(Store()) == {str(base): "convert"}


def test_another_file_is_not_what_moved(models: Path, bases: dict[str, Path], tmp_path: Path) -> None:
    base = models / "tiny-q8_0.gguf"
    Store().register(base)
    base.unlink()
    Store().fingerprint(bases["f32"])
    assert origins(Store()) == {str(base): "convert"}


def test_what_lay_in_the_same_folder_moves_with_it(models: Path, tmp_path: Path) -> None:
    add(Store(), [models])
    shutil.move(models, tmp_path / "elsewhere")
    assert not any(entry.is_there for entry in Store().known())
    Store().look(tmp_path / "elsewhere" / "tiny-q8_0.gguf")
    assert {path.removeprefix(str(tmp_path)) for path in origins(Store())} == {
        "/elsewhere/tiny-q8_0.gguf",
        "/elsewhere/more/support.gguf",
        "/elsewhere/more/extract",
    }
    assert all(entry.is_there for entry in Store().known())


def test_a_changed_file_is_looked_at_again(models: Path) -> None:
    base = models / "tiny-q8_0.gguf"
    Store().register(base)
    base.write_bytes(b"GGUF, but no longer")
    assert "tiny-q8_0.gguf" in Store().look(base).problem
    assert origins(Store()) == {str(base): "convert"}


def test_what_cannot_be_used_is_remembered_until_it_changes(
    models: Path, bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = models / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(100))
    problem = Store().look(broken).problem
    assert problem
    with monkeypatch.context() as patch:
        patch.setattr("edgelora.store.examine", lambda path: pytest.fail("opened again"))
        assert Store().look(broken).problem == problem
    shutil.copy(bases["q8_0"], broken)
    assert Store().look(broken).is_base


def test_a_folder_changes_with_any_of_its_files(models: Path) -> None:
    folder = models / "more" / "extract"
    before = state_of(folder), content_of(folder)
    assert (state_of(folder), content_of(folder)) == before
    weights = folder / "adapter_model.safetensors"
    data, stat = bytearray(weights.read_bytes()), weights.stat()
    data[-1] ^= 1
    weights.write_bytes(data)
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert state_of(folder) != before[0]
    assert content_of(folder) != before[1]


def test_content_is_sampled_and_sees_the_size(tmp_path: Path) -> None:
    large = tmp_path / "large"
    size = 3 * entry_module.SAMPLES * entry_module.SAMPLE_BYTES
    large.write_bytes(bytes(size))
    before = content_of(large)
    os.truncate(large, size + 1)
    assert content_of(large) != before


def test_a_split_base_is_one_base_by_any_part(tmp_path: Path) -> None:
    convert_base(TINY_BASE, tmp_path / "tiny.gguf", options=QuantizeOptions("q8_0", split_max_tensors=20))
    first, second = sorted(tmp_path.glob("*.gguf"))
    assert place_of(second) == first
    assert Store().fingerprint(second) == Store().fingerprint(TINY_BASE)
    assert [entry.path for entry in add(Store(), [tmp_path])] == [first]
    contract = Contract(base_fingerprint=Store().fingerprint(first))
    assert Store().find_base(contract, tmp_path / "adapter.gguf").path == first
    moved = second.rename(tmp_path / "away")
    assert "missing" in Store().look(first).problem
    moved.rename(second)
    assert Store().look(first).is_base


def test_add_refuses_all_or_nothing(models: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("no model")
    with pytest.raises(ModelFileError) as caught:
        add(Store(), [models, tmp_path / "empty", tmp_path / "notes.txt", tmp_path / "nowhere.gguf"])
    for name in ("empty: no base", "notes.txt: not a model", "nowhere.gguf: no such file"):
        assert name in caught.value.message
    assert Store().registered() == []


def test_add_tells_of_what_it_passes_over(models: Path) -> None:
    (models / "broken.gguf").write_bytes(b"no model")
    store = Store()
    assert len(add(store, [models])) == 3
    assert ["broken.gguf" in notice for notice in store.notices] == [True]


def test_add_does_not_walk_in_circles_nor_forever(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (models / "more" / "circle").symlink_to(models)
    deep = models.joinpath(*"abcdefghijk")
    deep.mkdir(parents=True)
    store = Store()
    assert len(add(store, [models])) == 3
    assert any("folders deep" in notice for notice in store.notices)
    monkeypatch.setattr("edgelora.discovery.MAX_LOOKED", 2)
    store = Store()
    assert len(add(store, [models])) < 3
    assert any("search ended" in notice for notice in store.notices)


def test_a_folder_of_training_is_one_adapter(models: Path) -> None:
    folder = models / "more" / "extract"
    shutil.copytree(folder, folder / "checkpoint-10")
    assert [entry.path.name for entry in add(Store(), [folder])] == ["extract"]
    assert [entry.name for entry in add(Store(), [folder / "checkpoint-10"])] == ["checkpoint-10"]


def test_remove_forgets_and_leaves_the_files(models: Path) -> None:
    add(Store(), [models])
    assert [item.entry.name for item in remove(Store(), ["support"])] == ["support"]
    assert (models / "more" / "support.gguf").is_file()
    shutil.rmtree(models / "more")
    assert len(remove(Store(), [str(models)])) == 2  # also what is gone
    assert Store().registered() == []
    assert (models / "tiny-q8_0.gguf").is_file()


def test_remove_refuses_all_or_nothing(models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "more", tmp_path / "again")
    add(Store(), [models, tmp_path / "again"])
    with pytest.raises(ModelFileError) as caught:
        remove(Store(), ["nobody", "support", "tiny-q8_0"])
    assert "nobody: not known" in caught.value.message
    assert "support: stands for several" in caught.value.message
    assert len(Store().registered()) == 5


def test_only_what_was_made_on_the_fly_is_deleted(models: Path, bases: dict[str, Path]) -> None:
    store = Store()
    store.make_adapter_folder()
    contract = Contract(base_fingerprint=store.fingerprint(bases["f32"]))
    own = write_adapter(
        store.adapter_path("a" * 64), bases["f32"], 5, contract=contract, metadata={"general.name": "lamp"}
    )
    assert [(entry.name, entry.origin) for entry in Store().known()] == [("lamp", "made on the fly")]
    assert [item.is_deleted for item in remove(Store(), ["lamp"])] == [True]
    assert not own.exists()
    add(Store(), [models / "more" / "support.gguf"])
    assert [item.is_deleted for item in remove(Store(), ["support"])] == [False]


def test_register_adapter(models: Path) -> None:
    Store().register_adapter(models / "more" / "support.gguf")
    assert origins(Store()) == {str(models / "more" / "support.gguf"): "convert"}
    with pytest.raises(ModelFileError, match="is a base"):
        Store().register_adapter(models / "tiny-q8_0.gguf")
    with pytest.raises(ModelFileError, match="nowhere"):
        Store().register_adapter(models / "nowhere.gguf")


def test_what_was_only_looked_at_is_not_kept_when_it_is_gone(models: Path) -> None:
    add(Store(), [models / "more"])
    Store().look(models / "tiny-q8_0.gguf")
    assert len(Store().remembered()) == 3
    shutil.rmtree(models)
    Store().known()
    assert {entry.origin for entry in Store().remembered()} == {"added"}


def test_looking_reads_no_more_than_needed(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add(Store(), [models])
    looked: list[Path] = []
    assert len(Store().known(looked.append)) == 3
    assert looked == []
    assert examine(models / "tiny-q8_0.gguf").fingerprint == Store().look(models / "tiny-q8_0.gguf").fingerprint
