"""edgelora: from a JSONL file to adapters that run on a laptop, with proof that what was trained is what is served.

    from edgelora import Engine

    with Engine("base-q8_0.gguf", adapters={"support": "support.gguf"}) as engine:
        print(engine.chat("Is it waterproof?", adapter="support").text)

The names below are imported on first use, so that importing edgelora loads neither numpy nor llama.cpp.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from edgelora.version import __version__

if TYPE_CHECKING:
    from edgelora.adapter_ref import AdapterRef
    from edgelora.contract import Contract
    from edgelora.engine.engine import Completion, Engine, Request, Stream
    from edgelora.errors import EdgeloraError
    from edgelora.sampling import Sampling

_HOMES = {
    "AdapterRef": "edgelora.adapter_ref",
    "Completion": "edgelora.engine.engine",
    "Contract": "edgelora.contract",
    "EdgeloraError": "edgelora.errors",
    "Engine": "edgelora.engine.engine",
    "Request": "edgelora.engine.engine",
    "Sampling": "edgelora.sampling",
    "Stream": "edgelora.engine.engine",
}

__all__ = [
    "AdapterRef",
    "Completion",
    "Contract",
    "EdgeloraError",
    "Engine",
    "Request",
    "Sampling",
    "Stream",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'edgelora' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
