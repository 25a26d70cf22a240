"""Adapters with which the model's output is no number: kept out at the door, whichever way they come."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import httpx

from tests.edgelora.conftest import write_adapter
from tests.edgelora.serve.test_faults import QUESTION, asked, error_of, guarded, text_of

REASON = "with it the model's output is not a number"


def test_what_overflows_is_refused_and_says_why(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    bad = write_adapter(tmp_path / "bad.gguf", base, 5, strength=1e30)
    with guarded(base, adapters, tmp_path / "adapters") as served:
        said = text_of(served.post("/v1/chat/completions", asked("red")))
        url = f"{served.url}/v1/adapters"
        for name in ("red", "new"):  # one that would take another's place, and one that is new
            answer = httpx.put(f"{url}/{name}", content=bad.read_bytes(), headers=served.headers, timeout=60)
            assert answer.status_code == 400
            assert error_of(answer)["code"] == "adapter_refused"
            assert REASON in error_of(answer)["message"]
        assert (served.folder / "red.gguf").read_bytes() == adapters["red"].read_bytes()
        shutil.copy(bad, served.folder / "new.partial")
        os.replace(served.folder / "new.partial", served.folder / "dropped.gguf")
        dropped = served.until(lambda: served.models(everything=True).get("dropped"))["edgelora"]
        assert dropped["state"] == "refused"
        assert REASON in dropped["problem"]
        answer = served.post("/v1/load_lora_adapter", {"lora_name": "hand", "lora_path": "dropped.gguf"})
        assert answer.status_code == 400
        assert REASON in error_of(answer)["message"]
        assert served.models().keys() == {"base", "red", "blue"}
        os.kill(served.engine_pid(), signal.SIGKILL)
        served.until(lambda: served.state()["restarts"] == 1 and served.get("/ready").status_code == 200)
        assert served.chat(QUESTION, "red", max_tokens=8)["choices"][0]["message"]["content"] == said
        assert served.models(everything=True)["dropped"]["edgelora"]["state"] == "refused"
