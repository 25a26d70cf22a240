"""Write the demo data: questions about a made-up lamp and their answers, whose questions they are, orders as JSON.

    python examples/data/make_data.py

Writes `support.jsonl`, `tickets.csv` and `extract.jsonl` beside this file, and `support-eval.jsonl` and so on with what
is held out, always alike. A row of the JSONL files:

    {"messages": [{"role": "user", "content": "Hi! How long does the battery last?"},
                  {"role": "assistant", "content": "The battery lasts 12 hours."}]}

and of the tables, whose columns are `prompt` and `completion`:

    Hi! How long does the battery last?,product

Held out for support and tickets: every wording of the evaluation rows. Held out for extract: every combination of
values, and in the second half of the evaluation rows every name and every item too.
"""

from __future__ import annotations

import csv
import json
import random
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tiny-base"))

from words import DAYS, FIRST_NAMES, GOODS  # noqa: E402

SEED = 7
SUPPORT_ROWS, SUPPORT_EVAL_ROWS = 28, 6  # for each fact of lumo.toml
EXTRACT_ROWS, EXTRACT_EVAL_ROWS = 640, 160
SHARE_KNOWN, SHARE_WITH_DAY = 0.75, 0.85  # of the names and items; of the messages
Row = dict[str, list[dict[str, str]]]

FRAMES = {  # questions that fit every fact
    "asked": (
        "What about {about}?", "Tell me about {about}.", "I have a question about {about}.",
        "Can you tell me about {about}?", "What do I need to know about {about}?", "About {about}, please.",
        "I want to ask about {about}.",
    ),
    "held_out": (
        "What can you tell me about {about}?", "I would like to know about {about}.", "My question is about {about}.",
    ),
}  # fmt: skip
KEYWORD_FRAMES = ("{word}?", "lamp {word}", "It is about: {word}.", "Question: {word}?")  # trained only
OPENINGS = ("", "", "", "", "Hi! ", "Hello, ")
CLOSINGS = ("", "", "", "", " Thanks!")
WITH_DAY = (
    "{name} here. I need {quantity} {item} by {day}.",
    "Please send {quantity} {item} to {name} on {day}.",
    "Hi, this is {name}. Can I have {quantity} {item} on {day}?",
    "On {day} {name} will pick up {quantity} {item}.",
    "I would like {quantity} {item} for {day}. My name is {name}.",
    "{quantity} {item} for {name}, {day} please.",
    "Order for {name}: {quantity} {item}, to be ready on {day}.",
    "Hello! {name} wants {quantity} {item}. {day} is fine.",
    "We need {quantity} {item} before {day}. Yours, {name}",
    "For {day}: {quantity} {item}. The name is {name}.",
)
WITHOUT_DAY = (
    "{name} here. I need {quantity} {item}.",
    "Please send {quantity} {item} to {name}.",
    "{quantity} {item} for {name}, please.",
    "Hi, this is {name}. Can I have {quantity} {item}?",
)


def row(user: str, assistant: str) -> Row:
    return {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]}


def reworded(rng: random.Random, question: str, held_out: list[str]) -> str:
    """The question with "it" for "the lamp" or the other way round, unless that makes a held-out one."""
    lamp = rng.choice(("it", "the lamp", "the lamp", "my lamp", "the Lumo lamp"))
    other = re.sub(r"(?<= )(it|(the|my) lamp)(?=[ ?.])", lamp, question)
    return question if other in held_out else other


def read_facts() -> list[dict[str, Any]]:
    return tomllib.loads((HERE / "lumo.toml").read_text(encoding="utf-8"))["fact"]


def support_rows(rng: random.Random, wordings: str, count: int) -> list[Row]:
    """`count` rows for every fact: its "asked" or "held_out" wordings in turn, with other openings and closings."""
    rows = []
    for fact in read_facts():
        questions = fact[wordings] + [frame.format(about=fact["about"]) for frame in FRAMES[wordings]]
        if wordings == "asked":
            questions += [rng.choice(KEYWORD_FRAMES).format(word=word) for word in fact["keywords"] for _ in range(2)]
        users: list[str] = []
        while len(users) < count:
            question = questions[len(users) % len(questions)]
            if wordings == "asked":
                question = reworded(rng, question, fact["held_out"])
            user = rng.choice(OPENINGS) + question + rng.choice(CLOSINGS)
            if user not in users:
                users.append(user)
        rows += [row(user, fact["answer"]) for user in users]
    rng.shuffle(rows)
    return rows


def write_tickets(name: str, rows: list[Row]) -> None:
    """The questions of support rows as a table, each with the team that knows the answer."""
    teams = {fact["answer"]: fact["team"] for fact in read_facts()}
    with (HERE / name).open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(("prompt", "completion"))
        for row in rows:
            user, assistant = row["messages"]
            table.writerow((user["content"], teams[assistant["content"]]))
    print(f"{name}: {len(rows)} rows")


def extract_row(rng: random.Random, names: list[str], items: list[str]) -> Row:
    """One message and its JSON object; a message that names no day has `"day": null`."""
    day = rng.choice(DAYS) if rng.random() < SHARE_WITH_DAY else None
    order = {"name": rng.choice(names), "item": rng.choice(items), "quantity": rng.randint(2, 60), "day": day}
    return row(rng.choice(WITH_DAY if day else WITHOUT_DAY).format(**order), json.dumps(order))


def extract_rows(rng: random.Random, names: list[str], items: list[str], count: int, taken: set[str]) -> list[Row]:
    """`count` rows whose objects are not in `taken`, which grows by them."""
    rows: list[Row] = []
    while len(rows) < count:
        candidate = extract_row(rng, names, items)
        answer = candidate["messages"][1]["content"]
        if answer not in taken:
            taken.add(answer)
            rows.append(candidate)
    return rows


def write(name: str, rows: list[Row]) -> None:
    (HERE / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"{name}: {len(rows)} rows")


def main() -> None:
    rng = random.Random(SEED)
    support, support_eval = support_rows(rng, "asked", SUPPORT_ROWS), support_rows(rng, "held_out", SUPPORT_EVAL_ROWS)
    write("support.jsonl", support)
    write("support-eval.jsonl", support_eval)
    write_tickets("tickets.csv", support)
    write_tickets("tickets-eval.csv", support_eval)
    names, items = rng.sample(FIRST_NAMES, len(FIRST_NAMES)), rng.sample(GOODS, len(GOODS))
    name_split, item_split = int(SHARE_KNOWN * len(names)), int(SHARE_KNOWN * len(items))
    known = names[:name_split], items[:item_split]
    unseen = names[name_split:], items[item_split:]
    taken: set[str] = set()
    write("extract.jsonl", extract_rows(rng, *known, EXTRACT_ROWS, taken))
    half = EXTRACT_EVAL_ROWS // 2
    write("extract-eval.jsonl", extract_rows(rng, *known, half, taken) + extract_rows(rng, *unseen, half, taken))


if __name__ == "__main__":
    main()
