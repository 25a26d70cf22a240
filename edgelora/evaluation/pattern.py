"""A regular expression as a metric.

Without a group, a reply is right where the expression is found in it. With one (`#### (-?[\\d,]+)`), the text of the
first group is taken from the last place where it is found, in the reply and in the reference, and both are the same.
"""

from __future__ import annotations

import re

from edgelora.errors import SettingsError


class Pattern:
    """Raises:
    SettingsError: no regular expression of Python's.
    """

    def __init__(self, source: str) -> None:
        try:
            self._regex = re.compile(source)
        except re.error as error:
            raise SettingsError(
                f"metric regex: {source!r} is no regular expression ({error})", hint="Write --metric 'regex=PATTERN'."
            ) from None

    @property
    def compares(self) -> bool:
        """Whether it has a group, which is looked for in the reference too."""
        return self._regex.groups > 0

    def extracted(self, text: str) -> str | None:
        """The first group where the expression is found last; None where it is not found."""
        found = [*self._regex.finditer(text)][-1:]
        return (found[0][1] or "").strip() if found else None

    def score(self, reply: str, reference: str) -> float:
        """1 for a reply that is right."""
        if not self.compares:
            return float(self._regex.search(reply) is not None)
        said = self.extracted(reply)
        return float(said is not None and said == self.extracted(reference))
