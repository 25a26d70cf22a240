"""Importance matrix files: as other programs write them, the numbers llama-quantize takes from them, and bad ones."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from converters.errors import ConversionError, FormatError, MissingFileError, OutputExistsError, UnsupportedError
from converters.imatrix import Importance, ImportanceMatrix, quantize_metadata, read_imatrix, write_imatrix
from converters.writer import Typed

DENSE, EXPERTS = "blk.0.ffn_down.weight", "blk.0.ffn_down_exps.weight"
METADATA: Mapping[str, Any] = {"imatrix.datasets": ["wiki.txt"], "imatrix.chunk_count": 3, "imatrix.chunk_size": 64}


def floats(*values: float) -> np.ndarray[Any, Any]:
    return np.array(values, np.float32)


def gguf_file(
    path: Path,
    arrays: Mapping[str, np.ndarray[Any, Any]],
    metadata: Mapping[str, Any] = METADATA,
    kind: str = "imatrix",
) -> Path:
    """A file made by gguf's own writer."""
    writer = gguf.GGUFWriter(path, "")
    writer.kv_data[0].clear()
    writer.add_type(kind)
    for key, value in metadata.items():
        add = {list: writer.add_array, int: writer.add_uint32, float: writer.add_float32, bool: writer.add_bool}
        add.get(type(value), writer.add_string)(key, value)
    for name, array in arrays.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def dense(name: str = DENSE, sums: Sequence[float] = (1, 2, 3, 4), count: float = 2) -> dict[str, np.ndarray[Any, Any]]:
    return {f"{name}.in_sum2": floats(*sums), f"{name}.counts": floats(count)}


def legacy_bytes(
    entries: Sequence[tuple[str, int, Sequence[float]]], chunks: int | None = 5, dataset: str | None = "wiki.txt"
) -> bytes:
    data = struct.pack("<i", len(entries))
    for name, calls, values in entries:
        data += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", calls, len(values))
        data += struct.pack(f"<{len(values)}f", *values)
    data += b"" if chunks is None else struct.pack("<i", chunks)
    return data + (b"" if dataset is None else struct.pack("<i", len(dataset)) + dataset.encode())


def saved(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def matrix(**changes: Any) -> ImportanceMatrix:
    rng = np.random.default_rng(0)
    entries = {
        DENSE: Importance(rng.random(8, np.float32), np.array([96])),
        EXPERTS: Importance(rng.random(24, np.float32), np.array([5, 0, 91])),
    }
    return ImportanceMatrix(
        **{"entries": entries, "datasets": ("a.txt",), "chunk_count": 3, "chunk_size": 32, **changes}
    )


# What is read


def test_means_are_sums_over_counts_in_float32(tmp_path: Path) -> None:
    imatrix = read_imatrix(gguf_file(tmp_path / "a.gguf", dense(sums=(1, 2, 3, 10), count=3)))
    values = imatrix.means_for(DENSE, 4)
    assert values is not None
    assert values[0].dtype == np.float32
    np.testing.assert_array_equal([*values], floats(1, 2, 3, 10)[None] / np.float32(3))
    assert (imatrix.datasets, imatrix.chunk_count, imatrix.chunk_size) == (("wiki.txt",), 3, 64)


def test_experts_have_their_own_counts_and_unused_ones_get_ones(tmp_path: Path) -> None:
    arrays = {
        f"{EXPERTS}.in_sum2": floats(2, 4, 7, 9, 5, 10).reshape(3, 2),
        f"{EXPERTS}.counts": floats(2, 0, 5).reshape(3, 1),
    }
    values = read_imatrix(gguf_file(tmp_path / "a.gguf", arrays)).means_for(EXPERTS, 2, 3)
    assert values is not None
    assert [row.tolist() for row in values] == [[1, 2], [1, 1], [1, 2]]


def test_counts_are_rounded_as_lround_does(tmp_path: Path) -> None:
    for count, whole in ((2.5, 3), (3.5, 4), (2.4, 2)):
        imatrix = read_imatrix(gguf_file(tmp_path / f"{count}.gguf", dense(count=count)))
        assert imatrix.entries[DENSE].counts.tolist() == [whole]


def test_legacy_values_are_divided_by_the_calls(tmp_path: Path) -> None:
    data = legacy_bytes([("b", 4, (2, 6)), (DENSE, 3, (1, 2, 3, 10))])
    imatrix = read_imatrix(saved(tmp_path / "a.dat", data))
    np.testing.assert_array_equal(imatrix.means_for(DENSE, 4)[0], floats(1, 2, 3, 10) / np.float32(3))  # type: ignore[index]
    assert list(imatrix.entries) == ["b", DENSE]
    assert (imatrix.datasets, imatrix.chunk_count, imatrix.chunk_size) == (("wiki.txt",), 5, 0)


def test_legacy_without_calls_holds_the_means(tmp_path: Path) -> None:
    imatrix = read_imatrix(saved(tmp_path / "a.dat", legacy_bytes([(DENSE, 0, (1, 2))])))
    assert imatrix.means_for(DENSE, 2)[0].tolist() == [1, 2]  # type: ignore[index]


def test_oldest_legacy_files_end_after_their_values(tmp_path: Path) -> None:
    imatrix = read_imatrix(saved(tmp_path / "a.dat", legacy_bytes([(DENSE, 1, (1, 2))], None, None)))
    assert (imatrix.datasets, imatrix.chunk_count) == ((), 0)
    imatrix = read_imatrix(saved(tmp_path / "b.dat", legacy_bytes([(DENSE, 1, (1, 2))], 7, None)))
    assert (imatrix.datasets, imatrix.chunk_count) == ((), 7)


def test_other_models_matrix_is_refused_with_both_sizes() -> None:
    with pytest.raises(FormatError, match=r"8 values for blk\.0\.ffn_down\.weight, the tensor has 16 columns \(16\)"):
        matrix().means_for(DENSE, 16)
    with pytest.raises(FormatError, match=r"24 values for .* 8 columns for each of 4 experts \(32\)"):
        matrix().means_for(EXPERTS, 8, 4)


def test_tensors_without_importance() -> None:
    assert matrix().means_for("blk.1.ffn_down.weight", 8) is None
    for name in ("token_embd.weight", "per_layer_token_embd.weight"):
        embedding = matrix(entries={name: Importance(floats(1, 2), np.array([1]))})
        assert embedding.means_for(name, 8) is None  # llama-quantize lets these pass
        assert embedding.means_for(name, 2) is not None


def test_keys_of_the_quantized_file() -> None:
    assert quantize_metadata(matrix(), "x/imatrix.gguf") == {
        "quantize.imatrix.file": b"x/imatrix.gguf",
        "quantize.imatrix.dataset": b"a.txt",
        "quantize.imatrix.entries_count": Typed("I", 2),
        "quantize.imatrix.chunks_count": Typed("I", 3),
    }
    assert list(quantize_metadata(matrix(datasets=(), chunk_count=0), "i")) == [
        "quantize.imatrix.file",
        "quantize.imatrix.entries_count",
    ]
    assert quantize_metadata(matrix(), "y" * 200)["quantize.imatrix.file"] == b"y" * 127


# What is written


def test_what_is_written_is_read_again_and_by_gguf(tmp_path: Path) -> None:
    write_imatrix(tmp_path / "a.gguf", matrix())
    again = read_imatrix(tmp_path / "a.gguf")
    for name, entry in matrix().entries.items():
        np.testing.assert_array_equal(again.entries[name].sums, entry.sums)
        np.testing.assert_array_equal(again.entries[name].counts, entry.counts)
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    assert [(t.name, t.shape.tolist()) for t in reader.tensors] == [  # ggml's order: columns first
        (f"{DENSE}.in_sum2", [8]),
        (f"{DENSE}.counts", [1]),
        (f"{EXPERTS}.in_sum2", [8, 3]),
        (f"{EXPERTS}.counts", [1, 3]),
    ]
    np.testing.assert_array_equal(reader.tensors[2].data.reshape(-1), matrix().entries[EXPERTS].sums)
    found = {key: (field.types, field.contents()) for key, field in reader.fields.items() if not key.startswith("GGUF")}
    kinds = gguf.GGUFValueType
    assert found == {
        "general.type": ([kinds.STRING], "imatrix"),
        "imatrix.datasets": ([kinds.ARRAY, kinds.STRING], ["a.txt"]),
        "imatrix.chunk_count": ([kinds.UINT32], 3),
        "imatrix.chunk_size": ([kinds.UINT32], 32),
    }


def test_legacy_means_survive_as_gguf(tmp_path: Path) -> None:
    old = read_imatrix(saved(tmp_path / "a.dat", legacy_bytes([("z", 0, (1, 2)), (DENSE, 3, (1, 2, 3, 10))])))
    write_imatrix(tmp_path / "a.gguf", old)
    new = read_imatrix(tmp_path / "a.gguf")
    for name, entry in old.entries.items():
        np.testing.assert_array_equal(new.entries[name].means(), entry.means())


def test_nothing_is_overwritten_or_half_written(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    write_imatrix(path, matrix())
    with pytest.raises(OutputExistsError, match="already exists"):
        write_imatrix(path, matrix())
    write_imatrix(path, matrix(chunk_count=9), force=True)
    assert read_imatrix(path).chunk_count == 9
    with pytest.raises(UnsupportedError, match="names no dataset"):
        write_imatrix(tmp_path / "b.gguf", matrix(datasets=()))
    long = {"x" * 60: Importance(floats(1), np.array([1]))}
    with pytest.raises(UnsupportedError, match="longer than 63 bytes"):
        write_imatrix(tmp_path / "b.gguf", matrix(entries=long))
    assert [p.name for p in tmp_path.iterdir()] == ["a.gguf"]


# Bad files

Make = Callable[[Path], Path]


def a_gguf(changed: Mapping[str, Any] | None = None, **metadata: Any) -> Make:
    """A sound file but for these tensors and keys (`chunk_count` for imatrix.chunk_count); None leaves one out."""
    arrays = {k: v for k, v in {**dense(), **dense("blk.1.x"), **(changed or {})}.items() if v is not None}
    pairs = {**METADATA, **{f"imatrix.{k}": v for k, v in metadata.items()}}
    return lambda path: gguf_file(path, arrays, {k: v for k, v in pairs.items() if v is not None})


def a_legacy(entries: Sequence[tuple[str, int, Sequence[float]]], **options: Any) -> Make:
    return lambda path: saved(path, legacy_bytes(entries, **options))


def some_bytes(data: bytes) -> Make:
    return lambda path: saved(path, data)


BAD: Mapping[str, tuple[Make, str]] = {
    "NaN": (a_gguf({f"{DENSE}.in_sum2": floats(1, np.nan)}), f"{DENSE}: sums that are not finite"),
    "infinity": (a_gguf({f"{DENSE}.in_sum2": floats(1, np.inf)}), f"{DENSE}: sums that are not finite"),
    "negative sum": (a_gguf({f"{DENSE}.in_sum2": floats(1, -2)}), f"{DENSE}: a sum of squares of -2"),
    "negative count": (a_gguf({f"{DENSE}.counts": floats(-3)}), f"{DENSE}: counts that are no numbers"),
    "NaN count": (a_gguf({f"{DENSE}.counts": floats(np.nan)}), f"{DENSE}: counts that are no numbers"),
    "huge count": (a_gguf({f"{DENSE}.counts": floats(1e30)}), f"{DENSE}: counts that are no numbers"),
    "unshared": (a_gguf({f"{DENSE}.counts": floats(1, 1, 1)}), "4 sums cannot be shared by 3 counts"),
    "no counts": (a_gguf({f"{DENSE}.counts": None}), rf"{DENSE}\.counts is missing"),
    "no sums": (a_gguf({f"{DENSE}.in_sum2": None}), rf"{DENSE}\.in_sum2 is missing"),
    "float16": (a_gguf({f"{DENSE}.counts": np.ones(1, np.float16)}), "is F16, expected F32"),
    "no datasets": (a_gguf(datasets=None), r"imatrix\.datasets is missing"),
    "datasets": (a_gguf(datasets=3), r"imatrix\.datasets is not a list of strings"),
    "no chunk size": (a_gguf(chunk_size=None), r"imatrix\.chunk_size is missing"),
    "chunks": (a_gguf(chunk_count=1.5), r"imatrix\.chunk_count is 1\.5"),
    "many chunks": (a_gguf(chunk_count=2**31), r"imatrix\.chunk_count is 2147483648"),
    "a model": (lambda path: gguf_file(path, {"a": floats(1)}, {}, kind="model"), "of type 'model' without"),
    "text": (some_bytes(b"once upon a time there was a lamp"), "not an importance matrix"),
    "empty": (some_bytes(b""), "not an importance matrix"),
    "GGUF alone": (some_bytes(b"GGUF"), "too short"),
    "no entries": (some_bytes(legacy_bytes([])), "0 entries"),
    "legacy NaN": (a_legacy([(DENSE, 1, (np.nan,))]), "not finite"),
    "legacy negative calls": (a_legacy([(DENSE, -7, (1, 2))]), "counts that are no numbers"),
    "legacy twice": (a_legacy([(DENSE, 1, (1,)), (DENSE, 1, (1,))]), "occurs twice"),
    "legacy no values": (a_legacy([(DENSE, 1, ()), ("b", 1, (1, 2, 3))]), "has 0 values"),
    "legacy no name": (a_legacy([("", 1, (1, 2))]), "is called ''"),
    "legacy negative chunks": (a_legacy([(DENSE, 1, (1,))], chunks=-1), "-1 chunks"),
    "legacy tail": (some_bytes(legacy_bytes([(DENSE, 1, (1,))]) + b"!"), "1 bytes follow its end"),
    "legacy name length": (some_bytes(struct.pack("<ii", 1, -5) + bytes(40)), "is -5"),
    "legacy not UTF-8": (some_bytes(struct.pack("<ii", 1, 2) + b"\xff\xfe" + bytes(40)), "not UTF-8"),
    "legacy bomb": (
        some_bytes(struct.pack("<ii1sii", 1, 1, b"a", 1, 2**31 - 1) + bytes(40)),
        "needs 8589934588 bytes",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused_by_name(tmp_path: Path, name: str) -> None:
    make, message = BAD[name]
    with pytest.raises(FormatError, match=message):
        read_imatrix(make(tmp_path / "bad"))


def test_the_files_that_bad_ones_are_made_from_are_good(tmp_path: Path) -> None:
    assert list(read_imatrix(a_gguf()(tmp_path / "a")).entries) == [DENSE, "blk.1.x"]
    assert list(read_imatrix(a_legacy([(DENSE, 1, (1,))])(tmp_path / "b")).entries) == [DENSE]


def test_all_bad_tensors_are_named(tmp_path: Path) -> None:
    arrays = {**dense("a", (np.nan,)), **dense("b", (1,), -1), **dense("c", (1,))}
    with pytest.raises(FormatError, match=r"(?s)a: sums.*b: counts") as caught:
        read_imatrix(gguf_file(tmp_path / "a.gguf", arrays))
    assert "c:" not in caught.value.message


@pytest.mark.parametrize("make", [a_gguf(), a_legacy([(DENSE, 1, (1, 2)), ("b", 2, (3, 4))])], ids=["gguf", "legacy"])
def test_a_file_cut_anywhere_is_refused(tmp_path: Path, make: Make) -> None:
    whole = make(tmp_path / "whole")
    data = whole.read_bytes()
    entries = len(read_imatrix(whole).entries)
    used = len(data.rstrip(b"\0"))  # padding may be cut
    cut = tmp_path / "cut"
    for length in range(used):
        cut.write_bytes(data[:length])
        try:
            found = read_imatrix(cut)
        except ConversionError:
            continue
        # The oldest format ends after its values or its number of chunks.
        assert (len(found.entries), found.datasets) == (entries, ())
        assert length >= len(data) - len("wiki.txt") - 8


def test_flipped_bytes_never_end_in_another_error(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for make in (a_gguf(), a_legacy([(DENSE, 1, (1, 2)), ("b", 2, (3, 4))])):
        data = make(tmp_path / "whole").read_bytes()
        for _ in range(400):
            changed = bytearray(data)
            changed[rng.integers(len(data))] = rng.integers(256)
            (tmp_path / "flipped").write_bytes(changed)
            try:
                found = read_imatrix(tmp_path / "flipped")
            except ConversionError:
                continue
            assert all(np.isfinite(entry.means()).all() for entry in found.entries.values())


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="No such file"):
        read_imatrix(tmp_path / "none.gguf")
    with pytest.raises(MissingFileError, match="Is a directory"):
        read_imatrix(tmp_path)
