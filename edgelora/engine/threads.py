"""How many threads to decode with: as many as the base is worth, and as the machine has cores to spare.

A graph makes its threads wait for each other a thousand times a token. Where one of them has to share its core with
another process, all wait for it, spinning: with one busy process on two cores, two threads are three times slower than
one (111 ms a token against 39 in ../shared/FACTS.md). So the number follows the load while replies are written.
"""

from __future__ import annotations

import math
import os
import time

BYTES_PER_THREAD = 16 << 20
"""Weights that make another thread worth its barriers. A token reads every weight once (16 MiB: about 1.5 ms on a core)
and waits for all threads some 200 times; on a busy machine each wait can cost a time slice."""


def threads_for(weight_bytes: int) -> int:
    """One thread for each `BYTES_PER_THREAD` of the base, at most one for each usable core."""
    return max(1, min(usable_cores(), -(-weight_bytes // BYTES_PER_THREAD)))


def usable_cores() -> int:
    """The physical cores this process may use: decoding waits for memory, and hyper-threads only wait in turns."""
    import psutil

    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(allowed, psutil.cpu_count(logical=False) or allowed))


WINDOW_SECONDS = 0.25
"""Between two looks at the load: 25 of the kernel's clock ticks."""
SLACK = 0.35
"""Cores that others may take without costing a thread: a desktop that is merely alive takes a fifth of one."""


class LoadFollower:
    """How many threads the load of the machine leaves.

    Args:
        most: threads on a quiet machine.
    """

    def __init__(self, most: int) -> None:
        self.most = self._threads = most
        self._cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
        self._cores = usable_cores()
        self._looked = time.monotonic()
        self._busy, self._own = self._times()

    def threads(self) -> int:
        """For the next decode; asked before each, it looks at the load now and then."""
        now = time.monotonic()
        seconds = now - self._looked
        if self.most == 1 or seconds < WINDOW_SECONDS:
            return self._threads
        busy, own = self._times()
        others = (busy - self._busy - (own - self._own)) / seconds
        self._looked, self._busy, self._own = now, busy, own
        if seconds < 8 * WINDOW_SECONDS:  # what was long ago says nothing of now
            self._threads = max(1, min(self.most, self._cores - max(0, math.ceil(others - SLACK))))
        return self._threads

    def _times(self) -> tuple[float, float]:
        """Seconds that the usable CPUs were busy, and that this process computed, since they were started."""
        import psutil

        every = psutil.cpu_times(percpu=True)
        cpus = every if self._cpus is None else [every[cpu] for cpu in self._cpus if cpu < len(every)]
        busy = sum(sum(cpu) - cpu.idle - getattr(cpu, "iowait", 0) - getattr(cpu, "guest", 0) for cpu in cpus)
        return busy, time.process_time()
