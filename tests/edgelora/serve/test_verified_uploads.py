"""`--require-verify`: what is uploaded does here what it did where it was trained, or stays out."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from edgelora.conversion import ConvertOptions, convert
from edgelora.serve.keys import Key, add_key
from edgelora.store import Store
from tests.conftest import TINY_BASE
from tests.edgelora.adapter_damage import scaled, write_damaged
from tests.edgelora.serve.conftest import serving
from tests.peft_folders import write_lora

pytestmark = pytest.mark.train


@pytest.fixture(scope="module")
def certified(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from edgelora.adapter_contract import contract_for
    from edgelora.messages import user_message
    from edgelora.train.certificate import RecordSettings, certify

    folder, store = tmp_path_factory.mktemp("certified"), Store(tmp_path_factory.mktemp("store"))
    made = write_lora(folder / "mine", TINY_BASE, seed=3, strength=0.5)
    prompts = [(user_message("Where is the mill?"),), (user_message("Good night."),)]
    contract = contract_for(made, TINY_BASE, store).contract
    certify(contract, TINY_BASE, made, prompts, RecordSettings(new_tokens=16)).save(made)
    return convert(made, folder / "sound.gguf", ConvertOptions(base=TINY_BASE), store=store).path


def test_only_what_is_proven_is_let_in(base: Path, certified: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    folder, keys = tmp_path / "adapters", tmp_path / "keys.toml"
    folder.mkdir()
    headers = {"Authorization": f"Bearer {add_key(keys, Key('boss', frozenset({'*'}), admin=True))}"}
    wrong = write_damaged(certified, tmp_path / "wrong.gguf", scaled(2.0))
    with serving(base, folder, "--require-verify", keys=keys) as served:

        def put(path: Path) -> tuple[int, str | None]:
            answer = httpx.put(
                f"{served.url}/v1/adapters/mine", content=path.read_bytes(), headers=headers, timeout=120
            )
            return answer.status_code, answer.json().get("error", {}).get("code")

        assert put(wrong) == (400, "not_verified")
        assert put(adapters["red"]) == (400, "not_certified")
        assert not list(folder.glob("*.gguf"))
        assert put(certified) == (201, None)
        assert put(wrong) == (400, "not_verified")
        assert (folder / "mine.gguf").read_bytes() == certified.read_bytes()
