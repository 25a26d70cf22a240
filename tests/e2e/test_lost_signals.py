"""Ctrl-C and SIGTERM that arrive where Python drops exceptions."""

import signal
import subprocess
import sys

import pytest

PROGRAM = """
import ctypes, os, sys, time
import edgelora.cli
from edgelora.__main__ import main

sent, place = int(sys.argv[1]), sys.argv[2]

def interrupted():
    os.kill(os.getpid(), sent)
    time.sleep(0.1)

class Dropped:
    def __del__(self):
        interrupted()

def cli(prog_name):
    if place == "destructor":
        Dropped()
    else:
        ctypes.CFUNCTYPE(None)(interrupted)()
    time.sleep(20)
    print("not heard")

edgelora.cli.cli = cli
main()
"""


@pytest.mark.parametrize("place", ["destructor", "callback"])
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_is_heard_wherever_it_arrives(sent: signal.Signals, code: int, place: str) -> None:
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(int(sent)), place], capture_output=True, text=True, timeout=60
    )
    assert (result.returncode, result.stdout, result.stderr) == (code, "", "")


def test_other_exceptions_that_are_dropped_are_still_shown() -> None:
    program = PROGRAM.replace("os.kill(os.getpid(), sent)", "raise ValueError('seen')").replace("sleep(20)", "sleep(0)")
    result = subprocess.run([sys.executable, "-c", program, "2", "destructor"], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "not heard\n")
    assert "ValueError: seen" in result.stderr
