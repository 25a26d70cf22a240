"""The parts of README.md that the code knows better: written between markers by this, compared by `--check`.

python -m tests.contracts.generated_docs            write them
python -m tests.contracts.generated_docs --check    fail where one is stale
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import click

from tests.contracts import adapter_tables

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
BLOCK = re.compile(r"(<!-- generated: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def commands() -> Iterator[str]:
    from edgelora.cli import cli

    yield from ("| command | what it does |", "|---|---|")
    for name, command in cli.commands.items():
        usage = " ".join([f"edgelora {name}", *_arguments(command)])
        yield f"| `{usage}` | {command.get_short_help_str(limit=200).rstrip('.')} |"


def _arguments(command: click.Command) -> Iterator[str]:
    for parameter in command.params:
        if isinstance(parameter, click.Argument):
            name = (parameter.name or "").upper()
            yield name if parameter.required else f"[{name}]"


def options() -> Iterator[str]:
    from edgelora.cli import cli

    for name, command in cli.commands.items():
        context = click.Context(
            command,
            info_name=f"edgelora {name}",
            terminal_width=110,
            **{**cli.context_settings, "max_content_width": 110},
        )
        title = f"<details><summary><code>edgelora {name} --help</code></summary>"
        yield f"{title}\n\n```\n{command.get_help(context)}\n```\n</details>\n"


def quantizations() -> Iterator[str]:
    from converters.quant_types import RECIPES

    yield ", ".join(f"`{name}`" for name in RECIPES)


def families() -> Iterator[str]:
    from converters.architectures import FAMILIES, MODELS

    yield from ("| models | `architectures` in config.json | in llama.cpp |", "|---|---|---|")
    for name, models in MODELS.items():
        yield f"| {models} | `{name}` | `{FAMILIES[name].architecture}` |"


def methods() -> Iterator[str]:
    from edgelora.train.methods import METHODS, SHORT_EXPORTS

    yield from (
        "| `--method` | what is trained | becomes | settings of its own, and their defaults |",
        "|---|---|---|---|",
    )
    for method in METHODS.values():
        own = ", ".join(_option(name, value) for name, value in method.defaults.items())
        yield f"| `{method.name}` | {method.summary} | {SHORT_EXPORTS[method.exports_to]} | {own} |"


def _option(name: str, default: object) -> str:
    option = f"`--{name.replace('_', '-')}`"
    shown = f"{default:g}" if isinstance(default, float) else default
    return option if default is None else f"{option} {shown}"


BLOCKS: dict[str, Callable[[], Iterator[str]]] = {
    "commands": commands,
    "options": options,
    "quantizations": quantizations,
    "families": families,
    "methods": methods,
    "adapters": adapter_tables.methods,
    "adapters-beside": adapter_tables.others,
}


def rendered(text: str) -> str:
    """`text` with every generated block filled in; an unknown block name is an error."""
    return BLOCK.sub(lambda match: match[1] + "\n".join(BLOCKS[match[2]]()) + "\n" + match[3], text)


def main(check: bool) -> int:
    text = README.read_text(encoding="utf-8")
    fresh = rendered(text)
    if text == fresh:
        return 0
    if check:
        print("README.md is stale; run: make docs", file=sys.stderr)  # noqa: T201
        return 1
    README.write_text(fresh, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
