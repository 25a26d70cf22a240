"""Files of keys: read whole or refused by name, found in constant time, changed whole or not at all."""

from __future__ import annotations

import errno
import hmac
import os
import random
import tomllib
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from edgelora.errors import SettingsError
from edgelora.serve import keys
from edgelora.serve.keys import Hash, Key, KeyRing, Rate, add_key, remove_key

FUZZED_FILES = 2_000
ACME = Key(
    "acme",
    adapters=frozenset({"support", "vip", "base"}),
    rate=Rate(60, 60),
    concurrency=4,
    tokens=Rate(100_000, 86400),
    created=datetime(2026, 11, 29, 4, 30, tzinfo=UTC),
)
BY_HAND = f"""# our customers
[keys.acme]
hash = "{Hash.of("acme's secret", b"12345678")}"
adapters = ["support", "base", "vip"]   # vip since May
admin = false
rate = "60/min"
concurrency = 4
tokens = "100k/day"
created = 2026-11-29T04:30:00Z

[keys."big.corp"]
hash = "{Hash.of("big's secret")}"
adapters = ["*"]

[keys.root]
hash = "{Hash.of("root's secret")}"
admin = true
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "keys.toml"
    path.touch(mode=0o600)
    path.write_text(BY_HAND)
    return path


def with_line(path: Path, line: str) -> Path:
    """One key, with this line in its table."""
    known = "" if line.startswith("hash") else f'hash = "{Hash.of("secret")}"\n'
    path.write_text(f"[keys.acme]\n{known}{line}\n")
    return path


def test_everything_that_a_file_says(path: Path) -> None:
    ring = KeyRing.read(path)
    assert ring.keys == (ACME, Key("big.corp", frozenset({"*"})), Key("root", admin=True))
    assert ring.notices == ()


def test_a_secret_finds_its_key_and_nothing_else_does(path: Path) -> None:
    ring = KeyRing.read(path)
    assert [ring.find(f"{name}'s secret") for name in ("acme", "big", "root")] == [*ring.keys]
    for other in ("", "acme", "acme's secret ", "Acme's secret", "é", "\udcff", "x" * 100_000, str(Hash.of("x"))):
        assert ring.find(other) is None


def test_every_key_is_compared_whichever_it_is(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ring, compared, real = KeyRing.read(path), list[bytes](), hmac.compare_digest

    def counted(a: bytes, b: bytes) -> bool:
        compared.append(b)
        return real(a, b)

    monkeypatch.setattr(hmac, "compare_digest", counted)
    for secret in ("acme's secret", "root's secret", "nobody's"):
        compared.clear()
        ring.find(secret)
        assert compared == [known.digest for known in ring._hashes]
    compared.clear()
    assert ring.find("x" * 257) is None
    assert compared == []  # too long to be anybody's: not worth hashing


def test_what_a_key_may_use(path: Path) -> None:
    acme, big, root = KeyRing.read(path).keys
    assert [acme.may_use(name) for name in ("support", "vip", "base", "none", "other", "*", "")] == [
        True, True, True, True, False, False, False,
    ]  # fmt: skip
    assert all(big.may_use(name) for name in ("support", "base", "none", "anything"))
    assert not any(root.may_use(name) for name in ("support", "base"))


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('hash = "sha256:12:34"', "hash is not of the form sha256:SALT:HASH"),
        ('hash = "the key itself"', "hash is not of the form"),
        ("hash = 7", "hash is not of the form"),
        ("hash = ''", "hash is not of the form"),
        ('adapters = "support"', "adapters is 'support', expected a list of names"),
        ("adapters = [1]", "adapters is a list, expected a list of names"),
        ("adapters = {support = true}", "adapters is a table"),
        ('adapters = ["../etc"]', "'../etc' cannot name an adapter"),
        ('adapters = ["none"]', "'none'"),
        ('admin = "yes"', "admin is 'yes', expected true or false"),
        ("admin = 1", "admin is 1, expected true or false"),
        ('rate = "60"', "rate is '60', expected 60/min"),
        ('rate = "0/min"', "rate is '0/min'"),
        ('rate = "-1/min"', "rate is '-1/min'"),
        ('rate = "1.5k/min"', "rate is '1.5k/min'"),
        ('rate = "60/minute"', "rate is '60/minute'"),
        ('rate = "٣/min"', "rate is '٣/min'"),
        ('rate = "60/min\\n"', "rate is '60/min"),
        ("rate = 60", "rate is 60"),
        ("tokens = [100]", "tokens is a list"),
        ('tokens = "100K/day"', "tokens is '100K/day', expected 60/min, 100k/day or the like (s, min, h, day)"),
        ("concurrency = 0", "concurrency is 0, expected a number from 1"),
        ("concurrency = true", "concurrency is True"),
        ("concurrency = 2.0", "concurrency is 2.0"),
        ("concurrency = 0x" + "f" * 9000, "concurrency is a huge number"),
        ('created = "today"', "created is 'today', expected a date with a time"),
        ("created = 2026-11-29", "created is datetime.date"),
        ("created = 04:30:00", "created is datetime.time"),
        ('adapter = ["support"]', "unknown field 'adapter' (known: hash, adapters,"),
        ('secret = "x"', "unknown field 'secret'"),
    ],
)
def test_a_wrong_field_is_named(path: Path, line: str, told: str) -> None:
    with pytest.raises(SettingsError) as caught:
        KeyRing.read(with_line(path, line))
    assert str(path) in caught.value.message
    assert "'acme'" in caught.value.message
    assert told in caught.value.message


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[keys.acme]\nadmin = true", "key 'acme': no hash"),
        ("keys = 3", "keys is 3, expected a table for each key"),
        ("[[keys]]\nadmin = true", "keys is a list"),
        ("[keys]\nacme = 1", "key 'acme': is 1, expected a table"),
        ("[keys.acme.more]\nx = 1", "unknown field 'more'"),
        (f'[keys."a b"]\nhash = "{Hash.of("x")}"', "'a b' cannot name a key"),
        (f'[keys.""]\nhash = "{Hash.of("x")}"', "'' cannot name a key"),
        (f'[keys."{"x" * 65}"]\nhash = "{Hash.of("x")}"', "cannot name a key"),
        ("[tenants.acme]\nadmin = true", "unknown entries 'tenants'"),
        ("[keys.acme\n", "not TOML"),
        ("[keys.acme]\nadmin = true\n[keys.acme]\n", "not TOML"),
        ("\ufeff[keys.acme]", "not TOML"),
        ("x = " + "[" * 5000, "not TOML"),
        ("x = " + "9" * 5000, "not TOML"),
        ("\0", "not TOML"),
    ],
)
def test_a_wrong_file_is_refused(path: Path, text: str, told: str) -> None:
    path.write_text(text)
    with pytest.raises(SettingsError) as caught:
        KeyRing.read(path)
    assert f"{path}: " in caught.value.message
    assert told in caught.value.message


def test_files_that_cannot_be_read(path: Path) -> None:
    path.write_bytes(b"\xff\xfe")
    for wrong, told in ((path, "not TOML"), (path.parent, "Is a directory"), (path / "x", "Not a directory"),
                        (path.with_name("none"), "No such file"), (Path("a\0b"), "not TOML"),
                        (Path("/dev/zero"), "larger than")):  # fmt: skip
        with pytest.raises(SettingsError, match=told):
            KeyRing.read(wrong)


def test_all_that_is_wrong_is_told_at_once_and_no_more_than_can_be_read(path: Path) -> None:
    path.write_text("[keys.a]\nrate = 1\nadmin = 2\n[keys.b]\nhash = 3\nspeed = 4\n")
    with pytest.raises(SettingsError) as caught:
        KeyRing.read(path)
    for told in ("'a': rate", "'a': admin", "'a': no hash", "'b': hash", "'b': unknown field 'speed'"):
        assert told in caught.value.message
    path.write_text("[keys]\n" + "\n".join(f"k{n} = {n}" for n in range(1000)))
    with pytest.raises(SettingsError, match="and 980 more") as caught:
        KeyRing.read(path)
    assert len(caught.value.message) < 2000


def test_two_keys_with_one_hash(path: Path) -> None:
    line = f'hash = "{Hash.of("x")}"'
    path.write_text(f"[keys.a]\n{line}\n[keys.b]\n{line}\n")
    with pytest.raises(SettingsError, match="two keys have the same hash"):
        KeyRing.read(path)


@pytest.mark.parametrize(("mode", "told"), [(0o600, ""), (0o400, ""), (0o640, "can read it"), (0o604, "can read it"),
                                            (0o620, "can change it"), (0o606, "can change it")])  # fmt: skip
def test_a_file_that_others_can_get_at_is_noticed(path: Path, mode: int, told: str) -> None:
    path.chmod(mode)
    notices = KeyRing.read(path).notices
    assert len(notices) == bool(told)
    assert all(told in notice and str(path) in notice for notice in notices)


def test_a_file_that_lets_nobody_in_is_noticed(path: Path) -> None:
    path.write_text("")
    assert ["holds no keys" in notice for notice in KeyRing.read(path).notices] == [True]
    with_line(path, "adapters = []")
    assert ["key acme may do nothing" in notice for notice in KeyRing.read(path).notices] == [True]


def test_no_hash_is_shown(path: Path) -> None:
    ring = KeyRing.read(path)
    shown = repr(ring) + repr(ring.keys[0].to_dict()) + "".join(ring.notices)
    for known in ring._hashes:
        assert known.digest.hex() not in shown
        assert repr(known.digest) not in shown


def test_a_file_that_breaks_leaves_the_old_ring_as_it_was(path: Path) -> None:
    ring = KeyRing.read(path)
    path.write_text(BY_HAND.replace('"60/min"', '"60 a minute"'))
    with pytest.raises(SettingsError, match="60 a minute"):
        KeyRing.read(path)
    assert ring.find("acme's secret") == ACME
    with pytest.raises(AttributeError):
        ring.keys = ()  # type: ignore[misc]
    path.write_text(BY_HAND.replace('"60/min"', '"61/min"'))
    found = KeyRing.read(path).find("acme's secret")
    assert found
    assert found.rate == Rate(61, 60)


def mutated(data: bytes, chance: random.Random) -> bytes:
    """A file as accidents leave it: bytes changed, cut out, doubled, moved, whole lines too."""
    lines = data.split(b"\n")
    for _ in range(chance.randint(1, 4)):
        place = chance.randrange(len(lines))
        match chance.randrange(7):
            case 0:
                del lines[place]
            case 1:
                lines.insert(chance.randrange(len(lines)), lines[place])
            case 2:
                lines[place] = lines[place].replace(b'"', chance.choice([b"", b"'", b'"""', b"["]))
            case 3:
                name, _, value = lines[place].partition(b" = ")
                others = [line.partition(b" = ")[2] for line in lines]
                lines[place] = name + b" = " + chance.choice([*others, value * 3, b"{}", b"nan", b"-1", b"1979-05-27"])
            case 4:
                start = chance.randrange(len(lines[place]) + 1)
                lines[place] = lines[place][:start] + chance.randbytes(chance.randint(1, 3)) + lines[place][start + 1 :]
            case 5:
                start = chance.randrange(len(lines[place]) + 1)
                lines[place] = (
                    lines[place][:start] + chance.choice(b'09afAZ"[]{}=.#\\').to_bytes() + lines[place][start:]
                )
            case 6:
                lines[place] = lines[place][: chance.randrange(len(lines[place]) + 1)]
        lines = lines or [b""]
    return b"\n".join(lines)


def test_mutated_files_are_refused_or_mean_what_they_say(path: Path) -> None:
    chance, readable = random.Random(6), 0
    for _ in range(FUZZED_FILES):
        path.write_bytes(mutated(BY_HAND.encode(), chance))
        with suppress(SettingsError):  # anything else fails this test
            ring = KeyRing.read(path)
            readable += 1
            assert ring.find("nobody's secret") is None
            told = tomllib.loads(path.read_text()).get("keys", {})
            assert {key.name: key.adapters for key in ring.keys} == {
                name: frozenset(table.get("adapters", ())) for name, table in told.items()
            }
    assert FUZZED_FILES // 20 < readable < FUZZED_FILES * 19 // 20  # neither everything passes nor nothing


def test_add_to_a_file_that_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    before = os.umask(0)
    try:
        secret = add_key(path, ACME)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o600
    assert [item.name for item in tmp_path.iterdir()] == ["keys.toml"]
    assert secret not in path.read_text()
    ring = KeyRing.read(path)
    assert ring.find(secret) == ACME
    assert ring.notices == ()
    assert len(secret) > 40
    assert secret != add_key(tmp_path / "other.toml", ACME)


def test_add_remembers_when(path: Path) -> None:
    before = datetime.now(UTC).replace(microsecond=0)
    secret = add_key(path, Key("new", frozenset({"base"})))
    found = KeyRing.read(path).find(secret)
    assert found
    assert found.created
    assert before <= found.created <= datetime.now(UTC)


def test_other_keys_stay_as_they_were_written(path: Path) -> None:
    before = tomllib.loads(path.read_text())["keys"]
    add_key(path, Key("new", frozenset({"base"})))
    add_key(path, Key("newer", frozenset({"*"}), rate=Rate(5_000, 1), tokens=Rate(2_000_000, 3600), concurrency=1))
    after = tomllib.loads(path.read_text())["keys"]
    assert [*after] == ["acme", "big.corp", "root", "new", "newer"]
    assert {name: after[name] for name in before} == before
    assert {**after["newer"], "hash": 0, "created": 0} == {
        "hash": 0, "adapters": ["*"], "admin": False, "rate": "5k/s", "concurrency": 1, "tokens": "2M/h", "created": 0,
    }  # fmt: skip
    remove_key(path, "big.corp")
    assert [key.name for key in KeyRing.read(path).keys] == ["acme", "root", "new", "newer"]


def test_a_name_is_taken_until_it_is_replaced(path: Path) -> None:
    with pytest.raises(SettingsError, match="there is a key acme already") as caught:
        add_key(path, ACME)
    assert "--replace" in caught.value.hint
    assert path.read_text() == BY_HAND
    secret = add_key(path, Key("acme", frozenset({"vip"})), replace_old=True)
    ring = KeyRing.read(path)
    assert [key.name for key in ring.keys] == ["acme", "big.corp", "root"]
    assert ring.find("acme's secret") is None
    found = ring.find(secret)
    assert found
    assert (found.adapters, found.rate, found.tokens) == (frozenset({"vip"}), None, None)


def test_what_cannot_be_added_or_removed(path: Path, tmp_path: Path) -> None:
    for refused, told in (
        (lambda: add_key(path, Key("idle")), "may do nothing"),
        (lambda: add_key(path, Key("much", frozenset({"*"}), concurrency=10**9)), "concurrency is 1000000000"),
        (lambda: Key("a b"), "cannot name a key"),
        (lambda: Key("a", frozenset({"x y"})), "cannot name an adapter"),
        (lambda: remove_key(path, "nobody"), "there is no key 'nobody'"),
        (lambda: remove_key(tmp_path / "none.toml", "acme"), "No such file"),
        (lambda: add_key(tmp_path / "none" / "keys.toml", ACME), "there is no folder"),
        (lambda: add_key(tmp_path, ACME), "Is a directory"),
    ):
        with pytest.raises(SettingsError, match=told):
            refused()
    assert path.read_text() == BY_HAND
    assert {item.name for item in tmp_path.iterdir()} == {"keys.toml"}


def test_a_broken_file_is_not_changed_but_to_mend_it(path: Path) -> None:
    path.write_text(f"{BY_HAND}speed = 1\n")  # of the last one, root
    for change in (lambda: add_key(path, Key("new", admin=True)), lambda: remove_key(path, "acme")):
        with pytest.raises(SettingsError, match="'root': unknown field 'speed'"):
            change()
    assert path.read_text() == f"{BY_HAND}speed = 1\n"
    remove_key(path, "root")
    assert [key.name for key in KeyRing.read(path).keys] == ["acme", "big.corp"]
    path.write_text("[keys.acme")
    with pytest.raises(SettingsError, match="not TOML"):
        add_key(path, Key("new", admin=True))
    assert path.read_text() == "[keys.acme"


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_full_disk_leaves_the_file_as_it_was(path: Path, failing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, failing, full)
        with pytest.raises(SettingsError, match=r"keys.toml: cannot be written \(No space left on device\)"):
            add_key(path, Key("new", admin=True))
    assert path.read_text() == BY_HAND
    assert [item.name for item in path.parent.iterdir()] == ["keys.toml"]
    add_key(path, Key("new", admin=True))


def test_what_a_killed_command_left_is_in_nobodys_way(path: Path) -> None:
    for left in ("keys.toml.partial", "keys.toml.lock"):
        path.with_name(left).write_text("[keys.half")
    add_key(path, Key("new", admin=True))
    assert len(KeyRing.read(path).keys) == 4
    assert [item.name for item in path.parent.iterdir()] == ["keys.toml"]


def test_a_link_to_the_file_stays_one(path: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.toml"
    link.symlink_to(path.name)
    add_key(link, Key("new", admin=True))
    assert link.is_symlink()
    assert len(KeyRing.read(path).keys) == 4


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")
def test_the_file_of_a_service_stays_its_own_when_root_changes_it(path: Path) -> None:
    os.chown(path, 4321, 8765)
    add_key(path, Key("new", admin=True))
    assert (path.stat().st_uid, path.stat().st_gid) == (4321, 8765)
    assert path.stat().st_mode & 0o777 == 0o600


def test_one_command_at_a_time(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "LOCK_SECONDS", 0.1)
    with FileLock(f"{path}.lock"), pytest.raises(SettingsError, match="another command has been changing it"):
        add_key(path, Key("new", admin=True))
    assert path.read_text() == BY_HAND
    add_key(path, Key("new", admin=True))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "plain",
        'quo"te',
        "back\\slash",
        "\\u0041",
        "a\nb\r\tc\b\f",
        "\0\x01\x1f\x7f\x80",
        "é ٣ 😀 \u2028",
        "'''",
        '"""',
    ],
)
def test_strings_come_back_from_toml(text: str) -> None:
    assert tomllib.loads(f"[{keys._quoted(text)}]\nx = {keys._toml_value([text, text])}") == {text: {"x": [text, text]}}


def test_every_letter_comes_back_from_toml() -> None:
    text = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x11000)]))
    assert tomllib.loads(f"x = {keys._quoted(text)}") == {"x": text}


@pytest.mark.parametrize(
    ("text", "rate", "told"),
    [
        ("60/min", Rate(60, 60), "60/min"),
        ("100k/day", Rate(100_000, 86400), "100k/day"),
        ("2M/h", Rate(2_000_000, 3600), "2M/h"),
        ("1/s", Rate(1, 1), "1/s"),
        ("1000/s", Rate(1000, 1), "1k/s"),
        ("1500k/day", Rate(1_500_000, 86400), "1500k/day"),
        ("1000k/day", Rate(1_000_000, 86400), "1M/day"),
        ("999999999999M/day", Rate(999_999_999_999_000_000, 86400), "999999999999M/day"),
    ],
)
def test_rates(text: str, rate: Rate, told: str) -> None:
    assert Rate.parse(text) == rate == Rate.parse(told)
    assert str(rate) == told


def test_the_table_of_fields_is_the_key(path: Path) -> None:
    """Each field of a key can be read, and is in JSON; nothing else is."""
    assert {*keys._READERS} - {"hash"} == {*Key.__dataclass_fields__} - {"name"}
    assert [*ACME.to_dict()] == [*Key.__dataclass_fields__]
