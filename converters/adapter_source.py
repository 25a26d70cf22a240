"""An adapter as it was saved: a PEFT folder, an MLX folder or a GGUF adapter, read into changes or finished pairs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from converters import initialisation
from converters.adapted_base import AdaptedBase
from converters.checkpoint import Tensors, missing_weights
from converters.compile import weight_of
from converters.errors import FormatError, MissingFileError, UnsupportedAdapterError
from converters.initialisation import Weight
from converters.methods import METHODS, LowRank, Reading, read_modules
from converters.methods.trained import TOKENS
from converters.mlx_config import detect_mlx
from converters.peft_config import PeftConfig, read_peft_config, with_settings
from converters.peft_settings import short
from converters.placement import shape_in_base
from converters.safetensors_file import read_tensors

NO_TOKENS = "trainable_token_indices names tokens, and the file has no tensor of them"
WEIGHTS, PICKLED = "adapter_model.safetensors", "adapter_model.bin"


@dataclass(frozen=True)
class AdapterSource:
    """An adapter that was trained, read.

    Attributes:
        method: what people call it.
        base_model: the base that it names; "" where it names none.
        inputs: files that are read.
        notices: what should be known of it.
        config: `adapter_config.json`; empty where there is none.
        init: the initialisation that moved a part of the base into it; "" where the base was left alone.
        from_quantized: its changes follow from weights of the base that were quantized.
    """

    path: Path
    method: str
    reading: Reading
    base_model: str
    inputs: tuple[Path, ...]
    notices: tuple[str, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    init: str = ""
    from_quantized: bool = False

    def against(self, weight: Weight) -> AdapterSource:
        """The same, whose `init` is one of `initialisation.RECOMPUTED`, against the base as it was released.

        Args:
            weight: the base's; called when a change is loaded.
        """
        return self.undone(initialisation.recomputed(self.reading, self.init, weight))

    def undone(self, reading: Reading) -> AdapterSource:
        """With changes that begin at the base as it was released."""
        return replace(
            self, reading=reading, init="", notices=(*self.notices, initialisation.ROUNDED.format(self.init))
        )


@contextmanager
def open_adapter(
    path: Path, base: AdaptedBase, *, allow_bin: bool = False, initial: Path | None = None
) -> Iterator[AdapterSource]:
    """Read a folder that PEFT or MLX saved; its tensors are read while it is open.

    Args:
        base: some methods save less than the sizes of the layers they change.
        allow_bin: read `adapter_model.bin` where there are no safetensors; nothing in it is executed.
        initial: the same adapter before it was trained, for initialisations that moved a part of the base into it.

    Raises:
        UnsupportedAdapterError: of a method that is no change of weights, or unknown; or `initial` is not its own.
        ConversionError: files that are missing or broken.
    """
    if detect_mlx(path):
        if initial is not None:
            raise unused_initial(path, "MLX's never do")
        from converters.mlx_adapter import open_mlx  # most folders are not MLX's
        from converters.mlx_reading import read_mlx

        with open_mlx(path) as adapter:
            inputs = tuple(file for file in path.iterdir() if file.is_file())
            reading = read_mlx(adapter, base)
            yield AdapterSource(path, f"MLX {adapter.method}", reading, adapter.base_model, inputs, adapter.notices)
        return
    config = read_peft_config(path)
    with _open(path, allow_bin=allow_bin) as tensors:
        source = _read(path, config, tensors, base)
        if initial is not None and not source.init:
            given = short(config.values.get("init_lora_weights"))
            raise unused_initial(path, f"its own, {given}, did not")
        initial = initial or (initialisation.initial_folder(path) if source.init else None)
        if initial is None:
            yield source
            return
        with open_adapter(initial, base, allow_bin=allow_bin) as begun:
            reading = initialisation.with_initial(source.reading, begun.reading, source.init)
            yield replace(source.undone(reading), inputs=(*source.inputs, *begun.inputs))


def unused_initial(path: Path, why: str) -> UnsupportedAdapterError:
    """What to raise where a state before training is given for an adapter that needs none."""
    return UnsupportedAdapterError(
        f"{path}: --initial is for adapters whose initialisation moved a part of the base into them, and {why}",
        hint="Leave out --initial; or, if it did, write into adapter_config.json which it was "
        '("init_lora_weights": "pissa", say). Of several adapters, convert the one that needs it by itself.',
    )


def _read(path: Path, config: PeftConfig, tensors: Tensors, base: AdaptedBase) -> AdapterSource:
    method = METHODS.get(config.peft_type)
    if method is None or method.read is None:
        why = method.refusal if method else "which is no method that edgelora knows"
        raise UnsupportedAdapterError(
            f"{path}: peft_type is {config.peft_type!r}, {why}",
            hint="Adapters that convert or merge: "
            + ", ".join(name for name, each in METHODS.items() if each.read)
            + ".",
        )
    if not tensors.tensors:
        raise FormatError(f"{path}: its file of weights is empty")
    reading = read_modules(config, method, tensors, partial(shape_in_base, base), partial(weight_of, base))
    if config.values.get("trainable_token_indices") and not any(name.endswith(TOKENS) for name in tensors.tensors):
        reading = replace(reading, problems=(*reading.problems, NO_TOKENS))
    init = initialisation.moved_base(config.values.get("init_lora_weights")) if config.peft_type == "LORA" else ""
    return AdapterSource(
        path=path,
        method=_title(config, method.title),
        reading=reading,
        base_model=config.base_model,
        inputs=tuple(file for file in path.iterdir() if file.is_file()),
        notices=tuple(_rivals(with_settings(config, method.settings, method.free, method.refused), reading)),
        config=config.values,
        init=init,
    )


def _title(config: PeftConfig, title: str) -> str:
    """LoRA and its relatives share one name in PEFT."""
    if config.peft_type != "LORA":
        return title
    flags = {"use_dora": "DoRA", "use_rslora": "rsLoRA", "alora_invocation_tokens": "aLoRA", "use_qalora": "QALoRA"}
    return next((name for key, name in flags.items() if config.values.get(key)), "LoRA")


def _rivals(config: PeftConfig, reading: Reading) -> Iterator[str]:
    """A word where it depends on the order of patterns what a module is multiplied by."""
    if "alpha_pattern" not in config.settings or reading.problems:
        return
    modules = [change.tensor.removesuffix(".weight") for change in reading.changes if isinstance(change, LowRank)]
    found = [(module, rivals) for module in modules if (rivals := config.rivals("alpha_pattern", module))]
    if found:
        (module, rivals), more = found[0], f" and {len(found) - 1} more" if len(found) > 1 else ""
        yield (
            f"alpha_pattern has {rivals} for {module}{more}: the first is taken, as PEFT does, but PEFT saves patterns "
            "sorted: if it was trained with them in another order, its scale was another"
        )


@contextmanager
def _open(folder: Path, *, allow_bin: bool) -> Iterator[Tensors]:
    if (folder / WEIGHTS).is_file():
        with Tensors(read_tensors(folder / WEIGHTS)) as tensors:
            yield tensors
    elif allow_bin and (folder / PICKLED).is_file():
        from converters.torch_file import read_torch_file

        with read_torch_file(folder / PICKLED) as pickled:
            yield pickled
    else:
        raise _missing(folder)


def _missing(folder: Path) -> MissingFileError | UnsupportedAdapterError:
    if (folder / PICKLED).is_file():
        return UnsupportedAdapterError(
            f"{folder}: its weights are a pickle ({PICKLED})",
            hint="Save them as safetensors, or read the pickle with --allow-bin: nothing in it is executed.",
        )
    return missing_weights(folder, WEIGHTS)  # type: ignore[return-value]
