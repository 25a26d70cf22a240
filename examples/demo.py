"""The main job, end to end, on the bundled tiny base: train two adapters, convert, chat, work through a batch, measure.

    make demo                      (or: python examples/demo.py)

Everything it writes is under build/demo/. It runs the same commands you would type, and ends with a table and an honest
exit status: 1 if an adapter does not beat the bare base by 50 points, or if the GGUF adapter on the Q8_0 base and the
PEFT adapter in torch differ by more than 2 points on held-out rows.
"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from held_out import Task, accuracy, ask_torch, read_task
from rich.console import Console
from rich.table import Table

from edgelora import Engine

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
BASE = EXAMPLES / "tiny-base" / "fennick-2.6m"
OUT = ROOT / "build" / "demo"
EDGELORA = [str(Path(sys.executable).with_name("edgelora"))]

MIN_GAIN, MAX_DIFFERENCE = 50.0, 2.0  # points of held-out accuracy
console = Console(markup=False, highlight=False)  # replies may hold brackets


@dataclass(frozen=True)
class Result:
    """Held-out accuracy in percent, and where it was measured."""

    task: Task
    none: float
    torch: float
    gguf: float

    @property
    def passed(self) -> bool:
        return self.gguf - self.none >= MIN_GAIN and abs(self.gguf - self.torch) <= MAX_DIFFERENCE


def main() -> int:
    started = time.perf_counter()
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    tasks = [read_task(EXAMPLES / "data", name) for name in ("support", "extract")]
    for task in tasks:
        folder = OUT / f"{task.name}-peft"
        edgelora("train", task.train_file, "--base", BASE, "-o", folder, "--config", task.recipe_file)
    edgelora("convert", BASE, "--quant", "q8_0", "-o", OUT / "base-q8_0.gguf")
    for task in tasks:
        edgelora("convert", OUT / f"{task.name}-peft", "-o", OUT / f"{task.name}.gguf")
    show_replies(tasks)
    run_batch(tasks)
    results = measure(tasks)
    show_results(results)
    seconds = time.perf_counter() - started
    console.print(f"\nDone in {seconds:.0f} s. Talk to it: edgelora chat --adapter {shown(OUT / 'support.gguf')}")
    return 0 if all(result.passed for result in results) else 1


def edgelora(*arguments: object) -> None:
    """Run one command as a user would, echoed; a failure ends the demo with its exit code."""
    console.print(f"\n$ edgelora {shlex.join(shown(a) for a in arguments)}", style="bold", soft_wrap=True)
    result = subprocess.run([*EDGELORA, *map(shown, arguments)], cwd=ROOT)
    if result.returncode:
        sys.exit(result.returncode)


def shown(argument: object) -> str:
    return str(argument.relative_to(ROOT)) if isinstance(argument, Path) else str(argument)


def adapter_options(tasks: list[Task]) -> list[object]:
    return [part for task in tasks for part in ("--adapter", OUT / f"{task.name}.gguf")]


def show_replies(tasks: list[Task]) -> None:
    """A prompt of each kind, answered with no adapter and with each."""
    columns = ["none", *(task.name for task in tasks)]
    table = Table("prompt", *columns, title="\nOne base in memory, an adapter a request", show_lines=True)
    with open_engine(tasks) as engine:
        for prompt in ("Hello!", *(task.rows[0].prompt for task in tasks)):
            table.add_row(prompt, *(engine.chat(prompt, adapter=name, sampling=GREEDY).text for name in columns))
    console.print(table)


def run_batch(tasks: list[Task]) -> None:
    """A small file whose rows name different adapters."""
    rows = [
        {"id": f"{task.name}-{index}", "prompt": row.prompt, "adapter": task.name}
        for index in range(6)
        for task in tasks
        for row in [task.rows[index]]
    ]
    rows.append({"id": "plain", "prompt": "Hello!", "adapter": "none"})
    path = OUT / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    options = [*adapter_options(tasks), "--temperature", "0", "--max-tokens", "80"]
    edgelora("batch", path, "-o", OUT / "replies.jsonl", *options)


GREEDY = {"temperature": 0.0, "max_tokens": 80}


def open_engine(tasks: list[Task]) -> Engine:
    return Engine(OUT / "base-q8_0.gguf", adapters={task.name: OUT / f"{task.name}.gguf" for task in tasks})


def measure(tasks: list[Task]) -> list[Result]:
    results = []
    with open_engine(tasks) as engine:
        for task in tasks:
            replies = {
                name: [engine.chat(row.prompt, adapter=name, sampling=GREEDY).text for row in task.rows]
                for name in ("none", task.name)
            }
            in_torch = ask_torch(BASE, OUT / f"{task.name}-peft", [row.prompt for row in task.rows])
            scores = [accuracy(task, answers) for answers in (replies["none"], in_torch, replies[task.name])]
            results.append(Result(task, *scores))
    return results


def show_results(results: list[Result]) -> None:
    title = "\nHeld-out accuracy, per cent of rows answered exactly"
    table = Table("adapter", "rows", "no adapter", "PEFT in torch", "GGUF on Q8_0", "", title=title)
    for result in results:
        verdict = "ok" if result.passed else "MISSED"
        figures = (f"{value:.1f}" for value in (result.none, result.torch, result.gguf))
        table.add_row(result.task.name, str(len(result.task.rows)), *figures, verdict)
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
