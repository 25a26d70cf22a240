"""The fine-tuning methods: one row each, with the PEFT config it builds and what its result can become.

A new method is a row here. Only the standard library is needed to read the table (`--help` does); PEFT is imported by
`Method.peft_config`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from edgelora.errors import SettingsError

if TYPE_CHECKING:
    from edgelora.train.recipe import Recipe

Export = Literal["adapter", "merge", "approximate"]
EXPORTS: Mapping[Export, str] = {
    "adapter": "becomes a GGUF adapter, exactly",
    "merge": "becomes part of a GGUF base: it fits no GGUF adapter",
    "approximate": "becomes a GGUF adapter that comes close to it",
}


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
        name: what `--method` takes.
        summary: a line for `--help`, with the paper.
        exports_to: "adapter" where the result is a GGUF adapter exactly, "merge" where it has to become part of the
            base, "approximate" where a GGUF adapter comes close, with a stated error.
        config_class: the class in `peft` that describes it.
        options: the arguments of that class, taken from the recipe.
    """

    name: str
    summary: str
    exports_to: Export
    config_class: str
    options: Callable[[Recipe], Mapping[str, Any]]

    @property
    def outcome(self) -> str:
        """What `edgelora train` says about the result before it begins."""
        return f"{self.name}: {EXPORTS[self.exports_to]}"

    def peft_config(self, recipe: Recipe) -> Any:
        """The `peft.PeftConfig` to train `recipe` with."""
        import peft

        return getattr(peft, self.config_class)(task_type="CAUSAL_LM", **self.options(recipe))


def _lora(recipe: Recipe) -> dict[str, Any]:
    return {
        "r": recipe.rank,
        "lora_alpha": int(recipe.alpha) if float(recipe.alpha).is_integer() else recipe.alpha,  # as readers expect it
        "lora_dropout": recipe.dropout,
        "target_modules": recipe.target_module_names,
        "bias": "none",
    }


METHODS: Mapping[str, Method] = {
    method.name: method
    for method in (
        Method("lora", "low-rank updates beside frozen weights (arXiv:2106.09685)", "adapter", "LoraConfig", _lora),
    )
}


def method_named(name: str) -> Method:
    """The row called `name`.

    Raises:
        SettingsError: there is none; the message lists the names.
    """
    if name not in METHODS:
        raise SettingsError(f"unknown method {name!r}", hint=f"Known: {', '.join(METHODS)}.")
    return METHODS[name]
