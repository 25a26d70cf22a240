"""The pages that reports are: a template beside the code that fills it, one HTML file that needs nothing else."""

from __future__ import annotations

from importlib.resources import files
from typing import Any


def render_page(package: str, template: str, *, trim_blocks: bool = False, **values: Any) -> str:
    """The page as text. Every value is escaped, and a name that the template asks for and nobody gave is an error.

    Args:
        package: where the template lies.
        trim_blocks: a block takes the end of its line with it.
    """
    import jinja2

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=trim_blocks)
    source = files(package).joinpath(template).read_text(encoding="utf-8")
    return environment.from_string(source).render(values)
