"""How the replies of an evaluation are written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

MAX_TOKENS = 512
GREEDY: Mapping[str, Any] = {"temperature": 0.0, "max_tokens": MAX_TOKENS, "seed": 0}


@dataclass(frozen=True)
class EngineSettings:
    """How the engine runs; see `Engine`.

    Attributes:
        sampling: settings over `GREEDY`.
        parallel: replies that are written at the same time; None for as many as memory allows.
    """

    sampling: Mapping[str, Any] = field(default_factory=dict)
    n_ctx: int | None = None
    threads: int | None = None
    gpu_layers: int | None = None
    kv_type: str | None = None
    chat_template: str | None = None
    parallel: int | None = None
    force: bool = False

    @property
    def asked(self) -> Mapping[str, Any]:
        return {**GREEDY, **self.sampling}
