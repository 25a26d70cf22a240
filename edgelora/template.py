"""Chat templates: the one renderer that training and serving share, so that both see the same text.

Templates come with models and adapters, that is from strangers, and run in Jinja's immutable sandbox. The environment
is the one Hugging Face templates are written for (transformers, `utils/chat_template_utils.py`): `trim_blocks`,
`lstrip_blocks`, loop controls, `raise_exception`, `strftime_now`, a `tojson` that does not escape HTML, and the
`{% generation %}` block, which marks the assistant's text and renders as what it holds.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from edgelora.errors import ModelFileError, SettingsError
from edgelora.messages import Message, user_message

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


PROBE_TOOL: Mapping[str, Any] = {
    "type": "function",
    "function": {
        "name": "probe_tool",
        "description": "A probe.",
        "parameters": {
            "type": "object",
            "properties": {"probed": {"type": "string", "description": "Some text."}},
            "required": ["probed"],
        },
    },
}
"""A tool that tells whether a template shows tools."""

RENDER_SECONDS = 10.0
MAX_STEPS = 1_000_000


class _Ranges:
    """`range` for one rendering; all of its ranges together have at most `MAX_STEPS` items."""

    def __init__(self) -> None:
        self._left = MAX_STEPS

    def __call__(self, *bounds: int) -> range:
        made = range(*bounds)
        self._left -= len(made)
        if self._left < 0:
            raise OverflowError(f"its loops take more than {MAX_STEPS} steps")
        return made


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
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The conversation as the text the model reads.

        Args:
            add_generation_prompt: the text ends where the assistant's reply begins.
            tools: what the model may call, as OpenAI's `tools`; a template that does not support them ignores them
                (`shows_tools`).

        Raises:
            ModelFileError: the template refuses the conversation (`raise_exception`, say for a system message it does
                not know) or fails on it.
        """
        import jinja2

        deadline = time.monotonic() + RENDER_SECONDS
        pieces = []
        try:
            for piece in self._template.generate(
                range=_Ranges(),
                messages=[dict(m) for m in messages],
                add_generation_prompt=add_generation_prompt,
                bos_token=bos_token,
                eos_token=eos_token,
                tools=[dict(tool) for tool in tools] if tools else None,
                **{"documents": None, **variables},
            ):
                pieces.append(piece)
                if time.monotonic() > deadline:
                    raise jinja2.TemplateError(f"it took longer than {RENDER_SECONDS:g} seconds")
        except Exception as error:  # a stranger's program: it may raise anything
            reason = str(error) or type(error).__name__
            raise ModelFileError(f"the chat template does not accept this conversation: {reason}") from None
        return "".join(pieces)

    @cached_property
    def shows_tools(self) -> bool:
        """Whether the text is another one with tools than without; some templates need tools to give one at all."""
        shown, without = (self._asked(tools) for tools in ([PROBE_TOOL], None))
        return shown is not None and shown != without

    def _asked(self, tools: Sequence[Mapping[str, Any]] | None) -> str | None:
        """A question as the model reads it; None where the template refuses it."""
        try:
            return self.render([user_message("A question?")], add_generation_prompt=True, tools=tools)
        except ModelFileError:
            return None


def _compile(source: str) -> jinja2.Template:
    import jinja2

    try:
        return _environment().from_string(source)
    except (jinja2.TemplateError, RecursionError, SyntaxError, ValueError, MemoryError, OverflowError) as error:
        reason = str(error) or type(error).__name__
        raise ModelFileError(f"not a chat template that Jinja can read: {reason}") from None


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
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, default=_listed, **options)


def _listed(value: Any) -> Any:
    """What Jinja's own filters give (`map`), which is no list yet."""
    if isinstance(value, Iterator):
        return list(value)
    raise TypeError(f"Object of type {type(value).__name__} is not JSON serializable")


def _raise_exception(message: str) -> NoReturn:
    import jinja2

    raise jinja2.TemplateError(message)
