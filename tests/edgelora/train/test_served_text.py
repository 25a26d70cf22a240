"""What is trained is what serving shows: under every real template, and in the ids of a real vocabulary."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from edgelora.dataset import conversation_of
from edgelora.engine.prompt import encode_prompt
from edgelora.errors import ModelFileError
from edgelora.messages import Conversation
from edgelora.rows import Row
from edgelora.template import BUILTIN, ChatTemplate
from edgelora.tools.families import family_of
from edgelora.train.passages import PassageFinder
from tests.conftest import ROOT, SHARED

from .conftest import chat

FOLDER = ROOT / "build" / "reference" / "models" / "templates"
TEMPLATES = {path.stem: path for path in sorted(FOLDER.glob("*.jinja"))}
QWEN = SHARED / "tokenizers" / "qwen2.5"
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a place.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "Where."}},
            "required": ["city"],
        },
    },
}


def calling(identifier: str, city: str) -> dict[str, Any]:
    function = {"name": "weather", "arguments": json.dumps({"city": city})}
    return {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": identifier, "type": "function", "function": function}],
    }


def answering(identifier: str, content: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": identifier, "content": content}


SAYS = chat("Weather in Oslo?", "It is 4 degrees.", "And in Rome?", "It is 17.")
USES: list[Any] = [
    SAYS[0],
    calling("call00001", "Oslo"),
    answering("call00001", "4 degrees"),
    *SAYS[1:3],
    calling("call00002", "Tromsø"),
    answering("call00002", "17 degrees"),
    SAYS[3],
]
SYSTEM: list[Any] = [{"role": "system", "content": "Be brief."}]
TALKS: dict[str, dict[str, Any]] = {
    "turns": {"messages": SAYS},
    "system prompt": {"messages": SYSTEM + SAYS},
    "tools": {"messages": USES, "tools": [WEATHER]},
    "tools and system prompt": {"messages": SYSTEM + USES, "tools": [WEATHER]},
}
OPENS_A_THOUGHT = {
    *("Apriel-1.6-15b-Thinker-fixed", "Cohere2MoE", "CohereForAI-c4ai-command-r7b-12-2024-tool_use", "GLM-4.7-Flash"),
    *("MiniMax-M2", "NVIDIA-Nemotron-3-Nano-30B-A3B-BF16", "Qwen-QwQ-32B", "Spark2.5", "deepseek-ai-DeepSeek-V3.2"),
    *("deepseek-ai-DeepSeek-R1-Distill-Llama-8B", "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B", "google-gemma-4-31B-it"),
    *("google-gemma-4-31B-it-interleaved", "llama-cpp-deepseek-r1"),
}
"""Their prompts begin a reply with a thought that the conversation does not show: data of replies alone fits none."""
OPENS_A_THOUGHT_BEFORE_CALLS = {"NVIDIA-Nemotron-Nano-v2"}
NEEDS_TOOLS = {"CohereForAI-c4ai-command-r-plus-tool_use"} | {
    name for name in TEMPLATES if name.startswith(("NousResearch-Hermes", "fireworks-ai"))
}
NO_SYSTEM_PROMPT = {"google-gemma-2-2b-it"}


class TextTokenizer:
    """Takes the place of a vocabulary and keeps the text that serving makes."""

    control_pattern = None

    def text_of(self, which: str) -> str:
        return {"bos": "<s>", "eos": "</s>"}[which]

    def encode(self, text: str, *, special: bool) -> list[str]:
        assert special
        return [text]


def served_text(template: ChatTemplate, messages: Any, tools: Any) -> str:
    tokenizer: Any = TextTokenizer()
    (text,) = encode_prompt(tokenizer, template, messages, tools=tools or None)
    return str(text)


def conversation(data: dict[str, Any]) -> Conversation:
    found = conversation_of(Row(1, data), "x:1")
    assert isinstance(found, Conversation), found
    return found


def is_refused(name: str, template: ChatTemplate, talk: Conversation) -> bool:
    if talk.tools:
        return family_of(template) is None or name in OPENS_A_THOUGHT | OPENS_A_THOUGHT_BEFORE_CALLS
    has_system = talk.messages[0]["role"] == "system"
    return name in OPENS_A_THOUGHT | NEEDS_TOOLS or (has_system and name in NO_SYSTEM_PROMPT)


def test_there_are_templates() -> None:
    if not FOLDER.is_dir():
        pytest.skip("llama.cpp's source, which brings templates, is not in build/reference")
    assert set(TEMPLATES) >= OPENS_A_THOUGHT | OPENS_A_THOUGHT_BEFORE_CALLS | NEEDS_TOOLS | NO_SYSTEM_PROMPT


@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_every_reply_follows_the_prompt_that_serving_makes(name: str, talk: str) -> None:
    source = TEMPLATES[name].read_text(encoding="utf-8")
    template, found = ChatTemplate(source), conversation(TALKS[talk])
    special = set(re.findall(r"<[^<>\s'\"{}%]+>|\[[A-Z_/]+\]", source))
    finder = PassageFinder(template, bos_token="<s>", eos_token="</s>", special_tokens=special)
    if is_refused(name, template, found):
        with pytest.raises(ModelFileError):
            finder.passages(found.messages, tools=found.tools)
        return
    passages = finder.passages(found.messages, tools=found.tools)
    spans = [(passage.text, *span) for passage in passages for span in passage.spans]
    replies = [index for index, message in enumerate(found.messages) if message["role"] == "assistant"]
    assert len(spans) == len(replies)
    for index, (text, start, end) in zip(replies, spans, strict=True):
        reply, trained = found.messages[index], text[start:end]
        assert text[:start] == served_text(template, TALKS[talk]["messages"][:index], found.tools)
        shown = [reply["content"], *(call["function"]["name"] for call in reply.get("tool_calls", ()))]
        assert all(part in trained for part in shown), trained
        assert "degrees<" not in trained  # what a tool answered
        assert "Be brief." not in trained


@pytest.mark.parametrize(
    ("name", "after_call", "after_text"),
    [
        ("Qwen-Qwen2.5-7B-Instruct", "</tool_call><|im_end|>", "<|im_end|>"),
        ("GLM-4.6", "</tool_call><|observation|>", "<|user|>"),  # the next turn's
        ("meetkai-functionary-medium-v3.1", "</function><|eom_id|>", "<|eot_id|>"),
        ("openai-gpt-oss-120b", "}<|call|>", "<|return|>"),
        ("mistralai-Mistral-Nemo-Instruct-2407", "}]</s>", "</s>"),
        ("meta-llama-Llama-3.1-8B-Instruct", "}<|eot_id|>", "<|eot_id|>"),
        ("moonshotai-Kimi-K2", "<|tool_calls_section_end|><|im_end|>", "<|im_end|>"),
        ("Bielik-11B-v3.0-Instruct", "</tool_call><|im_end|>", "<|im_end|>"),
    ],
)
def test_what_ends_a_call_and_a_text_is_trained(name: str, after_call: str, after_text: str) -> None:
    if name not in TEMPLATES:
        pytest.skip("llama.cpp's source, which brings templates, is not in build/reference")
    source = TEMPLATES[name].read_text(encoding="utf-8")
    special = set(re.findall(r"<[^<>\s'\"{}%]+>", source))
    finder = PassageFinder(ChatTemplate(source), bos_token="<s>", eos_token="</s>", special_tokens=special)
    found = conversation(TALKS["tools"])
    passages = finder.passages(found.messages, tools=found.tools)
    call, *_, last = [passage.text[a:b] for passage in passages for a, b in passage.spans]
    assert call.endswith(after_call)
    assert last.endswith(f"It is 17.{after_text}")


@pytest.mark.parametrize("template", [BUILTIN["chatml"], BUILTIN["llama2"]])
def test_a_template_without_tools_is_refused(template: str) -> None:
    finder = PassageFinder(ChatTemplate(template), bos_token="<s>", eos_token="</s>", special_tokens=())
    for data in ({"messages": SAYS, "tools": [WEATHER]}, {"messages": USES}):
        found = conversation(data)
        with pytest.raises(ModelFileError, match="tools cannot be used with this chat template") as caught:
            finder.passages(found.messages, tools=found.tools)
        assert "--chat-template" in caught.value.hint
    assert finder.passages(conversation({"messages": SAYS}).messages)  # the twin


def load_qwen() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(SHARED / "tokenizers" / "qwen2.5")


def load_gpt2() -> Any:
    from transformers import GPT2TokenizerFast

    folder = SHARED / "tokenizers" / "gpt2"
    return GPT2TokenizerFast(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"))


def load_stories() -> Any:
    from edgelora.train.sentencepiece import load_sentencepiece

    return load_sentencepiece(SHARED / "models" / "stories-260k")


WRITTEN_BY = ("Qwen-Qwen2.5-7B-Instruct", "Qwen-Qwen3-0.6B", "GLM-4.6", "meta-llama-Llama-3.1-8B-Instruct")
WRITTEN_BY += ("mistralai-Mistral-Nemo-Instruct-2407", "ibm-granite-granite-3.3-2B-Instruct", "LFM2-8B-A1B")


@pytest.mark.train
@pytest.mark.parametrize(
    "load", [load_qwen, load_gpt2, load_stories], ids=["BPE of Qwen", "BPE of GPT-2", "SentencePiece"]
)
def test_with_real_tokenizers_a_reply_follows_the_ids_of_its_prompt(load: Any) -> None:
    """Under templates of other models too: their marks are then text, which tokens may reach across."""
    from edgelora.train.data import IGNORED, finder_for, tokenize_conversations

    if not (SHARED / "tokenizers").is_dir() or not TEMPLATES:
        pytest.skip("needs ../shared/data/tokenizers, and llama.cpp's source in build/reference")
    tokenizer = load()
    for name in WRITTEN_BY:
        template = ChatTemplate(TEMPLATES[name].read_text(encoding="utf-8"))
        finder = finder_for(tokenizer, template)
        for talk in TALKS.values():
            found = conversation(talk)
            rows = tokenize_conversations([found], tokenizer, finder, 100_000).rows
            starts = [
                row.input_ids[:at]
                for row in rows
                for at in range(len(row.labels))
                if row.labels[at] != IGNORED and (at == 0 or row.labels[at - 1] == IGNORED)
            ]
            replies = [index for index, message in enumerate(found.messages) if message["role"] == "assistant"]
            prompts = [finder.render(found.messages[:i], reply_next=True, tools=found.tools) for i in replies]
            assert starts == [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts], name


@pytest.mark.train
def test_ids_of_a_conversation_with_tools_are_those_of_serving(tmp_path: Path) -> None:
    """Qwen 2.5's vocabulary in transformers, and as a GGUF in llama.cpp."""
    if not QWEN.is_dir():
        pytest.skip("../shared/data is absent: no vocabulary with tokens for calls")
    from transformers import AutoTokenizer

    from converters.tokenizer import load_vocabulary
    from converters.tokenizer_rules import QWEN_RULES
    from converters.writer import header_bytes
    from edgelora.engine.model import Model
    from edgelora.train.data import IGNORED, finder_for, tokenize_conversations

    folder = tmp_path / "qwen"
    folder.mkdir()
    for file in QWEN.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "config.json").write_text(
        json.dumps({"model_type": "qwen2", "vocab_size": 151936, "eos_token_id": 151645})
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    template = ChatTemplate(tokenizer.chat_template)
    found = conversation(TALKS["tools and system prompt"])
    (row,) = tokenize_conversations([found], tokenizer, finder_for(tokenizer, template), 4096).rows
    starts = [i for i in range(1, len(row.labels)) if row.labels[i] != IGNORED and row.labels[i - 1] == IGNORED]
    vocabulary = load_vocabulary(folder, 151936, QWEN_RULES)
    gguf = folder / "qwen.gguf"
    gguf.write_bytes(header_bytes({"general.architecture": "llama", **vocabulary.metadata}, []))
    model = Model(gguf, vocab_only=True)
    try:
        replies = [i for i, message in enumerate(found.messages) if message["role"] == "assistant"]
        for start, reply in zip(starts, replies, strict=True):
            served = encode_prompt(model.tokenizer, template, found.messages[:reply], tools=found.tools)
            assert row.input_ids[:start] == served
    finally:
        model.close()
    trained = tokenizer.decode([label for label in row.labels if label != IGNORED])
    assert trained == (
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call><|im_end|>'
        "It is 4 degrees.<|im_end|>"
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Tromsø"}}\n</tool_call><|im_end|>It is 17.<|im_end|>'
    )
