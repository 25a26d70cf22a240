"""A metric of the user's own: `--function FILE.py:NAME`.

    def polite(reply: str, reference: str, row: dict) -> float:
        return float("please" in reply.lower())

`row` has the fields of the data row. It returns a number or a bool; more is better.
"""

from __future__ import annotations

import math
import runpy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgelora.errors import DataFileError, EdgeloraError, SettingsError

_MEND = "Mend the function, and run the same command again: with -o, what models have answered is kept."
_HINT = "Write --function FILE.py:NAME, where NAME is `def NAME(reply, reference, row)`."


@dataclass(frozen=True)
class OwnFunction:
    """A function of a file."""

    name: str
    function: Callable[[str, str, Mapping[str, Any]], object]

    @classmethod
    def load(cls, spec: str) -> OwnFunction:
        """From `FILE.py:NAME`. The file is run, as Python runs a script that is imported.

        Raises:
            SettingsError: not of that form, or no such function in the file.
            DataFileError: the file cannot be read, or fails.
        """
        path, colon, name = spec.rpartition(":")
        if not colon or not name.isidentifier():
            raise SettingsError(f"--function {spec!r}: expected FILE.py:NAME", hint=_HINT)
        if not Path(path).is_file():
            raise DataFileError(f"{path}: no such file", hint=_HINT)
        try:
            names = runpy.run_path(path, run_name="edgelora_function")
        except (Exception, SystemExit) as error:
            raise DataFileError(f"{path}: running it failed: {type(error).__name__}: {error}") from error
        if not callable(names.get(name)):
            known = ", ".join(sorted(key for key, value in names.items() if callable(value) and key[0] != "_"))
            raise SettingsError(f"{path} has no function {name!r}" + (f"; it has {known}" if known else ""), hint=_HINT)
        return cls(name, names[name])

    def score(self, reply: str, reference: str, row: Mapping[str, Any], where: str) -> float:
        """What the function makes of a reply.

        Args:
            where: the row, `FILE:LINE`.

        Raises:
            EdgeloraError: it raised, or returned something other than a finite number.
        """
        try:
            found = self.function(reply, reference, row)
        except (Exception, SystemExit) as error:
            said = f"{type(error).__name__}: {error}"
            raise EdgeloraError(f"--function {self.name} failed on {where}: {said}", hint=_MEND) from error
        try:
            number = float(found)  # type: ignore[arg-type]
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if isinstance(found, str) or not math.isfinite(number):
            shown = repr(found) if isinstance(found, str | float) else f"a {type(found).__name__}"
            raise EdgeloraError(
                f"--function {self.name} returned {shown} for {where}, expected a finite number", hint=_MEND
            )
        return number
