"""How many threads to decode with."""

from __future__ import annotations

import os


def default_threads() -> int:
    """The physical cores this process may use: decoding waits for memory, and hyper-threads only wait in turns."""
    import psutil

    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(allowed, psutil.cpu_count(logical=False) or allowed))
