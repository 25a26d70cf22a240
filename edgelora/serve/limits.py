"""How much a key may use at one time: requests, requests at once, tokens.

Requests and tokens are counted over a moving window: `100k/day` is never more than 100,000 in any 24 hours, whenever
they began. A refused request counts for nothing. Tokens are known when a reply has ended and are booked then: a quota
may be overrun by the replies that were under way when it ran out.

The package `limits` was looked at and is not used. Its moving window goes by the wall clock, so that a corrected clock
opens or shuts a quota; keeps an object for each token; does not book what goes over a limit; and never forgets a name.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from edgelora.errors import EdgeloraError, SettingsError
from edgelora.serve.keys import Key, Rate

log = logging.getLogger("edgelora.serve")

SECOND = 1_000_000_000
"""Clocks count nanoseconds: sums of whole numbers are exact, so `retry_after` is."""
GRAINS = 1024
"""How finely a window of many is kept: what is booked within one part of so many is forgotten together."""
BUSY_SECONDS = 1
SWEEP_SECONDS = 60
VERSION = 1
_UNITS = {"rate": "requests", "tokens": "tokens"}


class LimitedError(EdgeloraError):
    """The key has used all that it may for now.

    Attributes:
        what: "rate", "tokens" or "concurrency".
        retry_after: whole seconds, at least 1, after which it is let in again, for what others of its requests do not
            take until then. When one of those under way ends, nobody knows: for "concurrency" it is 1.
    """

    def __init__(self, what: str, message: str, retry_after: int) -> None:
        super().__init__(message, hint=f"Try again in {retry_after} s.")
        self.what, self.retry_after = what, retry_after


class _Window:
    """What was used in the last `rate.seconds`, as times and amounts."""

    def __init__(self, rate: Rate) -> None:
        self.rate = rate
        self.used = 0
        self.booked: deque[tuple[int, int]] = deque()

    def book(self, now: int, amount: int) -> None:
        # Times are rounded up: all the tokens of a day take no more than some kilobytes, and are never freed early.
        grain = self.rate.seconds * SECOND // GRAINS if self.rate.amount > GRAINS else 1
        when, before = -(-now // grain) * grain, 0
        if self.booked and self.booked[-1][0] >= when:
            when, before = self.booked.pop()
        self.booked.append((when, before + amount))
        self.used += amount

    def expire(self, now: int) -> None:
        while self.booked and self.booked[0][0] + self.rate.seconds * SECOND <= now:
            self.used -= self.booked.popleft()[1]

    def wait(self, now: int) -> int:
        """Nanoseconds until anything more may be used; 0 where it may now."""
        self.expire(now)
        over = self.used - self.rate.amount
        for when, amount in self.booked:
            if over < 0:
                break
            over -= amount
            if over < 0:
                return when + self.rate.seconds * SECOND - now
        return 0


@dataclass
class _Use:
    """What a key uses: requests under way, and the windows that it has."""

    running: int = 0
    windows: dict[str, _Window] = field(default_factory=dict)

    def follow(self, key: Key) -> None:
        """Count by the key's limits as they are now: they may have changed since."""
        for what, rate in (("rate", key.rate), ("tokens", key.tokens)):
            if rate is None:
                self.windows.pop(what, None)
            else:
                self.windows.setdefault(what, _Window(rate)).rate = rate

    def is_idle(self, now: int) -> bool:
        for window in self.windows.values():
            window.expire(now)
        return not self.running and not any(window.booked for window in self.windows.values())


class Admission:
    """A request that was let in. It takes its place until `done`, or until the `with` block ends.

    Attributes:
        tokens: what it has used so far; the `with` block books it, however it ends.
    """

    def __init__(self, key: Key, use: _Use, ended: Callable[[Key, _Use, int], None]) -> None:
        self.tokens = 0
        self._key, self._use, self._ended = key, use, ended
        self._is_done = False

    def done(self, tokens: int) -> None:
        """Make room for another, and book the tokens of prompt and completion. Only the first call counts."""
        if not self._is_done:
            self._is_done = True
            self._ended(self._key, self._use, tokens)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.done(self.tokens)

    def __del__(self) -> None:
        if not self._is_done:
            log.error("a request of key %s was dropped without an end; its place is free again", self._key.name)
            self.done(self.tokens)


class Limits:
    """What the keys use, by their names; it belongs to one event loop.

    Args:
        restored: what `snapshot` gave before a restart.
        clock: nanoseconds that only ever go forward.
        wall: nanoseconds since 1970; only `snapshot` and `restored` look at it.

    Raises:
        SettingsError: `restored` is not what `snapshot` gives.
    """

    def __init__(
        self,
        restored: Mapping[str, Any] | None = None,
        *,
        clock: Callable[[], int] = time.monotonic_ns,
        wall: Callable[[], int] = time.time_ns,
    ) -> None:
        self._clock, self._wall = clock, wall
        self._uses: dict[str, _Use] = {} if restored is None else _restored(restored, clock(), wall())
        self._swept = clock()

    def enter(self, key: Key) -> Admission:
        """Let a request of this key in, and count it.

        A key's name stands for it: one with another secret or other limits goes on with what its namesake used.

        Raises:
            LimitedError: it may not use more now; of several reasons the one that lasts longest.
        """
        now = self._clock()
        if now - self._swept >= SWEEP_SECONDS * SECOND:
            self._sweep(now)
        use = self._uses.get(key.name) or _Use()
        use.follow(key)
        waits = {what: window.wait(now) for what, window in use.windows.items()}
        if key.concurrency is not None and use.running >= key.concurrency:
            waits["concurrency"] = BUSY_SECONDS * SECOND
        what = max(waits, key=lambda name: waits[name], default="")
        if what and waits[what] > 0:
            raise _limited(key, what, waits[what])
        if "rate" in use.windows:
            use.windows["rate"].book(now, 1)
        use.running += 1
        self._uses[key.name] = use
        return Admission(key, use, self._ended)

    def snapshot(self) -> dict[str, Any]:
        """What the windows hold, as JSON that a later process may go on from, by the wall clock.

        A clock that was put back meanwhile makes nothing count longer than one window from the restart; one that was
        put forward frees what would have been freed at that time.
        """
        now = self._clock()
        self._sweep(now)
        wall = self._wall() - now
        keys = {
            name: {
                what: {"rate": str(window.rate), "booked": [[when + wall, amount] for when, amount in window.booked]}
                for what, window in use.windows.items()
                if window.booked
            }
            for name, use in self._uses.items()
        }
        return {"version": VERSION, "keys": {name: windows for name, windows in keys.items() if windows}}

    def _ended(self, key: Key, use: _Use, tokens: int) -> None:
        now = self._clock()
        use.running -= 1
        if tokens > 0 and "tokens" in use.windows:
            use.windows["tokens"].book(now, tokens)
        if use.is_idle(now):
            self._uses.pop(key.name, None)

    def _sweep(self, now: int) -> None:
        self._swept = now
        self._uses = {name: use for name, use in self._uses.items() if not use.is_idle(now)}


def _limited(key: Key, what: str, wait: int) -> LimitedError:
    seconds = max(1, -(-wait // SECOND))
    if what == "concurrency":
        return LimitedError(what, f"key {key.name}: {key.concurrency} requests at once are under way already", seconds)
    return LimitedError(what, f"key {key.name}: its {getattr(key, what)} {_UNITS[what]} are used up", seconds)


def _restored(snapshot: Mapping[str, Any], now: int, wall: int) -> dict[str, _Use]:
    try:
        if snapshot["version"] != VERSION:
            raise ValueError(f"version {snapshot['version']!r}")
        return {
            name: _Use(windows={what: _restored_window(what, kept, now, wall) for what, kept in windows.items()})
            for name, windows in snapshot["keys"].items()
        }
    except (KeyError, TypeError, ValueError, AttributeError, SettingsError) as error:
        raise SettingsError(f"what the keys had used cannot be read: {error!r}") from None


def _restored_window(what: str, fields: Mapping[str, Any], now: int, wall: int) -> _Window:
    if what not in _UNITS:
        raise ValueError(f"{what!r}, expected one of {', '.join(_UNITS)}")
    window = _Window(Rate.parse(fields["rate"]))
    for when, amount in fields["booked"]:
        if type(when) is not int or type(amount) is not int or amount < 1:
            raise ValueError("no times and amounts")
        window.booked.append((min(when - wall, 0) + now, amount))
        window.used += amount
    return window
