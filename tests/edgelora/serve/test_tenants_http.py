"""Keys on a live server: what each may reach, how much, and what it learns of others."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from edgelora.serve.keys import Key, Rate, add_key
from tests.edgelora.serve.conftest import Served, serving

QUESTION = "Where does the miller live?"
SECRET = "the storm took the boats of the old fisherman, and nobody told the miller of it " * 4


@dataclass
class Tenants:
    served: Served
    keys: Path
    secrets: dict[str, str]

    def as_(self, name: str) -> Served:
        return replace(self.served, headers={"Authorization": f"Bearer {self.secrets[name]}"})


@pytest.fixture(scope="module")
def tenants(base: Path, adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tenants]:
    folder = tmp_path_factory.mktemp("tenants") / "adapters"
    folder.mkdir()
    for name, path in adapters.items():
        shutil.copy(path, folder / f"{name}.gguf")
    keys = folder.parent / "keys.toml"
    secrets = {
        key.name: add_key(keys, key)
        for key in (
            Key("reds", frozenset({"red"})),
            Key("others", frozenset({"red", "blue"})),
            Key("slow", frozenset({"*"}), rate=Rate(2, 60)),
            Key("poor", frozenset({"*"}), tokens=Rate(30, 86400)),
            Key("one", frozenset({"*"}), concurrency=1),
            Key("boss", frozenset({"*"}), admin=True),
        )
    }
    with serving(base, folder, "--max-upload", "5", "--ctx-size", "4096", keys=keys) as served:
        yield Tenants(served, keys, secrets)


def body(model: str, text: str = QUESTION, **more: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 8, **more}


def test_without_a_known_key_nobody_is_let_in(tenants: Tenants) -> None:
    for headers in ({}, {"Authorization": "Bearer nonsense"}, {"Authorization": f"Basic {tenants.secrets['boss']}"}):
        for path in ("/v1/models", "/status", "/metrics"):
            answer = httpx.get(tenants.served.url + path, headers=headers)
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"
    assert httpx.get(tenants.served.url + "/health").status_code == 200
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{tenants.served.url}/v1", api_key="wrong", max_retries=0).models.list()


def test_a_key_learns_nothing_of_others_adapters(tenants: Tenants) -> None:
    reds = tenants.as_("reds")
    assert set(reds.models()) == {"red"}
    assert set(reds.models(everything=True)) == {"red"}
    assert reds.post("/v1/chat/completions", body("red")).status_code == 200
    answers = [
        reds.post("/v1/chat/completions", body(model, **more))
        for model, more in (("blue", {}), ("nobody", {}), ("base", {}), ("red", {"adapters": {"red": 1, "blue": 0.1}}))
    ]
    assert {answer.status_code for answer in answers} == {404}
    texts = {answer.text.replace("blue", "X").replace("nobody", "X") for answer in answers[:2]}
    assert len(texts) == 1
    assert reds.get("/v1/models/blue").status_code == 404
    assert reds.get("/metrics").status_code == 403
    assert tenants.as_("others").post("/v1/chat/completions", body("blue")).status_code == 200
    assert {name: tenants.as_(name).state()["adapters_in_memory"] for name in ("reds", "boss")} == {
        "reds": 1,
        "boss": 2,
    }


def test_what_one_tenant_said_is_not_known_for_another(tenants: Tenants) -> None:
    def cached(name: str) -> int:
        usage = tenants.as_(name).post("/v1/chat/completions", body("red", SECRET)).json()["usage"]
        return int(usage["prompt_tokens_details"]["cached_tokens"])

    assert cached("reds") < 20
    assert cached("reds") > 50
    assert cached("others") < 20


def test_rates_tokens_and_concurrency(tenants: Tenants) -> None:
    slow = [tenants.as_("slow").post("/v1/chat/completions", body("base")) for _ in range(3)]
    assert [answer.status_code for answer in slow] == [200, 200, 429]
    assert 1 <= int(slow[2].headers["Retry-After"]) <= 60
    assert slow[2].json()["error"]["code"] == "rate_limit_exceeded"
    poor = [tenants.as_("poor").post("/v1/chat/completions", body("base")) for _ in range(3)]
    assert poor[0].status_code == 200
    assert poor[-1].status_code == 429
    assert poor[-1].json()["error"]["code"] == "tokens_limit_exceeded"
    one = tenants.as_("one")
    endless = body("base", grammar="root ::= [a-z ] root", max_tokens=3500, stream=True)
    with httpx.stream(
        "POST", f"{one.url}/v1/chat/completions", json=endless, headers=one.headers, timeout=60
    ) as answer:
        lines = answer.iter_lines()  # which would end the request, if it were dropped
        next(lines)
        assert one.post("/v1/chat/completions", body("base")).json()["error"]["code"] == "concurrency_limit_exceeded"
    one.until(lambda: one.post("/v1/chat/completions", body("base")).status_code == 200, 5)


def test_an_admin_manages_adapters(tenants: Tenants, adapters: dict[str, Path]) -> None:
    boss, reds = tenants.as_("boss"), tenants.as_("reds")
    call = {"lora_name": "second", "lora_path": "red.gguf"}
    assert reds.post("/v1/load_lora_adapter", call).status_code == 403
    assert boss.post("/v1/load_lora_adapter", call).json()["edgelora"]["generation"] == 1
    assert boss.post("/v1/load_lora_adapter", call).json()["error"]["code"] == "already_loaded"
    stale = boss.post("/v1/load_lora_adapter", {**call, "lora_path": "blue.gguf", "if_generation": 7})
    assert (stale.status_code, stale.json()["error"]["code"]) == (409, "generation_mismatch")
    moved = boss.post("/v1/load_lora_adapter", {**call, "lora_path": "blue.gguf", "if_generation": 1})
    assert moved.json()["edgelora"]["generation"] == 2
    for path in (
        "../base.gguf",
        "/etc/passwd",
        "x/../../keys.toml",
        "",
        "nothing.gguf",
        "\x00.gguf",
        "a" * 5000 + ".gguf",
    ):
        answer = boss.post("/v1/load_lora_adapter", {"lora_name": "out", "lora_path": path})
        assert answer.status_code == 400
        assert "/tmp" not in answer.text
    assert boss.post("/v1/unload_lora_adapter", {"lora_name": "second"}).status_code == 200
    assert boss.post("/v1/unload_lora_adapter", {"lora_name": "second"}).status_code == 404
    assert "second" not in boss.models()


def test_uploads(tenants: Tenants, adapters: dict[str, Path], base: Path) -> None:
    boss = tenants.as_("boss")

    def put(name: str, data: bytes, query: str = "", key: str = "boss") -> httpx.Response:
        return httpx.put(
            f"{boss.url}/v1/adapters/{name}{query}", content=data, headers=tenants.as_(key).headers, timeout=60
        )

    good = adapters["red"].read_bytes()
    assert put("up", good, key="reds").status_code == 403
    assert put("up", good[:-100]).json()["error"]["code"] == "adapter_refused"
    assert put("up", b"").status_code == 400
    assert put("up", bytes(6_000_000)).status_code == 413
    assert put("..%2Fup", good).status_code in (400, 404, 405)
    assert "up" not in boss.models(everything=True)
    made = put("up", good)
    assert (made.status_code, made.json()["edgelora"]["generation"]) == (201, 1)
    assert put("up", adapters["blue"].read_bytes(), "?if_generation=5").status_code == 409
    assert put("up", adapters["blue"].read_bytes(), "?if_generation=1").json()["edgelora"]["generation"] == 2
    folder = boss.folder
    assert sorted(path.name for path in folder.iterdir() if path.name.startswith(".") and "upload" in path.name) == []
    assert boss.chat(QUESTION, "up")["choices"]


def test_sighup_reads_the_keys_again_and_a_broken_file_changes_nothing(tenants: Tenants) -> None:
    fresh = add_key(tenants.keys, Key("fresh", frozenset({"red"})))
    headers = {"Authorization": f"Bearer {fresh}"}
    assert httpx.get(f"{tenants.served.url}/v1/models", headers=headers).status_code == 401
    tenants.served.process.send_signal(signal.SIGHUP)
    tenants.served.until(lambda: httpx.get(f"{tenants.served.url}/v1/models", headers=headers).status_code == 200)
    whole = tenants.keys.read_text()
    tenants.keys.write_text("[keys.fresh\nhash = ")
    os.kill(tenants.served.process.pid, signal.SIGHUP)
    tenants.served.until(lambda: "the old keys stay" in tenants.served.log.read_text())
    assert httpx.get(f"{tenants.served.url}/v1/models", headers=headers).status_code == 200
    tenants.keys.write_text(whole)


def test_a_restart_gives_nobody_a_new_day(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    folder, keys = tmp_path / "adapters", tmp_path / "keys.toml"
    folder.mkdir()
    secret = add_key(keys, Key("poor", frozenset({"*"}), tokens=Rate(30, 86400)))
    headers = {"Authorization": f"Bearer {secret}"}
    for codes in ([200, 429], [429]):
        with serving(base, folder, keys=keys) as served:
            tenant = replace(served, headers=headers)
            body_of_many = body("base", grammar="root ::= [a-z ] root", max_tokens=40)
            assert [tenant.post("/v1/chat/completions", body_of_many).status_code for _ in codes] == codes
    usage = keys.with_name("keys.toml.usage")
    assert usage.stat().st_mode & 0o077 == 0
    usage.write_text("{broken")
    with serving(base, folder, keys=keys) as served:
        assert replace(served, headers=headers).post("/v1/chat/completions", body("base")).status_code == 200
        assert "what was used before is not counted" in served.log.read_text()


def test_who_leaves_early_pays_for_what_was_written(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    folder, keys = tmp_path / "adapters", tmp_path / "keys.toml"
    folder.mkdir()
    secret = add_key(keys, Key("sly", frozenset({"*"}), tokens=Rate(60, 86400)))
    with serving(base, folder, "--ctx-size", "4096", keys=keys) as served:
        sly = replace(served, headers={"Authorization": f"Bearer {secret}"})
        endless = body("base", grammar="root ::= [a-z ] root", max_tokens=3500, stream=True)
        with httpx.stream("POST", f"{sly.url}/v1/chat/completions", json=endless, headers=sly.headers) as answer:
            lines = answer.iter_lines()
            for _ in range(200):
                next(lines)

        def refused() -> httpx.Response | None:
            answer = sly.post("/v1/chat/completions", body("base"))
            return answer if answer.is_error else None

        assert sly.until(refused).json()["error"]["code"] == "tokens_limit_exceeded"
