"""Which adapters take the engine's process down."""

from __future__ import annotations

from collections import Counter

FATAL_DEATHS = 2


class Suspects:
    """Which adapters were there when the process died, and how often.

    One that was being loaded is the culprit. Of several that were computed together nobody knows which it was: only the
    ones that were there at every death are blamed.
    """

    def __init__(self) -> None:
        self._deaths: Counter[str] = Counter()
        self._all = 0

    def died(self, suspects: frozenset[str]) -> frozenset[str]:
        """Those who are to be kept out from now on."""
        if not suspects:
            return frozenset()
        for name in list(self._deaths):
            if name not in suspects and len(suspects) > 1:
                del self._deaths[name]
        self._deaths.update(suspects)
        guilty = frozenset(name for name in suspects if self._deaths[name] >= FATAL_DEATHS)
        for name in guilty:
            del self._deaths[name]
        return guilty

    def cleared(self, name: str) -> None:
        """Another file has that name now."""
        self._deaths.pop(name, None)
