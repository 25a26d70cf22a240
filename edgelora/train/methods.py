"""The fine-tuning methods: one row each, with the PEFT config it builds and what its result can become.

A new method is a row here. Only the standard library is needed to read the table (`--help` does); PEFT is imported by
`Method.peft_config`.

Defaults are those of the papers where they name some for language models, and else LoRA's: (IA)3 learns at 3e-3
(section 3.3), VeRA at 4e-3 with rank 256 (its table of hyperparameters for Llama 2), PiSSA at 2e-5 with alpha = rank
(section 5), LoRA+ at half of LoRA's rate with ratio 16 (section 5 and PEFT's own advice), full fine-tuning at 2e-5
(Alpaca, Llama 2). rsLoRA's alpha gives rank 16 the scale that LoRA has.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from edgelora.errors import SettingsError

if TYPE_CHECKING:
    from edgelora.train.recipe import Recipe

ALL_LINEAR = "all-linear"
Export = Literal["adapter", "approximate", "merge", "base", "refused", "asked"]
EXPORTS: Mapping[Export, str] = {
    "adapter": "becomes a GGUF adapter, exactly",
    "approximate": "becomes a GGUF adapter that comes close to it; merged into its base it is exact",
    "merge": "becomes part of a GGUF base: it fits no GGUF adapter",
    "base": "becomes a GGUF base of its own",
    "refused": "becomes nothing that llama.cpp runs",
    "asked": "what it becomes is asked of the converter before training",
}
SHORT_EXPORTS: Mapping[Export, str] = {
    "adapter": "an adapter, exactly",
    "approximate": "an adapter, within 1 %; merged, exactly",
    "merge": "a part of its base",
    "base": "a base",
    "refused": "nothing",
    "asked": "said before training",
}


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
        name: what `--method` takes.
        summary: a line for `--help`, with the paper.
        exports_to: "adapter" where the result is a GGUF adapter exactly, "approximate" where one comes close, with a
            stated error, "merge" where it has to become part of the base, "base" where it is one.
        defaults: the settings of a recipe that it reads, beside those that every run reads, and what they are where
            none is given. Another one that is given is an error.
        config_class: the class in `peft` that describes it; "" where PEFT has no part in it, or a file says.
        options: the arguments of that class, taken from the recipe.
        quantization: what the base is turned into as it is loaded; see `base.Placement`.
        loftq: A and B begin as the largest part of what quantization took from the base.
    """

    name: str
    summary: str
    exports_to: Export
    defaults: Mapping[str, Any]
    config_class: str = ""
    options: Callable[[Recipe], Mapping[str, Any]] = field(default=lambda recipe: {})
    quantization: str = ""
    loftq: bool = False

    @property
    def trains_base(self) -> bool:
        """Whether the base's own weights are trained, and no adapter."""
        return self.exports_to == "base"

    def peft_config(self, recipe: Recipe, **found: Any) -> Any:
        """The `peft.PeftConfig` to train `recipe` with.

        Args:
            found: more arguments, which follow from the base.

        Raises:
            SettingsError: `recipe.peft_config` is no configuration that PEFT takes.
        """
        import peft

        if recipe.peft_config is not None:
            from edgelora.train.peft_file import read_config_file

            return read_config_file(recipe.peft_config)
        options = {**self.options(recipe), **found}
        return getattr(peft, self.config_class)(task_type="CAUSAL_LM", **options)


def _plain(value: float | None) -> float | int:
    """Whole numbers as such: readers of adapter_config.json expect them."""
    assert value is not None  # filled in by the row
    return int(value) if float(value).is_integer() else value


def _lora(recipe: Recipe) -> dict[str, Any]:
    return {
        "r": recipe.rank,
        "lora_alpha": _plain(recipe.alpha),
        "lora_dropout": recipe.dropout,
        "target_modules": recipe.target_module_names,
        "bias": "none",
    }


def _from_the_base(init: str | bool) -> Callable[[Recipe], dict[str, Any]]:
    """A and B begin as a part of the base, at scale 1; dropping some of their inputs would drop that part."""

    def options(recipe: Recipe) -> dict[str, Any]:
        return {
            "r": recipe.rank,
            "lora_alpha": recipe.rank,
            "lora_dropout": 0.0,
            "target_modules": recipe.target_module_names,
            "init_lora_weights": init,
        }

    return options


def _eva(recipe: Recipe) -> dict[str, Any]:
    from peft import EvaConfig

    return {**_lora(recipe), "init_lora_weights": "eva", "eva_config": EvaConfig(rho=recipe.eva_rho)}


def _ia3(recipe: Recipe) -> dict[str, Any]:
    if recipe.target_modules is None:
        return {}  # PEFT knows keys, values and the second feedforward matrix of each family
    names = [name.strip() for name in recipe.target_modules.split(",")]
    return {"target_modules": names, "feedforward_modules": [name for name in names if name.endswith(FEEDFORWARD)]}


def _factored(recipe: Recipe) -> dict[str, Any]:
    return {"r": recipe.rank, "alpha": _plain(recipe.alpha), "target_modules": recipe.target_module_names}


def _oft(recipe: Recipe) -> dict[str, Any]:
    return {"oft_block_size": recipe.block_size, "target_modules": recipe.target_module_names, "bias": "none"}


def _vera(recipe: Recipe) -> dict[str, Any]:
    return {"r": recipe.rank, "vera_dropout": recipe.dropout, "target_modules": recipe.target_module_names}


FEEDFORWARD = ("down_proj", "mlp.c_proj", "fc2", "fc_out", "dense_4h_to_h", "w2", "wo")  # whose inputs (IA)3 scales
LORA: Mapping[str, Any] = {
    "rank": 16,
    "alpha": 32.0,
    "dropout": 0.05,
    "target_modules": ALL_LINEAR,
    "learning_rate": 2e-4,
}
FROM_THE_BASE: Mapping[str, Any] = {"rank": 16, "target_modules": ALL_LINEAR, "learning_rate": 2e-4}
FACTORED: Mapping[str, Any] = {"rank": 8, "alpha": 8.0, "target_modules": ALL_LINEAR, "learning_rate": 2e-4}


def _variant(name: str, summary: str, export: Export = "adapter", **settings: Any) -> Method:
    """A relative of LoRA; `quantization` and `defaults` beside arguments of LoraConfig."""
    quantization, own = settings.pop("quantization", ""), settings.pop("defaults", {})
    return Method(
        name,
        summary,
        export,
        {**LORA, **own},
        "LoraConfig",
        lambda recipe: {**_lora(recipe), **settings},
        quantization=quantization,
    )


ROWS = (
    _variant("lora", "low-rank updates beside frozen weights (arXiv:2106.09685)"),
    _variant("qlora", "LoRA on a base in 4-bit NF4, quantized twice (arXiv:2305.14314)", quantization="nf4"),
    _variant("dora", "LoRA that trains each weight's length apart (arXiv:2402.09353)", "approximate", use_dora=True),
    _variant("qdora", "DoRA on a base in NF4", "approximate", use_dora=True, quantization="nf4"),
    _variant(
        "rslora", "LoRA scaled by alpha / sqrt(rank) (arXiv:2312.03732)", use_rslora=True, defaults={"alpha": 8.0}
    ),
    Method(
        "pissa",
        "LoRA that begins as the base's largest singular values (arXiv:2404.02948)",
        "adapter",
        {**FROM_THE_BASE, "learning_rate": 2e-5},
        "LoraConfig",
        _from_the_base("pissa"),
    ),
    Method(
        "olora",
        "LoRA that begins as the base's QR decomposition (arXiv:2406.01775)",
        "adapter",
        FROM_THE_BASE,
        "LoraConfig",
        _from_the_base("olora"),
    ),
    Method(
        "loftq",
        "LoRA that begins as what NF4 took from the base (arXiv:2310.08659)",
        "adapter",
        FROM_THE_BASE,
        "LoraConfig",
        _from_the_base(True),
        quantization="nf4",
        loftq=True,
    ),
    Method(
        "eva",
        "LoRA that begins at the data's own directions, with ranks where they matter (arXiv:2410.07170)",
        "adapter",
        {**LORA, "eva_rho": 2.0},
        "LoraConfig",
        _eva,
    ),
    _variant(
        "lora+",
        "LoRA whose B learns faster than A (arXiv:2402.12354)",
        defaults={"lora_plus_ratio": 16.0, "learning_rate": 1e-4},
    ),
    Method(
        "ia3",
        "a factor for each key, value and feedforward input (arXiv:2205.05638)",
        "approximate",
        {"target_modules": None, "learning_rate": 3e-3},
        "IA3Config",
        _ia3,
    ),
    Method(
        "loha",
        "the product, value by value, of two low-rank matrices (arXiv:2108.06098)",
        "adapter",
        FACTORED,
        "LoHaConfig",
        _factored,
    ),
    Method("lokr", "a Kronecker product (arXiv:2309.14859)", "adapter", FACTORED, "LoKrConfig", _factored),
    Method(
        "oft",
        "a rotation of the weights, block by block (arXiv:2306.07280)",
        "approximate",
        {"block_size": 32, "target_modules": ALL_LINEAR, "learning_rate": 2e-4},
        "OFTConfig",
        _oft,
    ),
    Method(
        "vera",
        "trained vectors between random matrices that all layers share (arXiv:2310.11454)",
        "adapter",
        {"rank": 256, "dropout": 0.0, "target_modules": ALL_LINEAR, "learning_rate": 4e-3},
        "VeraConfig",
        _vera,
    ),
    _variant(
        "alora",
        "LoRA that acts from its invocation on, so that a cache of what stands before is shared (arXiv:2504.12397)",
        defaults={"invocation": None},
    ),
    Method("full", "all weights of the base", "base", {"learning_rate": 2e-5}),
    Method(
        "peft-config",
        "any other method of PEFT, as the JSON file of --peft-config describes it",
        "asked",
        {"peft_config": None, "learning_rate": 2e-4},
    ),
)
METHODS: Mapping[str, Method] = {method.name: method for method in ROWS}


def method_named(name: str) -> Method:
    """The row called `name`.

    Raises:
        SettingsError: there is none; the message lists the names.
    """
    if name not in METHODS:
        raise SettingsError(f"unknown method {name!r}", hint=f"Known: {', '.join(METHODS)}.")
    return METHODS[name]
