"""HiRA: W + W * (B @ A), value by value.

<module>.hira_A  (rank, columns)        <module>.hira_embedding_A  (rank, vocabulary)
<module>.hira_B  (rows, rank)           <module>.hira_embedding_B  (embedding, rank)
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np

from converters.checkpoint import Floats
from converters.methods.changes import Change, ModuleProblem, Transformed
from converters.methods.factored import recent
from converters.methods.method import Method, Module
from converters.peft_settings import rank, rank_pattern


def read(module: Module) -> Iterator[Change]:
    if "embedding_a" in module or "embedding_b" in module:
        # PEFT adds W * (B @ A) after the scale that some models (Gemma) give their embeddings; merged, before it.
        raise ModuleProblem("is an embedding, where PEFT's HiRA computes one thing and merges another")
    if missing := [role for role in ("a", "b") if role not in module]:
        raise ModuleProblem(f"has no {', '.join(missing)}")
    module.check("a", None, None)
    count, columns = module.shape("a")
    known = {module.setting("r"), module.setting("r", "rank_pattern")}  # PEFT 0.21 takes no notice of the pattern
    if module.config.is_valid and count not in known:
        raise ModuleProblem(f"has rank {count}, {module.config.path.name} says {module.setting('r', 'rank_pattern')}")
    module.check("b", None, count)
    load_a = partial(module.load, "a")

    def apply(rows: Floats, start: int) -> Floats:
        factors = module.rows("b", start, start + len(rows)) @ recent(load_a)
        factors += np.float32(1)
        return rows * factors

    yield Transformed(module.weight, (module.shape("b")[0], columns), apply)


METHOD = Method(
    "HiRA",
    "openreview:TwJrTz9cRS",
    parts={
        ".hira_A": "a",
        ".hira_B": "b",
        ".hira_embedding_A": "embedding_a",
        ".hira_embedding_B": "embedding_b",
    },
    read=read,
    settings={"r": rank(32), "rank_pattern": rank_pattern()},
    free=("fan_in_fan_out", "hira_dropout", "init_weights"),
)
