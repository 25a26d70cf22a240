"""A Hugging Face model folder: its configuration and its weights, read in rows.

    model/
      config.json
      model.safetensors                     one file, or
      model.safetensors.index.json          an index and its shards
      model-00001-of-00002.safetensors ...

Weights that are stored quantized are computed back as they are read (`converters.stored`).
"""

from __future__ import annotations

import json
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from converters.errors import ConversionError, FormatError, MissingFileError, UnsupportedError, listed
from converters.safetensors_file import StoredTensor, read_tensors
from converters.shards import Floats as Floats
from converters.shards import Shards, floats, matrix_of
from converters.stored import BESIDE, Dequantized, restore

Bytes = npt.NDArray[np.uint8]
Tensor = StoredTensor | Dequantized
CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
READABLE = frozenset(("F64", "F32", "F16", "BF16"))  # weights as they are, without scales


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        MissingFileError: no such file, or not readable.
        FormatError: not JSON, or not an object.
    """
    try:
        text = path.read_text(encoding="utf-8")
        value = json.loads(text)
        if "\\ud" in text.lower():  # half a character cannot be written down again
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except OSError as error:
        raise MissingFileError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise FormatError(f"{path}: expected a JSON object")
    return value


def pickles_in(folder: Path) -> list[str]:
    """Names of weight files that could run code when opened."""
    return sorted(path.name for pattern in PICKLES for path in folder.glob(pattern) if path.name != "training_args.bin")


class Tensors:
    """Tensors of some safetensors files, by name. A context manager: it keeps the files open.

    Any number of threads may read at once.
    """

    def __init__(self, tensors: Mapping[str, StoredTensor]) -> None:
        self.tensors: dict[str, Tensor] = dict(tensors)
        self._shards = Shards(tensor.file for tensor in tensors.values())

    def __enter__(self) -> Self:
        self._shards.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._shards.__exit__(kind, error, trace)

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> Floats:
        """Rows `start` to `stop` of a tensor as float32, shape (stop - start, row length); a vector is one row.

        Raises:
            UnsupportedError: a dtype that is no float, or one that needs a scale (see `check_dtypes`).
            TruncatedFileError: the file has become shorter since its header was read.
        """
        tensor = self.tensors[name]
        stop = matrix_of(tensor.shape)[0] if stop is None else stop
        if isinstance(tensor, Dequantized):
            return tensor.rows(self._shards, start, stop)
        self.check_dtypes([name])
        return floats(self._shards.rows(tensor, start, stop), tensor.dtype)

    def raw_rows(self, name: str, start: int, stop: int, row_bytes: int) -> Bytes:
        """Bytes of a tensor as rows of `row_bytes`, uint8 (stop - start, row_bytes), whatever its dtype."""
        tensor = self.tensors[name]
        if isinstance(tensor, Dequantized):
            raise UnsupportedError(f"{tensor.file}: {name} is stored quantized, and not as the blocks expected here")
        data = self._shards.read(tensor, start * row_bytes, (stop - start) * row_bytes)
        return np.frombuffer(data, np.uint8).reshape(stop - start, row_bytes)

    def check_dtypes(self, names: Iterable[str]) -> None:
        """Refuse tensors that are no floats, or floats of 8 bits and less whose scale nothing tells.

        Raises:
            UnsupportedError: it names them all.
        """
        wrong = [name for name in names if self.tensors[name].dtype not in READABLE]
        if wrong:
            found = self.tensors[wrong[0]]
            shown = [f"{name}: is {self.tensors[name].dtype}" for name in wrong]
            raise UnsupportedError(
                f"{found.file.parent}: {len(wrong)} weights are no F64, F32, F16 or BF16:{listed(shown)}",
                hint=_SCALELESS if found.dtype.startswith(("F8", "F6", "F4")) else _NO_FLOATS,
            )


_NO_FLOATS = "Download the weights that were not quantized."
_SCALELESS = (
    "Such floats need scales, and these have none, or config.json does not say which. Download the model again with "
    "its config.json, or the weights that were not quantized."
)


class Checkpoint(Tensors):
    """A model folder. `config` is `config.json`; `tensors` says what there is, `rows` reads it.

    Attributes:
        notices: what should be known of its weights: that they were quantized before, say.
        tokenizer_folder: where its tokenizer is: here.

    Raises:
        MissingFileError: no folder, no config.json, no weights, or a shard that is not there.
        FormatError: config.json, the index or a shard is broken, or the index names a tensor that its shard lacks.
        UnsupportedError: the weights are pickles, or stored in a way that cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = self.tokenizer_folder = folder
        if not is_there(folder, stat.S_ISDIR):
            raise MissingFileError(f"{folder}: no such folder")
        self.config = _config(folder)
        super().__init__(_find_tensors(folder))
        beside = {name: read_json(folder / name) for name in BESIDE if is_there(folder / name)}
        stored = {name: tensor for name, tensor in self.tensors.items() if isinstance(tensor, StoredTensor)}
        restored = restore(folder, self.config, beside, stored)
        self.tensors, self.notices = dict(restored.tensors), restored.notices

    def rename(self, names: Mapping[str, str]) -> None:
        """Give tensors other names; those that get none are forgotten.

        Raises:
            FormatError: two get the same.
        """
        twice = [name for name, count in Counter(names.values()).items() if count > 1]
        if twice:
            raise FormatError(f"{self.folder}: has more than one tensor for{listed(twice)}")
        self.tensors = {names[stored]: tensor for stored, tensor in self.tensors.items() if stored in names}

    def is_idle_bias(self, name: str) -> bool:
        """Whether this is a bias of zeros beside a quantized weight: GPTQ gives every module one."""
        weight = self.tensors.get(name.removesuffix("bias") + "weight")
        return name.endswith(".bias") and isinstance(weight, Dequantized) and not self.rows(name).any()


def is_there(path: Path, kind: Callable[[int], bool] = stat.S_ISREG) -> bool:
    """Whether there is a file (or what `kind` says), also at the end of a link.

    Raises:
        MissingFileError: a link that leads nowhere, or a place that may not be looked at.
    """
    try:
        return kind(os.stat(path).st_mode)
    except FileNotFoundError:
        if os.path.islink(path):
            raise MissingFileError(
                f"{path}: is a link to {os.readlink(path)}, which is not there", hint="Download it again."
            ) from None
        return False
    except NotADirectoryError:
        return False
    except (OSError, ValueError) as error:
        raise MissingFileError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None


def _config(folder: Path) -> dict[str, Any]:
    if not is_there(folder / CONFIG) and is_there(folder / "adapter_config.json"):
        base = read_json(folder / "adapter_config.json").get("base_model_name_or_path") or "a base it does not name"
        raise FormatError(f"{folder}: is an adapter, and a base is needed here", hint=f"It was trained on {base}.")
    return read_json(folder / CONFIG)


def _find_tensors(folder: Path) -> dict[str, StoredTensor]:
    index = read_json(folder / INDEX) if is_there(folder / INDEX) else None
    whole = is_there(folder / WEIGHTS)
    if index is not None:
        found = _sharded(folder, index)
        if whole and all(tensor.file.name != WEIGHTS for tensor in found.values()):
            raise FormatError(
                f"{folder}: has {WEIGHTS}, and an {INDEX} of other files",
                hint="Delete one of them: transformers would take the former, llama.cpp the latter.",
            )
        return found
    if whole:
        return read_tensors(folder / WEIGHTS)
    raise missing_weights(folder, WEIGHTS)


# Weights in other formats: what they are, and the next step.
FOREIGN: Sequence[tuple[str, str, str]] = (
    ("adapter_model.safetensors", "an adapter's weights", "Give the folder of its base."),
    ("consolidated*.safetensors", "weights under Mistral's own names", "Download model*.safetensors as well."),
    ("*.gguf", "a GGUF file", "It is converted already: name the file itself."),
    ("*.onnx", "an ONNX model", "Download the safetensors files of the model."),
    ("*.h5", "TensorFlow weights", "Download the safetensors files of the model."),
    ("*.msgpack", "Flax weights", "Download the safetensors files of the model."),
    ("*.npz", "MLX or numpy weights", "Download the safetensors files of the model."),
)


def missing_weights(folder: Path, wanted: str) -> ConversionError:
    """The error for a folder without `wanted`: it tells pickles, other formats and shards without an index apart."""
    if pickles := pickles_in(folder):
        return UnsupportedError(
            f"{folder}: its weights are pickles ({', '.join(pickles[:3])}), which can run code when opened",
            hint="Save them as safetensors: model.save_pretrained(folder) in a recent transformers or PEFT.",
        )
    for pattern, what, hint in FOREIGN:
        if found := sorted(path.name for path in folder.glob(pattern) if path.name != wanted):
            return UnsupportedError(f"{folder}: has no {wanted}, but {what} ({found[0]})", hint=hint)
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    hint = f"There is {', '.join(others[:3])}, but no {INDEX}." if others else ""
    return MissingFileError(f"{folder}: no {wanted} in this folder", hint=hint)


def _sharded(folder: Path, index: dict[str, Any]) -> dict[str, StoredTensor]:
    weight_map = index.get("weight_map")
    files = list(weight_map.values()) if isinstance(weight_map, dict) else []
    if not isinstance(weight_map, dict) or not files or not all(isinstance(name, str) for name in files):
        raise FormatError(f"{folder / INDEX}: expected a weight_map of tensor names to file names")
    names = sorted(set(files))
    if outside := [name for name in names if Path(name).name != name or name in ("", "..") or "\0" in name]:
        raise FormatError(f"{folder / INDEX}: names files outside this folder: {', '.join(outside)}")
    if missing := [name for name in names if not is_there(folder / name)]:
        raise MissingFileError(
            f"{folder}: {len(missing)} of {len(names)} shards are missing: {', '.join(missing)}",
            hint="Download them again.",
        )
    shards = {name: read_tensors(folder / name) for name in names}
    absent = [f"{tensor} (in {shard})" for tensor, shard in weight_map.items() if tensor not in shards[shard]]
    if absent:
        raise FormatError(f"{folder / INDEX}: names tensors that are not there:{listed(absent)}")
    extra = [f"{tensor} (in {shard})" for shard in names for tensor in shards[shard] if weight_map.get(tensor) != shard]
    if extra:
        raise FormatError(f"{folder / INDEX}: does not name these tensors of its shards:{listed(extra)}")
    return {tensor: shards[shard][tensor] for tensor, shard in weight_map.items()}
