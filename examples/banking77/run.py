"""Banking77, a real data set: 77 intents of a bank's customers, learnt, converted and measured on its test split.

    python examples/banking77/run.py ../shared/data/datasets/banking77
    python examples/banking77/run.py ../shared/data/datasets/banking77 --base NAME=FOLDER

The folder has `train.csv` and `test.csv` with the columns `text` and `category`
(https://github.com/PolyAI-LDN/task-specific-datasets). Each base is trained twice, with LoRA and in all its weights,
by the recipe `BASE-METHOD.toml` beside this file. Everything is written under build/banking77/; a run that was stopped
goes on where it ended. The exit status is 1 if a GGUF file at F16 and torch differ by more than 0.5 points.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import shlex
import subprocess
import sys
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
EDGELORA = [str(Path(sys.executable).with_name("edgelora"))]
sys.path.insert(0, str(HERE.parent))

from held_out import ask_torch  # noqa: E402

from edgelora.evaluation.labels import Labels  # noqa: E402
from edgelora.template import resolve  # noqa: E402

BUNDLED = ROOT / "examples" / "tiny-base" / "fennick-2.6m"
QUANTS = ("f16", "q8_0", "q4_k_m")
METHODS = ("lora", "full")
VALIDATION = 10  # one in so many rows of the training split is not trained on: recipes were chosen on them
MAX_DIFFERENCE = 0.5  # points of accuracy between torch and the GGUF files at F16
MAX_TOKENS = 24  # the longest category has 21
PARALLEL = 32  # replies at the same time: they are short, and the models small
console = Console(markup=False, highlight=False)  # categories may hold brackets


@dataclass(frozen=True)
class Run:
    """A base and how it is trained; all files of a run lie in `folder`."""

    folder: Path
    base: Path
    base_name: str
    method: str

    @property
    def name(self) -> str:
        return f"{self.base_name}-{self.method}"

    @property
    def recipe(self) -> Path:
        return HERE / f"{self.name}.toml"

    @property
    def trained(self) -> Path:
        """What `edgelora train` leaves: an adapter, or a whole model."""
        return self.folder / self.name

    @property
    def adapter(self) -> Path:
        return self.folder / f"{self.name}.gguf"

    @property
    def is_adapter(self) -> bool:
        return self.method != "full"

    @property
    def chat_template(self) -> str | None:
        """Of a base that has none: what the recipe says."""
        return tomllib.loads(self.recipe.read_text(encoding="utf-8")).get("chat-template")

    def gguf(self, quant: str) -> Path:
        """What is served: the base at a quantization, or what it has become."""
        return self.folder / f"{self.base_name if self.is_adapter else self.name}-{quant}.gguf"


@dataclass(frozen=True)
class Result:
    """Accuracy in per cent: of the bare base at F16, and of what was trained, in torch and at each of `QUANTS`."""

    run: Run
    none: float | None
    torch: float
    gguf: tuple[float, ...]

    @property
    def passed(self) -> bool:
        return abs(self.gguf[0] - self.torch) <= MAX_DIFFERENCE


def main(arguments: list[str]) -> int:
    given = parse(arguments)
    started = time.perf_counter()
    prepare(given.data, given.out)
    results = []
    for base_name, base in given.base:
        for run in (Run(given.out, base, base_name, method) for method in given.method):
            train(run)
            convert(run)
            results.append(measure(run, given.split))
    show(results, given.split)
    console.print(f"\nDone in {time.perf_counter() - started:.0f} s.")
    return 0 if all(result.passed for result in results) else 1


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Learn and measure banking77.")
    parser.add_argument("data", type=Path, help="folder with train.csv and test.csv")
    parser.add_argument("--base", type=named_path, action="append", metavar="NAME=FOLDER", help="[the bundled one]")
    parser.add_argument("--method", choices=METHODS, action="append", help="[both]")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "banking77", help="[build/banking77]")
    parser.add_argument("--split", choices=("test", "validation"), default="test", help="what to measure on [test]")
    given = parser.parse_args(arguments)
    given.out = given.out.resolve()
    given.base = given.base or [(BUNDLED.name, BUNDLED)]
    given.method = given.method or METHODS
    return given


def named_path(text: str) -> tuple[str, Path]:
    name, _, path = text.partition("=")
    if not path:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=FOLDER")
    return name, Path(path).resolve()


def prepare(data: Path, folder: Path) -> None:
    """Write train.jsonl, validation.jsonl and test.jsonl. A row:

    {"prompt": "I am still waiting on my card?", "completion": "card arrival"}
    """
    train_rows, test_rows = read_split(data / "train.csv"), read_split(data / "test.csv")
    random.Random(0).shuffle(train_rows)
    n_validation = len(train_rows) // VALIDATION
    parts = {"validation": train_rows[:n_validation], "train": train_rows[n_validation:], "test": test_rows}
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in parts.items():
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def read_split(path: Path) -> list[dict[str, str]]:
    """Categories are written as words, which is how a model has met them: `card_arrival` is "card arrival"."""
    with path.open(encoding="utf-8", newline="") as file:
        return [
            {"prompt": row["text"].strip(), "completion": row["category"].replace("_", " ")}
            for row in csv.DictReader(file)
        ]


def train(run: Run) -> None:
    rows = run.folder / "train.jsonl"
    edgelora("train", rows, "--base", run.base, "-o", run.trained, "--config", run.recipe, "--resume")


def convert(run: Run) -> None:
    template = ["--chat-template", run.chat_template] if run.chat_template else []
    for quant in QUANTS:
        source = run.base if run.is_adapter else run.trained
        edgelora("convert", source, "--quant", quant, "-o", run.gguf(quant), *template, "--force")
    if run.is_adapter:
        edgelora("convert", run.trained, "-o", run.adapter, "--base", run.base, "--force")


def measure(run: Run, split: str) -> Result:
    """The test split, answered greedily by each quantization and by torch, and scored in the same way."""
    rows, folder = run.folder / f"{split}.jsonl", run.folder / "results" / f"{run.name}-{split}"
    first, *others = (run.gguf(quant) for quant in QUANTS)
    adapter = ["--adapter", run.adapter] if run.is_adapter else []
    against = [part for path in others for part in ("--against", path)]
    options = ["--metric", "accuracy", "--max-tokens", MAX_TOKENS, "--parallel", PARALLEL, "-o", folder]
    edgelora("eval", rows, "--base", first, *adapter, *against, *options)
    variants = json.loads((folder / "results.json").read_text(encoding="utf-8"))["variants"]
    trained, bare = [], []
    for variant in variants:
        has_adapter = variant["adapter"] != "none"
        (trained if has_adapter == run.is_adapter else bare).append(100.0 * variant["metrics"]["accuracy"]["value"])
    return Result(run, bare[0] if bare else None, torch_accuracy(run, rows), tuple(trained))


def torch_accuracy(run: Run, path: Path) -> float:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    labels = Labels([row["completion"] for row in rows])
    model, adapter = (run.base, run.trained) if run.is_adapter else (run.trained, None)
    template = resolve(run.chat_template) if run.chat_template else None
    prompts = [row["prompt"] for row in rows]
    replies = ask_torch(model, adapter, prompts, chat_template=template, max_new_tokens=MAX_TOKENS)
    hits = sum(labels.of(reply) == labels.of(row["completion"]) for reply, row in zip(replies, rows, strict=True))
    return 100.0 * hits / len(rows)


def show(results: list[Result], split: str) -> None:
    title = f"\nAccuracy on the {split} split, per cent of rows: PEFT in torch, and GGUF files"
    table = Table("base", "method", "no adapter", "torch", *(quant.upper() for quant in QUANTS), "", title=title)
    for result in results:
        figures = ("" if value is None else f"{value:.1f}" for value in (result.none, result.torch, *result.gguf))
        table.add_row(result.run.base_name, result.run.method, *figures, "ok" if result.passed else "MISSED")
    console.print(table)


def edgelora(*arguments: object) -> None:
    """Run one command as a user would, echoed; a failure ends the script with its exit code."""
    console.print(f"\n$ edgelora {shlex.join(shown(a) for a in arguments)}", style="bold", soft_wrap=True)
    result = subprocess.run([*EDGELORA, *map(shown, arguments)], cwd=ROOT)
    if result.returncode:
        sys.exit(result.returncode)


def shown(argument: object) -> str:
    inside = isinstance(argument, Path) and argument.is_relative_to(ROOT)
    return str(argument.relative_to(ROOT)) if inside else str(argument)  # type: ignore[union-attr]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
