"""Training beside a bare TRL script: the same base, rows, batches, precision and steps, in turn.

    python -m bench.train                 the 15M shape, five runs of each side
    python -m bench.train --shape tiny    a minute's look at the benchmark itself

Each run is a process of its own. Speed is that between the end of the first step and the end of the last, so that
loading is left out on both sides; what edgelora adds to a step (its checks, its metrics) is counted in. Ends with 1
where the median of ours is below `BAR` of theirs. Wants a calm machine, and prints the load it found; on a busy one,
the processor time of a step says more than the clock.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.convert import WORK
from bench.shapes import Shape, make_model

BAR = 0.95
STEPS, BATCH, LENGTH, RANK = 24, 4, 128, 8
SHAPES = {"tiny": Shape(128, 256, 2, 4, 2), "15m": Shape(288, 768, 6, 6, 6)}
WORDS = ("the", "lamp", "is", "red", "and", "green", "when", "night", "comes", "over", "hill", "river")


@dataclass(frozen=True)
class Speed:
    """Steps a second by the clock, and seconds of processor time that a step takes."""

    steps: float
    processor: float


class Clock:
    """Told of the end of every step."""

    def __init__(self) -> None:
        self.ends: list[tuple[float, float]] = []

    def tick(self) -> None:
        self.ends.append((time.monotonic(), time.process_time()))

    @property
    def speed(self) -> Speed:
        clock, processor = (last - first for first, last in zip(self.ends[0], self.ends[-1], strict=True))
        steps = len(self.ends) - 1
        return Speed(steps / clock, processor / steps)


def write_rows(path: Path) -> Path:
    """Prompts and completions of 60 to 100 words."""
    with open(path, "w", encoding="utf-8") as file:
        for row in range(STEPS * BATCH):
            said = " ".join(WORDS[(row * 5 + place) % len(WORDS)] for place in range(60 + row % 41))
            file.write(json.dumps({"prompt": "Say it.", "completion": " " + said}) + "\n")
    return path


def ours(data: Path, base: Path) -> Speed:
    from edgelora.train import Recipe, TrainStatus, train
    from edgelora.train.progress import SilentProgress

    clock = Clock()

    class Ticking(SilentProgress):
        def update(self, status: TrainStatus) -> None:
            clock.tick()

    recipe = Recipe(
        rank=RANK, alpha=2 * RANK, dropout=0.0, batch_size=BATCH, gradient_accumulation=1, max_length=LENGTH,
        max_steps=STEPS, logging_steps=10, save_steps=1000, certificate_probes=0,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        train(data, str(base), Path(folder) / "run", recipe, progress=Ticking())
    return clock.speed


def theirs(data: Path, base: Path) -> Speed:
    """What TRL's own documentation does: SFTTrainer, a dataset and a LoraConfig."""
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import LlamaTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    clock = Clock()

    class Ticking(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            clock.tick()

    with tempfile.TemporaryDirectory() as folder:
        settings = SFTConfig(
            output_dir=folder, per_device_train_batch_size=BATCH, gradient_accumulation_steps=1, max_length=LENGTH,
            max_steps=STEPS, learning_rate=2e-4, lr_scheduler_type="cosine", logging_steps=10, save_strategy="no",
            report_to="none", use_cpu=True, bf16=False, gradient_checkpointing=False, dataloader_pin_memory=False,
            model_init_kwargs={"dtype": "float32"}, disable_tqdm=True,
        )  # fmt: skip
        trainer = SFTTrainer(
            model=str(base), args=settings, processing_class=LlamaTokenizer.from_pretrained(base),
            train_dataset=load_dataset("json", data_files=str(data), split="train", cache_dir=folder),
            peft_config=LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM"),
            callbacks=[Ticking()],
        )  # fmt: skip
        trainer.train()
    return clock.speed


SIDES = {"ours": ours, "theirs": theirs}


def run_once(side: str, data: Path, base: Path) -> Speed:
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "bench.train", "--side", side, "--data", str(data), "--base", str(base)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"{side}: {done.stderr[-3000:]}")
    steps, processor = done.stdout.splitlines()[-1].split()
    return Speed(float(steps), float(processor))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="15m")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--base", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        speed = SIDES[options.side](options.data, options.base)
        print(speed.steps, speed.processor)
        return
    base = make_model(WORK / f"train-{options.shape}", SHAPES[options.shape])
    found: dict[str, list[Speed]] = {side: [] for side in SIDES}
    print(f"load before: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        data = write_rows(Path(folder) / "rows.jsonl")
        for number in range(options.runs):
            for side, speeds in found.items():
                speeds.append(run_once(side, data, base))
                print(f"run {number + 1}, {side}: {speeds[-1]}", flush=True)
    steps = {side: statistics.median(speed.steps for speed in speeds) for side, speeds in found.items()}
    costs = {side: statistics.median(speed.processor for speed in speeds) for side, speeds in found.items()}
    ratio = steps["ours"] / steps["theirs"]
    print(f"by the clock, steps/s: {steps['ours']:.3f} to {steps['theirs']:.3f}, {ratio:.3f} (bar {BAR})")
    print(f"by processor s a step: {costs['ours']:.3f} to {costs['theirs']:.3f}, {costs['theirs'] / costs['ours']:.3f}")
    print(f"load after: {os.getloadavg()[0]:.1f}")
    sys.exit(ratio < BAR)


if __name__ == "__main__":
    main()
