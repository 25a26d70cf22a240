"""Adapters as a stranger might break them: a folder's settings, and its tensors' names, shapes, types and values.

folder = Folder.read(path)          {"r": 8, ...}, {"base_model.model...lora_A.weight": Stored("F32", (8, 64), b"...")}
mutate(folder, random).write(out)   one to three things are other than they were
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
DTYPE_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "F64": 8, "I64": 8, "I32": 4, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "I8": 1}
SPECIAL_VALUES = (
    b"\xff\xff\xff\xff",
    b"\x00\x00\xc0\x7f",
    b"\x00\x00\x80\x7f",
    b"\xff\xff\x7f\x7f",
    b"\x01\x00\x00\x00",
)
NAMES = ("\x00", "\x1b[2J", "\n", "../", ".", "..", "base_layer.", "lora_A.", "é", "\u202e", "9" * 40, ".99999.", "-1")
VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 3, 10**6, 2**31, 2**63, 10**400, 0.5, -0.0, 1e300, "", "x", "\x1b]0;\x07", [], {},
    [None], [0, -1, 10**12], {"q_proj": 3}, {".*": 0}, {"(": 1}, {"(a+)+$": 4}, [["x"]], {"r": {}},
    "all-linear", "none",
)  # fmt: skip


@dataclass(frozen=True)
class Stored:
    """A tensor: its dtype as safetensors names it, and its bytes."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


@dataclass(frozen=True)
class Folder:
    """An adapter's folder."""

    config: Mapping[str, Any]
    tensors: Mapping[str, Stored]

    @classmethod
    def read(cls, path: Path) -> Folder:
        whole = (path / WEIGHTS).read_bytes()
        start = 8 + int.from_bytes(whole[:8], "little")
        header = json.loads(whole[8:start])
        tensors = {
            name: Stored(item["dtype"], tuple(item["shape"]), whole[slice(*(start + o for o in item["data_offsets"]))])
            for name, item in header.items()
            if name != "__metadata__"
        }
        return cls(json.loads((path / CONFIG).read_text()), tensors)

    def write(self, path: Path) -> Path:
        path.mkdir(parents=True, exist_ok=True)
        header, offset = {}, 0
        for name, tensor in self.tensors.items():
            places = [offset, offset + len(tensor.data)]
            header[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": places}
            offset = places[1]
        text = json.dumps(header).encode()
        data = b"".join(tensor.data for tensor in self.tensors.values())
        (path / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + data)
        (path / CONFIG).write_text(json.dumps(self.config))
        return path


Mutation = Callable[[Folder, Random], Folder]


def a_setting(folder: Folder, random: Random) -> Folder:
    return replace(folder, config={**folder.config, random.choice([*folder.config]): random.choice(VALUES)})


def a_setting_less(folder: Folder, random: Random) -> Folder:
    gone = random.choice([*folder.config])
    return replace(folder, config={key: value for key, value in folder.config.items() if key != gone})


def a_number_in_a_setting(folder: Folder, random: Random) -> Folder:
    """One whole number, or a rank, a little or far off."""
    numbers = [key for key, value in folder.config.items() if isinstance(value, (int, float)) and value is not True]
    if not numbers:
        return folder
    key = random.choice(numbers)
    changed = random.choice((folder.config[key] + 1, folder.config[key] * 2, folder.config[key] / 3, 10**9, 1))
    return replace(folder, config={**folder.config, key: changed})


def _with(folder: Folder, name: str, tensor: Stored) -> Folder:
    return replace(folder, tensors={**folder.tensors, name: tensor})


def a_shape(folder: Folder, random: Random) -> Folder:
    name = random.choice([*folder.tensors])
    tensor = folder.tensors[name]
    sizes = list(tensor.shape)
    way = random.randrange(5)
    if way == 0 or not sizes:
        sizes.insert(random.randrange(len(sizes) + 1), random.choice((0, 1, 2)))
    elif way == 1:
        del sizes[random.randrange(len(sizes))]
    elif way == 2:
        random.shuffle(sizes)
    else:
        place = random.randrange(len(sizes))
        sizes[place] = random.choice((0, 1, sizes[place] + 1, sizes[place] * 2, max(1, sizes[place] - 1)))
    return _with(folder, name, _filled(replace(tensor, shape=tuple(sizes))))


def _filled(tensor: Stored) -> Stored:
    """As many bytes as shape and dtype ask for."""
    size = DTYPE_BYTES.get(tensor.dtype, 4)
    for length in tensor.shape:
        size *= length
    data = (tensor.data or b"\0") * (size // max(1, len(tensor.data)) + 1)
    return replace(tensor, data=data[:size])


def a_dtype(folder: Folder, random: Random) -> Folder:
    name = random.choice([*folder.tensors])
    return _with(folder, name, _filled(replace(folder.tensors[name], dtype=random.choice([*DTYPE_BYTES]))))


def some_values(folder: Folder, random: Random) -> Folder:
    """NaN, infinity, the largest or the smallest number."""
    name = random.choice([*folder.tensors])
    data = folder.tensors[name].data
    place = random.randrange(len(data) // 4 + 1) * 4
    value = random.choice(SPECIAL_VALUES)
    return _with(
        folder, name, replace(folder.tensors[name], data=(data[:place] + value + data[place + 4 :])[: len(data)])
    )


def a_name(folder: Folder, random: Random) -> Folder:
    name = random.choice([*folder.tensors])
    place = random.randrange(len(name) + 1)
    end = place + random.choice((0, 0, 1, 5))
    changed = name[:place] + random.choice(NAMES) + name[end:]
    return replace(folder, tensors={changed if key == name else key: value for key, value in folder.tensors.items()})


def another_module(folder: Folder, random: Random) -> Folder:
    """A tensor under the name of another module, or layer."""
    name = random.choice([*folder.tensors])
    parts = name.split(".")
    place = random.randrange(len(parts))
    parts[place] = random.choice(
        ("7", "q_proj", "embed_tokens", "lm_head", "norm", "experts", "weight", "bias", "layers")
    )
    return _with(folder, ".".join(parts), folder.tensors[name])


def a_tensor_less(folder: Folder, random: Random) -> Folder:
    gone = random.choice([*folder.tensors])
    return replace(folder, tensors={name: value for name, value in folder.tensors.items() if name != gone})


MUTATIONS: tuple[Mutation, ...] = (
    a_setting, a_setting_less, a_number_in_a_setting, a_shape, a_dtype, some_values, a_name, another_module,
    a_tensor_less,
)  # fmt: skip


def mutate(folder: Folder, random: Random) -> Folder:
    """One to three mutations."""
    for _ in range(random.choice((1, 1, 2, 3))):
        if folder.tensors and folder.config:
            folder = random.choice(MUTATIONS)(folder, random)
    return folder
