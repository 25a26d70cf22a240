"""What the keys have used, kept beside the key file, so that a restart gives nobody a new day."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from edgelora.errors import SettingsError
from edgelora.serve.limits import Limits
from edgelora.whole_file import write_whole

log = logging.getLogger("edgelora.serve")
SAVE_SECONDS = 30.0


class UsageFile:
    """`keys.toml` has `keys.toml.usage`, readable by its owner alone."""

    def __init__(self, keys: Path) -> None:
        self.path = keys.with_name(f"{keys.name}.usage")
        self._saved = ""

    def restored(self) -> Limits:
        """Limits that go on from what was saved; fresh ones where that cannot be read."""
        try:
            return Limits(json.loads(self.path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return Limits()
        except (OSError, ValueError, SettingsError) as error:
            log.error("%s cannot be read (%s): what was used before is not counted", self.path, error)
            return Limits()

    def save(self, limits: Limits) -> None:
        """Write it, whole or not at all, if it has changed. What cannot be written is only logged."""
        text = json.dumps(limits.snapshot())
        if text == self._saved:
            return
        try:
            write_whole(self.path, text, mode=0o600)
            self._saved = text
        except OSError as error:
            log.error("%s cannot be written: %s", self.path, error)
