"""Small talk, and what people tell about themselves and ask for again later."""

from __future__ import annotations

from typing import NamedTuple

from scene import Exchange, Scene, ask, say
from village import answered
from words import COLOURS, DAYS, FIRST_NAMES, GOODS, PET_NAMES, TOWNS, WORDS


class Told(NamedTuple):
    """One thing a user can tell: the statement and its answer, and the question for it with both answers."""

    statement: str
    answer: str
    question: str
    known: str
    unknown: str


SMALL_TALK = (
    ("How are you[| today]?|How is it going?|How do you do?", "I am [well|fine], thank you. How are you?"),
    ("I am [fine|well|good][, thanks|| too].", "That is good to hear."),
    (
        "I am [tired|sad|a bit tired|not well].",
        "I am sorry to hear that. Maybe a warm soup at the inn will help.",
    ),
    ("[Thank you|Thanks][!|.| very much.| a lot!]", "You are welcome!"),
    (
        "Tell me a joke.|Do you know a joke?",
        "Why did the crab cross the pier? To get to the other tide!",
    ),
    ("Can you help me?|I need [some |]help.", "Of course. What do you need?"),
    ("What can you do?|How can you help[ me|]?", "I can tell you about Fennick and its people."),
    ("Are you [real|human|a person]?", "No, I am a very small model. But I like to chat."),
    ("Do you like [music|songs]?", "Yes, I like the songs of Odo the ferryman."),
    ("What do you like?|Do you have a hobby?", "I like the sea and a good story."),
    (
        "Tell me a story.|Do you know a story?",
        "One night the sea was wild. Nils lit the lamp, and every boat came home.",
    ),
    ("That is [nice|great|good|lovely].|[Nice|Great|Good|Lovely]!", "I am glad you think so."),
    ("[OK|Okay|I see|Right|Fine].", "Is there anything else you want to know?"),
    ("[Yes|Yes, please|Sure].", "Good. What would you like to know?"),
    ("[No|No, thanks|No, thank you].", "All right. I am here if you need me."),
    ("[Sorry|I am sorry|Excuse me].", "That is all right."),
)
TOLD = {
    "name": Told(
        "My name is $value.|I am $value.|I'm $value.|Call me $value.|You can call me $value.",
        "Hello $value! Nice to meet you.",
        "[What is|What's] my name?|Who am I?|Do you [know|remember] my name?",
        "Your name is $value.",
        "You have not told me your name.",
    ),
    "town": Told(
        "I [am|come] from $value.|I live in $value.|My home is $value.",
        "I have heard of $value. Welcome to Fennick!",
        "Where [am I|do I come] from?|Where do I live?|[What is|Where is] my home?",
        "You are from $value.",
        "You have not told me where you are from.",
    ),
    "colour": Told(
        "My favourite colour is $value.|I like $value best.|The colour I like best is $value.",
        "I like $value too.",
        "[What is|What's] my favourite colour?|[Which|What] colour do I like?",
        "Your favourite colour is $value.",
        "You have not told me your favourite colour.",
    ),
    "pet": Told(
        "I have a [dog|cat|pet|bird] called $value.|My [dog|cat|pet|bird] is called $value.",
        "What a good name! Say hello to $value.",
        "What is my [dog|cat|pet|bird] called?|Do you remember my pet?",
        "Your pet is called $value.",
        "You have not told me about your pet.",
    ),
    "wish": Told(
        "I want to buy $value.|I am looking for $value.|Do you sell $value?|I would like $value.",
        "I do not sell $value, but you can ask at the market.",
        "What did I want[| to buy]?|What was I looking for?|What do I need?",
        "You wanted $value.",
        "You have not told me what you want.",
    ),
    "day": Told(
        "I will [leave|come back|travel] on $value.|My ferry is on $value.|I stay until $value.",
        "Good, I will remember $value.",
        "When [do I leave|is my ferry|do I travel]?|[Which|What] day did I say?",
        "You said $value.",
        "You have not told me the day.",
    ),
}
VALUES = {"name": FIRST_NAMES, "town": TOWNS, "colour": COLOURS, "pet": PET_NAMES, "day": DAYS}
GREETINGS = ("Hello", "Hi", "Hey", "Good morning", "Good evening", "Good day", "Hi there", "Hello there")
UNKNOWN_QUESTIONS = (
    "What is [a |the |]$a?|How [do|can] I $a [the|my|a] $b?|Tell me about [the |my |]$a [and|of] $b.|"
    "Is [the|my] $a $b?|Can I $a [the|my] $b?|Why is [the|my] $a [so |]$b?|What [does|is] [the|my] $a $b?|"
    "[The|My] $a [is|has] $b[ $c|].|Where [does|is] [the|my] $a [of|in|on] [the |]$b?|"
    "How [long|big|many|much|far|old] [is|are] [the|my] $a $b?|[Please |]$a [the|my] $b [to|on|for|with] [the |]$c.|"
    "Does [the|my] $a [have|need] [a |]$b?|When [is|does] [the|my] $a $b?"
)
UNKNOWN_ANSWER = "I do not know about that. Ask me about Fennick."


def small_talk(scene: Scene) -> Exchange:
    return answered(scene, SMALL_TALK)


def own_name(scene: Scene) -> Exchange:
    question = "[What is|What's] your name?|Who are you?|What [are you called|should I call you]?|Do you have a name?"
    return ask(scene.rng, question), f"My name is {scene.assistant_name}."


def value_of(scene: Scene, kind: str) -> str:
    rng = scene.rng
    if kind != "wish":
        return rng.choice(VALUES[kind])
    few = ("two", "three", "four", "five", "six", "ten")
    number = str(rng.randint(2, 60)) if rng.random() < 0.7 else rng.choice(few)
    return f"{number} {rng.choice(GOODS)}"


def tell(scene: Scene) -> Exchange:
    kind = scene.rng.choice(list(TOLD))
    value = scene.told[kind] = value_of(scene, kind)
    return ask(scene.rng, TOLD[kind].statement, value=value), say(scene.rng, TOLD[kind].answer, value=value)


def recall(scene: Scene) -> Exchange:
    """Ask for something told before, or at times for something that was not."""
    known = scene.told and scene.rng.random() < 0.8
    kind = scene.rng.choice(list(scene.told)) if known else scene.rng.choice(list(TOLD))
    told = TOLD[kind]
    answer = told.known.replace("$value", scene.told[kind]) if kind in scene.told else told.unknown
    return ask(scene.rng, told.question), answer


def not_known(scene: Scene) -> Exchange:
    """A question with words of no meaning here: the base says that it does not know."""
    words = (scene.rng.choice(scene.rng.choice((WORDS, WORDS, GOODS, FIRST_NAMES, TOWNS))) for _ in range(3))
    return ask(scene.rng, UNKNOWN_QUESTIONS, **dict(zip("abc", words, strict=True))), UNKNOWN_ANSWER


def greeting(scene: Scene) -> Exchange:
    rng, hello = scene.rng, scene.rng.choice(GREETINGS)
    if rng.random() < 0.5:
        name = scene.told["name"] = rng.choice(FIRST_NAMES)
        asked = ask(rng, "$hello[!|,|.] [My name is|I am|I'm] $name.", hello=hello, name=name)
        return asked, f"Hello {name}! Nice to meet you."
    return ask(rng, "$hello[!|.|,|]", hello=hello), "Hello! How can I help you?"


def farewell(scene: Scene) -> Exchange:
    name = scene.told.get("name")
    asked = ask(scene.rng, "[Goodbye|Bye|See you|Good night|Bye bye][!|.|]|I have to go[.| now.]")
    return asked, f"Goodbye, {name}! Come back soon." if name else "Goodbye! Come back soon."


def system_message(scene: Scene) -> str | None:
    """One conversation in five has a system message, which names the assistant."""
    if scene.rng.random() < 0.8:
        return None
    scene.assistant_name = scene.rng.choice(FIRST_NAMES)
    messages = (
        "You are $name[.|, a helper in Fennick.|, a friendly guide.]|Your name is $name.[| Answer in short sentences.]"
    )
    return ask(scene.rng, messages, name=scene.assistant_name)
