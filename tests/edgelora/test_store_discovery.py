"""What other programs keep on this machine: found, grouped, never written to, and never a way out of their folders."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest

from edgelora import discovery
from edgelora.contract import Contract
from edgelora.discovery import SOURCES
from edgelora.errors import BaseNotFoundError, ModelFileError
from edgelora.listing import list_known
from edgelora.registration import add, remove
from edgelora.store import Store
from tests.conftest import TINY_BASE
from tests.edgelora.conftest import write_adapter
from tests.peft_folders import write_lora


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder of this test's own, in which the programs keep their models."""
    from huggingface_hub import constants

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("EDGELORA_DISCOVERY", raising=False)
    monkeypatch.delenv("OLLAMA_MODELS", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(discovery, "OLLAMA_SERVICE", tmp_path / "nowhere")
    return tmp_path


@pytest.fixture
def q8(bases: dict[str, Path]) -> Path:
    return bases["q8_0"]


@pytest.fixture
def contract(q8: Path) -> Contract:
    return Contract(base_name="tiny", base_fingerprint=Store().fingerprint(q8))


def snapshot(home: Path, repository: str, files: list[Path]) -> Path:
    """A repository in the hub's cache: blobs, and a snapshot of links to them."""
    folder = home / "hub" / f"models--{repository.replace('/', '--')}"
    made = folder / "snapshots" / ("a" * 40)
    made.mkdir(parents=True)
    (folder / "blobs").mkdir()
    for file in files:
        blob = folder / "blobs" / hashlib.sha256(file.name.encode()).hexdigest()
        shutil.copy(file, blob)
        (made / file.name).symlink_to(Path("../../blobs") / blob.name)
    return made


def ollama(root: Path, name: str, layers: dict[Path, str]) -> list[Path]:
    """A model of Ollama's: its manifest, and its layers as blobs."""
    made, described = [], []
    for file, kind in layers.items():
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        made.append(root / "blobs" / f"sha256-{digest}")
        made[-1].parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, made[-1])
        described.append({"mediaType": f"application/vnd.ollama.image.{kind}", "digest": f"sha256:{digest}"})
    manifest = root / "manifests" / "registry.ollama.ai" / name
    manifest.parent.mkdir(parents=True)
    manifest.write_text(json.dumps({"schemaVersion": 2, "layers": described}))
    return made


def found() -> list[tuple[str, str, str]]:
    return [(entry.origin, entry.name, entry.kind.value if entry.kind else "") for entry in Store().known()]


def test_the_hub_cache(home: Path, q8: Path) -> None:
    file = snapshot(home, "acme/tiny-GGUF", [q8]) / q8.name
    write_lora(home / "lora", TINY_BASE, seed=1)
    snapshot(home, "acme/lora", sorted((home / "lora").iterdir()))
    snapshot(home, "acme/tiny", sorted(TINY_BASE.iterdir()))
    origin = "Hugging Face cache"
    assert sorted(found()) == [
        (origin, "Fennick 2.6m", "GGUF base"),
        (origin, "acme/lora", "PEFT adapter folder"),
        (origin, "acme/tiny", "model folder"),
    ]
    assert {entry.path for entry in Store().known() if entry.is_base} >= {file}


def test_lm_studio_wherever_it_keeps_its_models(home: Path, q8: Path) -> None:
    for folder in (home / ".lmstudio" / "models", home / ".cache" / "lm-studio" / "models", home / "chosen"):
        (folder / "publisher" / "repository").mkdir(parents=True)
        shutil.copy(q8, folder / "publisher" / "repository" / "tiny.gguf")
    assert len(found()) == 2
    (home / ".lmstudio" / "settings.json").write_text(json.dumps({"downloadsFolder": str(home / "chosen")}))
    assert str(home / "chosen") in str(Store().known()[0].path)
    shutil.move(home / ".lmstudio", home / "moved")
    (home / ".lmstudio-home-pointer").write_text(f"{home / 'moved'}\n")
    assert len(found()) == 2


def test_ollama_by_its_manifests(home: Path, q8: Path, bases: dict[str, Path], contract: Contract) -> None:
    adapter = write_adapter(home / "adapter.gguf", bases["f32"], 1, contract=contract)
    root = home / ".ollama" / "models"
    ollama(root, "library/tiny/1b", {q8: "model", adapter: "adapter"})
    ollama(root, "somebody/tiny/latest", {bases["f32"]: "model"})
    assert found() == [
        ("Ollama", "tiny:1b", "GGUF base"),
        ("Ollama", "tiny:1b", "GGUF adapter"),
        ("Ollama", "somebody/tiny:latest", "GGUF base"),
    ]


def test_ollama_models_are_where_its_variable_says(home: Path, q8: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ollama(home / "elsewhere", "library/tiny/latest", {q8: "model"})
    assert found() == []
    monkeypatch.setenv("OLLAMA_MODELS", str(home / "elsewhere"))
    assert found() == [("Ollama", "tiny:latest", "GGUF base")]
    monkeypatch.setenv("EDGELORA_DISCOVERY", "0")
    assert found() == []


def test_nothing_is_followed_out_of_a_folder(home: Path, q8: Path) -> None:
    secret = Path(shutil.copy(q8, home / "secret.gguf"))
    digest = hashlib.sha256(b"").hexdigest()
    models = home / ".lmstudio" / "models"
    (models / "publisher").mkdir(parents=True)
    (models / "publisher" / "link.gguf").symlink_to(secret)
    (models / "folder").symlink_to(home)
    shutil.copytree(TINY_BASE, models / "model")
    (models / "model" / "model.safetensors").unlink()
    (models / "model" / "model.safetensors").symlink_to(TINY_BASE / "model.safetensors")
    [blob] = ollama(home / ".ollama" / "models", "library/tiny/latest", {q8: "model"})
    blob.unlink()
    blob.symlink_to(secret)
    other = home / ".ollama" / "models" / "manifests" / "host" / "library" / "tiny" / "other"
    other.parent.mkdir(parents=True)
    layer = {"mediaType": "application/vnd.ollama.image.model", "digest": f"sha256:../../{digest}"}
    other.write_text(json.dumps({"layers": [layer, "text", None, 3, {}]}))
    store = Store()
    assert store.known() == []
    told = "\n".join(store.notices)
    assert all(name in told for name in ("link.gguf", "model: holds links", blob.name))


def test_garbage_is_passed_over_and_named(home: Path, q8: Path) -> None:
    models = home / ".lmstudio" / "models" / "publisher" / "repository"
    models.mkdir(parents=True)
    (models / "bad.gguf").write_bytes(b"GGUF\xff" * 20)
    (models / "empty.gguf").touch()
    os.mkfifo(models / "pipe.gguf")
    (models / os.fsdecode(b"n\xffme.gguf")).write_bytes(q8.read_bytes())
    manifests = home / ".ollama" / "models" / "manifests" / "host" / "library" / "tiny"
    manifests.mkdir(parents=True)
    (manifests / "list").write_text("[]")
    (manifests / "deep").write_text("[" * 100_000)
    (manifests / "layers").write_text('{"layers": 3}')
    (manifests / "large").write_bytes(b" " * (2 << 20))
    (home / ".lmstudio-home-pointer").write_bytes(b"\xff\xfe\x00")
    (home / "hub").write_text("a file where a folder should be")
    listing = list_known(Store())
    assert {entry.path.name for entry in listing.unusable} == {"bad.gguf", "empty.gguf"}
    assert [len(model.bases) for model in listing.models] == [1]
    told = "\n".join(listing.notices)
    assert all(name in told for name in ("tiny/deep", "tiny/large"))
    json.dumps(listing.to_dict()).encode()


def test_nothing_is_written_there(home: Path, q8: Path, contract: Contract) -> None:
    made = snapshot(home, "acme/tiny-GGUF", [q8])
    [blob] = ollama(home / ".ollama" / "models", "library/tiny/latest", {q8: "model"})
    before = sorted((path, path.stat().st_mtime_ns) for path in home.rglob("*") if "store" not in path.parts)
    list_known(Store())
    Store().find_base(contract, Path("/nowhere/adapter.gguf"))
    with pytest.raises(ModelFileError, match="only reads"):
        remove(Store(), [blob.name, str(made)])
    assert sorted((path, path.stat().st_mtime_ns) for path in home.rglob("*") if "store" not in path.parts) == before


def test_a_base_is_found_there_after_the_index(home: Path, q8: Path, contract: Contract) -> None:
    alone = home / "alone" / "support.gguf"
    alone.parent.mkdir()
    alone.touch()
    made = snapshot(home, "acme/tiny-GGUF", [q8])
    base = Store().find_base(contract, alone)
    assert (base.path, base.how) == (made / q8.name, "found in the Hugging Face cache")
    own = Path(shutil.copy(q8, home / "own.gguf"))
    add(Store(), [own])
    assert Store().find_base(contract, alone).how == "known from `edgelora add`"
    with pytest.raises(BaseNotFoundError):  # one that does not say what it wants gets nothing of other programs'
        Store().find_base(None, alone)


def test_not_found_names_every_place(home: Path, q8: Path, contract: Contract) -> None:
    made = snapshot(home, "acme/tiny-GGUF", [q8])
    wanted = contract.with_changes(base_fingerprint="f" * 64)
    with pytest.raises(BaseNotFoundError) as caught:
        Store().find_base(wanted, home / "adapter.gguf")
    fingerprint = contract.base_fingerprint[:12]
    assert f"the Hugging Face cache: {made / q8.name} (fingerprint {fingerprint})" in caught.value.message
    for place in ("beside the adapter", "an earlier convert", "edgelora add", *(source.place for source in SOURCES)):
        assert place in caught.value.message


def test_not_found_knows_the_folder_that_a_base_can_be_made_of(home: Path, contract: Contract) -> None:
    add(Store(), [TINY_BASE])
    with pytest.raises(BaseNotFoundError) as caught:
        Store().find_base(contract, home / "adapter.gguf")
    assert f"edgelora convert {TINY_BASE}" in caught.value.hint


def test_the_listing_says_what_fits_which(home: Path, q8: Path, bases: dict[str, Path], contract: Contract) -> None:
    mine = home / "mine"
    mine.mkdir()
    shutil.copy(q8, mine / "tiny.gguf")
    write_adapter(mine / "support.gguf", bases["f32"], 1, contract=contract)
    write_adapter(mine / "other.gguf", bases["f32"], 2, contract=Contract(base_name="big", base_fingerprint="e" * 64))
    write_adapter(mine / "silent.gguf", bases["f32"], 3)
    write_lora(mine / "peft", TINY_BASE, seed=1)
    write_lora(mine / "by-name", TINY_BASE, seed=2, base_model_name_or_path="acme/large")
    add(Store(), [mine])
    (mine / "tiny.gguf").rename(mine / "moved.gguf")
    listing = list_known(Store())
    assert [entry.path.name for entry in listing.missing] == ["tiny.gguf"]
    Store().look(mine / "moved.gguf")
    listing = list_known(Store())
    assert listing.missing == []
    [model] = listing.models
    assert [entry.name for entry in model.bases] == ["Fennick 2.6m", "Fennick 2.6m"]  # one is the folder
    assert sorted(entry.name for entry in model.adapters) == ["peft", "support"]
    assert {(each.name, each.fingerprint, each.adapters[0].name) for each in listing.waiting} == {
        ("big", "e" * 64, "other"),
        ("acme/large", "", "by-name"),
    }
    assert [entry.name for entry in listing.unclaimed] == ["silent"]
