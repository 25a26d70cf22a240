"""Cases of every PEFT method that changes weights: one file a kind of method, and all of them in `CASES`."""

from __future__ import annotations

import importlib
import pkgutil

from tests.equivalence.peft_methods import Case

CASES: dict[str, Case] = {}
for _found in pkgutil.iter_modules(__path__):
    CASES.update(importlib.import_module(f"{__name__}.{_found.name}").CASES)
