"""What passes. Each threshold carries its help text; the command's options are made from them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any

from edgelora.errors import SettingsError


def _limit(default: float, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Thresholds:
    """The limits of `edgelora verify`; shares are from 0 to 1, KL is in nats.

    What quantization costs is for its user to weigh: there, only values that no usable base has fail. What the adapter
    adds is not: its weights are compared without the base's, and its effect on the output may be off by no more than
    quantization's noise explains. Measured on a base of 2.6 million parameters, F32 to Q2_K, with trained and random
    adapters: samples of sound weights are off by 0.0005, those of one at 1.1 times its scale by 0.1; the error of a
    sound effect is 0.1 to 1.7 times the noise; KL grows up to 2.4 times, and up to 0.27 of the likeliest tokens change
    (both with random adapters that leave nothing of the base's answers).

    Raises:
        SettingsError: a limit that is negative or no number.
    """

    max_kl: float = _limit(2.0, "Mean KL of the bare base, Hugging Face's to this device's.")
    max_kl_p99: float = _limit(15.0, "99th percentile of the same.")
    min_top_1: float = _limit(0.25, "Share of positions at which both bases find the same token likeliest.")
    min_greedy: float = _limit(0.0, "Share of the adapter's recorded answers that is written here, too.")
    max_weight_error: float = _limit(0.05, "Error of what the adapter adds to a weight, relative to that.")
    max_effect_error: float = _limit(2.0, "Error of the adapter's effect, in units of quantization's noise.")
    max_kl_growth: float = _limit(3.0, "Mean KL with the adapter, in units of that without.")
    max_top_1_loss: float = _limit(0.4, "By how much less both may agree on the likeliest token with the adapter.")

    def __post_init__(self) -> None:
        wrong = [
            f"{limit.name} is {value!r}, expected a number, 0 or more"
            for limit in fields(self)
            if not isinstance(value := getattr(self, limit.name), (int, float)) or not math.isfinite(value) or value < 0
        ]
        if wrong:
            raise SettingsError("thresholds: " + "; ".join(wrong))
