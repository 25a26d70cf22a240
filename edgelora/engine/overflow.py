"""A conversation that is too long, made to fit by leaving out its middle, where that was asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from edgelora.messages import Message

MARK = " [...] "


def shortened(messages: Sequence[Message], fits: Callable[[Sequence[Message]], bool]) -> list[Message] | None:
    """The conversation without its middle: the oldest exchanges after a system message are left out, whole, one after
    the other; where the last one alone is too long, the middle of its longest message is.

    Args:
        messages: of a conversation that does not fit.
        fits: whether these are short enough.

    Returns:
        The longest conversation of this kind that fits; None where none does.
    """
    kept, head = list(messages), int(messages[0]["role"] == "system")
    while not fits(kept):
        later = (at for at in range(head + 1, len(kept)) if kept[at]["role"] == "user")
        following = next(later, None)
        if following is None:
            return _cut_longest(kept, fits)
        del kept[head:following]
    return kept


def _cut_longest(messages: list[Message], fits: Callable[[Sequence[Message]], bool]) -> list[Message] | None:
    longest = max(range(len(messages)), key=lambda at: len(messages[at]["content"]))
    content = messages[longest]["content"]

    def with_length(length: int) -> list[Message]:
        cut = content[: length - length // 2] + MARK + content[len(content) - length // 2 :]
        return [*messages[:longest], {**messages[longest], "content": cut}, *messages[longest + 1 :]]

    low, high = 0, len(content)  # `low` fits, `high` does not
    if not fits(with_length(0)):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(with_length(middle)) else (low, middle)
    return with_length(low)
