"""How an adapter is named on the command line: `[NAME=]PATH[@SCALE]`."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

from edgelora.errors import SettingsError

BASE_NAMES = ("none", "base")  # both name the bare base
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_SCALE = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?")


@dataclass(frozen=True)
class AdapterRef:
    """One adapter: the name requests use, the file or PEFT folder it is in, and the scale it is applied at."""

    name: str
    path: Path
    scale: float = 1.0

    def __post_init__(self) -> None:
        number = isinstance(self.scale, (int, float)) and not isinstance(self.scale, bool)
        if not number or not math.isfinite(self.scale):
            raise SettingsError(f"adapter {self.name}: scale is {self.scale!r}, expected a finite number")

    @classmethod
    def parse(cls, text: str) -> AdapterRef:
        """`support.gguf`, `support.gguf@0.5`, `vip=tenants/7.gguf`; the name defaults to the file's stem.

        A file whose own name holds `=` or `@` is taken as it is where it exists.

        Raises:
            SettingsError: an empty path, a name that could not be typed in a request, or a scale that is no number.
        """
        if problem := _unusable(text):
            raise SettingsError(f"adapter {text[:80]!r}: {problem}")
        name, scale, path_text = "", 1.0, text
        if not Path(text).exists():
            head, equals, tail = text.partition("=")
            if equals and "/" not in head and "\\" not in head:
                name, path_text = head, tail
                if not name:
                    raise SettingsError(f"adapter {text!r}: no name before '='", hint="Write NAME=PATH, or PATH alone.")
            path_text, scale = _split_scale(path_text, text)
        if not path_text:
            raise SettingsError(
                f"adapter {text!r}: no path", hint="Write [NAME=]PATH[@SCALE], for example support.gguf@0.5."
            )
        path = Path(path_text).expanduser()
        return cls(check_name(name or default_name(path)), path, scale)


def _unusable(text: str) -> str:
    """What keeps the system from looking at such a path at all: a NUL, an unknown user's home, a name too long."""
    if "\0" in text:
        return "not a path (it holds a NUL)"
    try:
        candidates = {text, text.partition("=")[2], text.rpartition("@")[0], text.partition("=")[2].rpartition("@")[0]}
        for candidate in candidates:
            Path(candidate).expanduser().exists()
    except (OSError, ValueError, RuntimeError) as error:
        return f"not a path ({getattr(error, 'strerror', None) or error})"
    return ""


def _split_scale(path_text: str, whole: str) -> tuple[str, float]:
    head, at, tail = path_text.rpartition("@")
    if not at or Path(path_text).exists():
        return path_text, 1.0
    if not _SCALE.fullmatch(tail) or not math.isfinite(float(tail)):
        if "/" in tail or not head:  # an '@' inside a folder's name
            return path_text, 1.0
        raise SettingsError(
            f"adapter {whole!r}: {tail!r} is not a scale",
            hint="Write a number after '@', for example support.gguf@0.5.",
        )
    return head, float(tail)


def default_name(path: Path) -> str:
    """The name an adapter gets when none is given: the file's stem, or the folder's name."""
    return path.stem if path.suffix == ".gguf" else path.resolve().name


def check_name(name: str) -> str:
    """`name`, if a request may use it.

    Raises:
        SettingsError: reserved for the bare base, or holding characters that requests and files cannot carry.
    """
    if not isinstance(name, str):
        raise SettingsError(f"an adapter's name is {name!r}, expected text")
    if name in BASE_NAMES:
        raise SettingsError(
            f"an adapter cannot be called {name!r}: that names the bare base", hint="Give it a name: NAME=PATH."
        )
    if not _NAME.fullmatch(name):
        raise SettingsError(
            f"{name!r} cannot name an adapter: letters, digits, '.', '_' and '-' only",
            hint="Give it a name: NAME=PATH.",
        )
    return name
