"""Contents of a hub repository brought into huggingface_hub's cache, from where an interrupted download stopped.

huggingface_hub itself starts a file anew in every process since 2.4 (its partial files have names that nobody else
knows), and Xet transfers keep nothing either. A base is many gigabytes, so each content is fetched here over HTTP into
`blobs/<digest>.incomplete`, the name that earlier versions resume from too, is compared with the digest that the hub
listed, and only then gets its name. What is in `blobs/` huggingface_hub takes as downloaded.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converters.errors import DiskFullError, DownloadError
from converters.hub_cache import repository_folder
from converters.hub_problems import KEPT, MORE_SPACE

Progress = Callable[[int, int, str], None]
CONNECTIONS = 4
MAX_FAILURES = 5  # in a row, without a byte in between
FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 1.0, 15.0
PASSING_STATUS = (408, 416, 429, 500, 502, 503, 504)
READ_BYTES = 4 << 20
SPARE_BYTES = 64 << 20  # a disk filled to the last byte hurts whatever else runs
_DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


@dataclass(frozen=True)
class HubFile:
    """A file of a repository at one commit.

    Attributes:
        name: its path in the repository.
        size_bytes: its size.
        digest: SHA-256 of a file in large-file storage, git's SHA-1 of any other: what the cache calls its content.
    """

    name: str
    size_bytes: int
    digest: str

    @property
    def is_valid(self) -> bool:
        """Whether the hub's listing can be followed: nothing in it leads out of the cache's folder."""
        parts = self.name.split("/")
        plain = not any(part in ("", ".", "..") or "\\" in part for part in parts)
        return plain and self.size_bytes >= 0 and bool(_DIGEST.fullmatch(self.digest))


class Transfer:
    """Files of one repository at one commit, brought into the cache.

    Args:
        repository: `owner/name`.
        commit: 40 hexadecimal digits.
        progress: called with the bytes there are, the bytes there will be, and the file's name; from several threads,
            but never from two at once.
    """

    def __init__(self, repository: str, commit: str, progress: Progress | None = None) -> None:
        self.repository, self.commit = repository, commit
        self.folder = repository_folder(repository)
        self._progress = progress
        self._done = self._total = 0
        self._lock, self._stop = threading.Lock(), threading.Event()

    def is_there(self, file: HubFile) -> bool:
        path = self.path(file)
        return path.is_file() and path.stat().st_size == file.size_bytes  # a crash may have cut it

    def path(self, file: HubFile) -> Path:
        """Where a file's content lies once it is there."""
        linked = self.folder / "snapshots" / self.commit / file.name
        return linked if linked.is_file() else self._blob(file)

    def fetch(self, files: Sequence[HubFile]) -> None:
        """Download what is not in the cache yet.

        Raises:
            DiskFullError: it would not fit, seen before anything is asked for.
            DownloadError: what arrived is not what the hub listed.
            HTTPError: huggingface_hub's or of the HTTP client below it, when trying again did not help.
            OSError: the cache cannot be written.
        """
        missing = [file for file in files if not self.is_there(file)]
        self._total = sum(file.size_bytes for file in files)
        self._done = self._total - sum(file.size_bytes for file in missing)
        self._check_space(missing)
        if missing:
            (self.folder / "blobs").mkdir(parents=True, exist_ok=True)
            self._fetch_all(missing)

    def _check_space(self, missing: Sequence[HubFile]) -> None:
        needed = sum(file.size_bytes - min(file.size_bytes, _size(self._partial(file))) for file in missing)
        existing = next(folder for folder in (self.folder, *self.folder.parents) if folder.is_dir())
        free = shutil.disk_usage(existing).free
        if needed and needed + SPARE_BYTES > free:
            raise DiskFullError(
                f"{self.repository}: {_gigabytes(needed)} to download, and {_gigabytes(free)} free in {existing}",
                hint=MORE_SPACE,
            )

    def _fetch_all(self, files: Sequence[HubFile]) -> None:
        with ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="hub") as pool:
            futures = [pool.submit(self._fetch_one, file) for file in files]
            try:
                wait(futures, return_when=FIRST_EXCEPTION)
                failed = next((future.exception() for future in futures if future.done() and future.exception()), None)
                if failed is not None:
                    raise failed
            except BaseException:
                self._stop.set()
                for future in futures:
                    future.cancel()
                raise

    def _fetch_one(self, file: HubFile) -> None:
        with self._locked(file):
            if self.is_there(file):  # by another process, while this one waited
                self._report(file, file.size_bytes)
                return
            resumed = _size(self._partial(file)) > 0
            if not self._arrived_whole(file) and not (resumed and self._arrived_whole(file)):
                raise DownloadError(
                    f"{self.repository}: {file.name} arrived damaged (its digest is not the one that the hub lists)",
                    hint="Run it again. If it happens again, something between here and the hub changes the contents.",
                )

    @contextmanager
    def _locked(self, file: HubFile) -> Iterator[None]:
        """The lock that huggingface_hub takes too for this content; given up when this transfer is."""
        from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]

        locks = self.folder.parent / ".locks" / self.folder.name
        locks.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            while not self._stop.is_set():
                try:
                    stack.enter_context(WeakFileLock(locks / f"{file.digest}.lock", timeout=1.0))
                except TimeoutError:
                    continue
                break
            self._raise_if_stopped()
            yield

    def _raise_if_stopped(self) -> None:
        if self._stop.is_set():
            raise DownloadError(f"{self.repository}: stopped", hint=KEPT)

    def _arrived_whole(self, file: HubFile) -> bool:
        partial = self._partial(file)
        if _size(partial) > file.size_bytes:
            partial.unlink()
        self._report(file, _size(partial))
        self._complete(file, partial)
        if _digest(partial, len(file.digest)) == file.digest:
            _sync(partial)
            os.replace(partial, self._blob(file))
            return True
        partial.unlink()
        self._report(file, -file.size_bytes)
        return False

    def _complete(self, file: HubFile, partial: Path) -> None:
        """Ask until everything is there; give up after MAX_FAILURES answers in a row that brought nothing."""
        from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

        partial.touch()
        failures, seconds = 0, FIRST_WAIT_SECONDS
        while (have := _size(partial)) < file.size_bytes:
            problem: Exception = DownloadError(f"{self.repository}: the hub ended {file.name} too early", hint=KEPT)
            try:
                self._continue(file, partial, have)
            except HTTPError as error:
                if not _is_passing(error):
                    raise
                problem = error
            if _size(partial) > have:
                failures, seconds = 0, FIRST_WAIT_SECONDS
                continue
            failures += 1
            if failures >= MAX_FAILURES or self._stop.wait(seconds):
                raise problem
            seconds = min(2 * seconds, LONGEST_WAIT_SECONDS)

    def _continue(self, file: HubFile, partial: Path, have: int) -> None:
        from huggingface_hub import constants, get_session, hf_hub_url, hf_raise_for_status
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

        url = hf_hub_url(self.repository, file.name, revision=self.commit)
        headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
        if have:
            headers["Range"] = f"bytes={have}-"
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        with (
            get_session().stream("GET", url, headers=headers, timeout=timeout, follow_redirects=True) as response,
            partial.open("ab", buffering=0) as out,
        ):
            if response.status_code == 416:  # nothing behind this point: it was not this file's beginning
                self._start_anew(file, out, have)
            hf_raise_for_status(response)
            if have and response.status_code != 206:
                self._start_anew(file, out, have)
            self._receive(file, response, out)

    def _receive(self, file: HubFile, response: Any, out: Any) -> None:
        left = file.size_bytes - os.fstat(out.fileno()).st_size
        for chunk in response.iter_bytes():
            self._raise_if_stopped()
            piece = memoryview(chunk)[:left]  # never more than was listed, whatever arrives
            while piece:
                written = out.write(piece)
                self._report(file, written)
                left, piece = left - written, piece[written:]
            if not left:
                return

    def _start_anew(self, file: HubFile, out: Any, have: int) -> None:
        out.truncate(0)
        self._report(file, -have)

    def _report(self, file: HubFile, more: int) -> None:
        with self._lock:
            self._done += more
            if self._progress is not None:
                self._progress(self._done, self._total, file.name)

    def _blob(self, file: HubFile) -> Path:
        return self.folder / "blobs" / file.digest

    def _partial(self, file: HubFile) -> Path:
        return self._blob(file).with_name(f"{file.digest}.incomplete")


def _is_passing(error: Exception) -> bool:
    """Whether a problem may be gone in a moment: the connection's own, or the server's."""
    response = getattr(error, "response", None)
    return response is None or response.status_code in PASSING_STATUS


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _sync(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _digest(path: Path, n_digits: int) -> str:
    """What the hub calls this content: SHA-256 (64 digits), or SHA-1 as git computes it (40 digits)."""
    digest = hashlib.sha256() if n_digits == 64 else hashlib.sha1(b"blob %d\0" % _size(path), usedforsecurity=False)
    with path.open("rb") as file:
        while piece := file.read(READ_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def _gigabytes(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.2f} GB" if size_bytes >= 1e7 else f"{size_bytes / 1e6:.2f} MB"
