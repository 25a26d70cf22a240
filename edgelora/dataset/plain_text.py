"""Rows of plain text, to go on with a base's training (continued pretraining): no template, and every token is trained.

    {"text": "It was a dark and stormy night; the rain fell in torrents ..."}

A text begins and ends as a document does for the tokenizer; what is longer than a sequence becomes several.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgelora.json_type import json_type
from edgelora.messages import Conversation

LABELS = ("label", "labels", "category", "class", "intent", "target", "sentiment")
"""Fields that make of a text something to be classified: trained as plain text, what they say would be lost."""


def read_plain_text(data: Mapping[str, Any], source: str) -> Conversation | str:
    text = data["text"]
    if labels := [f"`{name}`" for name in LABELS if name in data]:
        return (
            f"`text` beside {' and '.join(labels)}: as plain text, the text alone would be learned; "
            "write the two as `prompt` and `completion`"
        )
    if not isinstance(text, str):
        return f"`text` is a JSON {json_type(text)}, expected a string"
    if not text.strip():
        return "`text` is empty, so nothing to learn from"
    return Conversation(({"role": "assistant", "content": text},), source, templated=False, plain=True)
