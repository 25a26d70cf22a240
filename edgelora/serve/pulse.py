"""Whether the engine's process still works, by what it says when it is asked.

    beat, ask -> answer: turn 6        between two steps
    beat, ask -> answer: turn 7        in a step
    beat, ask -> answer: turn 7        in the same one: legitimate for long, as a decode on a slow machine may be
    beat, ask -> no answer             stopped, swapped out or dead: legitimate for much shorter

The thread that reads the socket answers, which waits for nothing: a long decode delays no answer. Beats of the server
are counted, and no clock is read: while the server does not run itself (the machine sleeps, both processes are stopped)
nothing is held against the engine's.
"""

from __future__ import annotations

import math

BEATS = 10
"""Questions in the time that an answer may take."""
START_SECONDS = 120.0
"""Until the first answer, before which Python and its packages are read from a disk that may be slow."""


class Pulse:
    """One process's signs of life.

    Args:
        silent_seconds: without an answer, after which it counts as hanging.
        step_seconds: in one step or job of the engine's thread, after which that counts as hanging.

    Attributes:
        interval: seconds between two beats.
        is_stuck: it answers, but its engine has hung in a step.
    """

    def __init__(self, silent_seconds: float, step_seconds: float) -> None:
        self.interval = silent_seconds / BEATS
        self.is_stuck = False
        self._silent_seconds, self._step_seconds = max(START_SECONDS, silent_seconds), step_seconds
        self._after_first_answer = silent_seconds
        self._silent = self._in_turn = self._turn = 0

    def answered(self, turn: int) -> None:
        """It said how many steps and jobs its engine's thread has begun and ended: an odd number while it is in one."""
        self._silent, self._silent_seconds = 0, self._after_first_answer
        if turn != self._turn or turn % 2 == 0:
            self._in_turn = 0
        self._turn = turn

    def beat(self) -> str:
        """Another interval has passed. Why the process is to be ended; empty while it may go on."""
        self._silent += 1
        self._in_turn += 1
        if self._is_over(self._silent, self._silent_seconds):
            return f"it did not answer for {self._silent_seconds:g} s"
        self.is_stuck = self._turn % 2 == 1 and self._is_over(self._in_turn, self._step_seconds)
        return f"its engine was in one step for {self._step_seconds:g} s" if self.is_stuck else ""

    def _is_over(self, beats: int, seconds: float) -> bool:
        return beats > math.ceil(seconds / self.interval)
