"""How to train: one frozen record of every setting, with the help text and the bounds that the command line shows.

The defaults are the literature's. LoRA: Hu et al., arXiv:2106.09685. QLoRA: Dettmers et al., arXiv:2305.14314, whose
section 4 and appendix B found adapters on all linear layers to matter most, and used learning rate 2e-4 and batches of
16 for 7B and 13B models. alpha = 2 * rank is PEFT's and TRL's own habit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from edgelora.errors import SettingsError
from edgelora.train.methods import METHODS

ALL_LINEAR = "all-linear"
SCHEDULERS = ("cosine", "linear", "constant")
DEVICES = ("auto", "cpu", "cuda", "mps")
DTYPES = ("auto", "float32", "bfloat16")


@dataclass(frozen=True)
class Bound:
    """What a setting may be: the test, and the words for it."""

    accepts: Callable[[Any], bool]
    wanted: str
    choices: tuple[str, ...] = ()


def _number(low: float, high: float, wanted: str, *, above: bool = False) -> Bound:
    def accepts(value: Any) -> bool:
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
            return False
        return (low < value if above else low <= value) and value <= high

    return Bound(accepts, wanted)


def _whole(low: int, wanted: str, high: int = 2**32 - 1) -> Bound:
    return Bound(lambda v: isinstance(v, int) and not isinstance(v, bool) and low <= v <= high, wanted)


def _one_of(names: tuple[str, ...]) -> Bound:
    return Bound(lambda v: v in names, f"one of {', '.join(names)}", names)


def _optional(bound: Bound) -> Bound:
    return Bound(lambda v: v is None or bound.accepts(v), bound.wanted, bound.choices)


def _module_names(value: Any) -> bool:
    return isinstance(value, str) and bool(value) and all(name.strip() for name in value.split(","))


_COUNT = _whole(1, "a whole number, 1 or more")
_TEXT = Bound(lambda v: isinstance(v, str) and bool(v), "text that is not empty")
_FLAG = Bound(lambda v: isinstance(v, bool), "true or false")


def _setting(default: Any, bound: Bound, text: str, *, free_on_resume: bool = False) -> Any:
    """A field whose help, bound and "may it change on --resume" live in its metadata."""
    return field(default=default, metadata={"help": text, "bound": bound, "free_on_resume": free_on_resume})


@dataclass(frozen=True)
class Recipe:
    """The settings of a training run; each field's `metadata["help"]` describes it, `metadata["bound"]` checks it.

    Raises:
        SettingsError: values out of bounds; all problems in one message.
    """

    method: str = _setting("lora", _one_of(tuple(METHODS)), "fine-tuning method")
    rank: int = _setting(16, _COUNT, "rank of the update: its capacity and its size")
    alpha: float = _setting(
        32.0, _number(0, 1e6, "a number above 0", above=True), "the update is scaled by alpha / rank"
    )
    dropout: float = _setting(
        0.05, _number(0, 0.99, "a number from 0, below 1"), "dropout on the adapter's input (QLoRA: 0.05 to 0.1)"
    )
    target_modules: str = _setting(
        ALL_LINEAR,
        Bound(_module_names, "module names with commas between them, or all-linear"),
        "layers that get an adapter: all-linear, or names such as q_proj,v_proj",
    )
    learning_rate: float = _setting(
        2e-4, _number(0, 1, "a number above 0, at most 1", above=True), "highest learning rate (QLoRA: 2e-4)"
    )
    epochs: float = _setting(3.0, _number(0, 1e6, "a number above 0", above=True), "times to go through the data")
    max_steps: int | None = _setting(None, _optional(_COUNT), "stop after this many optimizer steps; overrides epochs")
    batch_size: int = _setting(8, _COUNT, "conversations in memory at once")
    gradient_accumulation: int = _setting(
        2, _COUNT, "batches per optimizer step; batch size times this is what the optimizer sees (QLoRA: 16)"
    )
    max_length: int = _setting(1024, _whole(2, "a whole number, 2 or more"), "tokens of a conversation that are kept")
    warmup_ratio: float = _setting(
        0.03, _number(0, 0.99, "a number from 0, below 1"), "share of the steps in which the learning rate rises"
    )
    scheduler: str = _setting("cosine", _one_of(SCHEDULERS), "course of the learning rate after the warm-up")
    weight_decay: float = _setting(0.0, _number(0, 1, "a number from 0 to 1"), "AdamW's weight decay")
    max_grad_norm: float = _setting(
        1.0, _number(0, 1e6, "a number above 0", above=True), "gradients are scaled down to this norm"
    )
    gradient_checkpointing: bool = _setting(
        False, _FLAG, "recompute activations in the backward pass: less memory, about a fifth slower"
    )
    seed: int = _setting(42, _whole(0, "a whole number from 0, below 2**32"), "same seed, same adapter")
    chat_template: str | None = _setting(
        None, _optional(_TEXT), "a built-in name or a Jinja file [default: the base's own]", free_on_resume=True
    )  # what it holds is compared, not where it lies
    dtype: str = _setting("auto", _one_of(DTYPES), "type of the base's weights; auto is bfloat16 on CUDA, else float32")
    device: str = _setting("auto", _one_of(DEVICES), "where to train", free_on_resume=True)
    save_steps: int = _setting(100, _COUNT, "optimizer steps between checkpoints", free_on_resume=True)
    eval_steps: int | None = _setting(
        None, _optional(_COUNT), "optimizer steps between evaluations [default: save steps]", free_on_resume=True
    )
    logging_steps: int = _setting(10, _COUNT, "optimizer steps between lines of metrics.jsonl", free_on_resume=True)
    certificate_probes: int = _setting(
        8,
        _whole(0, "a whole number, 0 or more"),
        "prompts to record for `edgelora verify`, 0 for none",
        free_on_resume=True,
    )

    def __post_init__(self) -> None:
        problems = [
            f"{f.name} is {getattr(self, f.name)!r}, expected {f.metadata['bound'].wanted}"
            for f in fields(self)
            if not f.metadata["bound"].accepts(getattr(self, f.name))
        ]
        if problems:
            raise SettingsError("recipe: " + "; ".join(problems))

    @property
    def target_module_names(self) -> str | list[str]:
        """What PEFT takes: "all-linear", or the list of names."""
        names = [name.strip() for name in self.target_modules.split(",")]
        return ALL_LINEAR if names == [ALL_LINEAR] else names

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Recipe:
        """The recipe in a config file or from options; None means "not given", a list of modules is joined.

        Raises:
            SettingsError: unknown names or values out of bounds.
        """
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise SettingsError(
                f"unknown recipe settings: {', '.join(unknown)}", hint=f"Known: {', '.join(sorted(known))}."
            )
        given = {name: value for name, value in values.items() if value is not None}
        modules = given.get("target_modules")
        if isinstance(modules, (list, tuple)):
            given["target_modules"] = ",".join(str(name) for name in modules)
        return cls(**given)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def differences(self, other: Mapping[str, Any]) -> list[str]:
        """What a resumed run would change of `other`, a recipe's `to_dict`, in ways that change the result."""
        return [
            f"{f.name} was {other.get(f.name)!r}, now {getattr(self, f.name)!r}"
            for f in fields(self)
            if not f.metadata["free_on_resume"] and other.get(f.name) != getattr(self, f.name)
        ]
