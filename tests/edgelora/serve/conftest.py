"""A real server in a process of its own, on a free port of this machine."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.edgelora.conftest import write_adapter

START_SECONDS, END_SECONDS = 60, 40


@dataclass
class Served:
    """A running server: its address, its process, and what it has logged."""

    url: str
    process: subprocess.Popen[str]
    log: Path
    folder: Path
    headers: dict[str, str] = field(default_factory=dict)

    def get(self, path: str, **more: Any) -> httpx.Response:
        return httpx.get(self.url + path, headers=self.headers, timeout=60, **more)

    def post(self, path: str, body: Any, **more: Any) -> httpx.Response:
        return httpx.post(
            self.url + path, json=body, headers={**self.headers, **more.pop("headers", {})}, timeout=120, **more
        )

    def chat(self, text: str, model: str = "base", **more: Any) -> dict[str, Any]:
        body = {"model": model, "messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 12}
        response = self.post("/v1/chat/completions", {**body, **more})
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer

    def state(self) -> dict[str, Any]:
        found: dict[str, Any] = self.get("/status").json()
        return found

    def models(self, everything: bool = False) -> dict[str, dict[str, Any]]:
        listed = self.get("/v1/models?all=true" if everything else "/v1/models").json()["data"]
        return {model["id"]: model for model in listed}

    def until(self, happened: Any, seconds: float = 20) -> Any:
        """What `happened` gives, once that is something."""
        deadline = time.monotonic() + seconds
        while not (found := happened()):
            assert time.monotonic() < deadline, self.log.read_text()
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.05)
        return found

    def engine_pid(self) -> int:
        """The engine's process."""
        import psutil

        children = psutil.Process(self.process.pid).children()
        (worker,) = [child for child in children if "edgelora.serve.worker" in " ".join(child.cmdline())]
        return int(worker.pid)

    def logged(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]


Sabotage = Callable[[str], Path]


@pytest.fixture
def sabotage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sabotage:
    """Code that every Python process that is started from now on runs first. It has `trigger`, a path, which is
    returned: what it does, it does when that is there."""

    def arrange(code: str) -> Path:
        trigger, folder = tmp_path / "trigger", tmp_path / "site"
        folder.mkdir()
        head = f"import os, pathlib, signal, time\ntrigger = pathlib.Path({str(trigger)!r})\n"
        (folder / "sitecustomize.py").write_text(head + code)
        monkeypatch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
        return trigger

    return arrange


@contextmanager
def serving(base: Path, folder: Path, *options: str, keys: Path | None = None) -> Iterator[Served]:
    """`edgelora serve`, until the block ends; then it has to end by itself."""
    log = folder.parent / f"{folder.name}.log"
    command = [
        sys.executable,
        "-m",
        "edgelora",
        "serve",
        "--base",
        str(base),
        "--adapter-dir",
        str(folder),
        "--port",
        "0",
    ]
    command += ["--threads", "1", "--ctx-size", "512", "--parallel", "4", *options]
    if keys:
        command += ["--keys", str(keys)]
    with open(log, "w") as sink:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=sink, text=True, start_new_session=True)
    try:
        yield Served(_address(process, log), process, log, folder)
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            assert process.wait(END_SECONDS) == 0, log.read_text()
        assert "Traceback" not in log.read_text(), log.read_text()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def _address(process: subprocess.Popen[str], log: Path) -> str:
    deadline = time.monotonic() + START_SECONDS
    while True:
        if found := re.search(r"serves at (http://\S+)", log.read_text()):
            return found[1]
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)


@pytest.fixture(scope="session")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Strong ones, whose replies are nobody else's."""
    folder = tmp_path_factory.mktemp("strong")
    made = (("red", 11), ("blue", 12))
    return {name: write_adapter(folder / f"{name}.gguf", base, seed, strength=0.4) for name, seed in made}


@pytest.fixture(scope="session")
def shelf(adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the adapters."""
    folder = tmp_path_factory.mktemp("serve") / "adapters"
    folder.mkdir()
    for name, path in adapters.items():
        shutil.copy(path, folder / f"{name}.gguf")
    return folder


@pytest.fixture(scope="session")
def served(base: Path, shelf: Path) -> Iterator[Served]:
    """A server that tests share, without keys."""
    with serving(base, shelf) as made:
        yield made
