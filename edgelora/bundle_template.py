"""A chat template that puts an adapter's control token where the conversation begins.

Which adapter is said by the variable `adapter` (`chat_template_kwargs` of llama-server), or by a system message that
begins with its token. The templates themselves stay as they are: each is rendered into a variable, and its first token
is exchanged there. Text in a message that looks like a control token is spaced out, since llama.cpp's programs read it
as one, and an adapter is not for everybody to choose in the middle of a conversation.

Written in what both Jinja and llama.cpp's own reader of templates (common/jinja) know: slices and `length` count bytes
in the one and characters in the other, and only together give the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from edgelora.errors import ModelFileError
from edgelora.messages import Message
from edgelora.template import ChatTemplate

SAMPLES: tuple[tuple[Message, ...], ...] = (
    ({"role": "user", "content": "How are you?"},),
    ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "How are you?"}),
    (
        {"role": "user", "content": "How are you?"},
        {"role": "assistant", "content": "Well."},
        {"role": "user", "content": "And <|now|>?"},
    ),
)
"""Conversations that an adapted template is compared on with the one it was made of."""


@dataclass(frozen=True)
class Choice:
    """An adapter, as a template knows it.

    Attributes:
        token: text of its control token.
        first: text of the token that it takes the place of; empty where it stands in front of the whole text.
        template: what its conversations are rendered with.
        system: its own system prompt, for conversations without one.
    """

    name: str
    token: str
    first: str
    template: str
    system: str = ""

    def applied(self, text: str) -> str | None:
        """`text` with its control token; None where that does not begin with `first`."""
        return self.token + text[len(self.first) :] if text.startswith(self.first) else None


@dataclass(frozen=True)
class Texts:
    """Of the base's special tokens.

    Attributes:
        added: what llama.cpp puts in front of a conversation that does not begin with it; empty for nothing.
    """

    bos: str
    eos: str
    added: str = ""


def adapted(base: str, choices: Sequence[Choice], texts: Texts) -> str:
    """The template of a bundle.

    Args:
        base: the template that conversations without an adapter are rendered with.

    Raises:
        ModelFileError: it would render other conversations than the templates it is made of.
    """
    knows_system = _knows_system(base, texts)
    source = "".join(_lines(base, choices, texts, knows_system))
    _compare(source, base, choices, texts, knows_system)
    return source


def _lines(base: str, choices: Sequence[Choice], texts: Texts, knows_system: bool) -> Iterator[str]:
    yield "{% set bundle_adapter = adapter if adapter is defined and adapter else 'none' %}"
    if knows_system:  # else llama.cpp takes the template for one that does, and no longer helps it out
        yield "{% if bundle_adapter == 'none' and messages and messages[0]['role'] == 'system' %}"
        yield "{% if messages[0]['content'] is string %}"
        yield from (_chosen_by_system(choice, "elif" if number else "if") for number, choice in enumerate(choices))
        yield "{% endif %}{% endif %}{% endif %}"
    for choice in choices:
        if choice.system:
            is_without = f"bundle_adapter == {_quoted(choice.name)} and messages and messages[0]['role'] != 'system'"
            message = f"{{'role': 'system', 'content': {_quoted(choice.system)}}}"
            yield f"{{% if {is_without} %}}{{% set messages = [{message}] + messages %}}{{% endif %}}"
    yield "{% set bundle_text %}"
    yield from _bodies(base, choices)
    yield "{% endset %}"
    for choice in choices:
        spaced = choice.token[0] + " " + choice.token[1:]
        yield f"{{% set bundle_text = bundle_text.replace({_quoted(choice.token)}, {_quoted(spaced)}) %}}"
    yield "{% if bundle_adapter == 'none' or bundle_adapter == 'base' %}"
    yield _unadapted(texts)
    for choice in choices:
        yield f"{{% elif bundle_adapter == {_quoted(choice.name)} %}}"
        yield _begun(choice)
    names = ", ".join([*(choice.name for choice in choices), "none"])
    unknown = f"'unknown adapter ' + bundle_adapter + {_quoted(f', this bundle has: {names}')}"
    yield f"{{% else %}}{{{{ raise_exception({unknown}) }}}}{{% endif %}}"


def _chosen_by_system(choice: Choice, branch: str) -> str:
    """The system message's token taken off, and the message too where nothing is left of it."""
    token = _quoted(choice.token)
    return (
        f"{{% {branch} messages[0]['content'].startswith({token}) %}}"
        f"{{% set bundle_adapter = {_quoted(choice.name)} %}}"
        f"{{% set bundle_system = messages[0]['content'][{token} | length:].strip() %}}"
        "{% set messages = messages[1:] %}"
        "{% if bundle_system %}"
        "{% set messages = [{'role': 'system', 'content': bundle_system}] + messages %}"
        "{% endif %}"
    )


def _bodies(base: str, choices: Sequence[Choice]) -> Iterator[str]:
    """The base's template, and those of adapters that have another."""
    groups: dict[str, list[str]] = {}
    for choice in choices:
        groups.setdefault(choice.template, []).append(choice.name)
    groups.pop(base, None)
    for number, (template, names) in enumerate(groups.items()):
        known = " or ".join(f"bundle_adapter == {_quoted(name)}" for name in names)
        yield f"{{% {'elif' if number else 'if'} {known} %}}{_embedded(template)}"
    yield f"{{% else %}}{_embedded(base)}{{% endif %}}" if groups else _embedded(base)


def _embedded(template: str) -> str:
    """A template inside another: nothing before or behind it may be taken for a line of it, and its last line end goes,
    as at the end of a file."""
    return "{{ '' }}" + template.removesuffix("\n") + "{{ '' }}"


def _unadapted(texts: Texts) -> str:
    if not texts.added:
        return "{{ bundle_text }}"
    bos = _quoted(texts.added)
    return f"{{% if not bundle_text.startswith({bos}) %}}{{{{ {bos} }}}}{{% endif %}}{{{{ bundle_text }}}}"


def _begun(choice: Choice) -> str:
    token, first = _quoted(choice.token), _quoted(choice.first)
    if not choice.first:
        return f"{{{{ {token} + bundle_text }}}}"
    problem = _quoted(f"this conversation does not begin with {choice.first}, whose place {choice.token} takes")
    return (
        f"{{% if not bundle_text.startswith({first}) %}}{{{{ raise_exception({problem}) }}}}{{% endif %}}"
        f"{{{{ {token} + bundle_text[{first} | length:] }}}}"
    )


def _quoted(text: str) -> str:
    """A string of Jinja."""
    escapes = (("\\", "\\\\"), ("'", "\\'"), ("\n", "\\n"), ("\r", "\\r"), ("\t", "\\t"))
    for character, written in escapes:
        text = text.replace(character, written)
    return f"'{text}'"


def _knows_system(base: str, texts: Texts) -> bool:
    return SAMPLES[1][0]["content"] in (_rendered(ChatTemplate(base), SAMPLES[1], texts) or "")


def _rendered(template: ChatTemplate, messages: Sequence[Message], texts: Texts, **variables: Any) -> str | None:
    """None where the template refuses the conversation."""
    try:
        return template.render(
            messages, add_generation_prompt=True, bos_token=texts.bos, eos_token=texts.eos, **variables
        )
    except ModelFileError:
        return None


def _compare(source: str, base: str, choices: Sequence[Choice], texts: Texts, knows_system: bool) -> None:
    """Render every sample both ways.

    Raises:
        ModelFileError: the two differ, or there is nothing to compare.
    """
    made, own = ChatTemplate(source), {each: ChatTemplate(each) for each in {base, *(c.template for c in choices)}}
    compared = 0
    for sample in SAMPLES:
        wanted = _rendered(own[base], sample, texts)
        compared += _same(wanted and _with_added(wanted, texts), _rendered(made, sample, texts))
        for choice in choices:
            messages = _with_system(sample, choice.system)
            wanted = _rendered(own[choice.template], messages, texts)
            wanted = None if wanted is None else choice.applied(wanted)
            compared += _same(wanted, _rendered(made, sample, texts, adapter=choice.name))
            if knows_system:  # a token alone in the system message leaves the adapter its own
                _same(wanted, _rendered(made, _named_in_system(sample, choice), texts))
    if not compared:
        raise ModelFileError("the chat template cannot be adapted: it refuses every conversation")


def _same(wanted: str | None, made: str | None) -> int:
    if wanted != made:
        raise ModelFileError("the chat template cannot be adapted: it would give other text than before")
    return wanted is not None


def _with_added(text: str, texts: Texts) -> str:
    return text if text.startswith(texts.added) else texts.added + text


def _with_system(messages: Sequence[Message], system: str) -> Sequence[Message]:
    if not system or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system}, *messages]


def _named_in_system(messages: Sequence[Message], choice: Choice) -> Sequence[Message]:
    if messages[0]["role"] == "system":
        return [{"role": "system", "content": f"{choice.token} {messages[0]['content']}"}, *messages[1:]]
    return [{"role": "system", "content": choice.token}, *messages]
