"""Templates of released models, made into a bundle's: llama.cpp's own reader of templates renders both alike."""

from __future__ import annotations

import os
import re
import urllib.error
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from edgelora.bundle_template import SAMPLES, Choice, Texts, adapted
from edgelora.errors import ModelFileError
from edgelora.messages import Message
from edgelora.template import ChatTemplate
from tests.conftest import ROOT
from tests.edgelora.test_bundle_server import SERVER, Ask, serving

TEMPLATES = sorted((ROOT / "build" / "reference" / "models" / "templates").glob("*.jinja"))
TEXTS = Texts("<|endoftext|>", "<|im_end|>")  # the tiny base's, which llama-server renders with
SPECIAL = re.compile(r"<[^<>\n]*>|\[[A-Z_]+\]")
CONVERSATIONS: tuple[Sequence[Message], ...] = SAMPLES[:2]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not TEMPLATES, reason="llama.cpp's source, which brings templates, is not in build/reference"),
]


def first_of(source: str) -> str:
    """The special token that its conversations begin with; skips a template that renders none of them."""
    rendered = []
    for sample in SAMPLES:
        try:
            made = ChatTemplate(source).render(
                sample, add_generation_prompt=True, bos_token=TEXTS.bos, eos_token=TEXTS.eos
            )
        except ModelFileError:
            continue
        rendered.append(made)
    if not rendered:
        pytest.skip("it needs more than messages")
    firsts = {found[0] if (found := SPECIAL.match(text)) else "" for text in rendered}
    return firsts.pop() if len(firsts) == 1 else ""


def prompt(ask: Ask, messages: Sequence[Message], chosen: Mapping[str, Any]) -> str | None:
    """What llama-server renders; None where the template refuses the conversation."""
    try:
        return str(ask("/apply-template", {"messages": messages, **chosen})["prompt"])
    except urllib.error.HTTPError:
        return None


@pytest.mark.skipif(not os.access(SERVER, os.X_OK), reason=f"{SERVER} is not built")
@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_a_released_template(path: Path, base: Path, tmp_path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    first = first_of(source)
    names = ("support", "billing")
    choices = [Choice(name, f"<|{name}|>", first, source) for name in names]
    made = tmp_path / "made.jinja"
    made.write_text(adapted(source, choices, TEXTS), encoding="utf-8")
    with serving(base, tmp_path / "own", "--chat-template-file", path) as ask:
        wanted = [prompt(ask, messages, {}) for messages in CONVERSATIONS]
    assert any(wanted)
    with serving(base, tmp_path / "log", "--chat-template-file", made) as ask:
        assert [prompt(ask, messages, {}) for messages in CONVERSATIONS] == wanted
        for choice in choices:
            named = {"chat_template_kwargs": {"adapter": choice.name}}
            found = [prompt(ask, messages, named) for messages in CONVERSATIONS]
            assert found == [None if text is None else choice.applied(text) for text in wanted]
