"""Chat templates: the one renderer that training and serving share, so that both see the same text.

Templates come with models and adapters, that is from strangers, and run in Jinja's immutable sandbox. The environment
is the one Hugging Face templates are written for (transformers, `utils/chat_template_utils.py`): `trim_blocks`,
`lstrip_blocks`, loop controls, `raise_exception`, `strftime_now`, a `tojson` that does not escape HTML, and the
`{% generation %}` block, which marks the assistant's text and renders as what it holds.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from edgelora.errors import ModelFileError, SettingsError
from edgelora.messages import Message

if TYPE_CHECKING:
    import jinja2

BUILTIN = {
    "chatml": (
        "{% for message in messages %}"
        "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
        "{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "llama2": (
        "{% set system = messages[0]['content'] if messages[0]['role'] == 'system' else '' %}"
        "{% for message in messages[1 if system else 0:] %}"
        "{% if message['role'] == 'user' %}{{ bos_token }}[INST] "
        "{% if loop.first and system %}<<SYS>>\n{{ system }}\n<</SYS>>\n\n{% endif %}{{ message['content'] }} [/INST]"
        "{% else %} {{ message['content'] }} {{ eos_token }}{% endif %}{% endfor %}"
    ),
    "plain": (  # text in, text out: for models that were never taught to chat
        "{{ bos_token }}{% for message in messages %}"
        "{{ message['content'] }}{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
        "{% endfor %}"
    ),
}


def resolve(name_or_path: str) -> str:
    """The source of a template given as a built-in name or a file.

    Raises:
        SettingsError: neither; the message lists the names.
    """
    if name_or_path in BUILTIN:
        return BUILTIN[name_or_path]
    path = Path(name_or_path).expanduser()
    if not path.is_file():
        raise SettingsError(
            f"unknown chat template {name_or_path!r}", hint=f"Give a Jinja file, or one of: {', '.join(BUILTIN)}."
        )
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path}: cannot be read as a chat template ({error})") from None


class ChatTemplate:
    """A compiled chat template.

    Raises:
        ModelFileError: `source` is not a Jinja template.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        self._template = _compile(source)

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool,
        bos_token: str = "",
        eos_token: str = "",
        **variables: Any,
    ) -> str:
        """The conversation as the text the model reads.

        With `add_generation_prompt` the text ends where the assistant's reply begins.

        Raises:
            ModelFileError: the template refuses the conversation (`raise_exception`, say for a system message it does
                not know) or fails on it.
        """
        import jinja2

        try:
            return self._template.render(
                messages=[dict(m) for m in messages],
                add_generation_prompt=add_generation_prompt,
                bos_token=bos_token,
                eos_token=eos_token,
                **{"tools": None, "documents": None, **variables},
            )
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, RecursionError) as error:
            raise ModelFileError(f"the chat template does not accept this conversation: {error}") from None

    @cached_property
    def accepts_system(self) -> bool:
        """Whether a system message is accepted and shows in the text."""
        probe = "system-prompt-probe"
        messages: list[Message] = [{"role": "system", "content": probe}, {"role": "user", "content": "hi"}]
        try:
            return probe in self.render(messages, add_generation_prompt=True)
        except ModelFileError:
            return False


def _compile(source: str) -> jinja2.Template:
    import jinja2

    try:
        return _environment().from_string(source)
    except (jinja2.TemplateError, RecursionError) as error:
        raise ModelFileError(f"not a chat template that Jinja can read: {error}") from None


def _environment() -> jinja2.Environment:
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012 - Jinja's own way to declare a tag

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    return environment


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise_exception(message: str) -> NoReturn:
    import jinja2

    raise jinja2.TemplateError(message)
