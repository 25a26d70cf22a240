"""What a server should have said: the same requests on an engine of this process, alone, one after the other."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from edgelora.engine.engine import Engine
from edgelora.engine.stream import Request
from edgelora.errors import EdgeloraError
from edgelora.serve import bodies

READERS = {"/v1/chat/completions": bodies.read_chat, "/v1/completions": bodies.read_completion}
PROBE = {"prompt": "A", "max_tokens": 2, "temperature": 0}


class RightAnswers:
    """An engine with the server's adapters."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def check(self, path: str, body: bytes, kind: str, answer: bytes) -> bool:
        """An answer with status 200 is what the engine says. False: nobody can tell, its seed was not given."""
        if path == "/v1/unload_lora_adapter":  # of a name that was refused before
            name = json.loads(body)["lora_name"]
            assert answer.decode() == f"Success: LoRA adapter '{name}' removed successfully."
            return True
        asked = READERS[path](json.loads(body))
        texts, reasons = _streamed(answer) if kind == "text/event-stream" else _whole(answer)
        requests = asked.requests(_adapter_of(asked))
        assert len(texts) == len(requests), (body, answer)
        if asked.seed is None and asked.sampling.get("temperature", 1) != 0:
            return False
        for index, request in enumerate(requests):
            right = self._engine.submit(request).completion
            echoed = str(asked.prompts[index // asked.n]) if asked.echo else ""
            assert texts[index] == echoed + right.text, (body, answer)
            assert reasons[index] == right.finish_reason, (body, answer)
        return True

    def probe(self, file: Path) -> str | None:
        """What an adapter's file makes of `PROBE`; None where its logits are no numbers. Files that are asked at the
        same time have different names."""
        self._engine.load_adapter(file.stem, file)
        try:
            sampling = {name: PROBE[name] for name in ("max_tokens", "temperature")}
            return self._engine.submit(
                Request(str(PROBE["prompt"]), file.stem, None, sampling, raw=True)
            ).completion.text
        except EdgeloraError:
            return None
        finally:
            self._engine.unload_adapter(file.stem)


def _adapter_of(asked: bodies.Asked) -> str | dict[str, float] | None:
    if asked.blend:
        return {name: scale for name, scale in asked.blend.items() if name != "base"} or None
    name = asked.model.removeprefix("base:")
    return None if name in ("base", "none") else name


def _whole(answer: bytes) -> tuple[list[str], list[str]]:
    choices = json.loads(answer)["choices"]
    texts = [each["message"]["content"] if "message" in each else each["text"] for each in choices]
    return texts, [each["finish_reason"] for each in choices]


def _streamed(answer: bytes) -> tuple[list[str], list[str]]:
    *events, last = [line.removeprefix(b"data: ") for line in answer.splitlines() if line]
    assert last == b"[DONE]", answer
    texts, reasons = defaultdict[int, str](str), dict[int, str]()
    for event in map(json.loads, events):
        choice: dict[str, Any]
        for choice in event["choices"]:
            said = choice["delta"].get("content") if "delta" in choice else choice["text"]
            texts[choice["index"]] += said or ""
            if choice["finish_reason"]:
                reasons[choice["index"]] = choice["finish_reason"]
    return [texts[index] for index in sorted(texts)], [reasons[index] for index in sorted(reasons)]
