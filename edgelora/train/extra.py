"""The packages of the extra `train`, and those of single settings: whether they are there, asked before anything loads
them."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from edgelora.errors import MissingExtraError

if TYPE_CHECKING:
    from edgelora.train.recipe import Recipe

PACKAGES = ("torch", "transformers", "peft", "trl", "datasets", "accelerate")


def require_extra(what: str) -> None:
    """Raises MissingExtraError where one of them is not installed.

    Args:
        what: needs them ("training").
    """
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise MissingExtraError(
            f"{what} needs packages that are not installed: {', '.join(missing)}",
            hint="pip install 'edgelora[train]'",
        )


def require_packages(recipe: Recipe) -> None:
    """Raises MissingExtraError where a setting needs a package that is not installed."""
    reports = [name.strip() for name in (recipe.report_to or "").split(",") if name]
    needed = {
        f"--method {recipe.method}": ("bitsandbytes", "bitsandbytes") if recipe.row.quantization else None,
        "--liger": ("liger_kernel", "liger-kernel") if recipe.liger else None,
        "--attention flash_attention_2": ("flash_attn", "flash-attn")
        if recipe.attention == "flash_attention_2"
        else None,
        **{f"--report-to {name}": (name, name) for name in reports},
    }
    missing = {what: names[1] for what, names in needed.items() if names and find_spec(names[0]) is None}
    if missing:
        raise MissingExtraError(
            "; ".join(f"{what} needs {package}, which is not installed" for what, package in missing.items()),
            hint=f"pip install {' '.join(missing.values())}",
        )
