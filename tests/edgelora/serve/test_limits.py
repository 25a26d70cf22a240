"""Limits by an injected clock: never more than was allowed, never less, and `retry_after` to the second."""

from __future__ import annotations

import gc
import json
import logging
import random
import time
from collections.abc import Iterator
from contextlib import suppress
from inspect import signature
from typing import Any

import pytest

from edgelora.errors import SettingsError
from edgelora.serve.keys import Key, Rate
from edgelora.serve.limits import GRAINS, SECOND, SWEEP_SECONDS, LimitedError, Limits

MINUTE, HOUR, DAY = 60, 3600, 86400
MANY = Key("many")


class Clock:
    """Seconds that a test lets pass, read in nanoseconds."""

    def __init__(self, seconds: float = 1000.0) -> None:
        self.now = round(seconds * SECOND)

    def __call__(self) -> int:
        return self.now

    def tick(self, seconds: float) -> None:
        self.now += round(seconds * SECOND)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def limits(clock: Clock) -> Limits:
    return Limits(clock=clock, wall=Clock(1.7e9))


def key(rate: str = "", concurrency: int | None = None, tokens: str = "", name: str = "acme") -> Key:
    return Key(
        name,
        rate=Rate.parse(rate) if rate else None,
        concurrency=concurrency,
        tokens=Rate.parse(tokens) if tokens else None,
    )


def ask(limits: Limits, who: Key, tokens: int = 0) -> None:
    """A request from its beginning to its end."""
    limits.enter(who).done(tokens)


def refusal(limits: Limits, who: Key) -> tuple[str, int]:
    with pytest.raises(LimitedError) as caught:
        limits.enter(who)
    return caught.value.what, caught.value.retry_after


def outcome(limits: Limits, who: Key, tokens: int = 0) -> tuple[str, int]:
    """Why it was refused, and for how long; nothing where it was not."""
    try:
        ask(limits, who, tokens)
    except LimitedError as error:
        return error.what, error.retry_after
    return "", 0


def test_requests_of_a_minute(limits: Limits, clock: Clock) -> None:
    who = key(rate="3/min")
    for _ in range(3):  # at 0, 10 and 20 s
        ask(limits, who)
        clock.tick(10)
    assert refusal(limits, who) == ("rate", 30)
    clock.tick(29.5)
    assert refusal(limits, who) == ("rate", 1)
    clock.tick(0.5)
    ask(limits, who)
    assert refusal(limits, who) == ("rate", 10)
    clock.tick(10)
    ask(limits, who)
    assert refusal(limits, who) == ("rate", 10)


def test_a_window_is_free_at_its_end_and_not_a_nanosecond_before(limits: Limits, clock: Clock) -> None:
    who = key(rate="1/min")
    ask(limits, who)
    clock.now += MINUTE * SECOND - 1
    assert refusal(limits, who) == ("rate", 1)
    clock.now += 1
    ask(limits, who)


def test_refused_requests_count_for_nothing(limits: Limits, clock: Clock) -> None:
    who = key(rate="2/min", concurrency=1, tokens="10/min")
    ask(limits, who)
    running = limits.enter(who)
    for _ in range(100):
        refusal(limits, who)
    clock.tick(60)
    assert refusal(limits, who) == ("concurrency", 1)
    running.done(0)
    ask(limits, who)
    ask(limits, who)
    assert refusal(limits, who)[0] == "rate"


def test_requests_at_once(limits: Limits) -> None:
    who = key(concurrency=2)
    first, second = limits.enter(who), limits.enter(who)
    assert refusal(limits, who) == ("concurrency", 1)
    first.done(5)
    first.done(5)  # frees no second place
    third = limits.enter(who)
    assert refusal(limits, who) == ("concurrency", 1)
    ask(limits, key(concurrency=2, name="other"))
    second.done(0)
    third.done(0)
    ask(limits, who)


def test_tokens_are_booked_when_a_reply_ends(limits: Limits, clock: Clock) -> None:
    who = key(tokens="100/day")
    early, late = limits.enter(who), limits.enter(who)
    early.done(99)
    ask(limits, who, tokens=0)  # one is left
    clock.tick(HOUR)
    late.done(50)  # over the quota by what was under way
    assert refusal(limits, who) == ("tokens", 23 * HOUR)
    clock.tick(23 * HOUR)
    ask(limits, who, tokens=51)
    assert refusal(limits, who) == ("tokens", HOUR)


def test_done_books_once(limits: Limits) -> None:
    who = key(tokens="100/day")
    admission = limits.enter(who)
    for _ in range(3):
        admission.done(60)
    ask(limits, who, tokens=40)
    assert refusal(limits, who)[0] == "tokens"


def test_a_quota_that_was_overrun_waits_for_all_that_stands_in_the_way(limits: Limits, clock: Clock) -> None:
    who = key(tokens="100/h")
    running = [limits.enter(who) for _ in range(4)]
    for admission in running:  # 90 tokens at 0, 10, 20 and 30 minutes
        admission.done(90)
        clock.tick(10 * MINUTE)
    assert refusal(limits, who) == ("tokens", 40 * MINUTE)  # 90 are left when three of four are forgotten
    clock.tick(40 * MINUTE - 1)
    assert refusal(limits, who) == ("tokens", 1)
    clock.tick(1)
    ask(limits, who)


def test_of_several_reasons_the_longest_is_told(limits: Limits, clock: Clock) -> None:
    who = key(rate="1/min", concurrency=1, tokens="10/h")
    admission = limits.enter(who)
    assert refusal(limits, who) == ("rate", 60)
    clock.tick(60)
    assert refusal(limits, who) == ("concurrency", 1)
    admission.done(10)
    assert refusal(limits, who) == ("tokens", HOUR)


def test_a_refusal_says_what_and_how_long(limits: Limits) -> None:
    who = key(rate="1/min", tokens="5k/day")
    ask(limits, who, tokens=5000)
    with pytest.raises(LimitedError, match="key acme: its 5k/day tokens are used up") as caught:
        limits.enter(who)
    assert caught.value.hint == f"Try again in {caught.value.retry_after} s."
    assert DAY <= caught.value.retry_after <= DAY * (1 + 1 / GRAINS) + 1
    running = limits.enter(key(concurrency=1, name="b"))
    with pytest.raises(LimitedError, match="key b: 1 requests at once are under way"):
        limits.enter(key(concurrency=1, name="b"))
    running.done(0)


def test_no_limits(limits: Limits) -> None:
    running = [limits.enter(MANY) for _ in range(1000)]
    for admission in running:
        admission.done(10**9)
    ask(limits, MANY)


def test_a_block_books_what_was_used_however_it_ends(limits: Limits) -> None:
    who = key(concurrency=1, tokens="100/day")
    with limits.enter(who) as admission:
        admission.tokens = 10
        refusal(limits, who)
    with suppress(ConnectionError), limits.enter(who) as admission:
        admission.tokens = 20
        raise ConnectionError("client gone")
    with limits.enter(who) as admission:
        admission.tokens = 5
        admission.done(70)  # the last word
    assert refusal(limits, who)[0] == "tokens"
    assert limits.snapshot()["keys"]["acme"]["tokens"]["booked"] == [[1_700_000_000 * SECOND, 100]]


def test_a_dropped_admission_is_told_and_gives_its_place_back(limits: Limits, caplog: pytest.LogCaptureFixture) -> None:
    who = key(concurrency=1)
    with caplog.at_level(logging.ERROR, logger="edgelora.serve"):
        admission = limits.enter(who)
        admission.done(0)
        del admission
        gc.collect()
        assert caplog.messages == []
        admission = limits.enter(who)
        del admission
        gc.collect()
    assert ["key acme" in message for message in caplog.messages] == [True]
    ask(limits, who)


def test_changed_limits_go_on_with_what_was_used(limits: Limits, clock: Clock) -> None:
    for _ in range(3):
        ask(limits, key(rate="3/min"))
        clock.tick(10)
    assert refusal(limits, key(rate="3/min")) == ("rate", 30)
    ask(limits, key(rate="4/min"))
    assert refusal(limits, key(rate="2/min")) == ("rate", 50)  # those at 0 and 10 s, and the one at 20 s too
    assert refusal(limits, key(rate="4/h")) == ("rate", HOUR - 30)
    admission = limits.enter(key())  # all limits lifted while it runs
    with pytest.raises(LimitedError):
        limits.enter(key(concurrency=1))
    admission.done(10)
    ask(limits, key(rate="1/min"))


@pytest.mark.parametrize(("rate", "seconds"), [("5/s", 1), ("7/min", MINUTE), ("40/h", HOUR)])
def test_against_a_list_of_all_requests(rate: str, seconds: int, clock: Clock) -> None:
    """Whoever is let in, and when those refused may come again, as counted by hand."""
    limits, who, chance, taken = Limits(clock=clock), key(rate=rate), random.Random(rate), list[int]()
    amount = Rate.parse(rate).amount
    refused = 0
    for _ in range(2000):
        clock.now += chance.randrange(2 * seconds * SECOND // amount)
        recent = [when for when in taken if clock.now - when < seconds * SECOND]
        if len(recent) < amount:
            ask(limits, who)
            taken.append(clock.now)
        else:
            wait = recent[-amount] + seconds * SECOND - clock.now
            assert refusal(limits, who) == ("rate", max(1, -(-wait // SECOND)))
            refused += 1
    assert 100 < refused < 1900


def test_many_tokens_take_little_memory_and_are_never_freed_early(limits: Limits, clock: Clock) -> None:
    who, chance, booked, refused = key(tokens="100k/day"), random.Random(5), list[int](), 0
    for _ in range(20_000):
        clock.now += chance.randrange(20 * SECOND)
        try:
            ask(limits, who, tokens=50)
            booked.append(clock.now)
        except LimitedError:
            refused += 1
    assert refused > 1000
    assert len(limits._uses["acme"].windows["tokens"].booked) <= GRAINS + 2
    first = 0
    for number, when in enumerate(booked):
        while when - booked[first] >= DAY * SECOND:
            first += 1
        assert 50 * (number - first + 1) <= 100_000


def test_what_is_kept_coarsely_is_freed_at_most_a_thousandth_late(limits: Limits, clock: Clock) -> None:
    who = key(tokens="2k/h")
    clock.tick(0.7)
    ask(limits, who, tokens=2000)
    what, wait = refusal(limits, who)
    assert what == "tokens"
    assert HOUR <= wait <= HOUR * (1 + 1 / GRAINS) + 1
    clock.tick(wait)
    ask(limits, who)


def test_the_wall_clock_may_jump(clock: Clock) -> None:
    wall = Clock(1.7e9)
    limits, who = Limits(clock=clock, wall=wall), key(rate="1/min", tokens="10/h")
    ask(limits, who, tokens=10)
    for jump in (-400 * DAY, 800 * DAY):
        wall.tick(jump)
        assert refusal(limits, who) == ("tokens", HOUR)
    clock.tick(HOUR)
    ask(limits, who)
    clocks = signature(Limits).parameters
    assert (clocks["clock"].default, clocks["wall"].default) == (time.monotonic_ns, time.time_ns)


def test_with_a_real_clock() -> None:
    real = Limits()
    ask(real, key(rate="1/s"))
    assert refusal(real, key(rate="1/s")) == ("rate", 1)
    time.sleep(1)
    ask(real, key(rate="1/s"))


def test_keys_that_come_and_go_leave_nothing(limits: Limits, clock: Clock) -> None:
    for number in range(5000):
        ask(limits, key(rate="5/min", concurrency=2, tokens="1k/h", name=f"k{number}"), tokens=number % 2)
        ask(limits, key(concurrency=2, name=f"c{number}"), tokens=5)
    assert len(limits._uses) == 5000  # the concurrency alone is forgotten at once
    clock.tick(MINUTE + SWEEP_SECONDS)
    running = limits.enter(MANY)
    assert len(limits._uses) == 2501
    clock.tick(DAY)
    ask(limits, MANY)
    assert len(limits._uses) == 1
    running.done(0)
    assert len(limits._uses) == 0


def restarted(limits: Limits, wall: Clock, *, off: float = 0.0, clock: Clock | None = None) -> Limits:
    """Another process with what the first one left, as JSON, `off` seconds later; its clock begins anew."""
    snapshot = json.loads(json.dumps(limits.snapshot()))
    wall.tick(off)
    return Limits(snapshot, clock=clock or Clock(5.0), wall=wall)


def test_quotas_survive_a_restart() -> None:
    wall, clock = Clock(1.7e9), Clock(77_777)
    limits, who = Limits(clock=clock, wall=wall), key(rate="5/h", tokens="100/day")
    ask(limits, who, tokens=60)
    clock.tick(HOUR)
    wall.tick(HOUR)
    ask(limits, who, tokens=40)
    later = Clock(3.0)
    again = restarted(limits, wall, off=2 * HOUR, clock=later)
    assert refusal(again, who) == ("tokens", 21 * HOUR)
    later.tick(21 * HOUR)
    ask(again, who, tokens=60)
    assert refusal(again, who) == ("tokens", HOUR)


def test_a_restart_changes_nothing_at_once() -> None:
    wall, chance = Clock(1.7e9), random.Random(3)
    clock = Clock(50.0)
    limits, keys = Limits(clock=clock, wall=wall), [key("8/min", None, "5k/h", f"k{n}") for n in range(5)]
    for _ in range(400):
        outcome(limits, chance.choice(keys), chance.randrange(100))
        step = chance.random() * 3
        clock.tick(step)
        wall.tick(step)
    again = restarted(limits, wall)
    assert again.snapshot() == limits.snapshot()
    assert {name: [*windows] for name, windows in limits.snapshot()["keys"].items()} == {
        f"k{n}": ["rate", "tokens"] for n in range(5)
    }
    assert [outcome(again, who) for who in keys] == [outcome(limits, who) for who in keys]


def test_the_wall_clock_was_set_back_while_the_server_was_off() -> None:
    wall, who = Clock(1.7e9), key(tokens="10/h")
    limits = Limits(clock=Clock(), wall=wall)
    ask(limits, who, tokens=10)
    assert refusal(restarted(limits, wall, off=-300 * DAY), who) == ("tokens", HOUR)


def test_the_wall_clock_was_set_forward_while_the_server_was_off() -> None:
    wall, who = Clock(1.7e9), key(tokens="10/h")
    limits = Limits(clock=Clock(), wall=wall)
    ask(limits, who, tokens=10)
    assert refusal(restarted(limits, wall, off=HOUR - 1), who) == ("tokens", 1)
    wall.tick(1 - HOUR)
    ask(restarted(limits, wall, off=300 * DAY), who)


def test_what_runs_is_not_in_a_snapshot(limits: Limits) -> None:
    running = limits.enter(key(concurrency=1))
    assert limits.snapshot() == {"version": 1, "keys": {}}
    running.done(0)


def broken_snapshots() -> Iterator[Any]:
    good = {"rate": "5/h", "booked": [[10**18, 1]]}
    yield from ({}, [], {"version": 2, "keys": {}}, {"version": 1}, {"version": 1, "keys": []})
    yield from ({"version": 1, "keys": {"a": windows}} for windows in (1, [], {"speed": good}, {"rate": 1}))
    for change in ({"rate": "5"}, {"rate": None}, {"booked": 5}, {"booked": [5]}, {"booked": [[1]]}, {"booked": "ab"},
                   {"booked": [[1, 2, 3]]}, {"booked": [[1.5, 2]]}, {"booked": [[1, 2.5]]}, {"booked": [[1, 0]]},
                   {"booked": [[1, -5]]}, {"booked": [["1", 2]]}, {"booked": [[1, True]]}, {"booked": [[None, 2]]},
                   {"booked": [[float("nan"), 2]]}):  # fmt: skip
        yield {"version": 1, "keys": {"a": {"tokens": {**good, **change}}}}
    yield {"version": 1, "keys": {"a": {"tokens": {"booked": []}}}}


@pytest.mark.parametrize("snapshot", [*broken_snapshots()], ids=repr)
def test_a_broken_snapshot_is_refused(snapshot: Any) -> None:
    with pytest.raises(SettingsError, match="what the keys had used cannot be read"):
        Limits(snapshot)
