"""PEFT's methods, by the name in `adapter_config.json`: how each one's tensors become changes of the base.

To add a method: one file beside this one that ends in `METHOD = Method(...)`, and its row in `METHODS`.
"""

from __future__ import annotations

from collections.abc import Mapping

from converters.methods import (
    adalora,
    beft,
    boft,
    c3a,
    deft,
    delora,
    fourierft,
    frod,
    glora,
    gralora,
    hira,
    hra,
    ia3,
    ln_tuning,
    loha,
    lokr,
    lora_variants,
    miss,
    oft,
    osf,
    peanut,
    psoft,
    pvera,
    randlora,
    road,
    shira,
    supertuning,
    tinylora,
    trainable_tokens,
    unilora,
    vblora,
    vera,
    waveft,
)
from converters.methods.changes import Change, LowRank, ModuleProblem, Reading, Replaced, Shifted, Transformed, Turned
from converters.methods.method import Method, Module
from converters.methods.reading import read_modules
from converters.methods.refused import REFUSED

__all__ = [
    "METHODS", "Change", "LowRank", "Method", "Module", "ModuleProblem", "Reading", "Replaced", "Shifted",
    "Transformed", "Turned", "read_modules",
]  # fmt: skip

METHODS: Mapping[str, Method] = {
    "ADALORA": adalora.METHOD,
    "BEFT": beft.METHOD,
    "BOFT": boft.METHOD,
    "BONE": miss.BONE,
    "C3A": c3a.METHOD,
    "DEFT": deft.METHOD,
    "DELORA": delora.METHOD,
    "FOURIERFT": fourierft.METHOD,
    "FROD": frod.METHOD,
    "GLORA": glora.METHOD,
    "GRALORA": gralora.METHOD,
    "HIRA": hira.METHOD,
    "HRA": hra.METHOD,
    "IA3": ia3.METHOD,
    "LN_TUNING": ln_tuning.METHOD,
    "LOHA": loha.METHOD,
    "LOKR": lokr.METHOD,
    "LORA": lora_variants.METHOD,
    "MISS": miss.METHOD,
    "OFT": oft.METHOD,
    "OSF": osf.METHOD,
    "PEANUT": peanut.METHOD,
    "PSOFT": psoft.METHOD,
    "PVERA": pvera.METHOD,
    "RANDLORA": randlora.METHOD,
    "ROAD": road.METHOD,
    "SHIRA": shira.METHOD,
    "SUPERTUNING": supertuning.METHOD,
    "TINYLORA": tinylora.METHOD,
    "TRAINABLE_TOKENS": trainable_tokens.METHOD,
    "UNILORA": unilora.METHOD,
    "VBLORA": vblora.METHOD,
    "VERA": vera.METHOD,
    "WAVEFT": waveft.METHOD,
    **REFUSED,
}
