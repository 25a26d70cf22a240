"""An adapter that mlx-lm trained on a Mac, read into plain matrices.

    adapters/
      adapter_config.json      {"fine_tune_type": "lora", "lora_parameters": {"rank": 8, "scale": 20.0}, ...}
      adapters.safetensors     model.layers.0.self_attn.q_proj.lora_a  (columns, rank)
                               model.layers.0.self_attn.q_proj.lora_b  (rank, rows)

What this relies on, all from https://github.com/ml-explore/mlx-lm:

- mlx_lm/tuner/lora.py: a linear layer computes y + scale * (x @ lora_a) @ lora_b. An embedding's lora_a is (vocabulary,
  rank) and its lora_b (rank, embedding). Experts have lora_a (experts, rank, columns), in older releases (experts *
  rank, columns), and lora_b (experts, rows, rank).
- mlx_lm/tuner/dora.py: m is the length that each row of W + change gets; a bias is added afterwards.
- mlx_lm/tuner/trainer.py: the file holds what was trained, so with `fine_tune_type` "full" whole weights.
- mlx_lm/models: modules are named as in transformers, but for `RENAMED` and the experts (`switch_mlp`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from converters.checkpoint import READABLE, Floats, Tensors, missing_weights
from converters.mlx_config import METHODS, MlxSettings, read_mlx_settings
from converters.safetensors_file import read_tensors

WEIGHTS = "adapters.safetensors"
PARTS = ("lora_a", "lora_b", "m")
EMBEDDINGS = frozenset(("embed_tokens", "wte", "wpe", "embed_in", "word_embeddings", "tok_embeddings", "embeddings"))
# Beginnings of modules' names where mlx-lm's are not transformers'.
RENAMED: Sequence[tuple[str, str]] = (
    (r"language_model\.(?=model\.|lm_head)", ""),
    (r"model\.language_model\.", "model."),
    (r"model\.h\.(?=\d+\.(attention|mlp\.dense))", "gpt_neox.layers."),
    (r"model\.(?=embed_in)", "gpt_neox."),
    (r"model\.(?=embed_out)", ""),
    (r"model\.(?=(h|wte|wpe)\b)", "transformer."),
)
Kind = Literal["linear", "embedding", "experts"]
Load = Callable[[], Floats]
Sizes = tuple[int, ...]


@dataclass(frozen=True)
class MlxModule:
    """W + scale * B @ A, and with a magnitude each row of that at the length it says (DoRA).

    Attributes:
        name: transformers' ("model.layers.0.self_attn.q_proj"); experts' has a star in the place of their number
            ("model.layers.0.mlp.experts.*.gate_proj"), with MLX's names of the three parts.
        shape: of W: (rows, columns), rows being outputs; of an embedding (vocabulary, embedding); of experts
            (experts, rows, columns).
        load_a: float32 (rank, columns), of experts (experts, rank, columns).
        load_b: float32 (rows, rank), of experts (experts, rows, rank), without the scale.
        load_magnitude: float32 (rows,), or None.
    """

    name: str
    kind: Kind
    shape: Sizes
    rank: int
    scale: float
    load_a: Load
    load_b: Load
    load_magnitude: Load | None = None


@dataclass(frozen=True)
class MlxTensor:
    """A weight that was trained as a whole: transformers' name, and float32 in its own shape."""

    name: str
    shape: Sizes
    load: Load


@dataclass(frozen=True)
class MlxAdapter:
    """What a folder holds.

    Attributes:
        method: "LoRA", "DoRA" or "full fine-tuning".
        whole: weights of a full fine-tuning.
        base_model: what it was trained on, as it was named there; "" where that is not told.
        problems: what makes it unusable, each with its name.
        notices: what should be known of it.
    """

    method: str
    modules: tuple[MlxModule, ...]
    whole: tuple[MlxTensor, ...]
    base_model: str
    problems: tuple[str, ...] = ()
    notices: tuple[str, ...] = ()


class _Problem(Exception):
    """One module's tensors do not go together; without the module's name."""


@contextmanager
def open_mlx(folder: Path) -> Iterator[MlxAdapter]:
    """Read a folder; what its modules load is there while it is open.

    Raises:
        MissingFileError: its configuration or its weights are not there.
        FormatError: one of them is broken.
        UnsupportedError: the weights are in another format.
    """
    settings = read_mlx_settings(folder)
    if not (folder / WEIGHTS).is_file():
        raise missing_weights(folder, WEIGHTS)
    with Tensors(read_tensors(folder / WEIGHTS)) as tensors:
        yield _read(settings, tensors)


def _read(settings: MlxSettings, tensors: Tensors) -> MlxAdapter:
    problems = [*settings.problems]
    if not tensors.tensors:
        problems.append(f"{WEIGHTS}: holds no tensor")
    names = _readable(tensors, problems)
    is_full = settings.method == "full"
    modules = () if is_full else tuple(_modules(settings, tensors, names, problems))
    whole = tuple(_whole(tensors, names)) if is_full else ()
    counted = Counter([*(module.name for module in modules), *(tensor.name for tensor in whole)])
    problems += [f"{name}: is there {count} times" for name, count in counted.items() if count > 1]
    return MlxAdapter(
        method=METHODS.get(settings.method, settings.method),
        modules=modules,
        whole=whole,
        base_model=settings.base_model,
        problems=tuple(problems),
        notices=settings.notices,
    )


def _readable(tensors: Tensors, problems: list[str]) -> list[str]:
    found = tensors.tensors
    problems += [f"{name}: is {found[name].dtype}, and no float" for name in found if found[name].dtype not in READABLE]
    return [name for name in found if found[name].dtype in READABLE]


def _whole(tensors: Tensors, names: Sequence[str]) -> Iterator[MlxTensor]:
    for name in names:
        yield MlxTensor(_renamed(name), tensors.tensors[name].shape, _loader(tensors, name))


def _modules(settings: MlxSettings, tensors: Tensors, names: Sequence[str], problems: list[str]) -> Iterator[MlxModule]:
    grouped: dict[str, dict[str, str]] = {}
    for stored in names:
        module, _, part = stored.rpartition(".")
        if part in PARTS and module:
            grouped.setdefault(module, {})[part] = stored
        else:
            problems.append(f"{stored}: no tensor of a LoRA or DoRA of mlx-lm")
    for module, parts in grouped.items():
        try:
            yield _module(module, parts, settings, tensors)
        except _Problem as problem:
            problems.append(f"{module}: {problem}")


def _module(name: str, parts: Mapping[str, str], settings: MlxSettings, tensors: Tensors) -> MlxModule:
    needed = PARTS if settings.method == "dora" else PARTS[:2]
    if set(parts) != set(needed):
        raise _Problem(f"has {', '.join(sorted(parts))}, and {settings.method} has {', '.join(needed)}")
    shapes = {part: tensors.tensors[stored].shape for part, stored in parts.items()}
    loaders = {part: _loader(tensors, stored) for part, stored in parts.items()}
    kind = _kind(name, shapes["lora_b"])
    rank, shape = SHAPES[kind](shapes["lora_a"], shapes["lora_b"])
    if settings.rank and rank != settings.rank:
        raise _Problem(f"has rank {rank}, lora_parameters.rank is {settings.rank}")
    if "m" in parts and (kind == "experts" or shapes["m"] != shape[:1]):
        raise _Problem(f"m {shapes['m']} is not one number for each of the {shape[0]} rows of a matrix")
    load_a, load_b = _factors(kind, rank, loaders["lora_a"], loaders["lora_b"])
    return MlxModule(_module_name(name, kind), kind, shape, rank, settings.scale, load_a, load_b, loaders.get("m"))


def _loader(tensors: Tensors, stored: str) -> Load:
    return lambda: tensors.rows(stored).reshape(tensors.tensors[stored].shape)


def _kind(name: str, b: Sizes) -> Kind:
    if len(b) == 3:
        return "experts"
    return "embedding" if name.rpartition(".")[2] in EMBEDDINGS else "linear"


def _module_name(name: str, kind: Kind) -> str:
    renamed = _renamed(name)
    if kind != "experts":
        return renamed
    module, _, part = renamed.rpartition(".")
    return f"{re.sub('[.](switch_mlp|experts)$', '', module)}.experts.*.{part}"


def _renamed(name: str) -> str:
    for pattern, start in RENAMED:
        if found := re.match(pattern, name):
            return start + name[found.end() :]
    return name


def _matrix_shape(a: Sizes, b: Sizes) -> tuple[int, Sizes]:
    """Of a linear layer: rank and (rows, columns)."""
    if len(a) != 2 or len(b) != 2 or a[1] != b[0] or 0 in a + b:
        raise _Problem(f"lora_a {a} and lora_b {b} do not fit together")
    return a[1], (b[1], a[0])


def _embedding_shape(a: Sizes, b: Sizes) -> tuple[int, Sizes]:
    rank, (embedding, vocabulary) = _matrix_shape(a, b)
    return rank, (vocabulary, embedding)


def _experts_shape(a: Sizes, b: Sizes) -> tuple[int, Sizes]:
    experts, rows, rank = b
    if a[:-1] not in ((experts, rank), (experts * rank,)) or 0 in a + b:
        raise _Problem(f"lora_a {a} and lora_b {b} do not fit together")
    return rank, (experts, rows, a[-1])


SHAPES: Mapping[Kind, Callable[[Sizes, Sizes], tuple[int, Sizes]]] = {
    "linear": _matrix_shape,
    "embedding": _embedding_shape,
    "experts": _experts_shape,
}


def _factors(kind: Kind, rank: int, lora_a: Load, lora_b: Load) -> tuple[Load, Load]:
    """A and B, in the order of `MlxModule`."""
    if kind == "embedding":
        return lora_b, lora_a
    if kind == "linear":
        return lambda: np.ascontiguousarray(lora_a().T), lambda: np.ascontiguousarray(lora_b().T)
    return lambda: _by_expert(lora_a(), rank), lora_b


def _by_expert(a: Floats, rank: int) -> Floats:
    return a.reshape(-1, rank, a.shape[-1])
