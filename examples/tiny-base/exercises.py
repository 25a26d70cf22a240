"""Exercises in copying: repeat, quote, list, pick a word, read a note. They teach the model to look words up.

The base learns to copy JSON as it stands and to read it, never to make it from a message: that is left to an adapter.
"""

from __future__ import annotations

import json
import string

from scene import Exchange, Scene, ask, listing, say
from words import DAYS, FIRST_NAMES, GOODS, TOWNS, WORDS

SHAPES = (
    "{a}: {b}", "({a}, {b})", "[{a}, {b}, {c}]", "<{a}>{b}</{a}>", "{a}_{b} = {n};", "'{a}'", "{a}? {b}!", "#{n} {a}",
    "{a}/{b}/{c}", "{a}@{b}.{c}", "{{{a}: {n}}}", "{n} + {m}", "{n}.{m}", "{n}%", "{n}:{m}", "*{a}* {b}", "{a} & {b}",
    "{n}x {a}", "{a}; {b}; {c}", "{a}-{b}", "${n}", "~{a}~ | {b}",
)  # fmt: skip
ORDER_SENTENCES = (
    "$name [took|sold|carried|lost|found|bought] $count $item in $town on $day.",
    "On $day $name [brought|sent|gave|sold] $count $item to $town.",
    "In $town, $name has $count $item until $day.",
    "$count $item [went|came] to $town on $day with $name.",
    "$name [from|of] $town has $count $item. That was on $day.",
)
ORDER_QUESTIONS = {
    "name": "Who [was it|is it about|is named]?|Whose order is it?|What is the name?",
    "count": "How many?|How many [are there|things are there]?|What is the count?",
    "item": "What [thing|goods]?|[What is|Which is] the item?|What was it about?",
    "day": "[Which|What] day?|When[| is it]?|What is the day?",
    "town": "[Which|What] town?|Where[| to]?|What is the town?",
}


def word(scene: Scene) -> str:
    return scene.rng.choice(scene.rng.choice((WORDS, WORDS, GOODS, FIRST_NAMES, TOWNS)))


def code(scene: Scene) -> str:
    """A made-up identifier: `kx41`, `QW-7` or a number."""
    rng = scene.rng
    letters = "".join(rng.choice(string.ascii_lowercase) for _ in range(rng.randint(1, 3)))
    forms = (f"{letters}{rng.randint(1, 99)}", f"{letters.upper()}-{rng.randint(1, 999)}", str(rng.randint(1, 2000)))
    return rng.choice(forms)


def phrase(scene: Scene) -> str:
    rng = scene.rng
    words = [code(scene) if rng.random() < 0.12 else word(scene) for _ in range(rng.randint(1, 14))]
    return rng.choice((" ", " ", " ", ", ", " - ")).join(words)


def shape(scene: Scene) -> str:
    """Words and numbers between punctuation, as in notes, addresses and code."""
    rng = scene.rng
    words = {letter: word(scene) for letter in "abc"}
    return rng.choice(SHAPES).format(**words, n=rng.randint(0, 99), m=rng.randint(0, 99))


def thing(scene: Scene) -> str:
    rng = scene.rng
    good = rng.choice(GOODS)
    return rng.choice((word(scene), good, f"{rng.randint(2, 60)} {good}", str(rng.randint(0, 99))))


def order(scene: Scene) -> dict[str, str]:
    """A random order: who, how many, what, which day, where to."""
    rng = scene.rng
    return {
        "name": rng.choice(FIRST_NAMES),
        "count": str(rng.randint(2, 60)),
        "item": rng.choice(GOODS),
        "day": rng.choice(DAYS),
        "town": rng.choice(TOWNS),
    }


def sentence(scene: Scene) -> str:
    return say(scene.rng, scene.rng.choice(ORDER_SENTENCES), **order(scene))


def note_json(scene: Scene) -> str:
    fields = order(scene)
    keys = scene.rng.sample(list(fields), scene.rng.randint(1, 4))
    return json.dumps({key: int(fields[key]) if key == "count" else fields[key] for key in keys})


def repeat(scene: Scene) -> Exchange:
    text = scene.rng.choice((phrase, phrase, phrase, phrase, shape, note_json, sentence))(scene)
    quoted = f'"{text}"' if scene.rng.random() < 0.3 else text
    requests = "Repeat after me: $t|Say $t|Please say: $t|Copy this: $t|Say this again: $t|Write $t"
    return ask(scene.rng, requests, t=quoted), text


def count_out(scene: Scene) -> Exchange:
    text, times = word(scene), scene.rng.choice((2, 3))
    return f"Say {text} {'twice' if times == 2 else 'three times'}.", " ".join([text] * times)


def pick_word(scene: Scene) -> Exchange:
    words = [word(scene) for _ in range(scene.rng.randint(2, 6))]
    which, index = scene.rng.choice((("first", 0), ("last", -1)))
    return f"What is the {which} word of: {' '.join(words)}", words[index]


def make_list(scene: Scene) -> Exchange:
    items = [thing(scene) for _ in range(scene.rng.randint(2, 6))]
    requests = "Make a list of $t.|Write a list: $t|I need $t. Make a list.|List $t for me."
    return ask(scene.rng, requests, t=listing(items)), "\n".join(f"- {item}" for item in items)


def quote(scene: Scene) -> Exchange:
    """Put quotation marks around each thing, or take them off: the same words with other characters around them."""
    items = [thing(scene) for _ in range(scene.rng.randint(2, 10))]
    plain, quoted = listing(items), ", ".join(f'"{item}"' for item in items)
    if scene.rng.random() < 0.25:
        return ask(scene.rng, "No quotes: $t|Take off the quotes: $t", t=quoted), plain
    return ask(scene.rng, "Quote $t|Quote these: $t|Put quotes on $t", t=plain), quoted


def read_note(scene: Scene) -> Exchange:
    """One question about one note: a sentence, `key: value` lines, or JSON."""
    rng, fields = scene.rng, order(scene)
    keys = rng.sample(list(fields), rng.randint(2, 5))
    forms = {
        "lines": "\n".join(f"{key}: {fields[key]}" for key in keys) + "\n",
        "json": json.dumps({key: fields[key] for key in keys}) + " ",
        "sentence": say(rng, rng.choice(ORDER_SENTENCES), **fields) + " ",
    }
    form = rng.choice(("sentence", "sentence", "lines", "json"))
    key = rng.choice(list(fields) if form == "sentence" else keys)
    return forms[form] + ask(rng, ORDER_QUESTIONS[key]), fields[key]


def write_note(scene: Scene) -> Exchange:
    """A sentence or JSON in, `key: value` lines out."""
    rng, fields = scene.rng, order(scene)
    if rng.random() < 0.5:
        fields = {key: fields[key] for key in rng.sample(list(fields), rng.randint(2, 4))}
        text = json.dumps(fields)
    else:
        text = say(rng, rng.choice(ORDER_SENTENCES), **fields)
    requests = "Write a note: $t|Take a note. $t|Make a note of this: $t"
    return ask(rng, requests, t=text), "\n".join(f"{key}: {value}" for key, value in fields.items())


def add(scene: Scene) -> Exchange:
    one, two = scene.rng.randint(1, 9), scene.rng.randint(1, 9)
    questions = "What is $a plus $b?|How much is $a and $b?|$a + $b"
    return ask(scene.rng, questions, a=str(one), b=str(two)), f"{one} plus {two} is {one + two}."
