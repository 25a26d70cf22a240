"""Requests made from the served OpenAPI document: whatever fits it, or nearly, is no error of the server's."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from edgelora.serve.keys import Key, add_key
from tests.edgelora.serve.conftest import serving

pytest.importorskip("schemathesis")


def with_names(document: dict[str, Any]) -> dict[str, Any]:
    """The document with models that exist, so that requests come further than their names."""
    for path in document["paths"].values():
        for operation in path.values():
            schema = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
            properties = schema.get("properties", {})
            if "model" in properties:
                properties["model"] = {"enum": ["base", "red"]}
                properties["max_tokens"] = {"type": "integer", "minimum": 1, "maximum": 8}
                properties.pop("adapters", None)
    return document


def test_nothing_that_fits_the_document_breaks_the_server(
    base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    folder, keys = tmp_path / "adapters", tmp_path / "keys.toml"
    folder.mkdir()
    shutil.copy(adapters["red"], folder / "red.gguf")
    secret = add_key(keys, Key("boss", frozenset({"*"}), admin=True))
    with serving(base, folder, "--timeout", "5", keys=keys) as served:
        served.headers["Authorization"] = f"Bearer {secret}"
        document = tmp_path / "openapi.json"
        document.write_text(json.dumps(with_names(served.get("/openapi.json").json())))
        command = [
            sys.executable, "-m", "schemathesis.cli", "run", str(document), "--url", served.url, "--seed", "7",
            "--header", f"Authorization: Bearer {secret}", "--checks", "not_a_server_error", "--max-examples", "20",
            "--phases", "coverage,fuzzing", "--generation-database", "none",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
        assert done.returncode == 0, done.stdout + served.log.read_text()[-3000:]
        codes = [line["status"] for line in served.logged() if "status" in line]
        assert len(codes) > 200
        assert codes.count(200) > 20, "hardly anything was understood, so this showed nothing"
        assert not [code for code in codes if code >= 500]
        assert served.state()["restarts"] == 0
