"""The native kernels make llama.cpp's bytes, a kernel that does not is found out, and there is always a way back."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from converters import native
from converters.block_types import TYPES
from converters.ggml_base import encoder
from converters.native import build, proof

ROOT = Path(__file__).parents[2]
KERNELS = (
    *("F16", "BF16", "Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K", "IQ4_XS", "IQ4_NL"),
    *("Q5_1", "Q5_0", "Q4_1", "Q4_0"),
)
FUZZ_ROUNDS = 12
ROWS = 8

needs_compiler = pytest.mark.skipif(build.find_compiler() is None, reason="no C compiler")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache of these tests' own, so that they see a first build."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("XDG_CACHE_HOME", str(folder))
        patch.delenv("EDGELORA_NATIVE", raising=False)
        patch.delenv("CC", raising=False)
        yield folder


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that has not used a kernel."""
    monkeypatch.setattr(native, "_known", {})


def library(*flags: str):
    built = build.library(flags)
    assert built is not None
    return built


def both(encode: native.Quantizer, name: str, rows: np.ndarray, importance: np.ndarray | None):
    kind = TYPES[name]
    ours, theirs = (np.zeros((len(rows), kind.row_bytes(rows.shape[1])), np.uint8) for _ in range(2))
    weights = None if importance is None else importance.ctypes.data
    encode(rows.ctypes.data, ours.ctypes.data, *rows.shape, weights)
    chunk = encoder(kind.number).ggml_quantize_chunk
    chunk(kind.number, rows.ctypes.data, theirs.ctypes.data, 0, *rows.shape, weights)
    return ours, theirs


def nasty_row(random: np.random.Generator, n: int) -> np.ndarray:
    """One of the things that weights can look like, or that break arithmetic."""
    scale = np.float32(10.0 ** random.uniform(-7, 3))
    row = random.standard_normal(n, np.float32) * scale
    groups = np.repeat(random.standard_normal(n // 16, np.float32), 16)
    choices = (
        lambda: row,
        lambda: random.standard_t(2, n) * scale,
        lambda: np.full(n, random.choice([0, -0.0, scale, -scale])),
        lambda: np.where(random.random(n) < 0.9, 0, row),
        lambda: np.where(random.random(n) < 0.5, -0.0, 0.0),
        lambda: np.where(np.arange(n) == random.integers(n), scale, 0),
        lambda: random.integers(-8, 9, n),
        lambda: random.integers(-32, 33, n) / 2,
        lambda: np.abs(row) * random.choice([-1, 1]),
        lambda: np.sign(row) * scale,
        lambda: groups * scale + row * 1e-4,
        lambda: groups * scale + row * 1e-7,
        lambda: row * np.repeat(10.0 ** random.uniform(-25, 3, n // 32), 32),
        lambda: row * np.repeat(random.random(n // 32) < 0.5, 32),
        lambda: row * np.exp(random.uniform(-30, 30, n)),
        lambda: row * 10.0 ** random.choice([-38, -30, 20, 30]),
        lambda: np.where(np.arange(n) == random.integers(n), random.choice([np.nan, np.inf, -np.inf]), row),
        lambda: random.integers(0, 2**32, n, dtype=np.uint32).view(np.float32),
        lambda: np.linspace(-scale, scale, n),
        lambda: np.round(row / scale * 4) / 4 * scale,
    )
    with np.errstate(all="ignore"):
        return choices[random.integers(len(choices))]().astype(np.float32)


def nasty_importance(random: np.random.Generator, n: int) -> np.ndarray:
    values = random.random(n, np.float32)
    choices = (values, values**8, np.where(random.random(n) < 0.5, 0, values), values * 0, values * 1e-20)
    return choices[random.integers(len(choices))].astype(np.float32)


def differing(encode: native.Quantizer, name: str, rounds: int = FUZZ_ROUNDS) -> list[str]:
    """Seeds of the fuzz whose bytes differ."""
    found = []
    for seed in range(rounds):
        random = np.random.default_rng(seed)
        n_cols = TYPES[name].block * int(random.integers(1, 6)) if TYPES[name].block > 1 else 32 * seed + 32
        rows = np.stack([nasty_row(random, n_cols) for _ in range(ROWS)])
        for importance in (None, nasty_importance(random, n_cols)):
            ours, theirs = both(encode, name, rows, importance)
            if ours.tobytes() != theirs.tobytes():
                found.append(f"seed {seed}, rows {np.flatnonzero((ours != theirs).any(1)).tolist()}")
    return found


def kernel(name: str, *flags: str) -> native.Quantizer:
    encode = native.bind(library(*flags), TYPES[name], encoder(TYPES[name].number))
    assert encode is not None
    return encode


@needs_compiler
@pytest.mark.parametrize("name", KERNELS)
def test_fuzz(cache: Path, name: str) -> None:
    assert not differing(kernel(name), name)


@needs_compiler
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("importance", [False, True])
def test_weights_like_a_models(cache: Path, name: str, importance: bool) -> None:
    """Many blocks: a difference in one of a thousand shows."""
    random = np.random.default_rng(5)
    rows = random.standard_normal((40, 5 * 512), np.float32) * np.float32(0.02)
    weights = random.random(rows.shape[1], np.float32) ** 4 if importance else None
    ours, theirs = both(kernel(name), name, rows, weights)
    assert (ours != theirs).sum() == 0


@needs_compiler
def test_every_half_float_and_what_lies_between(cache: Path) -> None:
    halves = np.arange(2**16, dtype=np.uint16).view(np.float16).astype(np.float32)
    halves = halves[np.isfinite(halves)]
    values = np.concatenate([halves, (halves[1:] + halves[:-1]) / 2])
    rows = np.concatenate([values, np.nextafter(values, np.float32(np.inf)), np.nextafter(values, -np.float32(np.inf))])
    for name in ("F16", "BF16"):
        ours, theirs = both(kernel(name), name, rows.reshape(1, -1), None)
        assert ours.tobytes() == theirs.tobytes()


# Every constant of llama.cpp's arithmetic, slightly wrong: each type uses one of them.
WRONG = (
    *("-DCOARSE_STEP=0.101f", "-DFINE_STEP=0.051f", "-DTURNS=2", "-DBELOW_HALF=0.5f", "-DLAST_MIDDLE=101.5f"),
    "-DTIES_TO_EVEN=0",
)
FUSED = ("-ffp-contract=fast",)


@needs_compiler
@pytest.mark.parametrize("name", KERNELS)
def test_a_wrong_kernel_is_found_out(cache: Path, name: str) -> None:
    assert proof.holds(kernel(name), TYPES[name], encoder(TYPES[name].number))
    assert not proof.holds(kernel(name, *WRONG), TYPES[name], encoder(TYPES[name].number))


needs_fma = pytest.mark.skipif("fma" not in build._processor(), reason="no fused multiply-add on this processor")


@needs_compiler
@needs_fma
@pytest.mark.parametrize("name", [name for name in KERNELS if name not in ("F16", "BF16", "Q8_0")])
def test_fused_multiply_adds_are_found_out(cache: Path, name: str) -> None:
    """What a compiler makes when it is not told otherwise: last bits, and a few blocks in a thousand, differ."""
    assert not proof.holds(kernel(name, *FUSED), TYPES[name], encoder(TYPES[name].number))


@needs_compiler
def test_a_wrong_type_goes_back_to_llama_cpp(cache: Path, fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    holds = proof.holds
    monkeypatch.setattr(proof, "holds", lambda encode, kind, ggml: kind.name != "Q4_K" and holds(encode, kind, ggml))
    assert native.quantizer(TYPES["Q4_K"], encoder(12)) is None
    assert native.quantizer(TYPES["Q8_0"], encoder(8)) is not None


@needs_compiler
@needs_fma
def test_other_arithmetic_turns_all_types_off_but_mere_rounding(
    cache: Path, fresh: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert proof.holds(kernel("Q8_0", *FUSED), TYPES["Q8_0"], encoder(8))
    fused = library(*FUSED)
    monkeypatch.setattr(build, "library", lambda: fused)
    assert native.quantizer(TYPES["Q8_0"], encoder(8)) is None
    assert native.quantizer(TYPES["F16"], encoder(1)) is not None


@needs_compiler
def test_rounding_is_proven_too(cache: Path, fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proof, "holds", lambda encode, kind, ggml: kind.name != "F16")
    assert native.quantizer(TYPES["F16"], encoder(1)) is None


def test_no_compiler(fresh: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert native.quantizer(TYPES["Q4_K"], encoder(12)) is None


def test_a_compiler_that_is_named_in_vain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    found = build.find_compiler()
    for wrong in ("gcc 'unclosed", "no-such-compiler -O2"):
        monkeypatch.setenv("CC", wrong)
        assert build.find_compiler() == found


def test_turned_off(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGELORA_NATIVE", "0")
    monkeypatch.setattr(build, "library", lambda: pytest.fail("built"))
    assert native.quantizer(TYPES["Q4_K"], encoder(12)) is None


def test_type_without_a_kernel(cache: Path, fresh: None) -> None:
    assert native.quantizer(TYPES["TQ1_0"], encoder(34)) is None


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in that writes what it was called with, and fails; its cache is empty."""
    script, calls = tmp_path / "cc", tmp_path / "calls"
    script.write_text(f'#!/bin/sh\necho "$@" >> {calls}\nexit 1\n')
    script.chmod(0o755)
    calls.touch()
    monkeypatch.setenv("CC", f"{script} --its-own")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return calls


def test_failed_build_is_silent_and_not_repeated(compiler: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert build.library() is None
    calls = compiler.read_text().splitlines()
    assert len(calls) == len(build.TUNING)
    assert all(call.startswith("--its-own ") for call in calls)
    assert build.library() is None
    assert compiler.read_text().splitlines() == calls
    assert capfd.readouterr() == ("", "")


def test_failed_build_is_tried_again_another_day(compiler: Path, tmp_path: Path) -> None:
    assert build.library() is None
    (marker,) = (tmp_path / "cache").rglob(build.FAILED)
    os.utime(marker, (0, 0))
    assert build.library() is None
    assert len(compiler.read_text().splitlines()) == 2 * len(build.TUNING)


SMALL_SOURCE = """
long long kquants_quantize(int type) { return type; }
int kquants_try(void) { return 0; }
"""


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A source that compiles at once, and an empty cache."""
    source, cache = tmp_path / "kquants.c", tmp_path / "cache"
    source.write_text(SMALL_SOURCE)
    monkeypatch.setattr(build, "SOURCE", source)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setattr(build.tempfile, "gettempdir", lambda: str(source))
    monkeypatch.delenv("CC", raising=False)
    return cache


def only_library(folder: Path) -> Path:
    (path,) = (path for path in folder.rglob("*") if path.is_file())
    return path


@needs_compiler
def test_cached_library_needs_no_second_build(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library()
    monkeypatch.setattr(build, "_build", lambda *arguments: pytest.fail("built again"))
    assert library().kquants_try() == 0


@needs_compiler
def test_another_source_or_flag_is_another_library(small: Path) -> None:
    library()
    library("-DANYTHING")
    build.SOURCE.write_text(SMALL_SOURCE + "/* changed */")
    library()
    assert len(list(small.rglob("*.so"))) == 3


@needs_compiler
@pytest.mark.parametrize("length", [0, 4096, -1])
def test_damaged_cache_file_is_built_again(small: Path, length: int) -> None:
    """In a process of its own: a library that this one has loaded must not change."""
    code = f"from pathlib import Path; from converters.native import build; build.SOURCE = Path({str(build.SOURCE)!r});"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def run(then: str) -> str:
        return subprocess.check_output([sys.executable, "-c", code + then], env=environment, text=True, timeout=60)

    run("build.library()")
    path = only_library(small)
    whole = path.read_bytes()
    path.write_bytes(whole[:length])
    assert run("print(build.library().kquants_try())").strip() == "0"
    assert only_library(small).read_bytes() == whole


@needs_compiler
@pytest.mark.parametrize("level", [0, 1, 2], ids=["file", "folder", "cache"])
def test_what_others_can_write_is_not_loaded(small: Path, monkeypatch: pytest.MonkeyPatch, level: int) -> None:
    library()
    path = only_library(small)
    loaded: list[Path] = []
    monkeypatch.setattr(build, "_load", loaded.append)
    build.library()
    assert loaded == [path]
    (path, *path.parents)[level].chmod(0o777)
    assert build.library() is None
    assert loaded == [path]


@needs_compiler
def test_cache_that_cannot_be_written(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library goes to a folder of the user's in the temporary directory."""
    small.touch()
    temporary = tmp_path / "tmp"
    monkeypatch.setattr(build.tempfile, "gettempdir", lambda: str(temporary))
    assert library().kquants_try() == 0
    folder = only_library(temporary).parents[1]
    assert folder.name.startswith("edgelora-kernels-")
    assert folder.stat().st_mode & 0o777 == 0o700


@needs_compiler
def test_library_that_ends_its_process_is_not_loaded(small: Path) -> None:
    build.SOURCE.write_text(SMALL_SOURCE.replace("return 0", "__builtin_trap()"))
    assert build.library() is None
    assert only_library(small).name == build.FAILED


@needs_compiler
def test_two_processes_at_once(small: Path) -> None:
    code = f"""
from pathlib import Path
from converters.native import build
build.SOURCE = Path({str(build.SOURCE)!r})
print(build.library().kquants_try())
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    children = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [child.communicate(timeout=60)[0].strip() for child in children] == ["0", "0"]
    left = [path for path in small.rglob("*") if path.is_file()]
    assert 1 <= len(left) <= 2
    assert {path.suffix for path in left} == {".so"}


@needs_compiler
def test_threads_share_one_proof(cache: Path, fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    proofs: list[str] = []
    holds = proof.holds
    monkeypatch.setattr(proof, "holds", lambda *arguments: proofs.append(arguments[1].name) or holds(*arguments))
    barrier = threading.Barrier(4)

    def first_use(_: int) -> native.Quantizer | None:
        barrier.wait()
        return native.quantizer(TYPES["Q6_K"], encoder(14))

    with ThreadPoolExecutor(4) as pool:
        found = set(pool.map(first_use, range(4)))
    assert proofs == [native.CANARY.name, "Q6_K"]
    assert len(found) == 1
    assert None not in found
