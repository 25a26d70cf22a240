"""Compiling C sources once for this machine (`kquants.c` and its headers, if none are named), and loading them.

The library is `$XDG_CACHE_HOME/edgelora/kernels/KEY/libNAME-DIGEST.so` (or lies in a folder of the user's in the
temporary directory, where the cache cannot be written). KEY covers the source, the compiler, the flags and the
processor; DIGEST is that of the file itself, for loading a damaged library can end the process. It is loaded only from
folders that belong to this user and that nobody else can write. Every failure means None: the caller has another way.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

SOURCE = Path(__file__).with_name("kquants.c")
FAILED = "failed"
# Contraction to fused multiply-add would change results.
FLAGS = ("-std=gnu11", "-O2", "-ffp-contract=off", "-fno-math-errno", "-fwrapv", "-w", "-fPIC", "-shared")
# The first set that a compiler takes. With GCC's bolder vectorizer -O2 is as fast as -O3 here, and compiles in a third.
TUNING = (
    ("-march=native", "-ftree-vectorize", "-fvect-cost-model=dynamic"),
    ("-march=native",),
    ("-mcpu=native",),
    (),
)
COMPILERS = ("cc", "gcc", "clang")
COMPILE_SECONDS, TRY_SECONDS, RETRY_SECONDS = 60, 20, 24 * 3600
TRY = "import ctypes, sys; sys.exit(getattr(ctypes.CDLL(sys.argv[1]), sys.argv[2])())"


def library(extra_flags: Sequence[str] = (), source: Path | None = None) -> ctypes.CDLL | None:
    """The kernels, built if need be (2 to 4 seconds, once a machine).

    Args:
        extra_flags: for the compiler, after ours.
        source: NAME.c, with headers beside it; `int NAME_try(void)` in it runs everything once, and returns 0.
    """
    source = source or SOURCE
    compiler = find_compiler()
    if compiler is None or os.name != "posix":
        return None
    for folder in _cache_folders():
        with suppress(OSError):
            return _library_in(folder / _key(source, compiler, extra_flags), source, compiler, extra_flags)
    return None


def find_compiler() -> tuple[str, ...] | None:
    """The command of the C compiler: `$CC`, or the first of `COMPILERS` that is installed."""
    for command in (os.environ.get("CC", ""), *COMPILERS):
        try:
            words = shlex.split(command)
        except ValueError:  # a quotation without an end
            continue
        program = shutil.which(words[0]) if words else None
        if program:
            return (program, *words[1:])
    return None


def _key(source: Path, compiler: Sequence[str], extra_flags: Sequence[str]) -> str:
    """Names a build. The compiler counts by its file, for asking its version would cost each start a process."""
    program = os.stat(compiler[0])
    sources = [path.read_text() for path in sorted(source.parent.glob("*.[ch]"))]
    flags = (*FLAGS, *(flag for flags in TUNING for flag in flags), *extra_flags)
    parts = (*sources, *compiler, str(program.st_size), str(program.st_mtime_ns), *flags)
    return hashlib.sha256("\0".join((*parts, _processor())).encode()).hexdigest()[:32]


def _processor() -> str:
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        wanted = ("flags", "features", "model name", "cpu part")
        return "\n".join(sorted({line for line in lines if line.lower().startswith(wanted)}))
    return "\n".join((platform.machine(), platform.processor(), platform.node()))


def _cache_folders() -> Iterator[Path]:
    cache = os.environ.get("XDG_CACHE_HOME", "")
    with suppress(RuntimeError):  # no home
        yield (Path(cache) if os.path.isabs(cache) else Path.home() / ".cache") / "edgelora" / "kernels"
    yield Path(tempfile.gettempdir()) / f"edgelora-kernels-{os.geteuid()}"


def _library_in(folder: Path, source: Path, compiler: Sequence[str], extra_flags: Sequence[str]) -> ctypes.CDLL | None:
    """The library in `folder`, made there if it is not; None if it cannot be made.

    Raises:
        OSError: the folder cannot be written, or others could write it.
    """
    for private in (folder.parent, folder):
        private.mkdir(mode=0o700, parents=True, exist_ok=True)
        _check_private(private)
    path = _whole_library(folder, source.stem)
    if path is None and not _failed_lately(folder):
        _build(folder, source, compiler, extra_flags)
        path = _whole_library(folder, source.stem)
    return _load(path) if path else None


def _whole_library(folder: Path, name: str) -> Path | None:
    for path in sorted(folder.glob(f"lib{name}-*.so")):
        _check_private(path)
        if path.name == _library_name(path, name):
            return path
        path.unlink()
    return None


def _library_name(path: Path, name: str) -> str:
    return f"lib{name}-{hashlib.sha256(path.read_bytes()).hexdigest()[:32]}.so"


def _failed_lately(folder: Path) -> bool:
    marker = folder / FAILED
    return marker.exists() and time.time() - marker.stat().st_mtime < RETRY_SECONDS


def _check_private(path: Path) -> None:
    status = path.lstat()
    private = status.st_uid == os.geteuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    if not private or stat.S_ISLNK(status.st_mode):
        raise PermissionError(f"{path} could be written by others")


def _build(folder: Path, source: Path, compiler: Sequence[str], extra_flags: Sequence[str]) -> None:
    """Compile in a folder of its own and rename: several builders at once each leave a whole library, or a marker."""
    with tempfile.TemporaryDirectory(dir=folder, ignore_cleanup_errors=True) as scratch:
        made = Path(scratch) / f"lib{source.stem}.so"
        for tuning in TUNING:
            command = [*compiler, *FLAGS, *tuning, *extra_flags, str(source), "-o", str(made), "-lm"]
            if _runs(command, COMPILE_SECONDS) and _can_be_used(made, source.stem):
                made.chmod(0o700)
                made.replace(folder / _library_name(made, source.stem))
                return
    (folder / FAILED).touch(mode=0o600)


def _can_be_used(made: Path, name: str) -> bool:
    """In a process of its own, which a processor that lacks an instruction may end."""
    return not sys.executable or _runs([sys.executable, "-I", "-S", "-c", TRY, str(made), f"{name}_try"], TRY_SECONDS)


def _runs(command: Sequence[str], seconds: float) -> bool:
    quiet = subprocess.DEVNULL
    try:
        done = subprocess.run(command, stdin=quiet, stdout=quiet, stderr=quiet, timeout=seconds, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


def _load(path: Path) -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(str(path))
    except OSError:  # folders whose files may not be run
        return None
