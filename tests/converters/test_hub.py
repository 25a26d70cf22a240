"""Hub ids: which files are fetched, how a broken download goes on, and what is said when the hub does not help.

Everything is asked of a hub of our own through HF_ENDPOINT, in processes of their own, as huggingface_hub reads its
environment when it is imported.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from converters.errors import ConversionError, DiskFullError, MissingFileError, UnsupportedError
from converters.hub import fetch
from converters.hub_cache import is_adapter, missing_from
from converters.hub_problems import translated
from converters.hub_reference import HubReference, hub_reference, is_hub_id
from tests.conftest import ROOT
from tests.converters.hub_server import Hub, Repository, commit_of, serving

TIMEOUT_SECONDS = 60
SCRIPT = """
import json, os, sys
from huggingface_hub import HfApi, constants, snapshot_download
from converters import checkpoint, hub, hub_transfer
from converters.errors import ConversionError

hub_transfer.FIRST_WAIT_SECONDS = 0.01

def answer(calls):
    for call in calls:
        seen, notices = [], []
        try:
            function = getattr(hub, call.pop("function", "fetch"))
            path = function(**call, progress=lambda *step: seen.append(step), notice=notices.append)
            names = sorted(str(p.relative_to(path)) for p in path.rglob("*") if p.is_file())
            result = {"path": str(path), "names": names}
        except ConversionError as error:
            result = {"error": type(error).__name__, "message": error.message, "hint": error.hint}
        print(json.dumps({**result, "progress": seen, "notices": notices}), flush=True)

if len(sys.argv) > 1:
    answer(json.loads(sys.argv[1]))
    sys.exit()
for line in sys.stdin:  # a copy of this process, all imported, for each order
    order = json.loads(line)
    if (child := os.fork()) == 0:
        os.environ.update(order["env"])
        constants.HF_HUB_CACHE = order["home"] + "/hub"
        constants.HF_TOKEN_PATH = order["home"] + "/token"
        os.chdir(order["home"])
        answer(order["calls"])
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    print(json.dumps({"status": status}), flush=True)
"""
SHARD = bytes(range(256)) * 1024  # 256 KiB
CHAT = {"chat_template.jinja": b"{{ messages }}", "additional_chat_templates/tools.jinja": b"{{ tools }}"}
MODEL = {
    "config.json": b'{"model_type": "llama"}',
    "generation_config.json": b"{}",
    "tokenizer.json": b'{"model": {}}',
    "tokenizer_config.json": b"{}",
    "README.md": b"# A model",
    "model.safetensors": b"1" + SHARD,
    **CHAT,
}
USELESS = {
    "pytorch_model.bin": b"pickle",
    "model.gguf": b"GGUF",
    "consolidated.safetensors": b"2" + SHARD,
    "original/params.json": b"{}",
    "original/consolidated.00.pth": b"pickle",
    "onnx/model.safetensors": b"3" + SHARD,
    "onnx/config.json": b"{}",
    "adapter_model.safetensors": b"4" + SHARD,
    "model.fp16.safetensors": b"5" + SHARD,
    "figure.png": b"png",
    "modeling_llama.py": b"import os",
    "LICENSE": b"free",
    ".gitattributes": b"*.safetensors filter=lfs",
}
SHARDS = {f"model.safetensors-0000{i}-of-00002.safetensors": bytes([i]) + SHARD for i in (1, 2)}
LAST_SHARD = max(SHARDS)
SHARDED = {
    **{name: content for name, content in MODEL.items() if name != "model.safetensors"},
    **SHARDS,
    "model.safetensors.index.json": json.dumps({"weight_map": dict(zip("ab", SHARDS, strict=True))}).encode(),
}
ADAPTER = {
    "adapter_config.json": b"{}",
    "adapter_model.safetensors": b"6" + SHARD,
    "edgelora.json": b"{}",
    "README.md": b"# An adapter",
    "tokenizer.json": b"{}",
    "chat_template.jinja": b"x",
}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    with serving() as hub:
        client = CLIENTS[hub.port] = Client(hub, tmp_path_factory.mktemp("client"))
        yield hub
        client.close()


@pytest.fixture
def hub(running: Hub) -> Hub:
    running.clear()
    running.repositories = {
        "owner/model": Repository({"main": {**MODEL, **USELESS}}),
        "owner/sharded": Repository({"main": SHARDED}),
        "owner/adapter": Repository({"main": {**ADAPTER, "training_args.bin": b"pickle", "checkpoint-1/a.bin": b"x"}}),
    }
    return running


def environment(hub: Hub, home: Path, **more: str) -> dict[str, str]:
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.upper().endswith("_PROXY") and not name.startswith(("HF_", "HUGGING", "TRANSFORMERS_", "XDG_"))
    }
    limits = {"HF_HUB_DOWNLOAD_TIMEOUT": "5", "HF_HUB_ETAG_TIMEOUT": "5", "HF_HUB_DISABLE_TELEMETRY": "1"}
    return {**kept, **limits, "HF_ENDPOINT": hub.url, "HF_HOME": str(home), "PYTHONPATH": str(ROOT), **more}


class Client:
    """A process with huggingface_hub imported under this hub's address; each test is answered by a copy of it."""

    def __init__(self, hub: Hub, home: Path) -> None:
        self.errors = home / "stderr"
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-c", SCRIPT],
                env=environment(hub, home),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )

    def answers(self, order: dict[str, Any]) -> list[dict[str, Any]]:
        limit = threading.Timer(TIMEOUT_SECONDS, self.process.kill)
        limit.start()
        try:
            assert self.process.stdin is not None
            assert self.process.stdout is not None
            print(json.dumps(order), file=self.process.stdin, flush=True)
            results = []
            while "status" not in (result := json.loads(self.process.stdout.readline())):
                results.append(result)
        finally:
            limit.cancel()
        assert result["status"] == 0, self.errors.read_text()
        return results

    def close(self) -> None:
        self.process.kill()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()
        self.process.wait(10)


CLIENTS: dict[int, Client] = {}


def fetched(hub: Hub, home: Path, *calls: dict[str, Any] | str, **env: str) -> list[dict[str, Any]]:
    """What each call gave, all in one process; nothing but the results may be printed anywhere."""
    asked = [{"source": call} if isinstance(call, str) else call for call in calls]
    client = CLIENTS[hub.port]
    before = client.errors.read_text()
    results = client.answers({"calls": asked, "home": str(home), "env": env})
    assert client.errors.read_text() == before
    assert len(results) == len(calls)
    return results


def fetched_anew(hub: Hub, home: Path, *calls: dict[str, Any] | str, **env: str) -> list[dict[str, Any]]:
    """The same in a process that starts under this environment."""
    asked = [{"source": call} if isinstance(call, str) else call for call in calls]
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(asked)],
        capture_output=True,
        text=True,
        cwd=home,
        env=environment(hub, home, **env),
        timeout=TIMEOUT_SECONDS,
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    return [json.loads(line) for line in result.stdout.splitlines()]


def contents(result: dict[str, Any]) -> dict[str, bytes]:
    return {name: (Path(result["path"]) / name).read_bytes() for name in result["names"]}


def leftovers(home: Path) -> list[str]:
    return sorted(path.name for path in home.rglob("*.incomplete"))


class TestFiles:
    def test_only_what_is_needed_and_only_once(self, hub: Hub, tmp_path: Path) -> None:
        first, second = fetched(hub, tmp_path, "owner/model", "owner/model")
        assert contents(first) == MODEL
        assert not any(request.path.endswith(name) for request in hub.requests for name in USELESS)
        assert len(hub.asked("GET", "/cdn/")) == 1
        assert {request.token for request in hub.requests} == {None}
        assert second["path"] == first["path"]
        total = sum(map(len, MODEL.values()))
        assert first["progress"][-1][:2] == [total, total]
        assert first["progress"] == sorted(first["progress"], key=lambda step: step[0])
        assert first["notices"] == second["notices"] == []
        hub.requests.clear()
        fetched(hub, tmp_path, "owner/model", {"source": "hf:owner/model", "function": "fetch_model"})
        assert not hub.asked("GET", "/resolve/")
        assert not hub.asked("GET", "/cdn/")
        assert leftovers(tmp_path) == []

    def test_shards_are_what_the_index_names(self, hub: Hub, tmp_path: Path) -> None:
        hub.repositories["owner/sharded"].revisions["main"] = {**SHARDED, **USELESS}
        [result] = fetched(hub, tmp_path, "owner/sharded")
        assert contents(result) == SHARDED
        assert missing_from(Path(result["path"])) == []
        gone = next(iter(SHARDS))
        (Path(result["path"]) / gone).unlink()
        assert missing_from(Path(result["path"])) == [gone]

    def test_adapters(self, hub: Hub, tmp_path: Path) -> None:
        both = {**MODEL, **{name: ADAPTER[name] for name in ("adapter_config.json", "adapter_model.safetensors")}}
        hub.repositories["owner/both"] = Repository({"main": both})
        hub.repositories["owner/configured"] = Repository({"main": {**ADAPTER, "config.json": b"{}"}})
        adapter, configured, model, wrong, other_wrong, right = fetched(
            hub,
            tmp_path,
            "owner/adapter",
            "owner/configured",
            "owner/both",
            {"source": "owner/adapter", "function": "fetch_model"},
            {"source": "owner/model", "function": "fetch_adapter"},
            {"source": "owner/adapter", "function": "fetch_adapter"},
        )
        assert contents(adapter) == ADAPTER
        assert contents(configured) == ADAPTER
        assert contents(model) == MODEL
        assert (wrong["error"], wrong["message"]) == (
            "FormatError",
            "owner/adapter: an adapter, and a model is wanted here",
        )
        assert other_wrong["message"] == "owner/model: a model, and an adapter is wanted here"
        assert right["path"] == adapter["path"]

    def test_repositories_that_cannot_be_used(self, hub: Hub, tmp_path: Path) -> None:
        no_weights = {name: content for name, content in MODEL.items() if name != "model.safetensors"}
        half = {name: content for name, content in SHARDED.items() if name != LAST_SHARD}
        trees = {
            "pickles": {**no_weights, "pytorch_model-00001-of-00001.bin": b"x", "training_args.bin": b"x"},
            "pickled-adapter": {"adapter_config.json": b"{}", "adapter_model.bin": b"x"},
            "gguf": {"README.md": b"x", "small-q4.gguf": b"GGUF"},
            "nothing": {"README.md": b"x"},
            "no-config": {"model.safetensors": b"x"},
            "half": half,
            "broken": {**SHARDED, "model.safetensors.index.json": b"{"},
            "empty": {".gitattributes": b""},
        }
        expected = {
            "pickles": ("UnsupportedError", "only pickles, which can run code", "{name}@refs/pr/NUMBER"),
            "pickled-adapter": ("UnsupportedError", "no adapter_model.safetensors, only pickles", "safetensors copy"),
            "gguf": ("UnsupportedError", "GGUF files, which are converted already:\n  - small-q4.gguf", "hf download"),
            "nothing": ("UnsupportedError", "no weights that can be read", "model.safetensors"),
            "no-config": ("FormatError", "neither a model (no config.json) nor an adapter", ""),
            "half": ("FormatError", "names files that are not there:\n  - " + LAST_SHARD, "earlier commit"),
            "broken": ("FormatError", "not valid JSON", ""),
            "empty": ("UnsupportedError", "no weights", ""),
        }
        hub.repositories |= {f"owner/{name}": Repository({"main": tree}) for name, tree in trees.items()}
        for name, result in zip(trees, fetched(hub, tmp_path, *(f"owner/{name}" for name in trees)), strict=True):
            error, message, hint = expected[name]
            assert result.get("error") == error, (name, result)
            assert message in result["message"], name
            assert hint.format(name=f"owner/{name}") in result["hint"], name
        assert not hub.asked("GET", "/cdn/")


class TestRevisions:
    def test_branches_tags_and_commits(self, hub: Hub, tmp_path: Path) -> None:
        old = {**MODEL, "config.json": b"old", "model.safetensors": b"old" + SHARD}
        hub.repositories["owner/model"].revisions |= {"v1.0": old, "refs/pr/1": old}
        commit = commit_of(old)
        address = f"{hub.url}/owner/model/tree/v1.0"
        results = fetched(
            hub,
            tmp_path,
            "owner/model",
            "owner/model@v1.0",
            {"source": "owner/model", "revision": commit},
            {"source": "owner/model", "revision": commit[:8]},
            "owner/model@refs/pr/1",
            address,
            "owner/model@v2",
        )
        assert contents(results[0])["config.json"] == MODEL["config.json"]
        for result in results[1:-1]:
            assert contents(result) == old
            assert Path(result["path"]).name == commit
        assert results[-1]["error"] == "DownloadError"
        assert results[-1]["message"].startswith("owner/model@v2: there is no revision v2")
        assert f"{hub.url}/owner/model/tree/main" in results[-1]["hint"]
        offline = fetched_anew(
            hub,
            tmp_path,
            "owner/model@v1.0",
            f"owner/model@{commit[:8]}",
            f"owner/model@{commit}",
            "owner/model@v2",
            HF_HUB_OFFLINE="1",
        )
        assert [result.get("path") for result in offline] == [*[results[1]["path"]] * 3, None]

    def test_a_branch_that_moves_on(self, hub: Hub, tmp_path: Path) -> None:
        [before] = fetched(hub, tmp_path, "owner/model")
        hub.repositories["owner/model"].revisions["main"] = {**MODEL, "config.json": b"{}"}
        hub.requests.clear()
        [after] = fetched(hub, tmp_path, "owner/model")
        assert contents(after)["config.json"] == b"{}"
        assert contents(before) == MODEL
        assert not hub.asked("GET", "/cdn/")  # the weights are the same content


class TestInterrupted:
    CUT = 100_000

    @pytest.mark.parametrize("reset", [False, True], ids=["ends", "reset"])
    def test_goes_on_where_the_connection_broke(self, hub: Hub, tmp_path: Path, reset: bool) -> None:
        hub.cuts["model.safetensors"], hub.reset = [self.CUT, 50_000], reset
        [result] = fetched(hub, tmp_path, "owner/model")
        assert contents(result) == MODEL
        ranges = [request.range for request in hub.asked("GET", "/cdn/")]
        assert ranges[0] is None
        assert len(ranges) == 3
        if not reset:  # what is on its way when a connection is reset is lost
            assert ranges[1:] == [f"bytes={self.CUT}-", f"bytes={self.CUT + 50_000}-"]
        total = sum(map(len, MODEL.values()))
        assert result["progress"][-1][:2] == [total, total]

    @pytest.mark.parametrize("killed_by", [signal.SIGKILL, signal.SIGINT])
    def test_goes_on_after_it_was_killed(self, hub: Hub, tmp_path: Path, killed_by: signal.Signals) -> None:
        hub.still["model.safetensors"] = self.CUT
        command = [sys.executable, "-c", SCRIPT, json.dumps([{"source": "owner/model"}])]
        env = environment(hub, tmp_path, HF_HUB_DOWNLOAD_TIMEOUT="1")
        process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        digest = hashlib.sha256(MODEL["model.safetensors"]).hexdigest()
        partial = tmp_path / "hub/models--owner--model/blobs" / f"{digest}.incomplete"
        deadline = time.monotonic() + TIMEOUT_SECONDS
        try:
            while not (partial.exists() and partial.stat().st_size == self.CUT):
                assert time.monotonic() < deadline
                assert process.poll() is None
                time.sleep(0.02)
            process.send_signal(killed_by)
            errors = process.communicate(timeout=10)[1]
        finally:
            process.kill()
            process.communicate(timeout=10)
        assert killed_by is signal.SIGKILL or errors.endswith("KeyboardInterrupt\n")
        hub.requests.clear()
        [result] = fetched(hub, tmp_path, "owner/model")
        assert contents(result) == MODEL
        assert [request.range for request in hub.asked("GET", "/cdn/")] == [f"bytes={self.CUT}-"]
        assert leftovers(tmp_path) == []

    def test_a_server_without_ranges_starts_anew(self, hub: Hub, tmp_path: Path) -> None:
        hub.cuts["model.safetensors"], hub.without_ranges = [self.CUT], True
        [result] = fetched(hub, tmp_path, "owner/model")
        assert contents(result) == MODEL
        assert len(hub.asked("GET", "/cdn/")) == 2
        assert max(step[0] for step in result["progress"]) == sum(map(len, MODEL.values()))

    @pytest.mark.parametrize("left", [b"something else", b"x" * (len(SHARD) + 1), b"x" * (len(SHARD) + 2)])
    def test_what_was_left_is_not_the_beginning(self, hub: Hub, tmp_path: Path, left: bytes) -> None:
        blobs = tmp_path / "hub/models--owner--model/blobs"
        blobs.mkdir(parents=True)
        digest = hashlib.sha256(MODEL["model.safetensors"]).hexdigest()
        (blobs / f"{digest}.incomplete").write_bytes(left)
        [result] = fetched(hub, tmp_path, "owner/model")
        assert contents(result) == MODEL
        assert leftovers(tmp_path) == []

    @pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
    def test_damaged_contents_are_not_kept(self, hub: Hub, tmp_path: Path, name: str) -> None:
        hub.corrupted.add(name)
        [result] = fetched(hub, tmp_path, "owner/model")
        assert result["error"] == "DownloadError"
        assert f"{name} arrived damaged" in result["message"]
        hub.corrupted.clear()
        [result] = fetched(hub, tmp_path, "owner/model")
        assert contents(result) == MODEL

    def test_passing_trouble_of_the_server(self, hub: Hub, tmp_path: Path) -> None:
        hub.failures["/cdn/"] = (503, 2)
        [result] = fetched(hub, tmp_path, "owner/model")
        assert contents(result) == MODEL

    def test_lasting_trouble_of_the_server(self, hub: Hub, tmp_path: Path) -> None:
        hub.failures["/cdn/"] = (500, 1000)
        [result] = fetched(hub, tmp_path, "owner/model")
        assert result["error"] == "DownloadError"
        assert "trouble of its own (the hub is being mended)" in result["message"]
        assert len(hub.asked("GET", "/cdn/")) == 5

    def test_a_content_that_a_crash_cut(self, hub: Hub, tmp_path: Path) -> None:
        [result] = fetched(hub, tmp_path, "owner/model")
        weights = (Path(result["path"]) / "model.safetensors").resolve()
        weights.write_bytes(weights.read_bytes()[: self.CUT])
        [result] = fetched(hub, tmp_path, "owner/model")
        assert contents(result) == MODEL

    def test_two_at_once(self, hub: Hub, tmp_path: Path) -> None:
        command = [sys.executable, "-c", SCRIPT, json.dumps([{"source": "owner/sharded"}])]
        env = environment(hub, tmp_path)
        both = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) for _ in range(2)]
        outputs = [json.loads(process.communicate(timeout=TIMEOUT_SECONDS)[0]) for process in both]
        assert [contents(result) for result in outputs] == [SHARDED] * 2
        assert len(hub.asked("GET", "/cdn/")) == len(SHARDS)


class TestRefused:
    def test_who_may_not(self, hub: Hub, tmp_path: Path) -> None:
        hub.repositories["owner/gated"] = Repository({"main": MODEL}, gated=True)
        hub.repositories["owner/private"] = Repository({"main": MODEL}, private=True)
        gated, private, missing = fetched(hub, tmp_path, "owner/gated", "owner/private", "owner/nothing")
        assert gated["error"] == private["error"] == missing["error"] == "DownloadError"
        assert "its owner wants to be asked" in gated["message"]
        assert f"{hub.url}/owner/gated" in gated["hint"]
        assert "hf auth login" in gated["hint"]
        assert private["message"] == missing["message"].replace("nothing", "private")
        assert "neither a file or folder here, nor a model that" in missing["message"]
        gated, private, wrong = (
            fetched(hub, tmp_path, f"owner/{name}", HF_TOKEN=token)[0]
            for name, token in (("gated", "hf_stranger"), ("private", "hf_stranger"), ("model", "expired"))
        )
        assert "its owner wants to be asked" in gated["message"]
        assert "nor a model that" in private["message"]
        assert "does not take your token" in wrong["message"]
        assert "HF_TOKEN" in wrong["hint"]

    def test_who_may(self, hub: Hub, tmp_path: Path) -> None:
        repository = hub.repositories["owner/gated"] = Repository({"main": MODEL}, gated=True, private=True)
        [result] = fetched(hub, tmp_path, "owner/gated", HF_TOKEN=repository.token)
        assert contents(result) == MODEL
        assert {request.token for request in hub.asked("GET", "/cdn/")} == {None}  # it stays with the hub
        (tmp_path / "token").write_text(repository.token)  # as `hf auth login` leaves it
        [result] = fetched(hub, tmp_path, "owner/gated")
        assert contents(result) == MODEL

    @pytest.mark.parametrize(
        ("status", "message"),
        [(500, "trouble of its own"), (403, "refuses"), (429, "wants fewer requests"), (400, "refuses")],
    )
    def test_by_status(self, hub: Hub, tmp_path: Path, status: int, message: str) -> None:
        hub.failures["/api/models/owner/model"] = (status, 1000)
        [result] = fetched(hub, tmp_path, "owner/model")
        assert result["error"] == "DownloadError"
        assert message in result["message"]
        assert result["message"].endswith("; nor is it in the cache")

    def test_disk_full_is_seen_before_the_download(self, hub: Hub, tmp_path: Path) -> None:
        hub.repositories["owner/model"].claimed_bytes["model.safetensors"] = 10**18
        [result] = fetched(hub, tmp_path, "owner/model")
        assert result["error"] == "DiskFullError"
        assert "1000000000.00 GB to download" in result["message"]
        assert "HF_HOME" in result["hint"]
        assert not hub.asked("GET", "/resolve/")

    def test_a_disk_that_fills_up_meanwhile(self) -> None:
        with pytest.raises(DiskFullError, match="/there: the disk is full") as caught, translated(HubReference("a/b")):
            raise OSError(errno.ENOSPC, "No space left on device", "/there")
        assert "is kept" in caught.value.hint

    def test_a_cache_that_is_a_file(self, hub: Hub, tmp_path: Path) -> None:
        (tmp_path / "hub").write_text("")
        [result] = fetched(hub, tmp_path, "owner/model")
        assert result["error"] == "WriteError"
        assert "HF_HOME" in result["hint"]

    def test_a_listing_that_leads_out_of_the_cache(self, hub: Hub, tmp_path: Path) -> None:
        index = json.dumps({"weight_map": {"a": "../../../../escaped.safetensors"}}).encode()
        evil = {**SHARDED, "model.safetensors.index.json": index, "../../../../escaped.safetensors": b"x"}
        hub.repositories["owner/evil"] = Repository({"main": evil})
        [result] = fetched(hub, tmp_path, "owner/evil")
        assert result["error"] == "FormatError"
        assert not list(tmp_path.rglob("escaped*"))


class TestOffline:
    def test_with_and_without_a_cache(self, hub: Hub, tmp_path: Path) -> None:
        online, part = fetched(hub, tmp_path, "owner/model", "owner/sharded")
        (Path(part["path"]) / LAST_SHARD).resolve().unlink()
        hub.requests.clear()
        calls = ["owner/model", {"source": "owner/model", "function": "fetch_adapter"}, "owner/sharded", "owner/other"]
        offline, wrong, incomplete, nothing = fetched_anew(hub, tmp_path, *calls, HF_HUB_OFFLINE="1")
        assert hub.requests == []
        assert offline["path"] == online["path"]
        assert offline["notices"] == []
        assert wrong["error"] == "FormatError"
        assert incomplete["error"] == nothing["error"] == "DownloadError"
        assert f"incomplete, without {LAST_SHARD}" in incomplete["message"]
        assert "HF_HUB_OFFLINE is set; nor is it in the cache" in nothing["message"]
        assert "hf download owner/other --revision main --local-dir other" in nothing["hint"]
        assert str(tmp_path / "hub/models--owner--other") in nothing["hint"]
        [again] = fetched(hub, tmp_path, "owner/sharded")
        assert contents(again) == SHARDED

    def test_no_network(self, hub: Hub, tmp_path: Path) -> None:
        endpoint = "http://127.0.0.1:9"
        [online] = fetched(hub, tmp_path, "owner/model")
        cached, nothing = fetched_anew(hub, tmp_path, "owner/model", "owner/other", HF_ENDPOINT=endpoint)
        assert cached["path"] == online["path"]
        assert "cannot be reached" in cached["notices"][0]
        assert "downloaded before" in cached["notices"][0]
        assert nothing["error"] == "DownloadError"
        assert f"{endpoint} (HF_ENDPOINT) cannot be reached" in nothing["message"]
        assert "--local-dir other" in nothing["hint"]

    @pytest.mark.parametrize(
        ("address", "message"),
        [
            ("/owner/model/resolve/main/README.md?", "does not answer as a Hugging Face hub does"),
            ("/some/where", "does not have it"),
        ],
    )
    def test_something_else_answers(self, hub: Hub, tmp_path: Path, address: str, message: str) -> None:
        [result] = fetched_anew(hub, tmp_path, "owner/model", HF_ENDPOINT=hub.url + address)
        assert result["error"] == "DownloadError"
        assert message in result["message"]
        assert "HF_ENDPOINT" in result["hint"]


class TestNames:
    @pytest.mark.parametrize(
        ("text", "reference"),
        [
            ("Qwen/Qwen3-0.6B", HubReference("Qwen/Qwen3-0.6B")),
            ("Qwen/Qwen3-0.6B@v1.0", HubReference("Qwen/Qwen3-0.6B", "v1.0")),
            ("Qwen/Qwen3-0.6B@refs/pr/1", HubReference("Qwen/Qwen3-0.6B", "refs/pr/1")),
            ("hf:Qwen/Qwen3-0.6B", HubReference("Qwen/Qwen3-0.6B")),
            ("hf://gpt2@main", HubReference("gpt2")),
            ("hf:tests/model", HubReference("tests/model")),
            ("https://huggingface.co/Qwen/Qwen3-0.6B", HubReference("Qwen/Qwen3-0.6B")),
            ("https://huggingface.co/Qwen/Qwen3-0.6B/", HubReference("Qwen/Qwen3-0.6B")),
            ("huggingface.co/Qwen/Qwen3-0.6B", HubReference("Qwen/Qwen3-0.6B")),
            ("https://hf.co/Qwen/Qwen3-0.6B/tree/refs%2Fpr%2F1", HubReference("Qwen/Qwen3-0.6B", "refs/pr/1")),
            ("https://huggingface.co/Qwen/Qwen3-0.6B/commit/0123abcd", HubReference("Qwen/Qwen3-0.6B", "0123abcd")),
        ],
    )
    def test_of_the_hub(self, text: str, reference: HubReference, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(ROOT)
        assert hub_reference(text) == reference
        assert is_hub_id(text)

    @pytest.mark.parametrize(
        ("text", "reason", "hint"),
        [
            ("./foo/bar", "written as a path", "owner/name"),
            ("~/foo", "written as a path", "owner/name"),
            ("C:\\foo", "written as a path", "owner/name"),
            ("models/x.gguf", "called like a file", "hf:models/x.gguf"),
            ("gpt2", "gpt2 has no owner", "hf:gpt2"),
            ("models/llama/7b", "with one slash", "owner/name"),
            ("models/", "letters, digits", "owner/name"),
            ("owner/a--b", "letters, digits", "owner/name"),
            ("owner/..", "letters, digits", "owner/name"),
            ("tests/nothing", "the folder tests is here", "hf:tests/nothing"),
            ("hf:a/b/c", "cannot be a hub id", "owner/name"),
            ("https://example.com/a/b", "not an address of the Hugging Face hub", "owner/name"),
            ("https://[", "not an address", "owner/name"),
            ("", "has no owner", "owner/name"),
        ],
    )
    def test_of_paths(self, text: str, reason: str, hint: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(ROOT)
        with pytest.raises(MissingFileError, match=re.escape(reason)) as caught:
            fetch(text)
        assert hint in caught.value.hint
        assert not is_hub_id(text)

    @pytest.mark.parametrize(
        ("text", "revision", "message"),
        [
            ("https://huggingface.co/datasets/a/b", None, "not a model"),
            ("https://huggingface.co/a/b/blob/main/c.gguf", None, "inside a repository"),
            ("https://huggingface.co/a/b/tree/main/c", None, "inside a repository"),
            ("https://huggingface.co/", None, "not the address of a model"),
            ("a/b@../../c", None, "cannot be a revision"),
            ("a/b", "-x", "cannot be a revision"),
            ("a/b@v1", "v2", "v2 was asked for too"),
        ],
    )
    def test_refused(self, text: str, revision: str | None, message: str) -> None:
        with pytest.raises(UnsupportedError, match=message):
            hub_reference(text, revision)

    def test_what_exists_is_itself(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        folder = tmp_path / "Qwen" / "Qwen3-0.6B"
        monkeypatch.chdir(tmp_path)
        assert is_hub_id("Qwen/Qwen3-0.6B")
        folder.mkdir(parents=True)
        assert not is_hub_id("Qwen/Qwen3-0.6B")
        assert fetch("Qwen/Qwen3-0.6B") == Path("Qwen/Qwen3-0.6B")
        with pytest.raises(ConversionError, match="is here, and has no revision v1"):
            fetch("Qwen/Qwen3-0.6B", revision="v1")

    def test_names_cost_nothing(self) -> None:
        code = "import sys; import converters.hub_reference as r; assert r.is_hub_id('a/b'); print(*sys.modules)"
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
        assert not {"numpy", "huggingface_hub", "httpx2"} & set(result.stdout.split())


def test_an_adapter_is_told_by_its_files() -> None:
    assert is_adapter(set(ADAPTER))
    assert not is_adapter(set(ADAPTER) | {"model.safetensors"})
    assert not is_adapter(set(ADAPTER) | {"pytorch_model.bin"})
    assert is_adapter(set(ADAPTER) | {"value_head.safetensors", "merged/model.safetensors"})
    assert not is_adapter(set(MODEL))
