"""No value in any family's config.json is a crash: a model converts, or is refused in words."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from converters.base import convert_base
from converters.errors import ConversionError
from tests.equivalence.tiny_models import TINY, build

pytestmark = pytest.mark.train

VALUES: tuple[Any, ...] = (
    None, "x", -1, 0, 0.5, 1e99, float("nan"), 2**31 - 1, [], [[]], {}, {"a": 1},
)  # fmt: skip
# Keys that a configuration may have, and those of the tiny models have not.
MORE = (
    "auto_map", "text_config", "quantization_config", "compression_config", "layer_types", "rope_scaling", "rope_theta",
    "rope_local_base_freq", "head_dim", "sliding_window", "sliding_window_pattern", "partial_rotary_factor",
    "num_local_experts", "num_experts_per_tok", "n_group", "topk_group", "norm_eps", "n_positions", "n_inner",
    "num_kv_heads", "num_nextn_predict_layers", "original_max_position_embeddings", "per_layer_config",
)  # fmt: skip
A_FEW = 12  # of some 900 for each family, which the slow test goes through


def variants(config: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """A configuration with one key gone or of another value, also within objects and lists."""
    for key in dict.fromkeys([*config, *MORE]):
        yield from _changes(config, [key], config.get(key))


def _changes(config: dict[str, Any], path: list[Any], value: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    for new in ("absent", *VALUES):
        changed = copy.deepcopy(config)
        holder: Any = changed
        for step in path[:-1]:
            holder = holder[step]
        if new == "absent" and isinstance(holder, dict):
            holder.pop(path[-1], None)
        else:
            holder[path[-1]] = new
        yield f"{'.'.join(map(str, path))} = {new!r}", changed
    inside = list(value) if isinstance(value, dict) else [0] if isinstance(value, list) and value else []
    for key in inside:
        yield from _changes(config, [*path, key], value[key])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("hostile")
    return {name: build(name, root / name) for name in TINY}


def crashes(folder: Path, wanted: list[tuple[str, dict[str, Any]]]) -> list[str]:
    path, found = folder / "config.json", []
    original = path.read_text()
    for what, config in wanted:
        path.write_text(json.dumps(config))
        try:
            convert_base(folder, folder / "out.gguf", quant="f32", dry_run=True, force=True)
        except ConversionError:
            continue
        except Exception as error:
            found.append(f"{what}: {error!r}")
    path.write_text(original)
    return found


@pytest.mark.parametrize("name", TINY)
def test_a_few_changes(name: str, folders: dict[str, Path]) -> None:
    every = list(variants(json.loads((folders[name] / "config.json").read_text())))
    assert crashes(folders[name], random.Random(name).sample(every, A_FEW)) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_every_change(name: str, folders: dict[str, Path]) -> None:
    assert crashes(folders[name], list(variants(json.loads((folders[name] / "config.json").read_text())))) == []


def test_a_crash_is_seen(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("converters.base.describe", lambda *given, **more: {}["general.name"])
    config = json.loads((folders["llama"] / "config.json").read_text())
    assert crashes(folders["llama"], [("none", config)]) == ["none: KeyError('general.name')"]
