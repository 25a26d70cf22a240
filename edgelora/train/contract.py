"""The contract of a trained adapter: what serving must know to give it the text that it was trained on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from edgelora.contract import GOLDEN_MESSAGES, Contract
from edgelora.errors import ModelFileError
from edgelora.train.base import Base
from edgelora.train.passages import PassageFinder
from edgelora.train.probes import Prompt


def contract_of_run(
    base: Base, fingerprint: str, tokenizer: Any, finder: PassageFinder, prompts: Sequence[Prompt]
) -> Contract:
    """Base, template, golden ids, stops and system prompt; the training summary is added when there is one.

    Raises:
        ModelFileError: the template refuses an ordinary question and answer.
    """
    try:
        golden = finder.render(GOLDEN_MESSAGES, reply_next=True)
    except ModelFileError as error:
        raise ModelFileError(f"{error.message} (question, reply, question)", hint=error.hint) from None
    return Contract(
        base_name=base.name,
        base_fingerprint=fingerprint,
        chat_template=finder.template.source,
        golden_messages=GOLDEN_MESSAGES,
        golden_tokens=tuple(tokenizer(golden, add_special_tokens=False)["input_ids"]),
        stop=finder.stop_strings(),
        system=shared_system_prompt(prompts),
    )


def shared_system_prompt(prompts: Sequence[Prompt]) -> str:
    """The system prompt that every row begins with; empty where rows differ or one has none."""
    firsts = {prompt[0]["content"] if prompt and prompt[0]["role"] == "system" else "" for prompt in prompts}
    return firsts.pop() if len(firsts) == 1 else ""
