"""PEFT's methods, by the name in `adapter_config.json`: how each one's tensors become changes of the base.

To add a method: one file beside this one that ends in `METHOD = Method(...)`, and its row in `METHODS`.
"""

from __future__ import annotations

from collections.abc import Mapping

from converters.methods import (
    adalora,
    c3a,
    fourierft,
    frod,
    gralora,
    loha,
    lokr,
    lora_variants,
    miss,
    peanut,
    pvera,
    randlora,
    shira,
    supertuning,
    tinylora,
    unilora,
    vblora,
    vera,
    waveft,
)
from converters.methods.changes import Change, LowRank, ModuleProblem, Reading, Replaced, Shifted, Transformed
from converters.methods.method import Method, Module
from converters.methods.reading import read_modules
from converters.methods.refused import REFUSED

__all__ = [
    "METHODS", "Change", "LowRank", "Method", "Module", "ModuleProblem", "Reading", "Replaced", "Shifted",
    "Transformed", "read_modules",
]  # fmt: skip

METHODS: Mapping[str, Method] = {
    "ADALORA": adalora.METHOD,
    "BONE": miss.BONE,
    "C3A": c3a.METHOD,
    "FOURIERFT": fourierft.METHOD,
    "FROD": frod.METHOD,
    "GRALORA": gralora.METHOD,
    "LOHA": loha.METHOD,
    "LOKR": lokr.METHOD,
    "LORA": lora_variants.METHOD,
    "MISS": miss.METHOD,
    "PEANUT": peanut.METHOD,
    "PVERA": pvera.METHOD,
    "RANDLORA": randlora.METHOD,
    "SHIRA": shira.METHOD,
    "SUPERTUNING": supertuning.METHOD,
    "TINYLORA": tinylora.METHOD,
    "UNILORA": unilora.METHOD,
    "VBLORA": vblora.METHOD,
    "VERA": vera.METHOD,
    "WAVEFT": waveft.METHOD,
    **REFUSED,
}
