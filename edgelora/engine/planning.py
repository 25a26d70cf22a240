"""From a request to a plan: which adapters, which tokens, which rules; what makes no sense is refused here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from edgelora.engine.adapters import BARE, Adapter, Adapters
from edgelora.engine.generation import Plan
from edgelora.engine.model import Model
from edgelora.engine.overflow import shortened
from edgelora.engine.prompt import encode_prompt
from edgelora.engine.stream import Request
from edgelora.errors import ContextOverflowError, ModelFileError, SettingsError
from edgelora.messages import Message, check_messages, check_tool_turns, prepared, user_message
from edgelora.sampling import Sampling
from edgelora.template import ChatTemplate
from edgelora.tools.use import ToolUse, tool_use

ERROR, TRUNCATE_MIDDLE = "error", "truncate-middle"
ON_OVERFLOW = (ERROR, TRUNCATE_MIDDLE)
MAX_BEGINNINGS = 1024
REPLY_SHARE = 4
"""Of the context window, the part that a conversation which is cut leaves for a reply of unknown length."""


class Planner:
    """Looks up what requests ask for.

    Args:
        n_ctx: tokens that a conversation and its reply may take.
        template: instead of the adapters' and the base's own.
        on_overflow: what becomes of a conversation that does not fit, one of `ON_OVERFLOW`.
    """

    def __init__(
        self, model: Model, adapters: Adapters, n_ctx: int, template: ChatTemplate | None, on_overflow: str
    ) -> None:
        self._model, self._adapters, self._n_ctx = model, adapters, n_ctx
        self._explicit_template, self._base_template = template, model.chat_template()
        self._on_overflow = on_overflow
        self._beginnings: dict[tuple[str, str], list[int]] = {}  # of conversations with an adapter

    def plan(self, request: Request) -> Plan:
        """Everything that a request needs.

        Raises:
            SettingsError, ModelFileError, ContextOverflowError: as `Engine.stream` says.
        """
        adapters = self._adapters_of(request)
        first = adapters[0][0] if adapters else BARE
        inside = first if first.bundled else None
        sampling = resolve_sampling(request.sampling, first)
        _check_numbers(request)
        tools = self._tools(request, first, sampling.schema)
        if tools and sampling.grammar is not None:
            raise SettingsError(
                "tools are given, and a grammar for the reply, which no call could follow",
                hint="Leave one of them out, say tool_choice none, or give a JSON schema instead of a grammar.",
            )
        if tools and tools.grammar is not None:
            sampling = replace(sampling, grammar=tools.grammar, schema=None)
        tokens, dropped, public = self._prompt(request, first, sampling, tools)
        begins = first_adapted(adapters, tokens)
        acting = () if inside else adapters
        return Plan(
            acting,
            tokens,
            sampling,
            self._n_ctx,
            request.deterministic,
            begins,
            dropped,
            inside,
            request.tenant,
            public,
            tools,
        )

    def encode(self, messages: Sequence[Message] | str, adapter: Adapter) -> list[int]:
        """The prompt's tokens, with the adapter's system prompt where the conversation has none."""
        return self._tokens(self._conversation(messages, adapter), adapter)

    def reply_tokens(self, request: Request, reply: str) -> list[int]:
        """The tokens of a reply to a request's conversation, as its template writes it, up to the one that ends it.

        Where the template writes the conversation otherwise once it has the reply, or a token would reach from one into
        the other, the reply is tokenized apart.

        Raises:
            SettingsError, ModelFileError: as `Engine.stream` says.
        """
        adapters = self._adapters_of(request)
        adapter = adapters[0][0] if adapters else BARE
        conversation = self._conversation(cast(Sequence[Message] | str, request.messages), adapter)
        tools = self._tools(request, adapter, None)
        prompt = self._tokens(conversation, adapter, tools)
        answer: Message = {"role": "assistant", "content": reply}
        whole = self._tokens([*conversation, answer], adapter, tools, closed=True)
        ends = self._model.tokenizer.end_tokens
        if whole[: len(prompt)] == prompt and len(whole) > len(prompt):
            rest = whole[len(prompt) :]
            end = next((at for at, token in enumerate(rest) if token in ends), len(rest) - 1)
            return rest[: end + 1]
        end_tokens = [token for token in whole if token in ends]
        return [*self._model.tokenizer.encode(reply, special=False), *end_tokens[-1:]]

    def _tools(self, request: Request, adapter: Adapter, schema: Mapping[str, Any] | None) -> ToolUse | None:
        if not request.tools and request.tool_choice is None:
            return None
        if request.raw:
            raise SettingsError("tools are for conversations, and raw texts are none")
        template, parallel = self._template(adapter), request.parallel_tool_calls
        return tool_use(request.tools, request.tool_choice, template, parallel=parallel, schema=schema)

    def _prompt(
        self, request: Request, adapter: Adapter, sampling: Sampling, tools: ToolUse | None
    ) -> tuple[list[int], int, int]:
        """The tokens, how many of the conversation's were left out, and how many of the first are the operator's."""
        if not isinstance(request.raw, bool):
            raise SettingsError(f"raw is {request.raw!r}, expected true or false")
        if request.raw:
            tokens = self.raw_tokens(request.messages, adapter)
            if len(tokens) >= self._n_ctx:
                raise self._too_long(len(tokens))
            return tokens, 0, 0
        conversation = self._conversation(cast(Sequence[Message] | str, request.messages), adapter)
        tokens, dropped = self._fitting(conversation, adapter, sampling, tools)
        return tokens, dropped, 0 if request.tenant is None else self._public(tokens, adapter)

    def raw_tokens(self, text: object, adapter: Adapter) -> list[int]:
        """The tokens of a text that is taken as it is, beginning as this base's texts do.

        Raises:
            SettingsError: neither text nor token ids, or nothing.
        """
        tokenizer = self._model.tokenizer
        if isinstance(text, str):
            tokens = tokenizer.encode(text, special=True)
            if tokenizer.adds_bos and tokens[:1] != [tokenizer.bos]:
                tokens.insert(0, tokenizer.bos)
        elif isinstance(text, Sequence) and all(
            isinstance(token, int) and not isinstance(token, bool) and 0 <= token < tokenizer.size for token in text
        ):
            tokens = list(text)
        else:
            raise SettingsError(f"a raw prompt is text or token ids from 0, below {tokenizer.size}")
        if not tokens:
            raise SettingsError("the prompt is empty, and this base begins with no token of its own")
        return adapter.bundled.placed(tokens, tokenizer.bos) if adapter.bundled else tokens

    def _public(self, tokens: Sequence[int], adapter: Adapter) -> int:
        """How many of the first tokens are the operator's own: those that all conversations with an adapter begin
        with."""
        named = adapter.name, adapter.content_hash
        if named not in self._beginnings:
            if len(self._beginnings) >= MAX_BEGINNINGS:
                self._beginnings.clear()
            one, other = (self.encode(text, adapter) for text in ("a", "b"))
            self._beginnings[named] = one[: _common(one, other)]
        return _common(tokens, self._beginnings[named])

    def _conversation(self, messages: Sequence[Message] | str, adapter: Adapter) -> list[Message]:
        if not isinstance(messages, (str, Sequence)):
            raise SettingsError(f"messages are {messages!r}, expected text or a list of {{role, content}}")
        conversation = [user_message(messages)] if isinstance(messages, str) else list(messages)
        if problem := check_messages(conversation) or check_tool_turns(conversation):
            raise SettingsError(problem)
        conversation = list(prepared(conversation))
        if conversation[0]["role"] != "system" and adapter.contract and adapter.contract.system:
            conversation.insert(0, {"role": "system", "content": adapter.contract.system})
        if conversation[0]["role"] == "system" and not conversation[0]["content"]:
            conversation.pop(0)
        return conversation

    def _tokens(
        self, conversation: Sequence[Message], adapter: Adapter, tools: ToolUse | None = None, *, closed: bool = False
    ) -> list[int]:
        """Of a conversation that a reply follows, or of a `closed` one that ends with it."""
        shown, opening = (tools.shown, tools.opening) if tools else (None, "")
        tokens = encode_prompt(
            self._model.tokenizer,
            self._template(adapter),
            conversation,
            add_generation_prompt=not closed,
            tools=shown,
            opening="" if closed else opening,
        )
        return adapter.bundled.placed(tokens, self._model.tokenizer.bos) if adapter.bundled else tokens

    def _fitting(
        self, conversation: list[Message], adapter: Adapter, sampling: Sampling, tools: ToolUse | None
    ) -> tuple[list[int], int]:
        """The prompt's tokens, and how many of the conversation's were left out."""
        tokens = self._tokens(conversation, adapter, tools)
        if len(tokens) < self._n_ctx:
            return tokens, 0
        whole = len(tokens)
        if self._on_overflow == TRUNCATE_MIDDLE:
            reply = min(sampling.max_tokens or self._n_ctx // REPLY_SHARE, self._n_ctx // 2)
            room = max(1, self._n_ctx - reply)
            cut = shortened(conversation, lambda messages: len(self._tokens(messages, adapter, tools)) <= room)
            if cut is not None:
                tokens = self._tokens(cut, adapter, tools)
                return tokens, whole - len(tokens)
        raise self._too_long(whole)

    def _too_long(self, length: int) -> ContextOverflowError:
        trained = self._model.n_ctx_train
        return ContextOverflowError(
            f"the conversation is {length} tokens long, and the reply needs room too; the context window is "
            f"{self._n_ctx} tokens",
            hint=f"Shorten it, ask for a larger window (this base was trained with {trained}), or leave out its "
            f"middle: --on-overflow={TRUNCATE_MIDDLE}.",
        )

    def _adapters_of(self, request: Request) -> tuple[tuple[Adapter, float], ...]:
        """The request's adapters with their scales, none for the bare base."""
        wanted = request.adapter
        if not isinstance(wanted, Mapping):
            adapter = self._adapters.get(wanted)
            scale = adapter.scale if request.scale is None else _number(request.scale, "scale")
            return () if adapter is BARE else _as_bundled(((adapter, scale),))
        times = 1.0 if request.scale is None else _number(request.scale, "scale")
        blend = [
            (self._adapters.get(name), times * _number(scale, f"scale of {name}")) for name, scale in wanted.items()
        ]
        return _as_bundled(tuple((adapter, scale) for adapter, scale in blend if adapter is not BARE))

    def _template(self, adapter: Adapter) -> ChatTemplate:
        """The explicit template, else the adapter's, else the base's.

        Raises:
            ModelFileError: there is none.
        """
        found = self._explicit_template or adapter.template or self._base_template
        if found is None:
            raise ModelFileError(
                f"{self._model.path} has no chat template"
                + ("" if adapter is BARE else f", nor has adapter {adapter.name}"),
                hint="Name one with --chat-template: chatml, llama2, plain, or a Jinja file.",
            )
        return found


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with."""
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def first_adapted(adapters: Sequence[tuple[Adapter, float]], tokens: Sequence[int]) -> int:
    """The first token that the adapters act on: 0, or where an activated LoRA's invocation comes last, as in PEFT
    (`calculate_alora_offsets`, peft/tuners/lora/variants.py).

    Raises:
        SettingsError: the invocation is not in the prompt; or a blend with an activated LoRA.
    """
    activated = [adapter for adapter, _ in adapters if adapter.invocation]
    if not activated:
        return 0
    if len(adapters) > 1:
        names = ", ".join(adapter.name for adapter, _ in adapters)
        raise SettingsError(f"a blend of {names}: {activated[0].name} is an activated LoRA, which acts alone")
    wanted = list(activated[0].invocation)
    starts = range(len(tokens) - len(wanted), -1, -1)
    found = next((at for at in starts if list(tokens[at : at + len(wanted)]) == wanted), None)
    if found is None:
        raise SettingsError(
            f"adapter {activated[0].name} is an activated LoRA; its invocation, tokens {wanted}, is not in the prompt",
            hint="Its chat template, or the conversation, has to hold the text that it was trained to begin with.",
        )
    return found


def _as_bundled(adapters: tuple[tuple[Adapter, float], ...]) -> tuple[tuple[Adapter, float], ...]:
    """These adapters, as they are asked for; of a bundle, one at the scale it was put in at.

    Raises:
        SettingsError: several of a bundle, or another scale.
    """
    inside = [(adapter, scale) for adapter, scale in adapters if adapter.bundled]
    if inside and len(adapters) > 1:
        raise SettingsError(
            f"a blend of {', '.join(adapter.name for adapter, _ in adapters)}: a bundle has one adapter at a time",
            hint="Blend the files: edgelora convert --blend.",
        )
    for adapter, scale in inside:
        if not math.isclose(scale, adapter.scale, rel_tol=1e-6):
            raise SettingsError(
                f"adapter {adapter.name} is in the bundle at scale {adapter.scale:g} for good; asked for was {scale:g}",
                hint="Bundle it again at that scale: --adapter NAME=PATH@SCALE.",
            )
    return adapters


def _check_numbers(request: Request) -> None:
    """Priority and deadline are numbers, and a tenant is a name.

    Raises:
        SettingsError: they are not.
    """
    if isinstance(request.priority, bool) or not isinstance(request.priority, int):
        raise SettingsError(f"priority is {request.priority!r}, expected a whole number")
    if not isinstance(request.tenant, str | None):
        raise SettingsError(f"tenant is {request.tenant!r}, expected text")
    if request.deadline is not None and _number(request.deadline, "deadline") <= 0:
        raise SettingsError(f"deadline is {request.deadline!r}, expected seconds, more than 0")


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise SettingsError(f"{name} is {value!r}, expected a finite number")
    return float(value)


def resolve_sampling(given: Sampling | Mapping[str, Any] | None, adapter: Adapter) -> Sampling:
    """The request's settings over the adapter's defaults; the adapter's stop strings always hold.

    Raises:
        SettingsError: an unknown name or a value out of range.
    """
    if not isinstance(given, Sampling | Mapping | None):
        raise SettingsError(f"sampling is {given!r}, expected a Sampling or a mapping")
    contract = adapter.contract
    sampling = given if isinstance(given, Sampling) else Sampling.from_mapping(given or {}, adapter.sampling)
    stops = (*(contract.stop if contract else ()), *sampling.stop)
    return replace(sampling, stop=tuple(dict.fromkeys(stops)))
