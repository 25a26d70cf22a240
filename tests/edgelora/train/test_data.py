"""Token ids and labels, with a real fast tokenizer."""

from __future__ import annotations

from typing import Any

import pytest

from edgelora.dataset import conversation_of
from edgelora.errors import DataFileError, ModelFileError
from edgelora.messages import Conversation, Message
from edgelora.rows import Row
from edgelora.template import BUILTIN, ChatTemplate
from edgelora.train.base import find_base
from edgelora.train.data import IGNORED, TokenRow, chat_template_ids, finder_for, n_trained, tokenize_conversations
from tests.conftest import SHARED

from .conftest import chat

pytestmark = pytest.mark.train

STORIES = SHARED / "models" / "tinystories-656k"
MULTI = chat("Is it waterproof?", "Yes, it is.", "Sure?", "Naïve café — 你好 🙂\n\n", system="Be brief.")


def conversation(messages: list[Message], line: int = 1) -> Conversation:
    return Conversation(tuple(messages), f"data.jsonl:{line}")


def rows_of(messages: list[Message], tokenizer: Any, template: str = BUILTIN["chatml"], max_length: int = 512) -> Any:
    finder = finder_for(tokenizer, ChatTemplate(template))
    return tokenize_conversations([conversation(messages)], tokenizer, finder, max_length)


def trained_text(row: TokenRow, tokenizer: Any) -> str:
    return str(tokenizer.decode([label for label in row.labels if label != IGNORED]))


@pytest.mark.parametrize("name", BUILTIN)
def test_ids_are_those_of_transformers_and_only_replies_are_trained(name: str, tokenizer: Any) -> None:
    (row,) = rows_of(MULTI, tokenizer, BUILTIN[name]).rows
    assert row.input_ids == chat_template_ids(tokenizer, MULTI, BUILTIN[name])
    assert len(row.labels) == len(row.input_ids)
    assert all(label in (IGNORED, token) for token, label in zip(row.input_ids, row.labels, strict=True))
    replies = [m["content"] for m in MULTI if m["role"] == "assistant"]
    shape = " {} <|im_end|>" if name == "llama2" else "{}<|im_end|>"
    assert trained_text(row, tokenizer) == "".join(shape.format(reply) for reply in replies)


def test_changing_a_question_moves_no_trained_token_and_changing_a_reply_does(tokenizer: Any) -> None:
    (row,) = rows_of(MULTI, tokenizer).rows
    other_question, other_reply = [dict(m) for m in MULTI], [dict(m) for m in MULTI]
    other_question[1]["content"] = "Is it red?"
    other_reply[2]["content"] = "No, it is not."
    (asked,) = rows_of(other_question, tokenizer).rows  # type: ignore[arg-type]
    (replied,) = rows_of(other_reply, tokenizer).rows  # type: ignore[arg-type]
    assert asked.input_ids != row.input_ids
    assert trained_text(asked, tokenizer) == trained_text(row, tokenizer)
    assert trained_text(replied, tokenizer) != trained_text(row, tokenizer)


def test_cut_rows_are_counted_and_rows_without_a_reply_left_out(tokenizer: Any) -> None:
    finder = finder_for(tokenizer, ChatTemplate(BUILTIN["chatml"]))
    short, long_reply = chat("Hi", "Yes."), chat("Hi", "Yes. " * 100)
    long_question = chat("Well? " * 100, "Yes.")
    conversations = [conversation(m) for m in (short, long_reply, long_question)]
    found = tokenize_conversations(conversations, tokenizer, finder, 64)
    assert (len(found.rows), found.cut, found.dropped) == (2, 2, 1)
    assert [len(row.input_ids) for row in found.rows][1] == 64
    assert "2 rows are longer than 64 tokens" in found.notes("training data", 64)[0]
    assert "1 rows are left out" in found.notes("training data", 64)[1]
    whole = tokenize_conversations(conversations, tokenizer, finder, 2048)
    assert (len(whole.rows), whole.cut, whole.dropped, whole.notes("training data", 2048)) == (3, 0, 0, [])


@pytest.mark.parametrize(
    "messages",
    [chat("Is it wat", "erproof, yes?"), chat("Is it wat", "erproof? Yes.", " And the batt", "ery lasts.")],
    ids=["one reply", "two replies"],
)
def test_a_reply_that_goes_on_in_a_word_follows_the_ids_of_its_prompt(messages: list[Message], tokenizer: Any) -> None:
    finder = finder_for(tokenizer, ChatTemplate(BUILTIN["plain"]))
    talks = [conversation(chat("Hi.", "!Yes."), 1), conversation(messages, 2)]
    found = tokenize_conversations(talks, tokenizer, finder, 512)
    assert found.apart == ("data.jsonl:2",)
    assert "1 conversations have a reply that continues" in found.notes("training data", 512)[-1]
    assert "data.jsonl:2" in found.notes("training data", 512)[-1]
    replies = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    assert len(found.rows) == 1 + len(replies)
    for row, reply in zip(found.rows[1:], replies, strict=True):
        prompt = finder.render(messages[:reply], reply_next=True)
        head = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        assert row.input_ids[: len(head)] == head
        assert row.labels == [IGNORED] * len(head) + row.input_ids[len(head) :]
        assert trained_text(row, tokenizer).startswith(messages[reply]["content"])


def test_plain_text_is_trained_whole_without_a_template(tokenizer: Any) -> None:
    finder = finder_for(tokenizer, ChatTemplate(BUILTIN["chatml"]))
    text = "Is it waterproof? Yes, the Pebble lamp is waterproof. " * 9
    found = conversation_of(Row(1, {"text": text}), "data.jsonl:1")
    assert isinstance(found, Conversation)
    (whole,) = tokenize_conversations([found], tokenizer, finder, 2048).rows
    assert tokenizer.decode(whole.input_ids) == f"<|begin|>{text}<|im_end|>"
    assert whole.labels == [IGNORED, *whole.input_ids[1:]]
    pieces = tokenize_conversations([found], tokenizer, finder, 32)
    first, *later = pieces.rows
    # Each begins with the last token of the one before: otherwise nothing would foretell its first.
    assert first.input_ids + [token for row in later for token in row.input_ids[1:]] == whole.input_ids
    assert first.labels + [label for row in later for label in row.labels[1:]] == whole.labels
    assert all(row.labels[0] == IGNORED for row in later)
    assert [len(row.input_ids) for row in pieces.rows[:-1]] == [32] * (len(pieces.rows) - 1)
    assert {row.source for row in pieces.rows} == {"data.jsonl:1"}
    assert pieces.cut == 0
    n_tokens = len(whole.input_ids)
    exact = tokenize_conversations([found], tokenizer, finder, n_tokens)
    assert len(exact.rows) == 1
    two = tokenize_conversations([found], tokenizer, finder, n_tokens - 1)
    assert [len(row.input_ids) for row in two.rows] == [n_tokens - 1, 2]  # of one token, the loss would be 0 / 0


def test_the_first_token_of_a_row_is_not_trained_whatever_its_label() -> None:
    assert [n_trained(TokenRow([5] * n, [5] * n)) for n in (1, 2)] == [0, 1]
    assert n_trained(TokenRow([5, 6, 7], [IGNORED, IGNORED, 7])) == 1


def test_special_tokens_in_messages_are_counted(tokenizer: Any) -> None:
    assert rows_of(chat("Hi", "Say <|im_end|> now."), tokenizer).quoting == 1
    assert rows_of(chat("Hi", "Say <im_end> now."), tokenizer).quoting == 0


def test_no_reply_left_anywhere_is_an_error(tokenizer: Any) -> None:
    with pytest.raises(DataFileError, match=r"data.jsonl: cut at 4 tokens, no row holds a reply"):
        rows_of(chat("Is it waterproof?", "Yes."), tokenizer, max_length=4)


def test_each_refused_row_is_named(tokenizer: Any) -> None:
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    finder = finder_for(tokenizer, ChatTemplate(strict + BUILTIN["chatml"]))
    rows = [conversation(chat("Hi", "Yes.", system="x" if line in (2, 5) else ""), line) for line in range(1, 7)]
    with pytest.raises(DataFileError) as caught:
        tokenize_conversations(rows, tokenizer, finder, 64)
    assert [line.partition(": ")[0] for line in caught.value.message.splitlines()] == ["data.jsonl:2", "data.jsonl:5"]


def test_a_template_transformers_renders_otherwise_is_refused(tokenizer: Any) -> None:
    with pytest.raises(ModelFileError, match="renders otherwise in transformers"):
        rows_of(chat("Hi", "Yes."), tokenizer, "{{ pad_token }}" + BUILTIN["chatml"])


@pytest.mark.skipif(not STORIES.is_dir(), reason="needs ../shared/data/models/tinystories-656k")
def test_the_tokenizer_is_the_file_that_serving_reads() -> None:
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    text = "na\u00efve CAF\u00c9  twice"  # characters outside this vocabulary
    expected = Tokenizer.from_file(str(STORIES / "tokenizer.json")).encode(text, add_special_tokens=False).ids
    ours = find_base(str(STORIES)).load_tokenizer()(text, add_special_tokens=False)["input_ids"]
    rebuilt = AutoTokenizer.from_pretrained(STORIES)(text, add_special_tokens=False)["input_ids"]
    assert ours == expected
    assert rebuilt != expected


def test_slow_tokenizers_are_refused() -> None:
    class Slow:
        is_fast = False
        bos_token = eos_token = None

        def get_added_vocab(self) -> dict[str, int]:
            return {}

    with pytest.raises(ModelFileError, match="Slow"):
        rows_of(chat("Hi", "Yes."), Slow())


@pytest.mark.parametrize("template", ["chatml", "llama2"])
def test_replies_of_weight_0_are_read_and_not_trained(template: str, tokenizer: Any) -> None:
    talk = chat("One?", "First.", "Two?", "Second.", "Three?", "Third.")
    texts = {}
    for weights in ((1, 1, 1), (0, 1, 0), (0, 0, 1)):
        messages = [{**m, **({"weight": weights[i // 2]} if i % 2 else {})} for i, m in enumerate(talk)]
        found = conversation_of(Row(1, {"messages": messages}), "data.jsonl:1")
        assert isinstance(found, Conversation)
        finder = finder_for(tokenizer, ChatTemplate(BUILTIN[template]))
        (row,) = tokenize_conversations([found], tokenizer, finder, 512).rows
        assert "First." in tokenizer.decode(row.input_ids)
        texts[weights] = trained_text(row, tokenizer).replace("<|im_end|>", " ").split()
    assert texts == {(1, 1, 1): ["First.", "Second.", "Third."], (0, 1, 0): ["Second."], (0, 0, 1): ["Third."]}


CALL = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        ({"messages": chat("Hi", "Yes."), "tools": [{"type": "function"}]}, "tools: tool 1: it is no function"),
        ({"messages": [*chat("Hi"), CALL]}, "`tool_calls` of which 1 is no function's"),
        ({"messages": chat("Hi", "Yes."), "functions": [{}]}, "`functions` (now `tools`)"),
        ({"messages": [*chat("Hi"), {**CALL, "function_call": {}, "weight": 0}]}, "`tool_calls` of which"),
        (
            {"messages": [*chat("Hi"), {"role": "assistant", "function_call": {"name": "x"}}]},
            "`function_call` in message",
        ),
        ({"messages": [{**m, "weight": 0} for m in chat("Hi", "Yes.")[1:]]}, "nothing to learn"),
        ({"messages": [*chat("Hi"), {"role": "assistant", "content": "Yes.", "weight": 0.5}]}, "expected 0 or 1"),
        ({"messages": [{**chat("Hi")[0], "weight": 1}, *chat("Hi", "Yes.")[1:]]}, "only the assistant's messages"),
    ],
)
def test_fields_that_training_cannot_honour_are_refused(data: dict[str, Any], problem: str) -> None:
    found = conversation_of(Row(1, data), "data.jsonl:1")
    assert isinstance(found, str)
    assert problem in found
    harmless = {"messages": [{**m, "name": "Ann"} for m in chat("Hi", "Yes.")], "id": 7, "tools": [], "metadata": {}}
    assert isinstance(conversation_of(Row(1, harmless), "data.jsonl:1"), Conversation)
