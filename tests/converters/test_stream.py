"""Tensors as they stream: chunks and experts, values that are not finite, order, memory."""

from __future__ import annotations

import threading
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from converters.block_types import TYPES
from converters.errors import FormatError, UnsupportedError
from converters.quantize import quantize_rows
from converters.reader import read_header
from converters.stream import ALL_CHUNKS_BYTES, Progress, Source, peak_memory, write_tensors
from converters.writer import Part, TensorSpec, header_bytes

Floats = np.ndarray[Any, np.dtype[np.float32]]


def source(name: str, values: Floats, kind: str, **more: Any) -> Source:
    rows = values.reshape(-1, values.shape[-1])
    return Source(TensorSpec(name, values.shape, TYPES[kind]), lambda start, stop: rows[start:stop], **more)


def copied(name: str, values: np.ndarray[Any, Any], kind: str) -> Source:
    """A tensor that goes over as it is."""
    rows = np.ascontiguousarray(values).reshape(-1, values.shape[-1]).view(np.uint8)
    spec = TensorSpec(name, values.shape, TYPES[kind])
    return Source(spec, read_blocks=lambda start, stop: rows[start:stop])


def write(
    out: Path, *sources: Source, threads: int = 2, strict: bool = False, progress: Progress | None = None
) -> list[str]:
    specs = [item.spec for item in sources]
    part = Part(out, header_bytes({"general.architecture": "x"}, specs), specs)
    return write_tensors([part], sources, threads, progress, strict=strict)


def stored(path: Path, name: str) -> bytes:
    tensor = read_header(path).tensors[name]
    return path.read_bytes()[tensor.offset : tensor.offset + tensor.size_bytes]


def random(*shape: int) -> Floats:
    return np.random.default_rng(0).standard_normal(shape, np.float32)


@pytest.mark.parametrize("chunk_bytes", [1, 1024, 5 * 1024, 1 << 20])
@pytest.mark.parametrize("threads", [1, 3])
def test_a_chunk_never_holds_rows_of_two_experts(chunk_bytes: int, threads: int, tmp_path: Path) -> None:
    """Each expert is weighed with its own importance, however the rows are cut."""
    values, importance = random(5, 7, 256), np.random.default_rng(1).random((5, 256), np.float32)
    item = source("a", values, "Q4_K", importance=importance, chunk_bytes=chunk_bytes)
    write(tmp_path / "a.gguf", item, threads=threads)
    whole = np.concatenate([quantize_rows(values[n], TYPES["Q4_K"], importance[n]) for n in range(5)])
    assert stored(tmp_path / "a.gguf", "a") == whole.tobytes()
    of_one = quantize_rows(values.reshape(-1, 256), TYPES["Q4_K"], importance[0])
    assert of_one.tobytes() != whole.tobytes()


def test_one_importance_for_all_rows(tmp_path: Path) -> None:
    values, importance = random(9, 256), np.random.default_rng(1).random(256, np.float32)
    write(tmp_path / "a.gguf", source("a", values, "Q4_K", importance=[importance], chunk_bytes=2048))
    assert stored(tmp_path / "a.gguf", "a") == quantize_rows(values, TYPES["Q4_K"], importance).tobytes()
    assert stored(tmp_path / "a.gguf", "a") != quantize_rows(values, TYPES["Q4_K"]).tobytes()


def test_a_slow_first_chunk_does_not_lose_its_place(tmp_path: Path) -> None:
    values, others_read = random(64, 32), threading.Event()

    def read(start: int, stop: int) -> Floats:
        if start == 0:
            assert others_read.wait(10)
        else:
            others_read.set()
        return values[start:stop]

    write(tmp_path / "a.gguf", Source(TensorSpec("a", (64, 32), TYPES["F32"]), read, chunk_bytes=1024))
    assert stored(tmp_path / "a.gguf", "a") == values.tobytes()


def test_few_chunks_are_read_ahead(tmp_path: Path) -> None:
    """What is in memory does not grow with the tensor."""
    begun, written, most = [0], [0], [0]

    def read(start: int, stop: int) -> Floats:
        begun[0] += 1
        most[0] = max(most[0], begun[0] - written[0])
        return np.zeros((stop - start, 32), np.float32)

    def progress(done: int, total: int, what: str) -> None:
        written[0] += 1

    item = Source(TensorSpec("a", (2000, 32), TYPES["Q8_0"]), read, chunk_bytes=128)
    write(tmp_path / "a.gguf", item, threads=2, progress=progress)
    assert begun[0] == written[0] == 2000
    assert most[0] <= 2 + 2 + 1


def test_progress_counts_every_byte(tmp_path: Path) -> None:
    steps: list[tuple[int, int, str]] = []
    write(
        tmp_path / "a.gguf",
        source("a", random(9, 32), "Q8_0", chunk_bytes=256),
        copied("b", random(3), "F32"),
        progress=lambda *step: steps.append(step),
    )
    size = (tmp_path / "a.gguf").stat().st_size
    assert steps[-1] == (size, size, "b")
    assert [done for done, _, _ in steps] == sorted(done for done, _, _ in steps)
    assert {total for _, total, _ in steps} == {size}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_K", "Q6_K"])
def test_broken_values_are_noticed_or_refused(kind: str, value: float, tmp_path: Path) -> None:
    values = random(4, 256)
    values[2, 100] = value
    notices = write(tmp_path / "a.gguf", source("good", random(4, 256), kind), source("bad", values, kind))
    assert notices == ["bad: holds values that are NaN or infinite"]
    with pytest.raises(FormatError, match=r"(?s)nothing was written:.*bad: holds") as caught:
        write(tmp_path / "b.gguf", source("good", random(4, 256), kind), source("bad", values, kind), strict=True)
    assert "good" not in caught.value.message
    assert not (tmp_path / "b.gguf").exists()


@pytest.mark.parametrize("kind", ["IQ3_S", "IQ3_XXS"])
def test_where_llama_cpp_would_end_the_process_they_are_always_refused(kind: str, tmp_path: Path) -> None:
    values = random(4, 256)
    values[2, 100] = np.nan
    with pytest.raises(FormatError, match=f"which {kind} cannot hold"):
        write(tmp_path / "a.gguf", source("bad", values, kind))
    assert list(tmp_path.iterdir()) == []


def test_values_too_large_for_a_type_are_refused_by_the_tensors_name(tmp_path: Path) -> None:
    values = random(4, 256)
    values[1, 1] = 1e20
    with pytest.raises(UnsupportedError, match=r"^bad: IQ3_S cannot hold"):
        write(tmp_path / "a.gguf", source("bad", values, "IQ3_S"))
    assert list(tmp_path.iterdir()) == []


def test_copied_tensors_are_looked_at_too(tmp_path: Path) -> None:
    for kind, values, broken in (
        ("F32", np.ones((2, 32), np.float32), np.nan),
        ("F16", np.ones((2, 32), np.float16), np.inf),
        ("BF16", np.full((2, 32), 0x3F80, np.uint16), 0x7FC0),
    ):
        assert write(tmp_path / f"{kind}.gguf", copied("a", values, kind)) == []
        values[1, 31] = broken
        assert write(tmp_path / f"{kind}-2.gguf", copied("a", values, kind)) == [
            "a: holds values that are NaN or infinite"
        ]
        assert stored(tmp_path / f"{kind}-2.gguf", "a") == values.tobytes()


def test_values_too_large_for_f16(tmp_path: Path) -> None:
    values = random(4, 32)
    values[3, 3] = 7e4
    notices = write(tmp_path / "a.gguf", source("a", values, "F16"))
    assert notices == ["a: holds values too large for F16, which became infinite"]
    values[3, 3] = 65504
    assert write(tmp_path / "b.gguf", source("a", values, "F16")) == []
    assert write(tmp_path / "c.gguf", source("a", values * 1e10, "BF16")) == []


def test_memory_follows_chunks_and_not_tensors() -> None:
    def of(*shape: int) -> Source:
        return Source(TensorSpec("a", shape, TYPES["Q8_0"]), lambda start, stop: np.zeros(0, np.float32))

    small, large = peak_memory([of(4096, 4096)], 2), peak_memory([of(10**7, 4096)], 2)
    assert small == large
    assert peak_memory([of(4096, 4096)], 8) > small
    assert peak_memory([of(10**7, 4096)], 256) <= 3 * ALL_CHUNKS_BYTES  # many cores take smaller chunks
    assert peak_memory([], 2) == 0
    wide = of(2, 10**7)
    assert peak_memory([wide], 1) >= 10**7 * 4
    assert prod(wide.spec.shape) == 2 * 10**7
