"""Messages with tools as a chat template takes them: what the model reads in serving, and is trained on.

    {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "weather", ...}}]}

goes to most templates as it is; to one that shows tools and writes no calls, as the text that its family writes:

    {"role": "assistant", "content": "<tool_call>\\n{\\"name\\": \\"weather\\", ...}\\n</tool_call>"}
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from edgelora.errors import SettingsError
from edgelora.messages import Message
from edgelora.template import ChatTemplate
from edgelora.tools.calls import ToolCall
from edgelora.tools.families import loses_calls, required_family


def written_message(
    template: ChatTemplate, message: Message, protect: Callable[[str], str] = lambda text: text
) -> Message:
    """A message with what the template reads of it.

    Args:
        message: as `edgelora.messages.prepared` makes it.
        protect: is done to every text that comes from outside.

    Raises:
        SettingsError: it has calls, and the template does not support them, or several, and it would lose some.
    """
    made: Message = {"role": message["role"], "content": protect(message["content"])}
    if "tool_call_id" in message:
        made["tool_call_id"] = protect(message["tool_call_id"])
    if "name" in message:
        made["name"] = protect(message["name"])
    if calls := message.get("tool_calls"):
        family = required_family(template)
        if family.in_content:
            own = [ToolCall(each["function"]["name"], json.dumps(each["function"]["arguments"])) for each in calls]
            opening, text, closing = family.written(own)
            made["content"] += f"{opening}{protect(text)}{closing}"
        elif len(calls) > 1 and loses_calls(template):
            raise SettingsError(
                f"a message has {len(calls)} calls, and this chat template writes the first of them alone",
                hint="Give every call a message of its own, with the tool's answer behind it.",
            )
        else:
            made["tool_calls"] = [everywhere(each, protect) for each in calls]
    return made


def everywhere(value: Any, change: Callable[[str], str]) -> Any:
    """A value of JSON with every text in it changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {change(key): everywhere(item, change) for key, item in value.items()}
    return [everywhere(item, change) for item in value] if isinstance(value, list | tuple) else value
