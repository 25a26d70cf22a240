"""What is trained under a template, at the level of text: no model, no tokenizer."""

from __future__ import annotations

import pytest

from edgelora.errors import ModelFileError, SettingsError
from edgelora.messages import Message
from edgelora.template import BUILTIN, ChatTemplate
from edgelora.train.passages import Passage, PassageFinder, chosen_template

from .conftest import chat

LLAMA3 = (
    "{{ bos_token }}"
    "{% for m in messages %}<|start|>{{ m['role'] }}<|stop|>\n\n{{ m['content'] | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|stop|>\n\n{% endif %}"
)
# As reasoning models do: an empty thought before the last reply, and thoughts dropped from earlier ones.
REASONING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_END = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
# As GLM: a reply ends where the next turn begins.
ENDS_IN_NEXT = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# As Mistral: the system prompt stands in the last question, if that is the last message.
SYSTEM_LAST = (
    "{% set system = messages[0]['content'] if messages[0]['role'] == 'system' else '' %}"
    "{% for m in messages if m['role'] != 'system' %}{% if m['role'] == 'user' %}"
    "[INST]{{ system + ' ' if system and loop.last else '' }}{{ m['content'] }}[/INST]"
    "{% else %}{{ m['content'] }}</s>{% endif %}{% endfor %}"
)
# As DeepSeek R1: the prompt opens a thought that the conversation does not show.
OPENS_THOUGHT = BUILTIN["chatml"].replace("assistant\n", "assistant\n<think>\n")
REWRITES_PROMPT = (
    "{{ 'asking' if add_generation_prompt else 'telling' }}{% for m in messages %}|{{ m['content'] }}{% endfor %}"
)
HIDES_REPLIES = (
    "{% for m in messages %}{{ m['role'] }}\n{% endfor %}{% if add_generation_prompt %}assistant\n{% endif %}"
)
SPECIAL = ("<s>", "<|user|>", "<|im_start|>", "<|im_end|>", "<|start|>", "<|stop|>", "<|eot|>", "<think>", "</think>")


def finder(template: str, eos_token: str = "<|im_end|>") -> PassageFinder:
    return PassageFinder(ChatTemplate(template), bos_token="<s>", eos_token=eos_token, special_tokens=SPECIAL)


def trained(passages: list[Passage]) -> list[list[str]]:
    return [[passage.text[a:b] for a, b in passage.spans] for passage in passages]


@pytest.mark.parametrize(
    ("template", "eos", "expected"),
    [
        (BUILTIN["chatml"], "<|im_end|>", ["Hi!<|im_end|>", "It is i.<|im_end|>"]),
        (BUILTIN["llama2"], "</s>", [" Hi! </s>", " It is i. </s>"]),
        (BUILTIN["plain"], "<|im_end|>", ["Hi!<|im_end|>", "It is i.<|im_end|>"]),
        (LLAMA3, "<|end|>", ["Hi!<|eot|>", "It is i.<|eot|>"]),
        (NO_END, "", ["Hi!\n", "It is i.\n"]),
        (ENDS_IN_NEXT, "", ["Hi!<|user|>", "It is i.<|user|>"]),
    ],
    ids=["chatml", "llama2", "plain", "llama3", "no end token", "end in next turn"],
)
def test_replies_and_their_end_are_trained(template: str, eos: str, expected: list[str]) -> None:
    messages = chat("Hello", "Hi!", "Which letter?", "It is i.")
    assert trained(finder(template, eos).passages(messages)) == [expected]


def test_a_system_prompt_is_not_trained() -> None:
    found = finder(BUILTIN["chatml"]).passages(chat("Hello", "Hi!", system="Hi!"))
    assert trained(found) == [["Hi!<|im_end|>"]]
    assert found[0].spans[0][0] > found[0].text.index("user")


@pytest.mark.parametrize("reply", ["i", "<", "\n", "end|>", "reply-probe", "Hi <|im_end|> there", ""])
def test_replies_that_look_like_the_template(reply: str) -> None:
    text = finder(BUILTIN["chatml"]).passages(chat("Hello", reply))
    assert trained(text) == [[f"{reply}<|im_end|>"]]


def test_a_template_that_rewrites_earlier_turns_gives_one_passage_a_reply() -> None:
    passages = finder(REASONING).passages(chat("Hello", "Hi!", "And now?", "Bye."))
    thought = "<think>\n\n</think>\n\n"
    assert trained(passages) == [[f"{thought}Hi!<|im_end|>"], [f"{thought}Bye.<|im_end|>"]]
    assert thought not in passages[1].text.partition("And now?")[0]
    assert len(finder(BUILTIN["chatml"]).passages(chat("Hello", "Hi!", "And now?", "Bye."))) == 1


def test_a_conversation_that_the_assistant_begins() -> None:
    opened = chat("Hello", "Hi!", "And now?", "Bye.")[1:]
    assert trained(finder(BUILTIN["chatml"]).passages(opened)) == [["Hi!<|im_end|>", "Bye.<|im_end|>"]]
    with pytest.raises(ModelFileError, match="differ before the reply begins"):
        finder(REWRITES_PROMPT).passages(opened)


def test_a_system_prompt_that_only_serving_sees_is_trained_on() -> None:
    messages = chat("Hello", "Hi!", "And now?", "Bye.", system="Be brief.")
    passages = finder(SYSTEM_LAST, "</s>").passages(messages)
    assert [passage.text for passage in passages] == [
        "[INST]Be brief. Hello[/INST]Hi!</s>",
        "[INST]Hello[/INST]Hi!</s>[INST]Be brief. And now?[/INST]Bye.</s>",
    ]
    assert trained(passages) == [["Hi!</s>"], ["Bye.</s>"]]
    assert all(passage.rebuilt for passage in passages)
    assert len(finder(SYSTEM_LAST, "</s>").passages(messages[1:])) == 1


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (OPENS_THOUGHT, "differ before the reply begins"),
        (REWRITES_PROMPT, "differ before the reply begins"),
        (HIDES_REPLIES, "does not show the assistant's text"),
    ],
)
def test_templates_that_cannot_be_masked_are_refused(template: str, message: str) -> None:
    shown = template.replace("{{ m['role'] }}\n{% endfor", "{{ m['role'] }}\n{{ m['content'] }}{% endfor")
    with pytest.raises(ModelFileError, match=message) as caught:
        finder(template).passages(chat("Hello", "Hi!"))
    assert "--chat-template" in caught.value.hint
    if shown != template:  # the twin: the same template with the reply shown is accepted
        assert trained(finder(shown).passages(chat("Hello", "Hi!"))) == [["Hi!"]]


@pytest.mark.parametrize(
    ("template", "eos", "stop"),
    [
        (BUILTIN["chatml"], "<|im_end|>", ()),
        (BUILTIN["chatml"], "<|end|>", ("<|im_end|>",)),
        (BUILTIN["llama2"], "</s>", ()),
        (LLAMA3, "<|end|>", ("<|eot|>",)),
        (NO_END, "", ("\nuser:",)),
        (ENDS_IN_NEXT, "", ("<|user|>",)),
        (BUILTIN["chatml"].replace("im_", "x_"), "", ("<|x_end|>",)),
    ],
)
def test_stop_strings(template: str, eos: str, stop: tuple[str, ...]) -> None:
    assert finder(template, eos).stop_strings() == stop


def test_which_template_is_chosen() -> None:
    assert chosen_template("chatml", "of base", chat_needed=True) == BUILTIN["chatml"]
    assert chosen_template(None, "of base", chat_needed=True) == "of base"
    assert chosen_template(None, None, chat_needed=False) == BUILTIN["plain"]
    with pytest.raises(SettingsError, match="no chat template"):
        chosen_template(None, None, chat_needed=True)


def test_a_refused_conversation_keeps_the_templates_words() -> None:
    refusal = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    strict = refusal + BUILTIN["chatml"]
    messages: list[Message] = chat("Hello", "Hi!", system="Be brief.")
    with pytest.raises(ModelFileError, match="no system here"):
        finder(strict).passages(messages)
    assert finder(strict).passages(messages[1:])
