"""A dataset by its id: the real `datasets` package against a hub on the loopback interface, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pytest

from tests.converters.hub_server import Hub, Repository, _Handler

pytestmark = pytest.mark.train


@contextmanager
def dataset_hub() -> Iterator[Hub]:
    """The hub of the converters' tests with its repositories as datasets."""
    hub = Hub()

    class Handler(_Handler):
        state = hub

        def _answer(self) -> None:
            self.path = unquote(self.path).replace("/api/datasets/", "/api/models/").replace("/datasets/", "/")
            if "/tree/" in self.path and self.path.partition("?")[0].count("/") > 6:  # a folder of a repository
                return self._refuse(404, "EntryNotFound", "Entry not found")
            super()._answer()

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        hub.port = server.server_address[1]
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join(10)


def check(hub: Hub, home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_OFFLINE": "0",
    }
    command = [sys.executable, "-m", "edgelora", "data", "check", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, cwd=home)


def test_a_dataset_is_fetched_by_its_id_and_read_by_split(tmp_path: Path) -> None:
    rows = [{"prompt": f"Lamp {n}?", "completion": "Yes."} for n in range(5)]
    lines = [(json.dumps(row) + "\n").encode() for row in rows]
    with dataset_hub() as hub:
        hub.repositories["somebody/lamps"] = Repository(
            {"main": {"train.jsonl": b"".join(lines), "test.jsonl": lines[0]}}
        )
        result = check(hub, tmp_path, "somebody/lamps@0.5", "--eval-data", "somebody/lamps:test", "--json")
        assert result.returncode == 0, result.stderr
        found = json.loads(result.stdout)
        assert found["files"] == [
            {"name": "somebody/lamps", "format": "prompt/completion", "rows": 5, "bad_rows": 0, "weight": 0.5}
        ]
        assert [file["rows"] for file in found["eval_files"]] == [1]
        assert [warning["count"] for warning in found["warnings"]] == [1]  # the row that is in both
        assert result.stderr == ""
        missing = check(hub, tmp_path, "somebody/nothing")
        assert missing.returncode == 4
        assert "somebody/nothing (train): not a file here, nor a dataset of the hub" in missing.stderr
