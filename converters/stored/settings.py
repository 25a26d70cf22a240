"""The settings of a quantization, as a model folder states them: found, and named where they are not understood."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from converters.errors import FormatError, UnsupportedError
from converters.stored.tensor import Settings

ORIGINAL = "Download the weights that were not quantized: the model card names them, mostly as its base model."

# Formats whose weights are not computed back here, by `quant_method` (or a format within it), as people know them.
REFUSED: Mapping[str, str] = {
    "aqlm": "AQLM (codebooks)",
    "auto-round": "AutoRound",
    "bitnet": "BitNet (ternary)",
    "compressed-tensors_nvfp4": "NVFP4",
    "deepspeed_fp": "DeepSpeed FP",
    "eetq": "EETQ",
    "exl2": "EXL2 (ExLlamaV2)",
    "exl3": "EXL3 (ExLlamaV3)",
    "fbgemm_fp8": "FBGEMM FP8",
    "fp_quant": "FP-Quant (MXFP4 or NVFP4)",
    "gguf": "GGUF",
    "higgs": "HIGGS",
    "hqq": "HQQ",
    "intel/auto-round": "AutoRound",
    "marlin": "Marlin",
    "modelopt_fp4": "NVFP4 (ModelOpt)",
    "mxfp4": "MXFP4",
    "mxfp4-pack-quantized": "MXFP4 (compressed-tensors)",
    "nvfp4": "NVFP4",
    "nvfp4-pack-quantized": "NVFP4 (compressed-tensors)",
    "quanto": "Quanto",
    "quark": "Quark",
    "sinq": "SINQ",
    "spqr": "SpQR",
    "torchao": "torchao",
    "vptq": "VPTQ (codebooks)",
}


def find_settings(config: Settings, beside: Mapping[str, Settings]) -> tuple[str, dict[str, Any]]:
    """How a model folder says its weights are quantized: ("", {}) where it does not.

    Args:
        config: config.json.
        beside: other files that state it, by name: those of ModelOpt and AutoGPTQ.

    Returns:
        `quant_method` in lower case, and the settings.

    Raises:
        FormatError: what should be an object is none.
    """
    text = config.get("text_config")
    for part in (config, text if isinstance(text, Mapping) else {}):
        for key in ("quantization_config", "compression_config"):
            found = part.get(key)
            if found is not None and not isinstance(found, Mapping):
                raise FormatError(f"config.json: {key} is {found!r}, expected an object")
            if found and (method := _method(found, "compressed-tensors" if key == "compression_config" else "")):
                return method, dict(found)
    if isinstance(found := beside.get("hf_quant_config.json", {}).get("quantization"), Mapping):
        return _method(found, "modelopt"), dict(found)
    if found := beside.get("quantize_config.json"):
        return _method(found, "gptq"), dict(found)
    return "", {}


def _method(settings: Settings, otherwise: str) -> str:
    method = settings.get("quant_method") or settings.get("method")
    if not method and (settings.get("load_in_4bit") or settings.get("load_in_8bit")):
        method = "bitsandbytes"
    return str(method or otherwise).lower()


def refused(what: str, more: str = "") -> UnsupportedError:
    """The error for weights that are not computed back here: `what` is a key of `REFUSED`, or stands for itself."""
    return UnsupportedError(
        f"its weights are stored as {REFUSED.get(what, what)}{more}, which cannot be computed back here", hint=ORIGINAL
    )


def whole(settings: Settings, key: str, *, among: range | tuple[int, ...]) -> int:
    """A whole number of the settings.

    Raises:
        UnsupportedError: it is something else, or one that is not known here.
    """
    value = settings.get(key)
    if type(value) is not int or value not in among:
        known = f"{among[0]} to {among[-1]}" if isinstance(among, range) else ", ".join(map(str, among))
        raise UnsupportedError(f"its quantization has {key} {value!r}; known are {known}", hint=ORIGINAL)
    return value


def one_of(settings: Settings, key: str, *known: object) -> Any:
    """A setting that is one of those known here; the first is what an absent one or null means.

    Raises:
        UnsupportedError: it is not.
    """
    value = known[0] if settings.get(key) is None else settings[key]
    if value not in known:
        shown = ", ".join(repr(each) for each in known)
        raise UnsupportedError(f"its quantization has {key} {value!r}; known are {shown}", hint=ORIGINAL)
    return value


def block_of(value: object) -> tuple[int, int] | None:
    """Rows and columns of a block, None where there are no blocks.

    Raises:
        UnsupportedError: neither.
    """
    if value is None:
        return None
    if isinstance(value, list) and len(value) == 2 and all(type(size) is int and 0 < size < 2**31 for size in value):
        return value[0], value[1]
    raise UnsupportedError(f"its quantization has blocks of {value!r}, expected rows and columns", hint=ORIGINAL)
