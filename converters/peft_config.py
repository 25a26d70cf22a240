"""`adapter_config.json`, as PEFT writes it: what the adapter is, and which of its settings cannot be kept.

Every key PEFT knows is in one of three tables; a key in none of them is refused by name, unless its value says "off".
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

from converters.checkpoint import read_json

FILE_NAME = "adapter_config.json"

# Settings of training, which do not change what the saved tensors mean.
FREE = (
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config",
    "exclude_modules", "fan_in_fan_out", "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config",
    "lora_dropout", "lora_ga_config", "megatron_core", "peft_version", "qalora_group_size", "revision",
    "runtime_config", "target_modules", "task_type",
)  # fmt: skip
# Settings that are used here.
USED = frozenset(("peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights"))
# Settings that must be off, and what it means when they are on.
REFUSED: Mapping[str, str] = {
    "use_dora": "DoRA scales whole weights, which no low-rank adapter can",
    "lora_bias": "a bias on B has no place in a GGUF adapter",
    "modules_to_save": "fully trained modules are not low-rank",
    "trainable_token_indices": "trained tokens replace rows of the embedding",
    "target_parameters": "LoRA on bare parameters is not converted yet",
    "layer_replication": "layers are repeated, which the base does not do",
    "alora_invocation_tokens": "activated LoRA is not converted yet",
    "use_qalora": "QALoRA pools the input of A",
    "megatron_config": "Megatron's parallel layers are not converted",
    "use_bdlora": "block-diagonal LoRA is not converted yet",
    "arrow_config": "Arrow routes between adapters",
    "kasa_config": "KaSA changes the base",
    "velora_config": "VeLoRA is not converted yet",
    "monteclora_config": "MonteCLoRA is not converted yet",
}
DEFAULTS: Mapping[str, Any] = {"r": 8, "lora_alpha": 8, "rank_pattern": {}, "alpha_pattern": {}}  # PEFT's own
PATTERNS = ("rank_pattern", "alpha_pattern")
MATCH = r"(.*\.)?({})$"  # as PEFT wraps a pattern
MAX_QUANTIFIERS = 3
F32_MAX = 3.4e38
OFF: tuple[Any, ...] = (None, False, [], {}, "", "none")
# Initialisations that leave the base as it was; the others move a part of the base into the adapter at the start.
PLAIN_INITS = (True, False, None, "gaussian", "orthogonal", "eva", "mica")
INIT_HINT = "save it with PEFT's path_initial_model_for_weight_conversion, which makes it a plain LoRA"


@dataclass(frozen=True)
class PeftConfig:
    """What an adapter folder's configuration says.

    Attributes:
        rank: of every module that `rank_pattern` does not match; likewise `alpha`.
        target_modules: names, where they are given as a list.
        is_valid: the numbers are those of the file; otherwise they are PEFT's defaults, and say nothing.
        problems: settings that cannot be converted, each with its reason.
    """

    path: Path
    peft_type: str
    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    use_rslora: bool
    base_model: str
    target_modules: tuple[str, ...]
    is_valid: bool
    problems: tuple[str, ...]

    def rank_of(self, module: str) -> int:
        return self.rank_pattern.get(_pattern_key(self.rank_pattern, module), self.rank)

    def scale_of(self, module: str, rank: int) -> float:
        """What PEFT multiplies B @ A by (arXiv:2106.09685; with `use_rslora` arXiv:2312.03732)."""
        alpha = self.alpha_pattern.get(_pattern_key(self.alpha_pattern, module), self.alpha)
        return alpha / (sqrt(rank) if self.use_rslora else rank)


def _pattern_key(patterns: Mapping[str, Any], module: str) -> str:
    """The first pattern that matches, as `get_pattern_key` (peft/utils/other.py)."""
    return next((key for key in patterns if re.match(MATCH.format(key), module)), module)


def read_peft_config(folder: Path) -> PeftConfig:
    """Read `adapter_config.json`.

    Raises:
        MissingFileError: no such file, or not readable.
        FormatError: not JSON.
    """
    path = folder / FILE_NAME
    values = read_json(path)
    problems = [problem for check in (_known, _valid, _init) for problem in check(values)]
    is_valid = not _valid(values)
    numbers = _with_defaults(values) if is_valid else DEFAULTS
    return PeftConfig(
        path=path,
        peft_type=str(values.get("peft_type")),
        rank=numbers["r"],
        alpha=numbers["lora_alpha"],
        rank_pattern=numbers["rank_pattern"],
        alpha_pattern=numbers["alpha_pattern"],
        use_rslora=bool(values.get("use_rslora")),
        base_model=str(values.get("base_model_name_or_path") or ""),
        target_modules=_names(values.get("target_modules")),
        is_valid=is_valid,
        problems=tuple(problems),
    )


def _names(value: Any) -> tuple[str, ...]:
    return tuple(name for name in value if isinstance(name, str)) if isinstance(value, list) else ()


def _with_defaults(values: Mapping[str, Any]) -> dict[str, Any]:
    return {**DEFAULTS, **{key: value for key, value in values.items() if value is not None}}


def _known(values: Mapping[str, Any]) -> list[str]:
    found = []
    for key, value in sorted(values.items()):
        if key in FREE or key in USED or value in OFF:
            continue
        if key == "bias":
            found.append(f"bias is {value!r}: trained biases have no place in a GGUF adapter")
        elif key in REFUSED:
            found.append(f"{key} is {_short(value)}: {REFUSED[key]}")
        else:
            found.append(f"unknown setting {key} = {_short(value)}")
    return found


def _valid(values: Mapping[str, Any]) -> list[str]:
    if values.get("peft_type") != "LORA":
        return []  # the method itself is refused
    checks: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
        ("r", _is_rank, "a whole number, 1 or more"),
        ("lora_alpha", _is_number, "a number"),
        ("rank_pattern", lambda value: _is_pattern(value, _is_rank), "regular expressions to ranks"),
        ("alpha_pattern", lambda value: _is_pattern(value, _is_number), "regular expressions to numbers"),
    )
    given = _with_defaults(values)
    bad = ((key, pattern) for key in PATTERNS if isinstance(given[key], dict) for pattern in given[key])
    slow = [f"{key} has {_short(pattern)}, {problem}" for key, pattern in bad if (problem := _pattern_problem(pattern))]
    return slow + [
        f"{key} is {_short(given[key])}, expected {wanted}" for key, ok, wanted in checks if not ok(given[key])
    ]


def _init(values: Mapping[str, Any]) -> list[str]:
    init = values.get("init_lora_weights", True)
    if any(init is plain or (isinstance(plain, str) and init == plain) for plain in PLAIN_INITS):
        return []
    return [f"init_lora_weights is {init!r}: it moved a part of the base into the adapter; {INIT_HINT}"]


def _is_rank(value: Any) -> bool:
    return type(value) is int and value >= 1


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= F32_MAX


def _is_pattern(value: Any, is_valid: Callable[[Any], bool]) -> bool:
    if not isinstance(value, dict):
        return False
    return all(is_valid(item) for item in value.values())


def _pattern_problem(pattern: str) -> str:
    """Why a pattern is not used: what it becomes must be an expression, and one that takes no exponential time."""
    try:
        re.compile(MATCH.format(pattern))
    except (re.error, OverflowError, RecursionError) as error:
        return f"which is no regular expression for a module's name ({error})"
    plain = re.sub(r"\\.|\[\^?\]?[^\]]*\]", "x", pattern)  # without escapes and classes
    if re.search(r"\)\s*[*+{]", plain) or len(re.findall(r"[*+{]", plain)) > MAX_QUANTIFIERS:
        return "whose quantifiers are nested or too many; write the modules' names out"
    return ""


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
