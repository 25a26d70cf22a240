"""Dialogues in the small world the tiny base is taught: the harbour village of Fennick.

Everything is written here, from tables and templates, and is the same for the same seed. A conversation is a list of
OpenAI messages:

    [{"role": "user", "content": "Hi! My name is Tilda."},
     {"role": "assistant", "content": "Hello Tilda! Nice to meet you."},
     {"role": "user", "content": "Who is the baker?"},
     {"role": "assistant", "content": "The baker is Mara. She works at the bakery."}]

    python examples/tiny-base/world.py      (prints twenty of them)
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from itertools import islice

from exercises import add, count_out, make_list, pick_word, quote, read_note, repeat, write_note
from scene import Exchange, Scene
from talk import farewell, greeting, not_known, own_name, recall, small_talk, system_message, tell
from village import about_place, about_price, about_season, about_village, about_villager

Message = dict[str, str]

# Each kind of exchange and how often it is drawn. Facts are learned fast; copying is what takes the time.
TOPICS: dict[Callable[[Scene], Exchange], float] = {
    about_villager: 11, about_place: 5, about_price: 5, about_season: 2, about_village: 3,
    small_talk: 6, own_name: 1, tell: 8, recall: 8, not_known: 6,
    repeat: 16, quote: 9, count_out: 3, pick_word: 4, make_list: 5, read_note: 11, write_note: 6, add: 2,
}  # fmt: skip


def conversation(rng: random.Random) -> list[Message]:
    """One dialogue of 1 to 24 exchanges, mostly short; the long ones fill the context."""
    scene = Scene(rng)
    system = system_message(scene)
    exchanges = [greeting(scene)] if rng.random() < 0.35 else []
    length = rng.randint(10, 22) if rng.random() < 0.03 else min(10, 1 + int(rng.expovariate(0.45)))
    for topic in rng.choices(list(TOPICS), list(TOPICS.values()), k=length):
        exchanges.append(topic(scene))
    if rng.random() < 0.2:
        exchanges.append(farewell(scene))
    messages = [{"role": "system", "content": system}] if system else []
    for user, assistant in exchanges:
        messages += [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    return messages


def conversations(seed: int) -> Iterator[list[Message]]:
    """Endless dialogues, the same for the same seed."""
    rng = random.Random(seed)
    while True:
        yield conversation(rng)


if __name__ == "__main__":
    for messages in islice(conversations(1), 20):
        print("\n".join(f"{message['role']:>9}  {message['content']}" for message in messages), end="\n\n")
