"""How many threads to decode with."""

from __future__ import annotations

import os

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
