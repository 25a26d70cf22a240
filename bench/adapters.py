"""A PEFT adapter to a GGUF adapter: edgelora beside llama.cpp's own script, on the same files in the same run.

    python -m bench.adapters                    the 1.1B shape, rank 16 on all linear layers, five runs each
    python -m bench.adapters --shape tiny       a minute's look at the benchmark itself

Both get the model folder as the base and write F16. Wall time and peak resident memory are those of the processes, from
start to end; the tensors are then compared: ours are theirs with the scale in B.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

import numpy as np

from bench.convert import REFERENCE, WORK, Run, measured
from bench.shapes import SHAPES, Shape, make_model

RANK, ALPHA = 16, 32
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ROUNDING = 1e-3  # both files hold 16-bit floats; ours have the scale in them before they are rounded


def make_adapter(folder: Path, base: Path, shape: Shape) -> Path:
    """A PEFT folder with LoRA on every linear layer, float32, random."""
    from safetensors.numpy import save_file

    rng, tensors = np.random.default_rng(0), {}
    for name, size in shape.tensors():
        if name.split(".")[-2] in LINEAR:
            prefix = "base_model.model." + name.removesuffix(".weight")
            tensors[f"{prefix}.lora_A.weight"] = rng.standard_normal((RANK, size[1]), np.float32) * np.float32(0.02)
            tensors[f"{prefix}.lora_B.weight"] = rng.standard_normal((size[0], RANK), np.float32) * np.float32(0.02)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base), "r": RANK,
        "lora_alpha": ALPHA, "target_modules": [*LINEAR], "bias": "none",
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def ours(adapter: Path, base: Path, out: Path) -> Run:
    command = [
        sys.executable,
        "-m",
        "edgelora",
        "convert",
        str(adapter),
        "--base",
        str(base),
        "-o",
        str(out),
        "--force",
    ]
    return measured(command, EDGELORA_HOME=str(WORK / "store"))


def theirs(adapter: Path, base: Path, out: Path) -> Run:
    script = str(REFERENCE / "convert_lora_to_gguf.py")
    command = [sys.executable, script, str(adapter), "--base", str(base), "--outfile", str(out), "--outtype", "f16"]
    return measured(command)


def largest_difference(one: Path, other: Path) -> float:
    """Of any tensor of ours from theirs with the scale in B, relative to it."""
    from converters.gguf_adapter import open_gguf_adapter

    with open_gguf_adapter(one) as ours, open_gguf_adapter(other) as theirs:
        reference = {pair.tensor: pair for pair in theirs.pairs}
        assert set(reference) == {pair.tensor for pair in ours.pairs}
        return max(
            float(np.linalg.norm(a - b) / np.linalg.norm(b))
            for pair in ours.pairs
            for a, b in zip(pair.load(), reference[pair.tensor].load(), strict=True)
        )


def shown(name: str, runs: list[Run]) -> float:
    seconds = sorted(run.seconds for run in runs)
    median = statistics.median(seconds)
    peak = max(run.peak_mb for run in runs)
    print(f"{name:34} {median:6.2f} s  ({seconds[0]:.2f} to {seconds[-1]:.2f})  peak {peak:6.0f} MB")
    return median


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shape", choices=SHAPES, default="1.1b")
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    shape, base = SHAPES[arguments.shape], WORK / f"model-{arguments.shape}"
    if not (base / "config.json").is_file():
        make_model(base, shape)
    adapter = make_adapter(WORK / f"adapter-{arguments.shape}", base, shape)
    out, reference = WORK / "adapter.gguf", WORK / "adapter-reference.gguf"
    of_ours, of_theirs = [], []
    for _ in range(arguments.runs):
        of_ours.append(ours(adapter, base, out))
        of_theirs.append(theirs(adapter, base, reference))
    print(f"LoRA of rank {RANK} on all linear layers of the {arguments.shape} shape, F16, {arguments.runs} runs each")
    first = shown("edgelora convert", of_ours)
    second = shown("convert_lora_to_gguf.py", of_theirs)
    difference = largest_difference(out, reference)
    print(f"wall time: {first / second:.3f} of the reference's; largest difference of a tensor {difference:.1e}")
    if difference > ROUNDING:
        sys.exit("the tensors differ")


if __name__ == "__main__":
    main()
