"""Functions that adapters apply value by value, by the name transformers gives them (`ACT2FN`, activations.py)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import erf, pi, sqrt
from typing import Any

import numpy as np

from converters.checkpoint import Floats

Activation = Callable[[Floats], Floats]
_ERF = np.frompyfunc(erf, 1, 1)


def _erf(x: Floats) -> Floats:
    found: Any = _ERF(x)
    return np.asarray(found, np.float32)


def _sigmoid(x: Floats) -> Floats:
    half: Floats = np.tanh(np.float32(0.5) * x)
    return np.float32(0.5) * (np.float32(1) + half)


def _softplus(x: Floats) -> Floats:
    return np.logaddexp(x, np.float32(0))


def _gelu(x: Floats) -> Floats:
    return x * np.float32(0.5) * (np.float32(1) + _erf(x / np.float32(sqrt(2))))


def _gelu_tanh(x: Floats) -> Floats:
    inner: Floats = np.tanh(np.float32(sqrt(2 / pi)) * (x + np.float32(0.044715) * x * x * x))
    return np.float32(0.5) * x * (np.float32(1) + inner)


def _leaky(slope: float) -> Activation:
    return lambda x: np.where(x > 0, x, np.float32(slope) * x)


def _laplace(x: Floats) -> Floats:
    return np.float32(0.5) * (np.float32(1) + _erf((x - np.float32(0.707107)) / np.float32(0.282095 * sqrt(2))))


def _relu(x: Floats) -> Floats:
    return np.maximum(x, np.float32(0))


ACTIVATIONS: Mapping[str, Activation] = {
    "gelu": _gelu,
    "gelu_10": lambda x: np.clip(_gelu(x), np.float32(-10), np.float32(10)),
    "gelu_accurate": _gelu_tanh,
    "gelu_fast": _gelu_tanh,
    "gelu_new": _gelu_tanh,
    "gelu_python": _gelu,
    "gelu_python_tanh": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "hardswish": lambda x: x * np.clip(x + np.float32(3), np.float32(0), np.float32(6)) / np.float32(6),
    "laplace": _laplace,
    "leaky_relu": _leaky(0.01),
    "linear": lambda x: x,
    "mish": lambda x: x * np.tanh(_softplus(x)),
    "prelu": _leaky(0.25),  # PEFT makes a new one each time, with the slope it begins with
    "quick_gelu": lambda x: x * _sigmoid(np.float32(1.702) * x),
    "relu": _relu,
    "relu2": lambda x: np.square(_relu(x)),
    "relu6": lambda x: np.clip(x, np.float32(0), np.float32(6)),
    "sigmoid": _sigmoid,
    "silu": lambda x: x * _sigmoid(x),
    "sqrtsoftplus": lambda x: np.sqrt(_softplus(x)),
    "swish": lambda x: x * _sigmoid(x),
    "tanh": np.tanh,
}
