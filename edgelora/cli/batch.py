"""`edgelora batch`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edgelora.adapter_ref import AdapterRef
from edgelora.cli.options import (
    FILE,
    adapter_option,
    base_option,
    config_option,
    engine_options,
    sampling_of,
    sampling_options,
    template_option,
)

command = click.Command("batch")
__all__ = [
    "FILE",
    "Any",
    "AdapterRef",
    "Path",
    "adapter_option",
    "base_option",
    "command",
    "config_option",
    "engine_options",
    "sampling_of",
    "sampling_options",
    "template_option",
]
