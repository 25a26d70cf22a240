"""How training data is named on the command line: `PATH[@WEIGHT]`, or a dataset's id."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from edgelora.dataset.source import DataSource


class DataType(click.ParamType["DataSource"]):
    """`PATH[@WEIGHT]`, or `OWNER/NAME[:SPLIT][@WEIGHT]`."""

    name = "PATH[@WEIGHT]"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> DataSource:
        from edgelora.dataset.source import DataSource
        from edgelora.errors import SettingsError

        if isinstance(value, DataSource):
            return value
        try:
            return DataSource.parse(str(value))
        except SettingsError as error:
            self.fail(f"{error.message}. {error.hint}".strip(), param, ctx)
