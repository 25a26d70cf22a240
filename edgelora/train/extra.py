"""The packages of the extra `train`: whether they are there, asked before anything loads them."""

from __future__ import annotations

from importlib.util import find_spec

from edgelora.errors import MissingExtraError

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
