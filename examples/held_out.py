"""Held-out rows, how they are scored, and what PEFT in torch answers to them: the reference for the GGUF path."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from logging import getLogger
from pathlib import Path


@dataclass(frozen=True)
class HeldOutRow:
    prompt: str
    answer: str


@dataclass(frozen=True)
class Task:
    """One adapter's job: its training file and recipe, and rows it has not seen."""

    name: str
    train_file: Path
    recipe_file: Path
    rows: tuple[HeldOutRow, ...]


def read_task(folder: Path, name: str) -> Task:
    rows = []
    for line in (folder / f"{name}-eval.jsonl").read_text(encoding="utf-8").splitlines():
        user, assistant = json.loads(line)["messages"]
        rows.append(HeldOutRow(user["content"], assistant["content"]))
    return Task(name, folder / f"{name}.jsonl", folder / f"{name}.toml", tuple(rows))


def accuracy(task: Task, replies: Sequence[str]) -> float:
    """Per cent of rows whose reply is the answer: the same text, or the same JSON object."""
    hits = sum(meaning(reply) == meaning(row.answer) for reply, row in zip(replies, task.rows, strict=True))
    return 100.0 * hits / len(task.rows)


def meaning(text: str) -> object:
    """A JSON object as its fields, so that spacing does not count; any other text as it is, trimmed."""
    try:
        value = json.loads(text)
    except ValueError:
        return text.strip()
    return value if isinstance(value, dict) else text.strip()


def ask_torch(
    base: Path,
    adapter: Path | None,
    prompts: Sequence[str],
    *,
    chat_template: str | None = None,
    max_new_tokens: int = 80,
) -> list[str]:
    """Greedy answers of HF, and PEFT where there is an adapter, in float32, as was trained.

    Args:
        chat_template: its source; None is the base's own.
    """
    getLogger("bitsandbytes").setLevel("ERROR")  # PEFT imports it where it is there; it misses an optional package
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")  # PEFT's, of transformers
    tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    model.eval()
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            chat_template=chat_template,
            tokenize=False,
            add_generation_prompt=True,
        )
        for prompt in prompts
    ]
    replies = {}
    shortest_first = sorted(range(len(texts)), key=lambda index: len(texts[index]))  # little padding in a batch
    for start in range(0, len(texts), 50):
        chosen = shortest_first[start : start + 50]
        batch = tokenizer([texts[i] for i in chosen], return_tensors="pt", padding=True, add_special_tokens=False)
        with torch.inference_mode():
            output = model.generate(**batch, do_sample=False, max_new_tokens=max_new_tokens)
        made = tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        replies |= dict(zip(chosen, made, strict=True))
    return [replies[index] for index in range(len(texts))]
