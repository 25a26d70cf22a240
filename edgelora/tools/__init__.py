"""Tools in a conversation: shown to the model by the chat template, and its calls read back from the reply.

How a model writes a call is decided by the template, not by the model's name: the template writes a call of ours into a
conversation, and the family is the one that reads it back (`families`). A template that does not show tools is refused.

    use = tool_use(tools, "auto", template)                  definitions: checked; families: how calls are written
    tokens = encode_prompt(..., tools=use.shown, opening=use.opening)
    parser = use.parser()                                    reading: text and calls, as the reply comes
    text = parser.feed("It is ") + parser.feed("<tool_")     "It is", and nothing of what may become a call
    text += parser.end()
    parser.calls                                             [ToolCall("weather", '{"city": "Oslo"}')]

`forcing` makes the grammars: of replies that have to be calls ("required", or a tool by its name), of those that are
calls or JSON (beside a schema), and of those in which the arguments of strict tools fit (`function.strict`).
"""

from edgelora.tools.calls import Family, ToolCall
from edgelora.tools.definitions import Choice, Tool, Tools, checked_choice, checked_tools
from edgelora.tools.families import family_of, required_family
from edgelora.tools.forcing import Forced, forced
from edgelora.tools.reading import Parsed, Parser, new_call_id, parse
from edgelora.tools.use import ToolUse, tool_use

__all__ = [
    "Choice",
    "Family",
    "Forced",
    "Parsed",
    "Parser",
    "Tool",
    "ToolCall",
    "ToolUse",
    "Tools",
    "checked_choice",
    "checked_tools",
    "family_of",
    "forced",
    "new_call_id",
    "parse",
    "required_family",
    "tool_use",
]
