"""The harbour village of Fennick: who lives there, what is sold where, and the questions that can be asked about it."""

from __future__ import annotations

from typing import NamedTuple

from scene import Exchange, Scene, ask, listing, say


class Villager(NamedTuple):
    """One person of Fennick and what can be asked about them."""

    name: str
    pronoun: str
    job: str
    place: str
    pet: str
    pet_name: str
    likes: str


class Place(NamedTuple):
    """One place of Fennick: where it stands, when it opens, and what it sells with prices in coins."""

    where: str
    opens: str
    goods: dict[str, int]


VILLAGERS = (
    Villager("Mara", "She", "baker", "bakery", "cat", "Soot", "plum cake"),
    Villager("Joss", "He", "fisherman", "pier", "dog", "Salt", "fish soup"),
    Villager("Edda", "She", "smith", "forge", "goat", "Nettle", "strong tea"),
    Villager("Bram", "He", "miller", "mill", "donkey", "Biscuit", "fresh bread"),
    Villager("Wren", "She", "teacher", "school", "rabbit", "Clover", "old maps"),
    Villager("Odo", "He", "ferryman", "ferry", "parrot", "Captain", "long songs"),
    Villager("Hale", "He", "doctor", "clinic", "turtle", "Button", "quiet evenings"),
    Villager("Tess", "She", "weaver", "loom house", "sheep", "Cotton", "bright colours"),
    Villager("Nils", "He", "lamp keeper", "lighthouse", "owl", "Moth", "night walks"),
    Villager("Ivy", "She", "gardener", "garden", "hen", "Pepper", "roses"),
    Villager("Karl", "He", "innkeeper", "inn", "horse", "Thunder", "card games"),
    Villager("Runa", "She", "boat builder", "boatyard", "duck", "Plank", "the smell of wood"),
)
PLACES = {
    "bakery": Place("next to the well", "six", {"bread": 4, "rolls": 2, "plum cake": 7}),
    "pier": Place("behind the market", "five", {"herring": 3, "crab": 9}),
    "forge": Place("at the end of Iron Lane", "eight", {"nails": 1, "horseshoes": 6, "knives": 12}),
    "mill": Place("on the hill", "seven", {"flour": 5, "oats": 3}),
    "school": Place("beside the church", "nine", {}),
    "ferry": Place("at the east landing", "seven", {"tickets": 8}),
    "clinic": Place("on Bell Street", "nine", {"bandages": 2, "cough syrup": 6}),
    "loom house": Place("by the river", "ten", {"scarves": 11, "blankets": 15}),
    "lighthouse": Place("on the north rock", "noon", {}),
    "garden": Place("behind the school", "eight", {"apples": 1, "roses": 4, "honey": 10}),
    "inn": Place("on the square", "four", {"soup": 5, "cider": 3}),
    "boatyard": Place("past the lighthouse", "eight", {"rope": 6, "oars": 14}),
}
SEASONS = {
    "spring": ("rainy and mild", "the Seed Fair"),
    "summer": ("warm and bright", "the Boat Race"),
    "autumn": ("windy and grey", "Lantern Night"),
    "winter": ("cold and snowy", "the Ice Supper"),
}
VILLAGER_QUESTIONS = (
    ("Who is $name?|Do you know $name?|Tell me about $name.", "$name is the $job. $she works at the $place."),
    (
        "Who is the $job?|[What is|What's] the name of the $job?|Who works at the $place?",
        "The $job is $name. $she works at the $place.",
    ),
    (
        "Where does $name work?|Where [is|can I find] $name?|Where can I meet $name?",
        "You can find $name at the $place.",
    ),
    (
        "Does $name have [a pet|an animal]?|What pet does $name have?",
        "Yes, $name has $a $pet called $pet_name.",
    ),
    (
        "What is $name's $pet called?|What is the name of $name's $pet?",
        "The $pet of $name is called $pet_name.",
    ),
    (
        "Who is $pet_name?|Whose [pet|animal] is $pet_name?|Who has $a $pet?",
        "$pet_name is the $pet of $name, the $job.",
    ),
    ("What does $name [like|love|enjoy]?|What could I give $name?", "$name likes $likes."),
    ("What does $name do?|What is $name's [job|work]?", "$name is the $job of Fennick."),
)
PLACE_QUESTIONS = (
    ("Where is the $place?|How do I get to the $place?|I am looking for the $place.", "The $place is $where."),
    (
        "When does the $place open?|What time does the $place open?|Is the $place open [now|early]?",
        "The $place opens at $opens.",
    ),
)
SHOP_QUESTION = (
    "What does the $place sell?|What do they sell at the $place?|What can I buy at the $place?",
    "At the $place you can buy $goods.",
)
PRICE_QUESTIONS = (
    (
        "How much [is|are|for] the $good?|What [is the price of|do I pay for] $good?|[What|How much] does $good cost?",
        "The price of $good is $price coins.",
    ),
    (
        "Where can I [buy|get|find] $good?|Who sells $good?|I need $good.|I want [some |]$good.",
        "You can buy $good at the $place.",
    ),
)
SEASON_QUESTIONS = (
    (
        "[What is|How is|What's] the weather [like |]in [the |]$season?|Is it [warm|cold|nice] in $season?",
        "In $season it is $weather.",
    ),
    (
        "What [happens|do people do] in $season?|Is there a [festival|feast|party] in $season?",
        "In $season there is $festival.",
    ),
)
VILLAGE_QUESTIONS = (
    (
        "[What is|What's] [this village|this place|the village] called?|[Where am I|Where are we]?",
        "This village is called Fennick.",
    ),
    ("How many people live [here|in Fennick]?|Is Fennick [big|large]?", "About two hundred people live in Fennick."),
    ("[What is|Tell me about] Fennick[?|.]", "Fennick is a small village with a harbour."),
    ("Where does the ferry go?|Where can the ferry take me?", "The ferry goes to Olm, across the bay."),
    ("How long does the ferry take?|Is the ferry [fast|slow]?", "The ferry takes one hour."),
    ("[When|What day] is market day?|When is the market?", "Market day is Saturday."),
    (
        "Who [runs|leads] [the village|Fennick]?|Who is the mayor?",
        "Fennick has no mayor. The villagers meet at the inn.",
    ),
    ("What is the river called?|[What is|What's] the name of the river?", "The river is called the Fenn."),
    (
        "What can I do [here|in Fennick]?|What is there to see?",
        "You can visit the lighthouse, take the ferry or eat plum cake.",
    ),
    (
        "Where can I sleep?|Is there a place to stay?|I need a room for the night.",
        "You can sleep at the inn on the square.",
    ),
)


def answered(scene: Scene, questions: tuple[tuple[str, str], ...], **values: str) -> Exchange:
    """One of the questions, with its answer."""
    question, answer = scene.rng.choice(questions)
    return ask(scene.rng, question, **values), say(scene.rng, answer, **values)


def about_villager(scene: Scene) -> Exchange:
    person = scene.rng.choice(VILLAGERS)
    article = "an" if person.pet[0] in "aeiou" else "a"
    return answered(scene, VILLAGER_QUESTIONS, **person._asdict(), she=person.pronoun, a=article)


def about_place(scene: Scene) -> Exchange:
    name, place = scene.rng.choice(list(PLACES.items()))
    if not place.goods:
        return answered(scene, PLACE_QUESTIONS, place=name, where=place.where, opens=place.opens)
    questions, goods = (*PLACE_QUESTIONS, SHOP_QUESTION), listing(list(place.goods))
    return answered(scene, questions, place=name, where=place.where, opens=place.opens, goods=goods)


def about_price(scene: Scene) -> Exchange:
    name, place = scene.rng.choice([(name, place) for name, place in PLACES.items() if place.goods])
    good, price = scene.rng.choice(list(place.goods.items()))
    return answered(scene, PRICE_QUESTIONS, good=good, price=str(price), place=name)


def about_season(scene: Scene) -> Exchange:
    season, (weather, festival) = scene.rng.choice(list(SEASONS.items()))
    return answered(scene, SEASON_QUESTIONS, season=season, weather=weather, festival=festival)


def about_village(scene: Scene) -> Exchange:
    return answered(scene, VILLAGE_QUESTIONS)
