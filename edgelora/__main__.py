"""The `edgelora` script, and `python -m edgelora` for checkouts."""

import gc
import os
import signal
import sys
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from sys import UnraisableHookArgs

EXIT_INTERRUPTED, EXIT_TERMINATED = 130, 143


def main() -> None:
    """Run the command line; Ctrl-C ends it with 130 also while it is still being imported."""
    # numpy's BLAS lets idle threads spin for a tenth of a second, at its start too: 2^16 cycles, then they sleep.
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "16")
    try:
        signal.signal(signal.SIGTERM, _terminate)
        sys.unraisablehook = _hear_again
        if sys.stdout is None:  # closed by whoever started us (`>&-`)
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for the life of the process
        from edgelora.cli import cli

        cli(prog_name="edgelora")
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    finally:
        gc.freeze()  # or Python, as it ends, looks at all that was imported again: a tenth of a short command's time


def _terminate(_signal: int, _frame: FrameType | None) -> NoReturn:
    """Leave as an exception does, so that locks and temporary files go."""
    sys.exit(EXIT_TERMINATED)


def _hear_again(lost: "UnraisableHookArgs") -> None:
    """A signal whose exception rose where Python drops it (a destructor, a callback from C) comes again a moment later,
    or a Ctrl-C at the wrong instant would do nothing."""
    if issubclass(lost.exc_type, KeyboardInterrupt):
        number = signal.SIGINT
    elif issubclass(lost.exc_type, SystemExit) and getattr(lost.exc_value, "code", 0) == EXIT_TERMINATED:
        number = signal.SIGTERM
    else:
        sys.__unraisablehook__(lost)
        return
    import threading

    again = threading.Timer(0.02, signal.pthread_kill, (threading.main_thread().ident, number))
    again.daemon = True
    again.start()


if __name__ == "__main__":
    main()
