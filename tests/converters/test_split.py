"""Bases in several files: cut as gguf's own writer does, joined again, and never half there."""

from __future__ import annotations

import os
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from converters.base import BaseReport, convert_base
from converters.base_file import BaseFile, read_base_header
from converters.block_types import TYPES
from converters.errors import ConversionError, FormatError, MissingFileError, OutputExistsError, UnsupportedError
from converters.fingerprint import fingerprint, fingerprint_of_header
from converters.options import QuantizeOptions
from converters.reader import read_header
from converters.requantize import requantize
from converters.split import parse_size, part_name, plan_parts
from converters.writer import TensorSpec, Typed, create_parts
from tests.converters import children
from tests.converters.folders import make_model

Floats = np.ndarray[Any, np.dtype[np.float32]]


def convert(folder: Path, out: Path, **options: Any) -> BaseReport:
    return convert_base(folder, out, options=QuantizeOptions("f16", **options))


def tensors(path: Path) -> dict[str, tuple[tuple[int, ...], str, bytes]]:
    """Shape, type and bytes, of all parts."""
    with BaseFile(path) as base:
        return {
            name: (tensor.shape, tensor.type_name, base.blocks(name).tobytes())
            for name, tensor in base.header.tensors.items()
        }


LIMITS: dict[str, dict[str, int]] = {
    "two tensors": {"max_tensors": 2},
    "one tensor": {"max_tensors": 1},
    "400 bytes": {"max_bytes": 400},
    "less than any tensor": {"max_bytes": 1},
    "both": {"max_bytes": 1000, "max_tensors": 3},
    "more than all": {"max_bytes": 10**6},
}


@pytest.mark.parametrize("limit", LIMITS)
def test_parts_are_cut_as_ggufs_writer_cuts_them(limit: str, tmp_path: Path) -> None:
    """The same tensors in the same order, by the writer that convert_hf_to_gguf.py uses: the same files."""
    rng = np.random.default_rng(0)
    arrays = {f"t{n}.weight": rng.standard_normal((n + 1, 10), np.float32) for n in range(7)}
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    theirs.mkdir()
    ours.mkdir()
    maximum = {
        "split_max_tensors": LIMITS[limit].get("max_tensors", 0),
        "split_max_size": LIMITS[limit].get("max_bytes", 0),
    }
    writer = gguf.GGUFWriter(theirs / "base.gguf", "llama", **maximum)
    writer.add_uint32("llama.block_count", 2)
    for name, array in arrays.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    specs = [TensorSpec(name, array.shape, TYPES["F32"]) for name, array in arrays.items()]
    metadata = {"general.architecture": "llama", "llama.block_count": 2}
    with create_parts(plan_parts(ours / "base.gguf", metadata, specs, **LIMITS[limit])) as file:
        for spec in specs:
            file.write(arrays[spec.name].tobytes())
            file.end_tensor(spec)
    assert contents(ours) == contents(theirs)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_every_part_is_within_its_limit(tmp_path: Path) -> None:
    report = convert(make_model(tmp_path / "model"), tmp_path / "base.gguf", split_max_bytes=8000)
    assert report.path == report.files[0] == tmp_path / f"base-00001-of-{len(report.files):05d}.gguf"
    assert report.size_bytes == sum(path.stat().st_size for path in report.files)
    sizes = [[tensor.size_bytes for tensor in read_header(path).tensors.values()] for path in report.files]
    assert all(sum(each) <= 8000 or len(each) == 1 for each in sizes)
    assert len(sizes) > 5


@pytest.mark.parametrize("quant", ["f16", "q4_0"])
def test_joined_parts_are_the_unsplit_file(quant: str, tmp_path: Path) -> None:
    folder, whole = make_model(tmp_path / "model"), tmp_path / "whole.gguf"
    convert_base(folder, whole, quant=quant)
    options = QuantizeOptions(quant, split_max_tensors=4)
    files = convert_base(folder, tmp_path / "split.gguf", options=options).files
    assert len(files) == 6
    for path in (files[0], files[3], files[-1]):
        header = read_base_header(path)
        assert tensors(path) == tensors(whole)
        assert list(header.tensors) == list(read_header(whole).tensors)
        assert header.path == files[0]
        assert header.files == files
        assert fingerprint(path) == fingerprint(whole)
    kept = {key: value for key, value in read_header(files[0]).metadata.items() if not key.startswith("split.")}
    assert kept == dict(read_header(whole).metadata)
    assert set(read_header(files[1]).metadata) == {"split.no", "split.count", "split.tensors.count"}


def test_a_part_alone_has_no_fingerprint(tmp_path: Path) -> None:
    files = convert(make_model(tmp_path / "model"), tmp_path / "split.gguf", split_max_tensors=9).files
    with pytest.raises(FormatError, match="one part of a split base"):
        fingerprint_of_header(read_header(files[0]))


def test_a_split_base_becomes_whole_and_split_again(tmp_path: Path) -> None:
    folder, whole = make_model(tmp_path / "model"), tmp_path / "whole.gguf"
    requantize(convert(folder, tmp_path / "f16.gguf").path, whole, QuantizeOptions("q8_0"))
    files = convert(folder, tmp_path / "split.gguf", split_max_tensors=5).files
    joined = requantize(files[2], tmp_path / "joined.gguf", QuantizeOptions("q8_0"))
    assert joined.path.read_bytes() == whole.read_bytes()
    again = requantize(files[0], tmp_path / "again.gguf", QuantizeOptions("q8_0", split_max_tensors=8))
    assert tensors(again.path) == tensors(whole)
    assert len(again.files) == 3


def test_what_fits_into_one_file_is_not_split(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    report = convert(folder, tmp_path / "base.gguf", split_max_bytes=10**9)
    assert report.files == (tmp_path / "base.gguf",)
    assert "not split" in report.notices[-1]
    convert(folder, tmp_path / "other.gguf")
    assert report.path.read_bytes() == (tmp_path / "other.gguf").read_bytes()


def test_another_alignment_is_in_every_part(tmp_path: Path) -> None:
    specs = [TensorSpec(f"t{n}.weight", (n + 1, 8), TYPES["F32"]) for n in range(4)]
    metadata = {"general.architecture": "llama", "general.alignment": 128}
    with create_parts(plan_parts(tmp_path / "a.gguf", metadata, specs, max_tensors=2, alignment=128)) as file:
        for spec in specs:
            file.write(bytes(spec.size_bytes))
            file.end_tensor(spec)
    header = read_base_header(tmp_path / "a-00002-of-00002.gguf")
    assert [tensor.offset % 128 for tensor in header.tensors.values()] == [0] * 4
    assert read_header(header.files[1]).metadata["general.alignment"] == 128


def test_sizes_and_names() -> None:
    sizes = {"2G": 2 * 10**9, "500M": 500 * 10**6, "7k": 7000, "123": 123, " 1g ": 10**9}
    assert {text: parse_size(text) for text in sizes} == sizes
    for text in ("", "0", "0G", "-1G", "1.5G", "2GB", "G", "two", "²"):
        with pytest.raises(UnsupportedError, match="no size"):
            parse_size(text)
    named = part_name(Path("x/a-b-00002-of-00010.gguf"))
    assert named is not None
    assert (named.stem, named.number, named.count) == ("a-b", 2, 10)
    assert named.path(1) == Path("x/a-b-00001-of-00010.gguf")
    for name in ("a.gguf", "a-1-of-2.gguf", "a-00001-of-00002.gguf.part", "-00001-of-00002.gguf"):
        assert part_name(Path(name)) is None


# Broken splits


def test_missing_parts_are_named(tmp_path: Path) -> None:
    files = convert(make_model(tmp_path / "model"), tmp_path / "split.gguf", split_max_tensors=5).files
    files[0].unlink()
    files[3].unlink()
    with pytest.raises(MissingFileError, match="2 of 5 parts are missing") as caught:
        read_base_header(files[1])
    assert files[0].name in caught.value.message
    assert files[3].name in caught.value.message


def rename(files: tuple[Path, ...]) -> Path:
    return files[0].rename(files[0].with_name("renamed.gguf"))


def rename_all(files: tuple[Path, ...]) -> Path:
    renamed = [path.rename(path.with_name(path.name.replace("00003.gguf", "00004.gguf"))) for path in files]
    return renamed[0]


def swap(files: tuple[Path, ...]) -> Path:
    files[1].rename(files[1].with_suffix(".x"))
    files[2].rename(files[1])
    files[1].with_suffix(".x").rename(files[2])
    return files[0]


def double(files: tuple[Path, ...]) -> Path:
    data = files[1].read_bytes()
    files[2].write_bytes(data.replace(number(1), number(2)))
    return files[2]


def of_another_model(files: tuple[Path, ...]) -> Path:
    other = convert(
        make_model(files[0].parent / "other", num_hidden_layers=3), files[0].parent / "o.gguf", split_max_tensors=11
    )
    shutil.copy(other.files[2], files[2])
    return files[0]


def wrong_total(files: tuple[Path, ...]) -> Path:
    total = b"split.tensors.count" + (5).to_bytes(4, "little")
    files[0].write_bytes(files[0].read_bytes().replace(total + bytes([21]), total + bytes([22])))
    return files[0]


def number(value: int) -> bytes:
    return b"split.no" + (2).to_bytes(4, "little") + value.to_bytes(2, "little")


BROKEN: dict[str, tuple[Callable[[tuple[Path, ...]], Path], str]] = {
    "renamed": (rename, "its name does not say which"),
    "another count in the names": (rename_all, "its name says 4 parts, split.count says 3"),
    "swapped": (swap, r"split\.no is 2, expected 1"),
    "a part twice": (double, "is in another part too"),
    "a part of another model": (of_another_model, "the parts have"),
    "a wrong total": (wrong_total, "split.tensors.count is 22, the parts have 21"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_parts_that_contradict_one_another(what: str, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    files = convert(folder, tmp_path / "split.gguf", split_max_tensors=8).files
    assert len(files) == 3
    assert len(read_base_header(files[0]).tensors) == 21
    change, message = BROKEN[what]
    path = change(files)
    with pytest.raises(FormatError, match=message):
        read_base_header(path)
    with pytest.raises(ConversionError):
        requantize(path, tmp_path / "out.gguf", QuantizeOptions("q8_0"))
    assert not (tmp_path / "out.gguf").exists()


# Writing: all parts or none


def test_parts_of_another_number_are_in_the_way(tmp_path: Path) -> None:
    folder, out = make_model(tmp_path / "model"), tmp_path / "base.gguf"
    old = convert(folder, out, split_max_tensors=4).files
    before = contents_of_files(tmp_path)
    with pytest.raises(OutputExistsError, match="6 parts of another split") as caught:
        convert(folder, out, split_max_tensors=9)
    assert "--force" in caught.value.hint
    assert contents_of_files(tmp_path) == before
    with pytest.raises(OutputExistsError, match="already exists"):
        convert(folder, out, split_max_tensors=4)
    other = convert(folder, tmp_path / "base-2.gguf", split_max_tensors=9).files  # another name
    new = convert_base(folder, out, options=QuantizeOptions("f16", split_max_tensors=9), force=True).files
    assert sorted(tmp_path.glob("*.gguf")) == sorted((*new, *other))
    assert not set(new) & set(old)


def contents_of_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("tensor", ["token_embd.weight", "blk.0.ffn_up.weight", "blk.1.ffn_up.weight"])
def test_an_interrupt_leaves_nothing(tensor: str, tmp_path: Path) -> None:
    def fail(done: int, total: int, what: str) -> None:
        if what == tensor:
            raise KeyboardInterrupt

    folder = make_model(tmp_path / "model")
    options = QuantizeOptions("f16", split_max_tensors=4)
    with pytest.raises(KeyboardInterrupt):
        convert_base(folder, tmp_path / "base.gguf", options=options, progress=fail)
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("failing", range(4))
def test_a_failure_while_names_are_given_leaves_nothing(
    failing: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = os.replace, []

    def replace(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == failing + 1:
            raise OSError(5, "Input/output error")
        real(source, target)

    monkeypatch.setattr("converters.writer.os.replace", replace)
    folder = make_model(tmp_path / "model")
    with pytest.raises(ConversionError, match="Input/output error"):
        convert(folder, tmp_path / "base.gguf", split_max_tensors=6)
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize(("options", "chunk"), [({}, 1), ({}, 12), ({"split_max_tensors": 4}, 14)])
def test_killed_while_writing_there_is_no_output(options: dict[str, int], chunk: int, tmp_path: Path) -> None:
    folder, out = make_model(tmp_path / "model"), tmp_path / "out"
    out.mkdir()
    children.kill_at_chunk(chunk, folder, out / "base.gguf", quant="q8_0", **options)
    assert list(out.iterdir()), "killed too early to prove anything"
    assert all(path.name.endswith(".partial") for path in out.iterdir())
    assert convert_base(folder, out / "base.gguf", options=QuantizeOptions("q8_0", **options)).path.is_file()


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("call", [1, 3, 4])
def test_killed_while_names_are_given_the_base_is_whole_or_not_there(call: int, old: bool, tmp_path: Path) -> None:
    """Also where an older base of that name is replaced: never parts of both."""
    code = """
        real, left = os.replace, int(sys.argv[4])
        def replace(source, target):
            global left
            left -= 1
            real(source, target)
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)
        os.replace = replace
        convert(force=True)
    """
    folder, out = make_model(tmp_path / "model"), tmp_path / "out"
    out.mkdir()
    if old:
        older = make_model(tmp_path / "older", seed=1)
        assert len(convert(older, out / "base.gguf", split_max_tensors=6).files) == 4
    done = children.run(code, folder, out / "base.gguf", str(call), quant="f16", split_max_tensors=6)
    assert done.returncode == -signal.SIGKILL, done.stderr
    found = sorted(out.glob("*.gguf"))
    if call == 4:
        assert len(found) == 4
        assert fingerprint(found[0]) == fingerprint(folder)
    else:
        with pytest.raises(MissingFileError, match=r"base-00001-of-00004\.gguf"):
            read_base_header(found[-1])


@pytest.mark.parametrize("limit", [300, 5_000, 12_000])
def test_a_full_disk_is_named_and_leaves_nothing(limit: int, tmp_path: Path) -> None:
    """The kernel refuses to let a file grow, as it does on a full disk; the first part or a later one meets it."""
    code = """
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[4]), resource.RLIM_INFINITY))
        try:
            convert()
        except ConversionError as error:
            print(type(error).__name__)
    """
    folder, out = make_model(tmp_path / "model"), tmp_path / "out"
    out.mkdir()
    options = {"quant": "f16", "split_max_tensors": 3}
    done = children.run(code, folder, out / "base.gguf", str(limit), **options)
    assert done.stdout == "DiskFullError\n", done.stderr
    assert list(out.iterdir()) == []
    done = children.run(code, folder, out / "base.gguf", str(resource.RLIM_INFINITY), **options)
    assert done.stdout == ""
    assert len(list(out.iterdir())) == 7


@pytest.mark.skipif(not children.can_mount(), reason="needs to mount a small disk")
@pytest.mark.parametrize("kib", [4, 40, 72])
@pytest.mark.parametrize("limit", [0, 3])
def test_a_disk_that_is_really_full(kib: int, limit: int, tmp_path: Path) -> None:
    """Somebody else fills it: the check before the work saw enough room."""
    code = """
        import shutil
        shutil.disk_usage = lambda path: type("Usage", (), {"free": 10**9})
        try:
            convert()
        except ConversionError as error:
            print(type(error).__name__)
        print(len(os.listdir(out.parent)))
    """
    folder, disk = make_model(tmp_path / "model"), tmp_path / "disk"
    disk.mkdir()
    options = {"quant": "f16", "split_max_tensors": limit}
    done = children.run_on_a_small_disk(code, kib, folder, disk / "base.gguf", **options)
    assert done.stdout == "DiskFullError\n0\n", done.stderr
    done = children.run_on_a_small_disk(code, 1000, folder, disk / "base.gguf", **options)
    assert done.stdout == ("7\n" if limit else "1\n"), done.stderr


def test_too_many_parts() -> None:
    specs = [TensorSpec(f"t{n}", (1,), TYPES["F32"]) for n in range(2**16)]
    with pytest.raises(UnsupportedError, match="65536 parts"):
        plan_parts(Path("a.gguf"), {"general.architecture": "llama"}, specs, max_tensors=1)


def test_the_types_of_the_keys(tmp_path: Path) -> None:
    specs = [TensorSpec(f"t{n}", (1,), TYPES["F32"]) for n in range(3)]
    parts = plan_parts(
        tmp_path / "a.gguf", {"general.architecture": "llama", "split.no": Typed("I", 7)}, specs, max_tensors=1
    )
    with create_parts(parts) as file:
        for spec in specs:
            file.write(bytes(4))
            file.end_tensor(spec)
    for index, part in enumerate(parts):
        fields = gguf.GGUFReader(part.path).fields
        kinds = {key: fields[key].types[0] for key in ("split.no", "split.count", "split.tensors.count")}
        kind = gguf.GGUFValueType
        assert kinds == {"split.no": kind.UINT16, "split.count": kind.UINT16, "split.tensors.count": kind.INT32}
        assert fields["split.no"].contents() == index
