"""Templates that choose an adapter: they render what the templates that they are made of render, but for the token."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from edgelora.bundle_template import Choice, Texts, adapted
from edgelora.errors import ModelFileError
from edgelora.messages import Message
from edgelora.template import BUILTIN, ChatTemplate

USER: Message = {"role": "user", "content": "Is it waterproof?"}
SYSTEM: Message = {"role": "system", "content": "Be brief."}
TEXTS = Texts("<s>", "</s>")
CHATML = BUILTIN["chatml"]
AWKWARD = """
  {%- if messages[0]['role'] == 'system' -%}
    {%- set system = messages[0]['content'] -%}
    {%- set messages = messages[1:] -%}
  {%- else -%}
    {%- set system = 'It\\'s you.' -%}
  {%- endif -%}
{% set ns = namespace(count=0) %}
{% macro turn(m) %}
<|im_start|>{{ m.role }}
{{ m.content | trim }}<|im_end|>
{% endmacro %}
<|im_start|>system
{{ system }}<|im_end|>
{% for m in messages %}{% set ns.count = ns.count + 1 %}
{{ turn(m) }}{% endfor %}

{{ ns.count }}{% if add_generation_prompt %}

<|im_start|>assistant
{% endif %}

"""


def choice(name: str = "support", first: str = "<|im_start|>", template: str = CHATML, system: str = "") -> Choice:
    return Choice(name, f"<|{name}|>", first, template, system)


def render(source: str, messages: Sequence[Message], adapter: str | None = None, texts: Texts = TEXTS) -> str:
    variables = {"adapter": adapter} if adapter is not None else {}
    return ChatTemplate(source).render(
        messages, add_generation_prompt=True, bos_token=texts.bos, eos_token=texts.eos, **variables
    )


@pytest.mark.parametrize("template", [CHATML, CHATML + "\n", AWKWARD, "{{ '<|im_start|>' }}" + CHATML])
@pytest.mark.parametrize("messages", [[USER], [SYSTEM, USER], [USER, {"role": "assistant", "content": "Yes."}, USER]])
def test_a_template_is_the_same_but_for_its_first_token(template: str, messages: list[Message]) -> None:
    source = adapted(template, [choice(template=template), choice("billing", template=template)], TEXTS)
    plain = render(template, messages)
    assert plain.startswith("<|im_start|>")
    for name in (None, "none", "base", ""):
        assert render(source, messages, name) == plain
    for name in ("support", "billing"):
        assert render(source, messages, name) == f"<|{name}|>" + plain.removeprefix("<|im_start|>")
    with pytest.raises(ModelFileError, match=r"unknown adapter sales, this bundle has: support, billing, none"):
        render(source, messages, "sales")


def test_a_system_message_chooses_too() -> None:
    source = adapted(CHATML, [choice(), choice("billing")], TEXTS)
    for text in ("<|billing|>Be brief.", "<|billing|>\n Be brief."):
        chosen = render(source, [{"role": "system", "content": text}, USER])
        assert chosen == render(source, [SYSTEM, USER], "billing")
    assert render(source, [{"role": "system", "content": "<|billing|>"}, USER]) == render(source, [USER], "billing")
    not_first = render(source, [{"role": "system", "content": "Say <|billing|>"}, USER])
    assert not_first.startswith("<|im_start|>")


def test_the_variable_wins_and_messages_never_hold_a_token() -> None:
    source = adapted(CHATML, [choice(), choice("billing")], TEXTS)
    text = render(
        source, [{"role": "system", "content": "<|billing|>x"}, {**USER, "content": "a <|support|> b"}], "support"
    )
    assert text.startswith("<|support|>")
    assert text.count("<|support|>") == 1
    assert "<|billing|>" not in text
    assert "a < |support|> b" in text
    assert "< |support|>" in render(source, [{**USER, "content": "<|support|>"}])


def test_an_adapter_keeps_its_own_template_and_system_prompt() -> None:
    own = choice("support", "<s>", BUILTIN["plain"], 'It\'s a \\ "shop".\n\tBe kind: é. {{ no }} {% endset %} #}')
    source = adapted(CHATML, [own, choice("billing")], TEXTS)
    said = {"role": "system", "content": own.system}
    assert render(source, [USER], "support") == "<|support|>" + render(own.template, [said, USER]).removeprefix("<s>")
    assert render(source, [SYSTEM, USER], "support") == "<|support|>Be brief.Is it waterproof?"
    assert render(source, [USER], "billing") == "<|billing|>" + render(CHATML, [USER]).removeprefix("<|im_start|>")
    assert render(source, [USER]) == render(CHATML, [USER])


@pytest.mark.parametrize(
    "template",
    [BUILTIN["llama2"], "{% for m in messages %}### {{ m.content }}\n{% endfor %}", "\n{{ messages[-1].content }}\n\n"],
)
def test_where_llama_cpp_puts_bos_in_front(template: str) -> None:
    texts = Texts("<s>", "</s>", added="<s>")
    first = "<s>" if template == BUILTIN["llama2"] else ""
    source = adapted(template, [choice(first=first, template=template)], texts)
    plain = render(template, [USER], texts=texts).removeprefix("<s>")
    assert render(source, [USER], texts=texts) == "<s>" + plain
    assert render(source, [USER], "support", texts) == "<|support|>" + plain


def test_a_template_without_system_messages_is_not_said_to_know_them() -> None:
    """llama-server looks whether a template reads them, and puts them into the user's message where it does not."""
    template = "{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.content }}{% endfor %}"
    source = adapted(template, [choice(template=template)], TEXTS)
    assert "startswith('<|support|>')" not in source
    assert "startswith('<|support|>')" in adapted(CHATML, [choice()], TEXTS)
    assert render(source, [USER], "support") == "<|support|>" + USER["content"]


def test_a_conversation_that_begins_otherwise_is_refused_where_it_is_rendered() -> None:
    template = "{% if messages | length > 5 %}Long: {% endif %}" + CHATML
    source = adapted(template, [choice(template=template)], TEXTS)
    with pytest.raises(ModelFileError, match=r"does not begin with <\|im_start\|>"):
        render(source, [USER] * 6, "support")
    assert render(source, [USER] * 6).startswith("Long: ")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("<|im_start|>{{ bundle_adapter | default('nobody') }}", "other text than before"),
        ("{{ raise_exception('no') }}", "refuses every conversation"),
        ("{% block turns %}<|im_start|>{% endblock %}", "block 'turns' defined twice"),
    ],
)
def test_what_cannot_be_adapted_is_refused(template: str, message: str) -> None:
    with pytest.raises(ModelFileError, match=message):
        adapted(template, [choice(template=template), choice("other", template=template + " ")], TEXTS)
