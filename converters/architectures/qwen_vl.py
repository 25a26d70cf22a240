"""The text models of Qwen2-VL, Qwen2.5-VL and Qwen3-VL, whose rotary embedding has sections for time, height, width.

llama.cpp: src/models/qwen2vl.cpp, qwen3vl.cpp, qwen3vlmoe.cpp; its converter: conversion/qwenvl.py, qwen3vl.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from converters.architectures import qwen2, qwen2_moe, qwen3, qwen3_moe
from converters.architectures.family import Config, Family
from converters.architectures.settings import common, full_rope

Settings = Callable[[Config], dict[str, Any]]


def _sections(config: Config) -> dict[str, Any]:
    return {"rope.dimension_sections": [*full_rope(config)["mrope_section"], 0, 0, 0, 0][:4]}


def _deepstack(config: Config) -> dict[str, Any]:
    layers = (config.get("vision_config") or {}).get("deepstack_visual_indexes", [])
    return {"n_deepstack_layers": len(layers)}


def two(config: Config) -> dict[str, Any]:
    return common(config) | _sections(config)


def three(config: Config) -> dict[str, Any]:
    return common(config) | _sections(config) | _deepstack(config)


def three_moe(config: Config) -> dict[str, Any]:
    return qwen2_moe.hyperparameters(config) | _sections(config) | _deepstack(config)


def problems(config: Config) -> list[str]:
    rope = full_rope(config)
    sections = rope.get("mrope_section")
    if not isinstance(sections, list) or not all(type(size) is int and size > 0 for size in sections):
        return [f"mrope_section is {sections!r}, expected a list of sizes"]
    return [] if rope["rope_type"] in ("default", "mrope") else qwen2.problems(config)


def _of(family: Family, architecture: str, hyperparameters: Settings, sections: list[int]) -> Family:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": sections}
    return replace(
        family,
        architecture=architecture,
        hyperparameters=hyperparameters,
        defaults={**family.defaults, "rope_parameters": rope},
        problems=problems,
    )


QWEN2 = _of(qwen2.FAMILY, "qwen2vl", two, [16, 24, 24])
QWEN3 = _of(qwen3.FAMILY, "qwen3vl", three, [24, 20, 20])
QWEN3_MOE = _of(qwen3_moe.FAMILY, "qwen3vlmoe", three_moe, [24, 20, 20])
