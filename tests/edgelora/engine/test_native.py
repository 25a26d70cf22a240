"""The seam: silent, handles freed once, a running decode can be interrupted."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from edgelora.engine.context import Context, Interrupted
from edgelora.engine.model import Model
from edgelora.engine.native import Handle, InterruptFlag, forget_log, llama, reason
from edgelora.errors import EdgeloraError


def test_a_handle_is_freed_once_and_not_used_after() -> None:
    freed: list[int] = []
    handle = Handle(7, freed.append)
    assert handle.pointer == 7
    handle.close()
    handle.close()
    assert freed == [7]
    with pytest.raises(RuntimeError, match="after it was freed"):
        _ = handle.pointer


def test_the_reason_of_a_failure_is_kept(tmp_path: Path) -> None:
    forget_log()
    assert not llama().llama_model_load_from_file(
        str(tmp_path / "missing.gguf").encode(), llama().llama_model_default_params()
    )
    assert "missing.gguf" in reason()
    forget_log()
    assert reason() == "llama.cpp gave no reason"


def test_nothing_is_printed_by_loading_failing_or_leaving_without_close(base: Path, adapters: dict[str, Path]) -> None:
    script = (
        "import sys\n"
        "from edgelora.engine.engine import Engine\n"
        "from edgelora.engine.native import llama\n"
        "engine = Engine(sys.argv[1], [sys.argv[2]])\n"
        "stream = engine.stream('hello', adapter='red')\n"
        "next(stream)\n"
        "llama().llama_model_load_from_file(b'/missing', llama().llama_model_default_params())\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, base, adapters["red"]], capture_output=True, timeout=60, check=False
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, b"", b"")


def test_loading_can_be_given_up(base: Path) -> None:
    with pytest.raises(EdgeloraError, match="loading was interrupted"):
        Model(base, keep_going=lambda: False)
    Model(base).close()


def test_a_decode_is_given_up_when_the_flag_is_set(base: Path) -> None:
    model = Model(base)
    context = Context(model, n_ctx=512, n_sequences=1, threads=1, n_batch=512)
    try:
        flag = InterruptFlag()
        context.interrupt_with(flag)
        context.decode(0, list(range(500)), 0)  # the twin: an unset flag interrupts nothing
        context.trim(0, 0)
        flag.set()
        with pytest.raises(Interrupted):
            context.decode(0, list(range(500)), 0)
        context.interrupt_with(None)
        context.trim(0, 0)
        context.decode(0, list(range(500)), 0)
    finally:
        context.close()
        model.close()


def decode_again_and_again(context: Context, tokens: list[int]) -> None:
    for _ in range(20):
        context.decode(0, tokens, 0)
        context.trim(0, 0)


def test_a_running_decode_is_given_up_half_way(base: Path) -> None:
    model = Model(base)
    context = Context(model, n_ctx=512, n_sequences=1, threads=1, n_batch=512)
    tokens = list(range(512))
    try:
        start = time.perf_counter()
        context.decode(0, tokens, 0)
        whole = time.perf_counter() - start
        context.trim(0, 0)
        flag = InterruptFlag()
        context.interrupt_with(flag)
        threading.Timer(whole / 4, flag.set).start()
        with pytest.raises(Interrupted):
            decode_again_and_again(context, tokens)
    finally:
        context.close()
        model.close()
