"""Write the two demo data sets: `support` (questions about a made-up lamp) and `extract` (a message becomes one JSON object).

    python examples/data/make_data.py

Writes `support.jsonl`, `support-eval.jsonl`, `extract.jsonl` and `extract-eval.jsonl` beside this file, the same every time. A row:

    {"messages": [{"role": "user", "content": "Hi! How long does the battery last?"},
                  {"role": "assistant", "content": "The battery lasts 12 hours."}]}

Held out for support: every wording of the evaluation set. Held out for extract: every combination of values, and half of the
names and goods altogether.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
SEED = 7
TRAIN_ROWS = {"support": 15, "extract": 640}  # support: per fact
EVAL_ROWS = {"support": 5, "extract": 160}  # support: per fact
Row = dict[str, list[dict[str, str]]]


class Fact(NamedTuple):
    """One answer about the Lumo lamp, the questions that train it, and those held out."""

    answer: str
    asked: tuple[str, ...]
    held_out: tuple[str, ...]


FACTS = (
    Fact(
        "The battery lasts 12 hours.",
        ("How long does the battery last?", "What is the battery life?", "How many hours does the battery run?", "Is the battery good for a whole night?",
         "When is the battery empty?", "Battery life?", "How long is one battery good for?"),
        ("How long will the battery run?", "How many hours is the battery good for?", "Does the battery last a whole night?"),
    ),
    Fact(
        "Charging takes 2 hours.",
        ("How long does charging take?", "How long must I charge it?", "When is the lamp fully charged?", "How fast does it charge?", "Charging time?",
         "How many hours to charge the lamp?", "Is charging fast?"),
        ("How long until it is fully charged?", "How many hours does charging take?", "Does the lamp charge fast?"),
    ),
    Fact(
        "It charges with a USB cable.",
        ("Which cable do I need?", "What cable does it use?", "Is there a USB cable?", "Which cable is in the box?", "What kind of cable is it?",
         "Do I need a special cable?", "I lost the cable. Which one fits?"),
        ("What kind of cable do I need?", "Which cable fits the lamp?", "Does it use a USB cable?"),
    ),
    Fact(
        "The warranty is 3 years.",
        ("How long is the warranty?", "Is there a warranty?", "What warranty do I get?", "Does the lamp have a warranty?", "How many years of warranty?",
         "When does the warranty end?", "Tell me about the warranty."),
        ("How many years is the warranty?", "What about the warranty?", "Do I get a warranty with the lamp?"),
    ),
    Fact(
        "You can return it within 30 days.",
        ("Can I return it?", "How do I return the lamp?", "How long can I return it?", "I want to return my lamp.", "What if I want to return it?",
         "Is a return possible?", "I do not like it. Can I return it?"),
        ("Is it possible to return the lamp?", "I would like to return it.", "Until when can I return it?"),
    ),
    Fact(
        "The Lumo lamp costs 49 euros.",
        ("What does the lamp cost?", "How much is the lamp?", "What is the price?", "How much does it cost?", "Price of the lamp?", "Is the price high?",
         "What do I pay for one lamp?"),
        ("What is the price of the lamp?", "How much does one lamp cost?", "Tell me the price."),
    ),
    Fact(
        "It comes in white, green and copper.",
        ("Which colours are there?", "What colours does it come in?", "Can I choose the colour?", "Is there a green one?", "What colour is the lamp?",
         "Do you have other colours?", "Which colour can I get?"),
        ("What colours can I choose?", "Are there other colours?", "Which colours do you have?"),
    ),
    Fact(
        "It weighs 400 grams.",
        ("How heavy is it?", "What is the weight?", "How much does it weigh?", "Is the lamp heavy?", "Weight of the lamp?", "What does the lamp weigh?",
         "Is it too heavy to carry?"),
        ("What is the weight of the lamp?", "How heavy is the lamp?", "Does it weigh much?"),
    ),
    Fact(
        "It is 21 centimetres tall.",
        ("How tall is it?", "What is the height?", "How high is the lamp?", "Height of the lamp?", "Is the lamp tall?", "What size is it?", "How big is the lamp?"),
        ("What is the height of the lamp?", "How tall is the lamp?", "Is it big?"),
    ),
    Fact(
        "Turn the ring to make it brighter or dimmer.",
        ("How do I dim it?", "Can I dim the light?", "How do I make it brighter?", "The light is too bright.", "Is the light bright enough?",
         "How do I change the brightness?", "Can it be dimmer?"),
        ("How can I dim the lamp?", "It is too bright.", "How do I make the light brighter?"),
    ),
    Fact(
        "Press the top once to switch it on.",
        ("How do I switch it on?", "How do I turn it on?", "Where is the switch?", "How does it go on?", "How do I start the lamp?", "Where do I press to start?",
         "I cannot switch it on."),
        ("How can I switch the lamp on?", "Where is the switch of the lamp?", "How do I start it?"),
    ),
    Fact(
        "Hold the top for 10 seconds to reset it.",
        ("How do I reset it?", "Can I reset the lamp?", "I need to reset it.", "Is there a reset?", "How does the reset work?", "Where is the reset button?",
         "Please help me reset it."),
        ("How can I reset my lamp?", "What is the way to reset it?", "I want to reset the lamp."),
    ),
    Fact(
        "A red light means the battery is low.",
        ("Why is the light red?", "What does the red light mean?", "There is a red light.", "The lamp shows red.", "It is red. Why?", "Red light?",
         "What is wrong when it is red?"),
        ("Why does it show red?", "The light is red. What does it mean?", "I see a red light."),
    ),
    Fact(
        "A blue light means it is looking for your phone.",
        ("Why is the light blue?", "What does the blue light mean?", "There is a blue light.", "The lamp shows blue.", "It is blue. Why?", "Blue light?",
         "What is wrong when it is blue?"),
        ("Why does it show blue?", "The light is blue. What does it mean?", "I see a blue light."),
    ),
    Fact(
        "The bulb cannot be changed. It lasts 20 years.",
        ("How do I change the bulb?", "Can I replace the bulb?", "Which bulb does it need?", "The bulb is broken.", "How long does the bulb last?",
         "Where can I buy a bulb?", "Do you sell the bulb?"),
        ("Can the bulb be changed?", "What bulb do I need?", "I want to replace the bulb."),
    ),
    Fact(
        "Yes, it is waterproof and can stand in the rain.",
        ("Is it waterproof?", "Can it get wet?", "Is water a problem?", "Can I leave it in the rain?", "Is rain bad for it?", "What about water?",
         "It got wet. Is that a problem?"),
        ("Is the lamp waterproof?", "Is rain a problem?", "Can the lamp stand in water?"),
    ),
    Fact(
        "Clean it with a soft, damp cloth.",
        ("How do I clean it?", "How can I clean the lamp?", "What do I clean it with?", "It is dirty.", "The lamp is dirty. What now?", "Can I clean it with soap?",
         "How do I keep it clean?"),
        ("What is the best way to clean it?", "My lamp is dirty.", "How should I clean it?"),
    ),
    Fact(
        "The Lumo app is free and works on every phone.",
        ("Is there an app?", "Which app do I need?", "Does it have an app?", "Is the app free?", "What does the app cost?", "Where do I get the app?",
         "Does the app work on my phone?"),
        ("Do you have an app?", "What is the app called?", "Do I need an app?"),
    ),
    Fact(
        "Set the timer in the app, up to 8 hours.",
        ("Does it have a timer?", "How do I set the timer?", "Is there a timer?", "How long can the timer run?", "Where is the timer?", "Can I use a timer?",
         "How does the timer work?"),
        ("Can I set a timer?", "What about a timer?", "How do I use the timer?"),
    ),
    Fact(
        "We ship within 2 days.",
        ("When do you ship?", "How long does shipping take?", "When will my order ship?", "Is shipping fast?", "How soon do you ship it?", "Shipping time?",
         "When is my order shipped?"),
        ("How fast is shipping?", "How long until you ship my order?", "When do you ship the lamp?"),
    ),
    Fact(
        "Delivery is free.",
        ("What does delivery cost?", "Is delivery free?", "How much is delivery?", "Do I pay for delivery?", "Cost of delivery?", "Must I pay the delivery?",
         "Is there a delivery fee?"),
        ("How much do I pay for delivery?", "What is the cost of delivery?", "Do you have free delivery?"),
    ),
    Fact(
        "The lamp is made in Norway.",
        ("Where is it made?", "Where do you make the lamp?", "Who made the lamp?", "Which country is it made in?", "Is it made in Norway?", "Where was it made?",
         "Made in which country?"),
        ("Where is the lamp made?", "In which country was it made?", "Where do you make it?"),
    ),
    Fact(
        "The body is made of steel and glass.",
        ("Which material is it?", "What is the material?", "Is the material plastic?", "Is it steel?", "Is it glass or plastic?", "What material do you use?",
         "Is it plastic?"),
        ("What material is the lamp?", "Is the lamp plastic?", "Is it steel or plastic?"),
    ),
    Fact(
        "Write to help@lumo.example and we answer in one day.",
        ("How do I contact you?", "What is your email?", "Where can I write to?", "Do you have an email address?", "I need to contact you.",
         "How can I write to you?", "Can I email you?"),
        ("What email can I write to?", "How can I contact you?", "What is your email address?"),
    ),
    Fact(
        "Our phone line is open from 9 to 17.",
        ("When can I call you?", "Can I call you?", "When is the phone line open?", "I want to call you.", "What time can I call?", "Is the phone line open now?",
         "Can I talk to a person?"),
        ("What are the hours of the phone line?", "I would like to call you.", "At what time can I call you?"),
    ),
    Fact(
        "Yes, gift wrap costs 3 euros.",
        ("Do you have gift wrap?", "Can you wrap it?", "It is a gift.", "Can I get it as a gift?", "What does gift wrap cost?", "Is there gift wrap?",
         "Please wrap it as a gift."),
        ("Could you wrap it as a gift?", "How much is gift wrap?", "The lamp is a gift."),
    ),
    Fact(
        "You can pay by card or by bank transfer.",
        ("How can I pay?", "Can I pay by card?", "Which cards do you take?", "What ways to pay are there?", "Can I pay with my card?", "How do I pay?",
         "Is a card fine to pay?"),
        ("What are the ways to pay?", "Do you take my card?", "How can I pay for it?"),
    ),
    Fact(
        "The invoice is in your email.",
        ("Where is my invoice?", "I need an invoice.", "Can I get an invoice?", "Do you send an invoice?", "How do I get the invoice?", "I lost the invoice.",
         "Please send me the invoice."),
        ("Where can I find the invoice?", "Could you send an invoice?", "I did not get an invoice."),
    ),
    Fact(
        "You can cancel until we ship it.",
        ("How do I cancel?", "Can I cancel my order?", "I want to cancel.", "Please cancel my order.", "Until when can I cancel?", "Is it possible to cancel?",
         "What if I cancel?"),
        ("How can I cancel the order?", "I need to cancel it.", "When can I cancel?"),
    ),
    Fact(
        "Send it to us and we repair it for free.",
        ("My lamp is broken.", "Can you repair it?", "Do you repair lamps?", "The lamp does not work.", "What does a repair cost?", "It is broken. What now?",
         "Where can I repair it?"),
        ("Could you repair my lamp?", "It does not work.", "How much is a repair?"),
    ),
    Fact(
        "Yes, it is safe for children. It never gets hot.",
        ("Is it safe for children?", "Does it get hot?", "Is it safe?", "Is it hot?", "Can a child use it?", "Will the lamp get hot?", "My child wants one. Is it safe?"),
        ("Is the lamp safe?", "Is it good for a child?", "Does the lamp get too hot?"),
    ),
    Fact(
        "Please recycle the old lamp at a shop.",
        ("How do I recycle it?", "Can I recycle the lamp?", "Where can I recycle it?", "What do I do with an old lamp?", "Where does my old lamp go?",
         "Do you take old lamps?", "My lamp is old. Where does it go?"),
        ("How can I recycle my old lamp?", "What about my old lamp?", "Is it possible to recycle it?"),
    ),
)  # fmt: skip
OPENINGS = ("", "", "", "", "Hi! ", "Hello, ", "Hello! ", "One question: ", "Excuse me. ", "Good morning! ")
CLOSINGS = ("", "", "", "", " Thanks!", " Thank you.", " Please help.")

NAMES = """
Ada Agnes Alma Amos Anders Anton Arlo Asta Aster Basil Bella Benno Boris Bruno Carla Cedric Celia Clara Conrad Cora Dagny Daisy Della Denis Dora Edgar Edith
Elena Elias Ella Elsa Emil Emma Enid Erik Esther Eva Ezra Felix Fern Fiona Flora Frank Freya Frida Gemma George Gerda Gina Grace Greta Gwen Hanna Hazel Heidi
Henry Hilda Hugo Ian Ida Igor Inga Iris Jack Jana Jasper Jonas Judith Julia June Karin Kira Klara Knut Lars Laura Leif Lena Leo Lewis Linus Lisa Lotte Lucas
Lucy Luna Lydia Mabel Magnus Maja Marek Margot Maria Marta Martin Matilda Merle Mia Mila Milo Mina Moira Mona Nadia Nell Nico Nina Noah Nora Olaf Olga Oliver
Orla Oscar Otis Otto Paula Pearl Peter Petra Pia Quinn Ralf Rasmus Rex Rita Robin Rolf Roman Rosa Ruby Rufus Ruth Sam Sander Sara Selma Silas Simon Sofia Sven
Tara Ted Thea Theo Tilda Tobias Tom Ursula Vera Victor Viggo Viola Wanda Wilma Yara Yuri Zelda Zoe
""".split()
ITEMS = """
candles lamps plates cups bowls spoons forks pots pans kettles baskets barrels buckets bottles jars boxes bags sacks ropes nets hooks sails oars boots shoes
socks gloves hats coats shirts belts scarves blankets pillows curtains carpets chairs tables stools benches shelves mirrors clocks books maps pens pencils
stamps envelopes notebooks brushes brooms mops towels soaps combs needles buttons ribbons hammers saws axes shovels rakes ladders bricks tiles boards planks
screws wires bolts hinges locks keys chains bells drums flutes dolls kites puzzles apples pears plums cherries lemons onions carrots potatoes cabbages eggs
cheeses pies sausages pumpkins turnips tulips seeds wheels saddles tents torches lanterns batteries cables pumps radios posters flags umbrellas
""".split()
WEEK = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
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


def support_rows(rng: random.Random, count: int, *, held_out: bool) -> list[Row]:
    """`count` rows for every fact: its wordings in turn, each time with another opening and closing."""
    rows = []
    for fact in FACTS:
        wordings = fact.held_out if held_out else fact.asked
        users: list[str] = []
        while len(users) < count:
            user = rng.choice(OPENINGS) + wordings[len(users) % len(wordings)] + rng.choice(CLOSINGS)
            if user not in users:
                users.append(user)
        rows += [row(user, fact.answer) for user in users]
    rng.shuffle(rows)
    return rows


def extract_row(rng: random.Random, names: list[str], items: list[str]) -> Row:
    """One message and its JSON object; a message that names no day has `"day": null`."""
    day = rng.choice(WEEK) if rng.random() < 0.85 else None
    order = {"name": rng.choice(names), "item": rng.choice(items), "quantity": rng.randint(2, 60), "day": day}
    return row(rng.choice(WITH_DAY if day else WITHOUT_DAY).format(**order), json.dumps(order))


def extract_rows(rng: random.Random, count: int, names: list[str], items: list[str], taken: set[str]) -> list[Row]:
    """`count` rows whose objects are not in `taken`, which grows by them."""
    rows: list[Row] = []
    while len(rows) < count:
        candidate = extract_row(rng, names, items)
        answer = candidate["messages"][1]["content"]
        if answer not in taken:
            taken.add(answer)
            rows.append(candidate)
    return rows


def write(name: str, rows: Iterable[Row]) -> None:
    path = HERE / name
    path.write_text("".join(json.dumps(each) + "\n" for each in rows), encoding="utf-8")
    print(f"{path.name}: {len(path.read_text(encoding='utf-8').splitlines())} rows")


def main() -> None:
    rng = random.Random(SEED)
    write("support.jsonl", support_rows(rng, TRAIN_ROWS["support"], held_out=False))
    write("support-eval.jsonl", support_rows(rng, EVAL_ROWS["support"], held_out=True))
    names, items = rng.sample(NAMES, len(NAMES)), rng.sample(ITEMS, len(ITEMS))
    known, half = (names[: len(names) // 2], items[: len(items) // 2]), EVAL_ROWS["extract"] // 2
    unseen = (names[len(names) // 2 :], items[len(items) // 2 :])
    taken: set[str] = set()
    write("extract.jsonl", extract_rows(rng, TRAIN_ROWS["extract"], *known, taken))
    write("extract-eval.jsonl", extract_rows(rng, half, *known, taken) + extract_rows(rng, half, *unseen, taken))


if __name__ == "__main__":
    main()
