"""BEFT (arXiv:2509.15974): a trained vector that is added to a layer's bias.

<module>.beft_bias  (1, rows)
"""

from __future__ import annotations

from collections.abc import Iterator

from converters.methods.changes import Change, Shifted
from converters.methods.method import Method, Module


def read(module: Module) -> Iterator[Change]:
    module.check("shift", 1, None)
    yield Shifted(module.bias, module.shape("shift")[1:], lambda: module.load("shift").reshape(-1))


METHOD = Method("BEFT", "arXiv:2509.15974", parts={".beft_bias": "shift"}, read=read, free=("init_weights",))
