"""The plan of a dry run: exact where it says so, near where it estimates, and made without reading weights."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from converters import plan as plan_module
from converters.base import convert_base
from converters.errors import DiskFullError, OutputExistsError
from converters.options import QuantizeOptions
from converters.reader import read_header
from converters.requantize import requantize
from tests.converters import children
from tests.converters.folders import CONFIG, byte_level_tokenizer, make_model, write_json

MB = 1 << 20
# The estimate is what the process holds when it plans, and chunks in flight at their largest. Freed memory that the
# allocator keeps is not in it, and not all threads hold their largest chunk at once.
MEMORY_FACTOR = 1.5
# Two cores that other processes may take in between; the estimate is for deciding between minutes and hours.
TIME_FACTOR = 6


def sparse_model(folder: Path, dtype: str = "BF16", **config: Any) -> Path:
    """A Llama folder of any size that takes no disk: zeros that were never written."""
    folder.mkdir(parents=True)
    full = {**CONFIG, **config}
    write_json(folder / "config.json", full)
    byte_level_tokenizer().save(str(folder / "tokenizer.json"))
    d, ff, vocab = full["hidden_size"], full["intermediate_size"], full["vocab_size"]
    q, kv = full["num_attention_heads"] * full["head_dim"], full["num_key_value_heads"] * full["head_dim"]
    shapes = {"model.embed_tokens": (vocab, d), "model.norm": (d,), "lm_head": (vocab, d)}
    of_layer = {"self_attn.q_proj": (q, d), "self_attn.k_proj": (kv, d), "self_attn.v_proj": (kv, d)}
    of_layer |= {"self_attn.o_proj": (d, q), "mlp.gate_proj": (ff, d), "mlp.up_proj": (ff, d), "mlp.down_proj": (d, ff)}
    of_layer |= {"input_layernorm": (d,), "post_attention_layernorm": (d,)}
    for layer in range(full["num_hidden_layers"]):
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in of_layer.items()}
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        header[f"{name}.weight"] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return folder


SMALL = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 4, "num_attention_heads": 16}
SMALL |= {"num_key_value_heads": 4, "head_dim": 64}
LARGE = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
LARGE |= {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 32000}

PLAN = """
    counted = lambda: int(open("/proc/self/io").readline().split()[1])
    before = counted()
    report = convert(dry_run=True)
    print(json.dumps({**report.plan.to_dict(), "read": counted() - before, "measured": status("VmHWM")}))
"""
MEASURE = """
    report = convert()
    print(json.dumps({"measured": status("VmHWM"), "seconds": report.seconds, "size_bytes": report.size_bytes}))
"""


def child(code: str, source: Path, out: Path, **options: Any) -> dict[str, Any]:
    done = children.run(code, source, out, **options)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_the_table_is_what_will_be_written(tmp_path: Path) -> None:
    folder, out = make_model(tmp_path / "model"), tmp_path / "base.gguf"
    options = QuantizeOptions("q4_0", split_max_tensors=9)
    planned = convert_base(folder, out, options=options, dry_run=True)
    assert list(tmp_path.iterdir()) == [folder]
    written = convert_base(folder, out, options=options)
    plan = planned.plan
    assert plan is not None
    assert written.plan is None
    assert [file.path for file in plan.files] == list(written.files)
    for file in plan.files:
        assert file.size_bytes == file.path.stat().st_size
        assert file.n_tensors == len(read_header(file.path).tensors)
    assert plan.size_bytes == sum(file.size_bytes for file in plan.files) == written.size_bytes
    found = {name: it for file in plan.files for name, it in read_header(file.path).tensors.items()}
    rows = {row.name: (row.shape, row.type, row.size_bytes) for row in plan.tensors}
    assert rows == {name: (it.shape, it.type_name, it.size_bytes) for name, it in found.items()}
    assert {row.source for row in plan.tensors} == {"F32"}
    again = requantize(written.path, tmp_path / "again.gguf", QuantizeOptions("q4_0"), dry_run=True).plan
    assert again is not None
    assert {row.name: row.source for row in again.tensors} == {row.name: row.type for row in plan.tensors}


def test_it_is_json(tmp_path: Path) -> None:
    plan = convert_base(make_model(tmp_path / "model"), tmp_path / "base.gguf", dry_run=True).plan
    assert plan is not None
    read = json.loads(json.dumps(plan.to_dict()))
    assert read["files"] == [{"path": str(tmp_path / "base.gguf"), "size_bytes": plan.size_bytes, "n_tensors": 21}]
    assert read["tensors"][1] == {
        "name": "output_norm.weight", "shape": [32], "source": "F32", "type": "F32", "size_bytes": 128
    }  # fmt: skip
    assert read["fits"] is True


def test_too_small_a_disk_is_in_the_plan_and_refused_without_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    folder, out = make_model(tmp_path / "model"), tmp_path / "base.gguf"
    report = convert_base(folder, out, dry_run=True)
    assert report.plan is not None
    assert (report.plan.free_bytes, report.plan.fits) == (1000, False)
    assert "1,000 are free there" in report.notices[-1]
    with pytest.raises(DiskFullError):
        convert_base(folder, out)
    options = QuantizeOptions("f32", split_max_tensors=3)  # each part would fit where all do not
    with pytest.raises(DiskFullError):
        convert_base(folder, out, options=options)
    out.write_text("there")
    with pytest.raises(OutputExistsError):
        convert_base(folder, out, dry_run=True)


@pytest.mark.parametrize("quant", ["q4_k_m", "f16"])
def test_memory_is_near_the_estimate(quant: str, tmp_path: Path) -> None:
    folder = sparse_model(tmp_path / "model", **SMALL)
    planned = child(PLAN, folder, tmp_path / "a.gguf", quant=quant)
    real = child(MEASURE, folder, tmp_path / "a.gguf", quant=quant)
    assert planned["size_bytes"] == real["size_bytes"]
    ratio = real["measured"] / planned["peak_memory_bytes"]
    assert 1 / MEMORY_FACTOR < ratio < MEMORY_FACTOR, (real, planned["peak_memory_bytes"])
    again = child(PLAN, tmp_path / "a.gguf", tmp_path / "b.gguf", quant="q8_0", allow_requantize=True)
    real = child(MEASURE, tmp_path / "a.gguf", tmp_path / "b.gguf", quant="q8_0", allow_requantize=True)
    assert 1 / MEMORY_FACTOR < real["measured"] / again["peak_memory_bytes"] < MEMORY_FACTOR


def test_time_is_near_the_estimate(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", hidden_size=512, intermediate_size=1536, head_dim=128, num_hidden_layers=6)
    real = child(MEASURE, folder, tmp_path / "a.gguf", quant="q6_k")
    planned = child(PLAN, folder, tmp_path / "b.gguf", quant="q6_k")
    assert 1 / TIME_FACTOR < real["seconds"] / planned["seconds"] < TIME_FACTOR, (real, planned["seconds"])


def test_a_70b_model_fits_a_laptop_with_8_gb(tmp_path: Path) -> None:
    """On paper: 141 GB of weights, planned without reading them, in the memory of a small model."""
    folder = sparse_model(tmp_path / "model", **LARGE)
    weights = (folder / "model.safetensors").stat().st_size
    started = time.monotonic()
    plan = child(PLAN, folder, tmp_path / "a.gguf", quant="q4_k_m")
    assert 135e9 < weights < 145e9
    assert 40e9 < plan["size_bytes"] < 44e9
    assert plan["peak_memory_bytes"] < 700 * MB
    assert plan["measured"] < 500 * MB
    # norms for the fingerprint, and the sample of the read speed
    assert plan["read"] < plan_module.READ_SAMPLE_BYTES + 24 * MB
    assert plan["seconds"] > 60
    assert len(plan["tensors"]) == 723
    assert time.monotonic() - started < 30


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """The twin of the estimate: four times the layers, the same peak."""
    peaks = []
    for layers in (2, 8):
        folder = sparse_model(tmp_path / f"{layers}", **{**SMALL, "num_hidden_layers": layers})
        peaks.append(child(MEASURE, folder, tmp_path / f"{layers}.gguf", quant="q8_0")["measured"])
    assert abs(peaks[1] - peaks[0]) < 20 * MB  # a file four times as large has 60 MB more
