"""Who may ask: `keys.toml`, a table for each key, which `edgelora keys` writes and people may edit.

    [keys.acme]
    hash = "sha256:0f3c...:9ab1..."    # salt and SHA-256, in hexadecimal; the key itself is nowhere
    adapters = ["support", "vip"]      # names; "base" is the bare base, ["*"] is everything
    admin = false                      # may load and unload adapters
    rate = "60/min"                    # requests; per s, min, h or day
    concurrency = 4                    # requests at once
    tokens = "100k/day"                # of prompts and completions; k and M are thousands and millions
    created = 2026-11-29T04:30:00Z

Only `hash` must be there. Without `rate`, `concurrency` or `tokens` there is no such limit; without `adapters` a key
may use nothing, which is enough for an admin's.
"""

from __future__ import annotations

import glob
import hashlib
import hmac
import json
import os
import re
import secrets
import stat
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from edgelora.adapter_ref import BASE_NAMES, check_name
from edgelora.errors import SettingsError
from edgelora.whole_file import write_whole

BASE, EVERYTHING = "base", "*"
SECONDS = {"s": 1, "min": 60, "h": 3600, "day": 86400}
SUFFIXES = {"": 1, "k": 1_000, "M": 1_000_000}
PREFIX = "edgelora-"  # so that scanners of published code can know one
SECRET_BYTES, SALT_BYTES, MAX_SECRET_LETTERS = 32, 16, 256
MAX_CONCURRENCY, MAX_FILE_BYTES, MAX_PROBLEMS = 1_000_000, 1 << 24, 20
LOCK_SECONDS = 10.0
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")  # goes into logs and metrics
_RATE = re.compile(rf"([1-9][0-9]{{0,11}})([{''.join(SUFFIXES)}]?)/({'|'.join(SECONDS)})")
_HASH = re.compile(r"sha256:((?:[0-9a-f]{2}){8,64}):([0-9a-f]{64})")
_BARE = re.compile(r"[A-Za-z0-9_-]+")
Reader = Callable[[object], Any]


@dataclass(frozen=True)
class Rate:
    """So much in any stretch of so many seconds: `60/min`, `100k/day`."""

    amount: int
    seconds: int

    @classmethod
    def parse(cls, text: object) -> Rate:
        """Raises:
        SettingsError: anything else than a whole number above 0 and a unit of time.
        """
        match = _RATE.fullmatch(text) if isinstance(text, str) else None
        if not match:
            raise SettingsError(f"is {_shown(text)}, expected 60/min, 100k/day or the like ({', '.join(SECONDS)})")
        return cls(int(match[1]) * SUFFIXES[match[2]], SECONDS[match[3]])

    def __str__(self) -> str:
        unit = next(unit for unit, seconds in SECONDS.items() if seconds == self.seconds)
        suffix = max((s for s, size in SUFFIXES.items() if self.amount % size == 0), key=lambda s: SUFFIXES[s])
        return f"{self.amount // SUFFIXES[suffix]}{suffix}/{unit}"


@dataclass(frozen=True)
class Key:
    """What the bearer of a key may do.

    Attributes:
        adapters: names; "base" is the bare base, "*" everything.
        admin: may load and unload adapters. It may use only what `adapters` says, like any other.
        rate: of requests.
        concurrency: requests at once.
        tokens: of prompts and completions together.

    Raises:
        SettingsError: a name that logs and metrics cannot carry, or an adapter's that none can have.
    """

    name: str
    adapters: frozenset[str] = frozenset()
    admin: bool = False
    rate: Rate | None = None
    concurrency: int | None = None
    tokens: Rate | None = None
    created: datetime | None = None

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise SettingsError(
                f"{_shown(self.name)} cannot name a key: at most 64 letters, digits, '.', '_' and '-', a letter or "
                "digit first"
            )
        for adapter in sorted(self.adapters - {BASE, EVERYTHING}):
            check_name(adapter)

    def may_use(self, name: str) -> bool:
        """Whether it may use the adapter of this name, or the bare base by one of its names."""
        return EVERYTHING in self.adapters or (BASE if name in BASE_NAMES else name) in self.adapters

    def to_dict(self) -> dict[str, Any]:
        """Its fields as JSON holds them."""
        return {
            "name": self.name,
            "adapters": sorted(self.adapters),
            "admin": self.admin,
            "rate": self.rate and str(self.rate),
            "concurrency": self.concurrency,
            "tokens": self.tokens and str(self.tokens),
            "created": self.created and self.created.isoformat(),
        }


class Hash(NamedTuple):
    """A key's secret as a file may hold it.

    One round of SHA-256 is enough: a secret is 32 random bytes, which nobody guesses however fast he hashes. Slow
    hashes are for passwords that people choose, and here would make each request slow. The salts keep two files from
    telling that they hold the same key.
    """

    salt: bytes
    digest: bytes

    @classmethod
    def of(cls, secret: str, salt: bytes | None = None) -> Hash:
        salt = secrets.token_bytes(SALT_BYTES) if salt is None else salt
        return cls(salt, hashlib.sha256(salt + secret.encode("utf-8", "surrogatepass")).digest())

    @classmethod
    def parse(cls, text: object) -> Hash:
        match = _HASH.fullmatch(text) if isinstance(text, str) else None
        if not match:  # the value is not shown: somebody may have put the key itself there
            raise SettingsError("is not of the form sha256:SALT:HASH in hexadecimal")
        return cls(bytes.fromhex(match[1]), bytes.fromhex(match[2]))

    def __str__(self) -> str:
        return f"sha256:{self.salt.hex()}:{self.digest.hex()}"


@dataclass(frozen=True)
class KeyRing:
    """The keys of a file as it was when it was read; it never changes.

    Attributes:
        keys: in the file's order.
        notices: what should be told of the file, a sentence each.
    """

    keys: tuple[Key, ...]
    notices: tuple[str, ...]
    _hashes: tuple[Hash, ...] = field(repr=False)

    @classmethod
    def read(cls, path: Path) -> KeyRing:
        """Raises:
        SettingsError: it cannot be read or is no such file; all that is wrong in one message.
        """
        tables, mode = _read(path)
        return _ring(path, tables, mode)

    def find(self, secret: str) -> Key | None:
        """The key whose secret this is. How long that takes tells nothing of any key."""
        if len(secret) > MAX_SECRET_LETTERS:  # hashed once for each key: a header full of it would cost something
            return None
        found = None
        for key, known in zip(self.keys, self._hashes, strict=True):
            if hmac.compare_digest(Hash.of(secret, known.salt).digest, known.digest):
                found = key
        return found


def add_key(path: Path, key: Key, *, replace_old: bool = False) -> str:
    """Add a key to the file, which is made where there is none, and return its secret: it cannot be had again.

    The file is written anew: comments in it are not kept.

    Args:
        replace_old: where there is a key of this name, this one takes its place; its secret no longer opens anything.

    Raises:
        SettingsError: a name that is taken, a key that may do nothing, a file that cannot be read or written.
    """
    if not key.adapters and not key.admin:
        raise SettingsError(
            f"key {key.name} may do nothing",
            hint="Say what it may use: --adapter NAME, --base or --all-adapters; --admin lets it load adapters.",
        )
    secret = PREFIX + secrets.token_urlsafe(SECRET_BYTES)
    with _changing(path) as tables:
        if key.name in tables and not replace_old:
            raise SettingsError(
                f"{path}: there is a key {key.name} already",
                hint="Give --replace to put this one, with a new secret, in its place.",
            )
        made = key if key.created else replace(key, created=datetime.now(UTC).replace(microsecond=0))
        tables[key.name] = _table(made, Hash.of(secret))
    return secret


def remove_key(path: Path, name: str) -> None:
    """Take a key out of the file, be it one that is written wrong. Comments in it are not kept.

    Raises:
        SettingsError: there is no such key, or the file cannot be read or written.
    """
    _read(path)  # a file that is not there is not made
    with _changing(path) as tables:
        if name not in tables:
            raise SettingsError(f"{path}: there is no key {_shown(name)}", hint="`edgelora keys list` names them.")
        del tables[name]


def _read(path: Path) -> tuple[dict[str, Any], int]:
    """The file's tables by the names of their keys, and its mode."""
    try:
        with open(path, "rb") as file:
            mode, data = os.fstat(file.fileno()).st_mode, file.read(MAX_FILE_BYTES + 1)
        if len(data) > MAX_FILE_BYTES:
            raise SettingsError(f"{path}: larger than {MAX_FILE_BYTES} bytes, which no file of keys is")
        document = tomllib.loads(data.decode("utf-8"))
    except OSError as error:
        hint = "`edgelora keys add NAME` makes it." if isinstance(error, FileNotFoundError) else ""
        raise SettingsError(f"{path}: cannot be read ({error.strerror})", hint=hint) from None
    except (ValueError, RecursionError) as error:
        raise SettingsError(f"{path}: not TOML ({error})") from None
    tables = document.pop("keys", {})
    if unknown := ", ".join(map(_shown, [*document][:MAX_PROBLEMS])):
        raise SettingsError(f"{path}: unknown entries {unknown}; expected only [keys.NAME] tables")
    if not isinstance(tables, dict):
        raise SettingsError(f"{path}: keys is {_shown(tables)}, expected a table for each key: [keys.NAME]")
    return tables, mode


def _ring(path: Path, tables: Mapping[str, Any], mode: int) -> KeyRing:
    problems, keys, hashes = list[str](), list[Key](), list[Hash]()
    for name, table in tables.items():
        read = _values(table, problem := list[str]())
        if not problem:
            try:
                hashes.append(read.pop("hash"))
                keys.append(Key(name, **read))
            except SettingsError as error:
                problem.append(error.message)
        problems += [f"key {_shown(name)}: {text}" for text in problem]
    if any(count > 1 for count in Counter(hashes).values()):
        problems.append("two keys have the same hash: each needs its own, from `edgelora keys add`")
    if problems:
        more = [f"and {len(problems) - MAX_PROBLEMS} more"] if len(problems) > MAX_PROBLEMS else []
        raise SettingsError(f"{path}: " + "; ".join(problems[:MAX_PROBLEMS] + more))
    return KeyRing(tuple(keys), tuple(_notices(path, keys, mode)), tuple(hashes))


def _notices(path: Path, keys: list[Key], mode: int) -> Iterator[str]:
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        done = "change" if mode & (stat.S_IWGRP | stat.S_IWOTH) else "read"
        yield f"{path}: others on this machine can {done} it: chmod 600 keeps them out"
    if not keys:
        yield f"{path}: holds no keys, so nobody is let in"
    for key in keys:
        if not key.adapters and not key.admin:
            yield f"{path}: key {key.name} may do nothing: it names no adapters"


def _values(table: object, problems: list[str]) -> dict[str, Any]:
    """A key's fields as `Key` wants them; what is wrong is added to `problems`."""
    values: dict[str, Any] = {}
    if not isinstance(table, dict):
        problems.append(f"is {_shown(table)}, expected a table")
        return values
    for name, value in table.items():
        if name not in _READERS:
            problems.append(f"unknown field {_shown(name)} (known: {', '.join(_READERS)})")
            continue
        try:
            values[name] = _READERS[name](value)
        except SettingsError as error:
            problems.append(f"{name} {error.message}")
    if "hash" not in table:
        problems.append("no hash")
    return values


def _reader(fits: Callable[[Any], bool], expected: str, read: Callable[[Any], Any] = lambda value: value) -> Reader:
    def reader(value: object) -> Any:
        if not fits(value):
            raise SettingsError(f"is {_shown(value)}, expected {expected}")
        return read(value)

    return reader


_READERS: Mapping[str, Reader] = {
    "hash": Hash.parse,
    "adapters": _reader(
        lambda value: isinstance(value, list) and all(isinstance(name, str) for name in value),
        'a list of names: ["support", "base"], or ["*"] for all',
        frozenset,
    ),
    "admin": _reader(lambda value: isinstance(value, bool), "true or false"),
    "rate": Rate.parse,
    "concurrency": _reader(
        lambda value: type(value) is int and 1 <= value <= MAX_CONCURRENCY, f"a number from 1 to {MAX_CONCURRENCY}"
    ),
    "tokens": Rate.parse,
    "created": _reader(lambda value: isinstance(value, datetime), "a date with a time"),
}


def _shown(value: object) -> str:
    """A value from a file for a message: short, and whatever it is."""
    if isinstance(value, int) and value.bit_length() > 64:  # Python refuses to print the really long ones
        return "a huge number"
    text = "a table" if isinstance(value, dict) else "a list" if isinstance(value, list) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _table(key: Key, known: Hash) -> dict[str, Any]:
    """A key's fields as the file has them."""
    values = {"hash": str(known), **key.to_dict(), "created": key.created}
    return {name: value for name, value in values.items() if name in _READERS and value is not None}


@contextmanager
def _changing(path: Path) -> Iterator[dict[str, Any]]:
    """The file's tables, to be changed in the block: written when it ends well, while nobody else changes them."""
    from filelock import FileLock, Timeout

    target = Path(os.path.realpath(path))  # a link to the file stays one
    lock = FileLock(f"{target}.lock", timeout=LOCK_SECONDS, mode=0o600)
    try:
        if not target.parent.is_dir():
            raise SettingsError(f"{path}: there is no folder {target.parent}")
        with lock:
            try:
                tables = _read(target)[0] if target.exists() else {}
                yield tables
                _ring(path, tables, mode=0)  # nothing is written that could not be read
                write_whole(target, "\n".join(_toml(tables)), mode=0o600)
                for left in target.parent.glob(f"{glob.escape(target.name)}.*partial"):  # by a command that was killed
                    left.unlink(missing_ok=True)
            finally:  # while it is held: filelock lets nobody in by a lock file that is gone
                Path(lock.lock_file).unlink(missing_ok=True)
    except Timeout:
        raise SettingsError(f"{path}: another command has been changing it for {LOCK_SECONDS:.0f} s") from None
    except OSError as error:
        raise SettingsError(f"{path}: cannot be written ({error.strerror}); it is as it was") from None


def _toml(tables: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """The few kinds of values that these tables hold, in TOML."""
    yield "# Written by `edgelora keys`, which does not keep comments. The keys themselves are not in here.\n"
    for name, table in tables.items():
        yield f"[keys.{name if _BARE.fullmatch(name) else _quoted(name)}]"
        yield from (f"{entry} = {_toml_value(value)}" for entry, value in table.items())
        yield ""


def _toml_value(value: object) -> str:
    if isinstance(value, datetime):
        return value.isoformat().replace("+00:00", "Z")
    if isinstance(value, list):
        return f"[{', '.join(map(_toml_value, value))}]"
    return _quoted(value) if isinstance(value, str) else json.dumps(value)


def _quoted(text: str) -> str:
    """A basic string: JSON's escapes are TOML's too, but TOML wants one for DEL as well."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
