"""Options that more than one command has, and `--config`, which fills any of them from a TOML file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from edgelora.adapter_ref import AdapterRef
from edgelora.errors import DataFileError, SettingsError
from edgelora.sampling import Sampling

Command = TypeVar("Command", bound=Callable[..., Any])
FILE = click.Path(path_type=Path)


class AdapterType(click.ParamType[AdapterRef]):
    """`[NAME=]PATH[@SCALE]`."""

    name = "[NAME=]PATH[@SCALE]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> AdapterRef:
        if isinstance(value, AdapterRef):
            return value
        try:
            return AdapterRef.parse(str(value))
        except SettingsError as error:
            self.fail(f"{error.message} {error.hint}".strip(), param, ctx)


def _chain(*decorators: Callable[[Command], Command]) -> Callable[[Command], Command]:
    def decorate(command: Command) -> Command:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return decorate


def _read_config(ctx: click.Context, _param: click.Parameter, path: Path | None) -> Path | None:
    if path is None:
        return None
    import tomllib

    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise click.BadParameter(f"{path}: cannot be read ({error})") from None
    except tomllib.TOMLDecodeError as error:
        raise click.BadParameter(f"{path}: not TOML ({error})") from None
    options = {option[2:]: p for p in ctx.command.get_params(ctx) for option in p.opts if option.startswith("--")}
    options = {name.replace("-", "_"): option for name, option in options.items() if name not in ("config", "help")}
    values = {name.replace("-", "_"): value for name, value in values.items()}
    if unknown := sorted(set(values) - set(options)):
        known = ", ".join(sorted(options))
        raise click.BadParameter(f"{path}: unknown settings: {', '.join(unknown)} (known: {known})")
    given = {str(options[name].name): _as_typed(path, name, value, options[name]) for name, value in values.items()}
    ctx.default_map = {**(ctx.default_map or {}), **given}
    return path


def _as_typed(path: Path, name: str, value: Any, option: click.Parameter) -> Any:
    """A TOML value as the text that would be typed for it, so that the option's own check has the last word."""
    is_flag = getattr(option, "is_flag", False)
    if is_flag or isinstance(value, bool):
        if is_flag and isinstance(value, bool):
            return value
        raise click.BadParameter(f"{path}: {name} is {value!r}, expected {'true or false' if is_flag else 'a value'}")
    items = value if isinstance(value, list) else [value]
    if not all(isinstance(item, (str, int, float)) for item in items) or (len(items) != 1 and not option.multiple):
        expected = "a list of values" if option.multiple else "one value"
        raise click.BadParameter(f"{path}: {name} is {value!r}, expected {expected}")
    return [str(item) for item in items] if option.multiple else str(items[0])


def sectioned(sections: Mapping[str, Sequence[str]]) -> type[click.Command]:
    """A command whose help has a heading for each of `sections`, over the options of these names; those of no heading
    come first."""

    class SectionedCommand(click.Command):
        def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
            options = [param for param in self.get_params(ctx) if isinstance(param, click.Option)]
            records = {option.name: record for option in options if (record := option.get_help_record(ctx))}
            under = {heading: [records.pop(name) for name in names] for heading, names in sections.items()}
            for heading, rows in {"Options": [*records.values()], **under}.items():
                with formatter.section(heading):
                    formatter.write_dl(rows)

    return SectionedCommand


config_option = click.option(
    "--config",
    type=FILE,
    is_eager=True,
    expose_value=False,
    callback=_read_config,
    help="TOML file whose keys fill options not given here (`learning-rate = 1e-4`).",
)

adapter_option = click.option(
    "--adapter",
    "adapters",
    type=AdapterType(),
    multiple=True,
    help="A GGUF adapter or a PEFT folder; repeat for several. Its name defaults to the file's stem, its scale to 1.",
)

base_option = click.option(
    "--base", type=FILE, help="GGUF base; without it, the one the adapter was made for is found."
)

template_option = click.option(
    "--chat-template", metavar="NAME|FILE", help="Chat template to use instead of the adapter's or base's own."
)

context_options = _chain(
    click.option(
        "--ctx-size",
        type=click.IntRange(min=16),
        help="Context window in tokens.  [default: the model's, at most 4096]",
    ),
    click.option(
        "--threads", type=click.IntRange(1, 512), help="CPU threads.  [default: by the base's size, at most the cores]"
    ),
    click.option(
        "--gpu-layers",
        type=click.IntRange(min=-1),
        show_default="as many as fit",
        help="Layers kept on the GPU, where there is one; -1 is all.",
    ),
    click.option(
        "--kv-type",
        type=click.Choice(["f16", "q8_0", "q4_0"]),
        help="How the KV cache is kept.  [default: f16; q8_0 where only that fits]",
    ),
)

force_option = click.option(
    "--force", is_flag=True, help="Use an adapter even where it says that it was made for another base."
)

engine_options = _chain(
    context_options,
    click.option(
        "--cache-dir", type=FILE, help="Folder in which KV is kept from one run to the next; it holds what was said."
    ),
    click.option(
        "--on-overflow",
        type=click.Choice(["error", "truncate-middle"]),
        default="error",
        show_default=True,
        help="What becomes of a conversation that does not fit: refused, or its oldest exchanges are left out.",
    ),
    force_option,
)

_DEFAULTS = Sampling()
sampling_options = _chain(
    click.option(
        "--temperature", type=float, help=f"0 is greedy.  [default: the adapter's, else {_DEFAULTS.temperature}]"
    ),
    click.option(
        "--top-k", type=int, help=f"Keep the k most likely tokens; 0 keeps all.  [default: {_DEFAULTS.top_k}]"
    ),
    click.option("--top-p", type=float, help=f"Nucleus sampling.  [default: {_DEFAULTS.top_p}]"),
    click.option(
        "--min-p",
        type=float,
        help=f"Drop tokens less likely than this share of the best.  [default: {_DEFAULTS.min_p}]",
    ),
    click.option("--repeat-penalty", type=float, help=f"1 changes nothing.  [default: {_DEFAULTS.repeat_penalty}]"),
    click.option("--presence-penalty", type=float, help="Make tokens that occurred already less likely, from -2 to 2."),
    click.option("--frequency-penalty", type=float, help="The same for each time that they occurred."),
    click.option("--schema", type=FILE, help="A JSON schema (a file) that each reply fits."),
    click.option("--grammar", type=FILE, help="A grammar (a file, in GBNF) that each reply follows."),
    click.option("--seed", type=int, help="Same seed, same text."),
    click.option(
        "--max-tokens", type=int, help="End a reply after this many tokens.  [default: no limit but the context]"
    ),
    click.option("--stop", multiple=True, help="End a reply at this string; repeat for several."),
)


def sampling_of(options: dict[str, Any]) -> dict[str, Any]:
    """Take the sampling options out of a command's `options`; only those given are returned, files as what they hold.

    Raises:
        SettingsError: a value out of range, or a schema or grammar that cannot be used.
        DataFileError: a file that cannot be read.
    """
    taken = {name: options.pop(name, None) for name in Sampling.field_names()}
    given = {name: value for name, value in taken.items() if value is not None and value != ()}
    if "grammar" in given:
        given["grammar"] = _read_text(given["grammar"])
    if "schema" in given:
        given["schema"] = _read_json(given["schema"])
    Sampling.from_mapping(given)
    return given


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataFileError(f"{path}: cannot be read ({error})") from None


def _read_json(path: Path) -> dict[str, Any]:
    import json

    try:
        value = json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:
        raise DataFileError(f"{path}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise DataFileError(f"{path}: a JSON schema is an object, this is {type(value).__name__}")
    return value
