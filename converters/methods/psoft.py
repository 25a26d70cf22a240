"""PSOFT (openreview:FSHrinMArK): the base's largest singular vectors, turned.

W + U @ S @ (R - I) @ V.T. Only R is stored; U and V are decomposed from W again wherever the adapter is loaded. Both of
a pair of singular vectors may have the other sign: U @ S @ V.T is the same then, but U @ S @ R @ V.T is another matrix,
and which signs were trained with is known to the training machine's library alone.
"""

from __future__ import annotations

from converters.methods.method import Method

METHOD = Method(
    "PSOFT",
    "openreview:FSHrinMArK",
    refusal="it turns singular vectors of the base that it does not store, and their signs differ from machine to "
    "machine; merge it with PEFT where it was trained (merge_and_unload), and convert the result",
)
