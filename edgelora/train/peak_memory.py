"""The most memory that this process has had: of a GPU where it computes on one, else resident in RAM."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # proc_pid_clear_refs(5)
SAMPLE_SECONDS = 0.01


@dataclass
class Peak:
    """Bytes above what there was when the block began; `value` stands when it ends."""

    value: int = 0


@contextmanager
def peak_memory(device: str) -> Iterator[Peak]:
    """Watch the memory of this process while the block runs."""
    found = Peak()
    with _on_cuda(found) if device == "cuda" else _counted(found) if _counts() else _sampled(found):
        yield found


def memory_now(device: str) -> int:
    """Bytes that this process has at the moment, the libraries themselves included."""
    if device == "cuda":
        import torch

        return int(torch.cuda.memory_reserved())
    return int(psutil.Process().memory_info().rss)


def memory_so_far(device: str) -> int:
    """The most bytes that this process has had since it began."""
    if device == "cuda":
        import torch

        return int(torch.cuda.max_memory_reserved())
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def free_memory(device: str) -> int:
    """Bytes that this process could still take."""
    if device == "cuda":
        import torch

        return int(torch.cuda.mem_get_info()[0])
    return int(psutil.virtual_memory().available)


def _counts() -> bool:
    """Whether the kernel keeps the peak itself, and lets it be set back."""
    try:
        CLEAR.write_text(RESET_PEAK)
    except OSError:
        return False
    return sys.platform == "linux"


@contextmanager
def _counted(found: Peak) -> Iterator[None]:
    before = memory_now("cpu")
    yield
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    found.value = int(line.split()[1]) * 1024 - before


@contextmanager
def _on_cuda(found: Peak) -> Iterator[None]:
    import torch

    before = torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    yield
    found.value = torch.cuda.max_memory_reserved() - before


@contextmanager
def _sampled(found: Peak) -> Iterator[None]:
    """Where the kernel keeps no peak: look often."""
    before, ended = memory_now("cpu"), threading.Event()

    def watch() -> None:
        while not ended.wait(SAMPLE_SECONDS):
            found.value = max(found.value, memory_now("cpu") - before)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()
