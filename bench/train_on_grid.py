"""Train what you ship: an adapter trained on a quantized base's own weights, beside one trained on the weights before.

    python -m bench.train_on_grid [--quants q2_k,q3_k_m] [--seeds 3] [--steps 120] [--rows 800] [--json FILE]

The bundled base and three datasets: its own two tasks, and intents of BANKING77 (../shared/data). Each adapter is
trained twice with one seed, alike but for the base: the checkpoint (float32), and the quantized GGUF. Both are then
converted, served on that GGUF by llama.cpp, and scored on rows that neither has seen: nats a token of the right reply,
and the share of replies that are the right one, greedily. Medians over seeds; about 15 minutes on 2 cores.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from converters.adapter import prepare_adapter
from converters.base import convert_base
from edgelora.contract import Contract
from edgelora.engine.engine import Engine
from edgelora.engine.stream import Request
from edgelora.train.recipe import Recipe
from edgelora.train.run import train

ROOT = Path(__file__).parents[1]
BASE = ROOT / "examples" / "tiny-base" / "fennick-2.6m"
TASKS = ROOT / "examples" / "data"
BANKING = ROOT.parent / "shared" / "data" / "datasets" / "banking77"
INTENTS = 20
SCORED = 150
CHECKPOINT = "checkpoint"


@dataclass(frozen=True)
class Row:
    prompt: str
    reply: str


@dataclass(frozen=True)
class Rows:
    """What one adapter learns, and what it is scored on."""

    name: str
    training: Sequence[Row]
    held_out: Sequence[Row]


@dataclass(frozen=True)
class Score:
    """Of one adapter on one base.

    Attributes:
        nats: mean -log p of a token of the right reply.
        right: share of greedy replies that are the right one.
    """

    nats: float
    right: float


@dataclass(frozen=True)
class Result:
    """Both adapters of one seed, served on one quantization."""

    data: str
    quant: str
    seed: int
    from_checkpoint: Score
    from_gguf: Score


def task(name: str) -> Rows:
    """One of the bundled base's own tasks."""

    def read(path: Path) -> list[Row]:
        turns = (json.loads(line)["messages"] for line in path.read_text(encoding="utf-8").splitlines())
        return [Row(user["content"], assistant["content"]) for user, assistant in turns]

    return Rows(name, read(TASKS / f"{name}.jsonl"), read(TASKS / f"{name}-eval.jsonl"))


def banking77() -> Rows:
    """The most frequent intents, by name."""
    tables = []
    for part in ("train", "test"):
        with open(BANKING / f"{part}.csv", encoding="utf-8", newline="") as file:
            tables.append([Row(row["text"], row["category"].replace("_", " ")) for row in csv.DictReader(file)])
    kept = {reply for reply, _ in Counter(row.reply for row in tables[0]).most_common(INTENTS)}
    training, test = ([row for row in table if row.reply in kept] for table in tables)
    return Rows("banking77", training, test)


DATA: Mapping[str, Callable[[], Rows]] = {
    "support": lambda: task("support"),
    "extract": lambda: task("extract"),
    "banking77": banking77,
}


def spread(rows: Sequence[Row], count: int) -> list[Row]:
    """So many of them, evenly: files are often sorted by their answers."""
    step = max(1, len(rows) // count)
    return list(rows[::step][:count])


def trained(base: Path, rows: Rows, seed: int, options: argparse.Namespace, folder: Path) -> Path:
    """An adapter of PEFT's, in `folder`."""
    data = folder.parent / f"{rows.name}.jsonl"
    kept = spread(rows.training, options.rows)
    lines = [json.dumps({"messages": [{"role": "user", "content": row.prompt},
                                      {"role": "assistant", "content": row.reply}]}) for row in kept]  # fmt: skip
    data.write_text("\n".join(lines) + "\n", encoding="utf-8")
    recipe = Recipe.from_mapping({
        "max_steps": options.steps, "seed": seed, "learning_rate": 4e-3, "batch_size": 16, "gradient_accumulation": 1,
        "dropout": 0.0, "max_length": 128, "rank": 8, "alpha": 16.0, "certificate_probes": 0, "save_steps": 10_000,
    })  # fmt: skip
    train(data, str(base), folder, recipe)
    return folder


def converted(folder: Path, base: Path) -> Path:
    """The adapter's GGUF for a base."""
    out = folder.with_suffix(".gguf")
    contract = Contract.load(folder)
    assert contract is not None
    with prepare_adapter(folder, base) as prepared:
        prepared.write(out, contract.to_metadata(), force=True)
    return out


def scored(base: Path, adapter: Path, rows: Sequence[Row]) -> Score:
    """On llama.cpp, as served."""
    losses: list[float] = []
    with Engine(base, adapters={"it": adapter}) as engine:
        requests = [Request(row.prompt, adapter="it", sampling={"temperature": 0.0, "max_tokens": 60}) for row in rows]
        for request, row in zip(requests, rows, strict=True):
            losses.extend(engine.score(request, row.reply).losses.tolist())
        replies = [completion.text for completion in engine.batch(requests)]
    right = sum(reply.strip() == row.reply.strip() for reply, row in zip(replies, rows, strict=True))
    return Score(statistics.fmean(losses), right / len(rows))


def measured(rows: Rows, options: argparse.Namespace, folder: Path) -> Iterator[Result]:
    """Every seed and quantization of one dataset; an adapter of the checkpoint serves for all quantizations."""
    held_out = spread(rows.held_out, SCORED)
    bases = {quant: convert_base(BASE, folder / f"{quant}.gguf", quant=quant).path for quant in options.quants}
    for seed in range(options.seeds):
        plain = trained(BASE, rows, seed, options, folder / f"{CHECKPOINT}-{seed}")
        for quant, base in bases.items():
            own = trained(base, rows, seed, options, folder / f"{quant}-{seed}")
            scores = [scored(base, converted(adapter, base), held_out) for adapter in (plain, own)]
            yield Result(rows.name, quant, seed, *scores)


def print_result(result: Result) -> None:
    print(f"  {result.data:10} {result.quant:8} seed {result.seed}: {line(result.from_checkpoint, result.from_gguf)}")


def line(checkpoint: Score, gguf: Score) -> str:
    nats = f"{checkpoint.nats:.4f} -> {gguf.nats:.4f} nats a token ({gguf.nats / checkpoint.nats - 1:+.1%})"
    return f"{nats}, {checkpoint.right:.1%} -> {gguf.right:.1%} right"


def print_medians(results: Sequence[Result]) -> None:
    print("\nmedians: trained on the checkpoint -> trained on the GGUF, both served on the GGUF")
    for key in dict.fromkeys((result.data, result.quant) for result in results):
        group = [result for result in results if (result.data, result.quant) == key]
        medians = [
            Score(statistics.median(score.nats for score in scores), statistics.median(score.right for score in scores))
            for scores in ([result.from_checkpoint for result in group], [result.from_gguf for result in group])
        ]
        better = sum(result.from_gguf.nats < result.from_checkpoint.nats for result in group)
        print(f"  {key[0]:10} {key[1]:8} {line(*medians)}; lower loss with {better} of {len(group)} seeds")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=lambda text: text.split(","), default=[*DATA])
    parser.add_argument("--quants", type=lambda text: text.split(","), default=["q2_k", "q3_k_m"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--rows", type=int, default=800)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    began, results = time.monotonic(), list[Result]()
    for name in options.data:
        rows = DATA[name]()
        with tempfile.TemporaryDirectory() as folder:
            for result in measured(rows, options, Path(folder)):
                print_result(result)
                sys.stdout.flush()
                results.append(result)
    print_medians(results)
    print(f"{time.monotonic() - began:.0f} s")
    if options.json:
        options.json.write_text(json.dumps([asdict(result) for result in results], indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
