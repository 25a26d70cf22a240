"""The small world the tiny base is taught: the harbour village of Fennick, and dialogues about it.

Everything is written here, from tables and templates, and is the same for the same seed. A conversation is a list of OpenAI messages:

    [{"role": "user", "content": "Hi! My name is Tilda."},
     {"role": "assistant", "content": "Hello Tilda! Nice to meet you."},
     {"role": "user", "content": "Who is the baker?"},
     {"role": "assistant", "content": "The baker is Mara. She works at the bakery."}]

Templates hold choices in square brackets, `[Hi|Hello], $name!`, and values after a dollar sign.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from words import COLOURS, DAYS, FIRST_NAMES, GOODS, PET_NAMES, TOWNS, WORDS

Message = dict[str, str]
Exchange = tuple[str, str]  # what the user says, what the assistant answers


class Villager(NamedTuple):
    """One person of Fennick and what can be asked about them."""

    name: str
    she: bool
    job: str
    place: str
    pet: str
    pet_name: str
    likes: str


class Shop(NamedTuple):
    """One place of Fennick: where it stands, when it opens, and what it sells with prices in coins."""

    where: str
    opens: str
    goods: dict[str, int]


VILLAGERS = (
    Villager("Mara", True, "baker", "bakery", "cat", "Soot", "plum cake"),
    Villager("Joss", False, "fisherman", "pier", "dog", "Salt", "fish soup"),
    Villager("Edda", True, "smith", "forge", "goat", "Nettle", "strong tea"),
    Villager("Bram", False, "miller", "mill", "donkey", "Biscuit", "fresh bread"),
    Villager("Wren", True, "teacher", "school", "rabbit", "Clover", "old maps"),
    Villager("Odo", False, "ferryman", "ferry", "parrot", "Captain", "long songs"),
    Villager("Hale", False, "doctor", "clinic", "turtle", "Button", "quiet evenings"),
    Villager("Tess", True, "weaver", "loom house", "sheep", "Cotton", "bright colours"),
    Villager("Nils", False, "lamp keeper", "lighthouse", "owl", "Moth", "night walks"),
    Villager("Ivy", True, "gardener", "garden", "hen", "Pepper", "roses"),
    Villager("Karl", False, "innkeeper", "inn", "horse", "Thunder", "card games"),
    Villager("Runa", True, "boat builder", "boatyard", "duck", "Plank", "the smell of wood"),
)
PLACES = {
    "bakery": Shop("next to the well", "six", {"bread": 4, "rolls": 2, "plum cake": 7}),
    "pier": Shop("behind the market", "five", {"herring": 3, "crab": 9}),
    "forge": Shop("at the end of Iron Lane", "eight", {"nails": 1, "horseshoes": 6, "knives": 12}),
    "mill": Shop("on the hill", "seven", {"flour": 5, "oats": 3}),
    "school": Shop("beside the church", "nine", {}),
    "ferry": Shop("at the east landing", "seven", {"tickets": 8}),
    "clinic": Shop("on Bell Street", "nine", {"bandages": 2, "cough syrup": 6}),
    "loom house": Shop("by the river", "ten", {"scarves": 11, "blankets": 15}),
    "lighthouse": Shop("on the north rock", "noon", {}),
    "garden": Shop("behind the school", "eight", {"apples": 1, "roses": 4, "honey": 10}),
    "inn": Shop("on the square", "four", {"soup": 5, "cider": 3}),
    "boatyard": Shop("past the lighthouse", "eight", {"rope": 6, "oars": 14}),
}
SEASONS = {
    "spring": "rainy and mild",
    "summer": "warm and bright",
    "autumn": "windy and grey",
    "winter": "cold and snowy",
}
FESTIVALS = {"spring": "the Seed Fair", "summer": "the Boat Race", "autumn": "Lantern Night", "winter": "the Ice Supper"}
VILLAGE_FACTS = (
    ("[What is|What's] [this village|this place|the village] called?|[Where am I|Where are we]?", "This village is called Fennick."),
    ("How many people live [here|in Fennick]?|Is Fennick [big|large]?", "About two hundred people live in Fennick."),
    ("[What is|Tell me about] Fennick[?|.]", "Fennick is a small village with a harbour."),
    ("Where does the ferry go?|Where can the ferry take me?", "The ferry goes to Olm, across the bay."),
    ("How long does the ferry take?|Is the ferry [fast|slow]?", "The ferry takes one hour."),
    ("[When|What day] is market day?|When is the market?", "Market day is Saturday."),
    ("Who [runs|leads] [the village|Fennick]?|Who is the mayor?", "Fennick has no mayor. The villagers meet at the inn."),
    ("What is the river called?|[What is|What's] the name of the river?", "The river is called the Fenn."),
    ("What can I do [here|in Fennick]?|What is there to see?", "You can visit the lighthouse, take the ferry or eat plum cake."),
    ("Where can I sleep?|Is there a place to stay?|I need a room for the night.", "You can sleep at the inn on the square."),
)
SMALL_TALK = (
    ("How are you[| today]?|How is it going?|How do you do?", "I am [well|fine], thank you. How are you?"),
    ("I am [fine|well|good][, thanks|| too].", "That is good to hear."),
    ("I am [tired|sad|a bit tired|not well].", "I am sorry to hear that. Maybe a warm soup at the inn will help."),
    ("[Thank you|Thanks][!|.| very much.| a lot!]", "You are welcome!"),
    ("Tell me a joke.|Do you know a joke?", "Why did the crab cross the pier? To get to the other tide!"),
    ("Can you help me?|I need [some |]help.", "Of course. What do you need?"),
    ("What can you do?|How can you help[ me|]?", "I can tell you about Fennick and its people."),
    ("Are you [real|human|a person]?", "No, I am a very small model. But I like to chat."),
    ("Do you like [music|songs]?", "Yes, I like the songs of Odo the ferryman."),
    ("What do you like?|Do you have a hobby?", "I like the sea and a good story."),
    ("Tell me a story.|Do you know a story?", "One night the sea was wild. Nils lit the lamp, and every boat came home."),
    ("That is [nice|great|good|lovely].|[Nice|Great|Good|Lovely]!", "I am glad you think so."),
    ("[OK|Okay|I see|Right|Fine].", "Is there anything else you want to know?"),
    ("[Yes|Yes, please|Sure].", "Good. What would you like to know?"),
    ("[No|No, thanks|No, thank you].", "All right. I am here if you need me."),
    ("[Sorry|I am sorry|Excuse me].", "That is all right."),
)
GREETINGS = ("Hello", "Hi", "Hey", "Good morning", "Good evening", "Good day", "Hi there", "Hello there")
UNKNOWN = "I do not know about that. Ask me about Fennick."


def say(rng: random.Random, template: str, **values: str) -> str:
    """Pick one choice of every bracket, innermost first, then put the values in."""
    while match := re.search(r"\[([^\[\]]*)\]", template):
        template = template[: match.start()] + rng.choice(match[1].split("|")) + template[match.end() :]
    return re.sub(r"\$([a-z_]+)", lambda found: values[found[1]], template)


def ask(rng: random.Random, alternatives: str, **values: str) -> str:
    """Pick one of the alternatives written `first|[second|third] way?`, splitting only outside brackets."""
    depth, parts = 0, [""]
    for character in alternatives:
        depth += {"[": 1, "]": -1}.get(character, 0)
        if character == "|" and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return say(rng, rng.choice(parts), **values)


def listing(items: list[str]) -> str:
    """`a, b and c`."""
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]


def article(noun: str) -> str:
    return "an" if noun[0] in "aeiou" else "a"


@dataclass
class Scene:
    """One conversation while it is written: what the user and the system message told so far."""

    rng: random.Random
    assistant_name: str = "Pip"
    told: dict[str, str] = field(default_factory=dict)

    def name(self) -> str:
        return self.rng.choice(FIRST_NAMES)


# ---- the village -----------------------------------------------------------------------------------------------------


def about_villager(scene: Scene) -> Exchange:
    rng, person = scene.rng, scene.rng.choice(VILLAGERS)
    she, her = ("She", "her") if person.she else ("He", "him")
    questions = (
        ("Who is $name?|Do you know $name?|Tell me about $name.", "$name is the $job. $she works at the $place."),
        ("Who is the $job?|[What is|What's] the name of the $job?|Who works at the $place?", "The $job is $name. $she works at the $place."),
        ("Where does $name work?|Where [is|can I find] $name?|Where can I meet $name?", "You can find $name at the $place."),
        ("Does $name have [a pet|an animal]?|What pet does $name have?", "Yes, $name has $a $pet called $pet_name."),
        ("What is $name's $pet called?|What is the name of $name's $pet?", "The $pet of $name is called $pet_name."),
        ("Who is $pet_name?|Whose [pet|animal] is $pet_name?|Who has $a $pet?", "$pet_name is the $pet of $name, the $job."),
        ("What does $name [like|love|enjoy]?|What could I give $name?", "$name likes $likes."),
        ("What does $name do?|What is $name's [job|work]?", "$name is the $job of Fennick."),
    )
    question, answer = rng.choice(questions)
    values = {"name": person.name, "job": person.job, "place": person.place, "pet": person.pet, "pet_name": person.pet_name}
    values |= {"likes": person.likes, "she": she, "her": her, "a": article(person.pet)}
    return ask(rng, question, **values), say(rng, answer, **values)


def about_place(scene: Scene) -> Exchange:
    rng = scene.rng
    place, shop = rng.choice(list(PLACES.items()))
    questions = [
        ("Where is the $place?|How do I get to the $place?|I am looking for the $place.", "The $place is $where."),
        ("When does the $place open?|What time does the $place open?|Is the $place open [now|early]?", "The $place opens at $opens."),
    ]
    if shop.goods:
        questions.append(("What [does|do they sell at] the $place[ sell|]?|What can I buy at the $place?", "At the $place you can buy $goods."))
    question, answer = rng.choice(questions)
    question = question.replace("[does|do they sell at] the $place[ sell|]", rng.choice(["does the $place sell", "do they sell at the $place"]))
    values = {"place": place, "where": shop.where, "opens": shop.opens, "goods": listing(list(shop.goods)) if shop.goods else ""}
    return ask(rng, question, **values), say(rng, answer, **values)


def about_price(scene: Scene) -> Exchange:
    rng = scene.rng
    place = rng.choice([name for name, shop in PLACES.items() if shop.goods])
    good, price = rng.choice(list(PLACES[place].goods.items()))
    questions = (
        ("How much [is|are|for] the $good?|What [is the price of|do I pay for] $good?|[What|How much] does $good cost?", "The price of $good is $price coins."),
        ("Where can I [buy|get|find] $good?|Who sells $good?|I need $good.|I want [some |]$good.", "You can buy $good at the $place."),
    )
    question, answer = rng.choice(questions)
    values = {"good": good, "price": str(price), "place": place}
    return ask(rng, question, **values), say(rng, answer, **values)


def about_season(scene: Scene) -> Exchange:
    rng, season = scene.rng, scene.rng.choice(list(SEASONS))
    questions = (
        ("[What is|How is|What's] the weather [like |]in [the |]$season?|Is it [warm|cold|nice] in $season?", "In $season it is $weather."),
        ("What [happens|do people do] in $season?|Is there a [festival|feast|party] in $season?", "In $season there is $festival."),
    )
    question, answer = rng.choice(questions)
    values = {"season": season, "weather": SEASONS[season], "festival": FESTIVALS[season]}
    return ask(rng, question, **values), say(rng, answer, **values)


def about_village(scene: Scene) -> Exchange:
    question, answer = scene.rng.choice(VILLAGE_FACTS)
    return ask(scene.rng, question), answer


# ---- the two speakers ------------------------------------------------------------------------------------------------


def small_talk(scene: Scene) -> Exchange:
    question, answer = scene.rng.choice(SMALL_TALK)
    return ask(scene.rng, question), say(scene.rng, answer)


def own_name(scene: Scene) -> Exchange:
    question = "[What is|What's] your name?|Who are you?|What [are you called|should I call you]?|Do you have a name?"
    return ask(scene.rng, question), f"My name is {scene.assistant_name}."


PERSONAL = {
    "name": ("My name is $value.|I am $value.|I'm $value.|Call me $value.|You can call me $value.", "Hello $value! Nice to meet you.",
             "[What is|What's] my name?|Who am I?|Do you [know|remember] my name?", "Your name is $value.", "You have not told me your name."),
    "town": ("I [am|come] from $value.|I live in $value.|My home is $value.", "I have heard of $value. Welcome to Fennick!",
             "Where [am I|do I come] from?|Where do I live?|[What is|Where is] my home?", "You are from $value.", "You have not told me where you are from."),
    "colour": ("My favourite colour is $value.|I like $value best.|The colour I like best is $value.", "I like $value too.",
               "[What is|What's] my favourite colour?|[Which|What] colour do I like?", "Your favourite colour is $value.", "You have not told me your favourite colour."),
    "pet": ("I have a [dog|cat|pet|bird] called $value.|My [dog|cat|pet|bird] is called $value.", "What a good name! Say hello to $value.",
            "What is my [dog|cat|pet|bird] called?|Do you remember my pet?", "Your pet is called $value.", "You have not told me about your pet."),
    "wish": ("I want to buy $value.|I am looking for $value.|Do you sell $value?|I would like $value.", "I do not sell $value, but you can ask at the market.",
             "What did I want[| to buy]?|What was I looking for?|What do I need?", "You wanted $value.", "You have not told me what you want."),
    "day": ("I will [leave|come back|travel] on $value.|My ferry is on $value.|I stay until $value.", "Good, I will remember $value.",
            "When [do I leave|is my ferry|do I travel]?|[Which|What] day did I say?", "You said $value.", "You have not told me the day."),
}  # fmt: skip


def personal_value(scene: Scene, kind: str) -> str:
    rng = scene.rng
    if kind == "wish":
        number = str(rng.randint(2, 60)) if rng.random() < 0.7 else rng.choice(["two", "three", "four", "five", "six", "ten"])
        return f"{number} {rng.choice(GOODS)}"
    table = {"name": FIRST_NAMES, "town": TOWNS, "colour": COLOURS, "pet": PET_NAMES, "day": DAYS}[kind]
    return rng.choice(table)


def tell(scene: Scene) -> Exchange:
    kind = scene.rng.choice(list(PERSONAL))
    statement, answer, *_ = PERSONAL[kind]
    value = scene.told[kind] = personal_value(scene, kind)
    return ask(scene.rng, statement, value=value), say(scene.rng, answer, value=value)


def recall(scene: Scene) -> Exchange:
    kind = scene.rng.choice(list(scene.told)) if scene.told and scene.rng.random() < 0.8 else scene.rng.choice(list(PERSONAL))
    _, _, question, known, unknown = PERSONAL[kind]
    answer = say(scene.rng, known, value=scene.told[kind]) if kind in scene.told else unknown
    return ask(scene.rng, question), answer


# ---- words: copying, lists, notes ------------------------------------------------------------------------------------


def word(scene: Scene) -> str:
    return scene.rng.choice(scene.rng.choice((WORDS, WORDS, GOODS, FIRST_NAMES, TOWNS)))


def code(scene: Scene) -> str:
    letters = "".join(scene.rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(scene.rng.randint(1, 3)))
    return scene.rng.choice((f"{letters}{scene.rng.randint(1, 99)}", f"{letters.upper()}-{scene.rng.randint(1, 999)}", str(scene.rng.randint(1, 2000))))


def phrase(scene: Scene) -> str:
    words = [code(scene) if scene.rng.random() < 0.12 else word(scene) for _ in range(scene.rng.randint(1, 7))]
    return scene.rng.choice((" ", " ", " ", ", ", " - ")).join(words)


SHAPES = (
    "{a}: {b}", "({a}, {b})", "[{a}, {b}, {c}]", "<{a}>{b}</{a}>", "{a}_{b} = {n};", "'{a}'", "{a}? {b}!", "#{n} {a}", "{a}/{b}/{c}", "{a}@{b}.{c}",
    "{{{a}: {n}}}", "{n} + {m}", "{n}.{m}", "{n}%", "{n}:{m}", "*{a}* {b}", "{a} & {b}", "{n}x {a}", "{a}; {b}; {c}", "{a}-{b}", "${n}", "~{a}~ | {b}",
)  # fmt: skip


def shape(scene: Scene) -> str:
    """Words and numbers between punctuation, as in notes, addresses and code."""
    rng = scene.rng
    return rng.choice(SHAPES).format(a=word(scene), b=word(scene), c=word(scene), n=rng.randint(0, 99), m=rng.randint(0, 99))


def repeat(scene: Scene) -> Exchange:
    text = scene.rng.choice((phrase, phrase, phrase, shape, shape, note_json, sentence))(scene)
    quoted = scene.rng.random() < 0.3
    asked = ask(scene.rng, "Repeat after me: $t|Say $t|Please say: $t|Copy this: $t|Say this again: $t|Write $t", t=f'"{text}"' if quoted else text)
    return asked, text


def count_out(scene: Scene) -> Exchange:
    text, times = word(scene), scene.rng.choice(("twice", "three times"))
    return f"Say {text} {times}.", " ".join([text] * (2 if times == "twice" else 3))


def pick_word(scene: Scene) -> Exchange:
    words = scene.rng.sample(WORDS, scene.rng.randint(2, 6))
    which = scene.rng.choice(("first", "last"))
    return f"What is the {which} word of: {' '.join(words)}", words[0 if which == "first" else -1]


def make_list(scene: Scene) -> Exchange:
    items = [scene.rng.choice((f"{scene.rng.randint(2, 60)} {good}", good)) for good in scene.rng.sample(GOODS, scene.rng.randint(2, 4))]
    asked = ask(scene.rng, "Make a list of $t.|Write a list: $t|I need $t. Make a list.|List $t for me.", t=listing(items))
    return asked, "\n".join(f"- {item}" for item in items)


def order(scene: Scene) -> dict[str, str]:
    """A random order: who, how many, what, which day, where to."""
    rng = scene.rng
    return {"name": scene.name(), "count": str(rng.randint(2, 60)), "item": rng.choice(GOODS), "day": rng.choice(DAYS), "town": rng.choice(TOWNS)}


ORDER_QUESTIONS = {
    "name": "Who [was it|is it about|is named]?|Whose order is it?|What is the name?",
    "count": "How many?|How many [are there|things are there]?|What is the count?",
    "item": "What [thing|goods]?|[What is|Which is] the item?|What was it about?",
    "day": "[Which|What] day?|When[| is it]?|What is the day?",
    "town": "[Which|What] town?|Where[| to]?|What is the town?",
}
ORDER_SENTENCES = (
    "$name [took|sold|carried|lost|found|bought] $count $item in $town on $day.",
    "On $day $name [brought|sent|gave|sold] $count $item to $town.",
    "In $town, $name has $count $item until $day.",
    "$count $item [went|came] to $town on $day with $name.",
    "$name [from|of] $town has $count $item. That was on $day.",
)


def sentence(scene: Scene) -> str:
    return say(scene.rng, scene.rng.choice(ORDER_SENTENCES), **order(scene))


def note_json(scene: Scene) -> str:
    fields = order(scene)
    keys = scene.rng.sample(list(fields), scene.rng.randint(1, 4))
    return json.dumps({key: int(fields[key]) if key == "count" else fields[key] for key in keys})


def read_note(scene: Scene) -> Exchange:
    rng, fields = scene.rng, order(scene)
    keys = rng.sample(list(fields), rng.randint(2, 5))
    style = rng.choice(("sentence", "sentence", "lines", "json"))
    if style == "sentence":
        keys = list(fields)
        text = say(rng, rng.choice(ORDER_SENTENCES), **fields)
    elif style == "lines":
        text = "\n".join(f"{key}: {fields[key]}" for key in keys) + "\n"
    else:
        text = json.dumps({key: fields[key] for key in keys})
    key = rng.choice(keys)
    return f"{text} {ask(rng, ORDER_QUESTIONS[key])}".replace("\n ", "\n"), fields[key]


def note_lines(scene: Scene) -> Exchange:
    """A sentence or JSON in, `key: value` lines out; JSON is never what the base is asked to make."""
    rng, fields = scene.rng, order(scene)
    if rng.random() < 0.5:
        keys = rng.sample(list(fields), rng.randint(2, 4))
        text = json.dumps({key: fields[key] for key in keys})
    else:
        keys = list(fields)
        text = say(rng, rng.choice(ORDER_SENTENCES), **fields)
    return ask(rng, "Write a note: $t|Take a note. $t|Make a note of this: $t", t=text), "\n".join(f"{key}: {fields[key]}" for key in keys)


def add(scene: Scene) -> Exchange:
    one, two = scene.rng.randint(1, 9), scene.rng.randint(1, 9)
    return ask(scene.rng, "What is $a plus $b?|How much is $a and $b?|$a + $b", a=str(one), b=str(two)), f"{one} plus {two} is {one + two}."


def not_known(scene: Scene) -> Exchange:
    return ask(
        scene.rng,
        "What is [a |the |]$a?|How [do|can] I $a [the|my|a] $b?|Tell me about [the |my |]$a [and|of] $b.|Is [the|my] $a $b?|"
        "Can I $a [the|my] $b?|Why is [the|my] $a [so |]$b?|What [does|is] [the|my] $a $b?|[The|My] $a [is|has] $b [$c|].|"
        "Where [does|is] [the|my] $a [of|in|on] [the |]$b?|How [long|big|many|much|far|old] [is|are] [the|my] $a $b?|"
        "[Please |]$a [the|my] $b [to|on|for|with] [the |]$c.|Does [the|my] $a [have|need] [a |]$b?|When [is|does] [the|my] $a $b?",
        a=word(scene), b=word(scene), c=word(scene),
    ), UNKNOWN  # fmt: skip


# Each kind of exchange and how often it is drawn.
TOPICS: dict[Callable[[Scene], Exchange], float] = {
    about_villager: 16, about_place: 7, about_price: 7, about_season: 3, about_village: 4, small_talk: 7, own_name: 2,
    tell: 9, recall: 9, repeat: 9, count_out: 2, pick_word: 3, make_list: 4, read_note: 9, note_lines: 4, add: 3, not_known: 9,
}  # fmt: skip


def greeting(scene: Scene) -> Exchange:
    rng, hello = scene.rng, scene.rng.choice(GREETINGS)
    if rng.random() < 0.5:
        name = scene.told["name"] = scene.name()
        return ask(rng, "$hello[!|,|.] [My name is|I am|I'm] $name.", hello=hello, name=name), f"Hello {name}! Nice to meet you."
    return ask(rng, "$hello[!|.|,|]", hello=hello), "Hello! How can I help you?"


def farewell(scene: Scene) -> Exchange:
    name = scene.told.get("name")
    asked = ask(scene.rng, "[Goodbye|Bye|See you|Good night|Bye bye][!|.|]|I have to go[.| now.]")
    return asked, f"Goodbye, {name}! Come back soon." if name else "Goodbye! Come back soon."


def system_message(scene: Scene) -> str | None:
    if scene.rng.random() < 0.8:
        return None
    scene.assistant_name = scene.name()
    return ask(scene.rng, "You are $name[.|, a helper in Fennick.|, a friendly guide.]|Your name is $name.[| Answer in short sentences.]", name=scene.assistant_name)


def conversation(rng: random.Random) -> list[Message]:
    """One dialogue of 1 to 24 exchanges, mostly short; the long ones fill the context."""
    scene = Scene(rng)
    system = system_message(scene)
    exchanges: list[Exchange] = [greeting(scene)] if rng.random() < 0.35 else []
    topics, weights = list(TOPICS), list(TOPICS.values())
    length = rng.randint(10, 22) if rng.random() < 0.03 else min(10, 1 + int(rng.expovariate(0.45)))
    for topic in rng.choices(topics, weights, k=length):
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
    for _, messages in zip(range(20), conversations(1), strict=False):
        print("\n".join(f"{message['role']:>9}  {message['content']}" for message in messages), end="\n\n")
