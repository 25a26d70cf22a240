"""Commands in a Markdown file, with what they print: read, run, and compared.

    ```console
    $ edgelora convert build/support
    build/support.gguf  0.6 MB
    ...
    $ edgelora serve --adapter build/support.gguf --port 8080 &
    ```

A line `...` stands for any lines. A command goes on after a line that ends with `\\`, and in lines that begin with
`> `, as a shell shows what it still waits for. One that ends with `&` is waited for until its port answers, and ended
with the story.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

PORT = "8080"
"""What stories say; another one that is free takes its place."""
_BLOCK = re.compile(r"^```console\n(.*?)^```$", re.M | re.S)
_NUMBER = re.compile(r"[-+−]?\d[\d,.]*")
_TIMEOUT = 900  # seconds: on a machine that does other things, too


@dataclass(frozen=True)
class Command:
    """A command of a story.

    Attributes:
        text: as a shell takes it.
        printed: the lines that the story shows below it.
    """

    text: str
    printed: tuple[str, ...]

    @property
    def is_service(self) -> bool:
        return self.text.endswith("&")


def read_story(text: str) -> list[Command]:
    commands: list[list[str]] = []
    for block in _BLOCK.findall(text):
        for line in block.replace("\\\n", "").splitlines():
            if line.startswith("$ "):
                commands.append([line[2:]])
            elif line.startswith("> ") and len(commands[-1]) == 1:
                commands[-1][0] += "\n" + line[2:]
            else:
                commands[-1].append(line)
    return [Command(first, tuple(line for line in rest if line.strip())) for first, *rest in commands]


def run_story(commands: list[Command], folder: Path) -> Iterator[tuple[Command, str]]:
    """Run each command in `folder`: what it printed, on stdout and stderr together.

    Raises:
        AssertionError: a command failed, or a service did not answer.
    """
    port = _free_port()
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    with _services() as services:
        for command in commands:
            text = command.text.replace(PORT, str(port))
            if command.is_service:
                services.append(_start(text.removesuffix("&"), folder, environment))
                _wait_for(port, services[-1])
                yield command, ""
                continue
            result = subprocess.run(
                text, shell=True, cwd=folder, env=environment, timeout=_TIMEOUT, stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )  # fmt: skip
            assert result.returncode == 0, f"{text}\n{result.stdout}"
            yield command, result.stdout.replace(str(port), PORT)


def missing_lines(command: Command, output: str) -> list[str]:
    """The lines that the story shows and the command did not print; numbers and the width of columns may differ."""
    printed = {_shape(line) for line in output.splitlines()}
    return [line for line in command.printed if line != "..." and _shape(line) not in printed]


def _shape(line: str) -> str:
    return " ".join(_NUMBER.sub("#", line).split())


@contextmanager
def _services() -> Iterator[list[subprocess.Popen[bytes]]]:
    services: list[subprocess.Popen[bytes]] = []
    try:
        yield services
    finally:
        for service in services:
            os.killpg(service.pid, signal.SIGTERM)
            service.wait(60)


def _start(text: str, folder: Path, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(  # exec: the shell becomes the service, and who waits for one waits for the other
        f"exec {text}", shell=True, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip


def _free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_for(port: int, service: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _TIMEOUT
    while time.monotonic() < deadline:
        assert service.poll() is None, "the service ended at once"
        with closing(socket.socket()) as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise AssertionError("the service does not answer")
