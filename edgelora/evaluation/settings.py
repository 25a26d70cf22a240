"""How the replies of an evaluation are written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgelora.adapter_ref import AdapterRef

if TYPE_CHECKING:
    from edgelora.engine.engine import Engine

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

    def open(self, base: Path, adapters: Sequence[AdapterRef], parallel: int | None = None) -> Engine:
        """An engine whose replies depend on their rows alone.

        Args:
            parallel: where these settings do not say it.

        Raises:
            ModelFileError, BaseMismatchError, SettingsError: see `Engine`.
        """
        from edgelora.engine.engine import Engine

        return Engine(
            base,
            adapters=list(adapters),
            n_ctx=self.n_ctx,
            threads=self.threads,
            gpu_layers=self.gpu_layers,
            kv_type=self.kv_type,
            chat_template=self.chat_template,
            force=self.force,
            parallel=self.parallel or parallel,
            reproducible=True,
        )
