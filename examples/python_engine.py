"""The engine from Python: whole answers, streams, a conversation, and many requests with different adapters.

    python examples/python_engine.py build/demo/base-q8_0.gguf support=build/demo/support.gguf

The first argument is the base, the others are adapters: `[NAME=]PATH[@SCALE]`.
"""

from __future__ import annotations

import sys

from edgelora import Engine, Request


def main(base: str, adapters: list[str]) -> None:
    with Engine(base, adapters) as engine:
        for notice in engine.notices:
            print(f"notice: {notice}", file=sys.stderr)
        name = engine.adapters[0]

        print("-- a whole answer, and how it was made")
        completion = engine.chat("How long does the battery last?", adapter=name, sampling={"temperature": 0})
        made = f"{completion.completion_tokens} tokens, {completion.finish_reason}"
        print(f"{completion.adapter}: {completion.text} ({made})")

        print("-- the same, as it is written")
        for piece in engine.stream("How long does the battery last?", adapter=name, sampling={"temperature": 0}):
            print(piece, end="", flush=True)
        print()

        print("-- a conversation with the bare base")
        messages = [{"role": "user", "content": "Hi! My name is Tilda."}]
        for question in ("What is my name?", "Thanks, bye!"):
            reply = engine.chat(messages, sampling={"temperature": 0, "max_tokens": 40}).text
            messages += [{"role": "assistant", "content": reply}, {"role": "user", "content": question}]
        messages.append({"role": "assistant", "content": engine.chat(messages, sampling={"temperature": 0}).text})
        print("\n".join(f"{message['role']}: {message['content']}" for message in messages))

        print("-- one question to every adapter, and to none")
        greedy = {"temperature": 0, "max_tokens": 40}
        requests = [Request("Can I use it in the rain?", adapter=a, sampling=greedy) for a in (None, *engine.adapters)]
        for completion in engine.batch(requests):
            print(f"{completion.adapter}: {completion.text}")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2:])
