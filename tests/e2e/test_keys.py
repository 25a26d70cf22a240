"""`edgelora keys` as it is typed: a secret on stdout and nothing else, a file that only hashes are in."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from edgelora.serve.keys import KeyRing
from tests.e2e.test_bad_input import EDGELORA, refused, run

COMMANDS_AT_ONCE = 6


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.toml"


def answer(*arguments: object, cwd: Path | None = None) -> str:
    result = run("keys", *arguments, cwd=cwd)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_from_the_first_key_to_the_last(path: Path, tmp_path: Path) -> None:
    limits = ("--rate", "60/min", "--concurrency", 4, "--tokens", "100k/day")
    acme = answer("add", "acme", "--adapter", "support", "--adapter", "vip", *limits, cwd=tmp_path)
    admin = answer("add", "me", "--admin", "--all-adapters", "--file", path)
    base = answer("add", "base-only", "--base", "--file", path)
    assert [secret.count("\n") for secret in (acme, admin, base)] == [1, 1, 1]
    assert path.stat().st_mode & 0o777 == 0o600
    assert not any(secret.strip() in path.read_text() for secret in (acme, admin, base))

    ring = KeyRing.read(path)
    assert [ring.find(secret.strip()) for secret in (acme, admin, base)] == [*ring.keys]
    assert [key.may_use("base") for key in ring.keys] == [False, True, True]

    listed = answer("list", cwd=tmp_path).splitlines()
    assert [line.split()[0] for line in listed] == ["acme", "me", "base-only"]
    assert "support, vip  60/min requests, 4 at once, 100k/day tokens" in listed[0]
    assert "admin  everything" in listed[1]

    told = json.loads(answer("list", "--json", cwd=tmp_path))
    assert told["keys"][0] | {"created": ""} == {
        "name": "acme", "adapters": ["support", "vip"], "admin": False, "rate": "60/min", "concurrency": 4,
        "tokens": "100k/day", "created": "",
    }  # fmt: skip
    for known in ring._hashes:
        assert known.digest.hex() not in json.dumps(told) + "".join(listed)

    assert answer("remove", "acme", cwd=tmp_path) == "acme  removed\n"
    assert KeyRing.read(path).find(acme.strip()) is None
    assert KeyRing.read(path).find(admin.strip()) == ring.keys[1]
    assert [item.name for item in tmp_path.iterdir()] == ["keys.toml"]


def test_a_key_is_replaced_only_when_asked(path: Path) -> None:
    first = answer("add", "acme", "--base", "--file", path).strip()
    refused(run("keys", "add", "acme", "--admin", "--file", path), 2, "there is a key acme already", "--replace")
    assert KeyRing.read(path).find(first)
    second = answer("add", "acme", "--admin", "--replace", "--file", path).strip()
    ring = KeyRing.read(path)
    assert ring.find(first) is None
    assert ring.find(second) == ring.keys[0]
    assert ring.keys[0].admin


def test_what_is_refused_says_what_to_do(path: Path) -> None:
    answer("add", "acme", "--base", "--file", path)
    before = path.read_text()
    refused(run("keys", "add", "x", "--file", path), 2, "key x may do nothing", "--adapter NAME", "--base", "--admin")
    refused(run("keys", "add", "x y", "--base", "--file", path), 2, "'x y' cannot name a key")
    refused(run("keys", "add", "x", "--adapter", "a/b", "--file", path), 2, "'a/b' cannot name an adapter")
    refused(run("keys", "add", "x", "--base", "--rate", "fast", "--file", path), 2, "--rate", "'fast'", "60/min")
    refused(run("keys", "add", "x", "--base", "--tokens", "5/year", "--file", path), 2, "--tokens", "'5/year'")
    refused(run("keys", "add", "x", "--base", "--concurrency", "0", "--file", path), 2, "--concurrency")
    refused(run("keys", "remove", "x", "--file", path), 2, "there is no key 'x'", "edgelora keys list")
    assert path.read_text() == before
    path.write_text(before + "\nspeed = 1\n")
    path.chmod(0o644)
    refused(run("keys", "list", "--file", path), 2, str(path), "unknown field 'speed'")
    refused(run("keys", "list", "--file", path.with_name("none")), 2, "No such file", "edgelora keys add")
    path.write_text(before)
    assert "can read it: chmod 600" in run("keys", "list", "--file", path).stderr


def test_commands_at_once_lose_nothing(path: Path) -> None:
    commands = [[EDGELORA, "keys", "add", f"key{n}", "--base", "--file", str(path)] for n in range(COMMANDS_AT_ONCE)]
    running = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for command in commands
    ]
    told = [process.communicate(timeout=120) for process in running]
    assert [process.returncode for process in running] == [0] * COMMANDS_AT_ONCE, told
    ring = KeyRing.read(path)
    found = [ring.find(secret.strip()) for secret, _ in told]
    assert [key and key.name for key in found] == [f"key{n}" for n in range(COMMANDS_AT_ONCE)]
    assert [item.name for item in path.parent.iterdir()] == ["keys.toml"]
