"""By how many bytes resident memory grows while all adapters but the first are loaded and used.

python -m bench.engine_memory BASE ADAPTER ADAPTER ...
"""

from __future__ import annotations

import sys

import psutil

from edgelora.engine.engine import Engine


def main(base: str, first: str, *further: str) -> None:
    with Engine(base, {"first": first}, chat_template="plain", n_ctx=512, parallel=1) as engine:
        engine.chat("hello", adapter="first", sampling={"max_tokens": 2})
        before = psutil.Process().memory_info().rss
        for index, path in enumerate(further):
            engine.load_adapter(f"further-{index}", path)
            engine.chat("hello", adapter=f"further-{index}", sampling={"max_tokens": 2})
        print(psutil.Process().memory_info().rss - before)


if __name__ == "__main__":
    main(*sys.argv[1:])
