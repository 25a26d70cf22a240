"""A GGUF base to train on: its own weights in torch, so that an adapter learns on what it will be served on.

    base-q4_k_m.gguf -> rows of float32 (`converters.dequantize`) -> the checkpoint's tensors (`converters.restore`)
                     -> transformers' model of the configuration that the metadata gives (`converters.configuration`)

What a quantization took from the weights stays lost; that is the point. The forward pass in torch is then llama.cpp's
but for one thing: llama.cpp also rounds activations to 8 bits before it multiplies them by quantized weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from converters.adapted_base import family_of, sizes_of
from converters.architectures import FAMILIES
from converters.architectures.settings import complete, flatten
from converters.architectures.stored import Stored
from converters.base_file import BaseFile
from converters.configuration import configuration, problems_of_stored
from converters.errors import ConversionError, UnsupportedError, listed
from converters.restore import restore, restored_places
from edgelora.errors import EdgeloraError, ModelFileError, SettingsError

if TYPE_CHECKING:
    from edgelora.train.base import Placement

OWN_CONFIG = "Give a folder with the model's config.json and tokenizer files with --base-config."


@dataclass(frozen=True)
class GGUFBase:
    """A GGUF file that is trained on, a `Base` (`edgelora.train.base`).

    Attributes:
        path: the file; of a split one, any part.
        config_folder: config.json and tokenizer files of the model it was made from; None reads them from the file.
    """

    path: Path
    config_folder: Path | None = None

    @property
    def reference(self) -> str:
        return str(self.path.resolve())

    @property
    def name(self) -> str:
        with BaseFile(self.path) as file:
            return str(file.header.metadata.get("general.name") or self.path.stem)

    def check(self) -> None:
        """Raises ModelFileError: it is no GGUF base, or of a family that nobody here knows."""
        try:
            with BaseFile(self.path) as file:
                family_of(file.header)
        except ConversionError as error:
            raise ModelFileError(
                error.message, hint=error.hint or "Give a GGUF base, or a Hugging Face folder."
            ) from error

    def load_tokenizer(self) -> Any:
        """The tokenizer that the file carries, or the one its vocabulary stands for; or that of `config_folder`.

        Raises:
            ModelFileError: neither gives the ids of serving.
        """
        from edgelora.train.base import BaseFolder
        from edgelora.train.gguf_tokenizer import check_ids, load_tokenizer

        if self.config_folder is None:
            return load_tokenizer(self.path)
        tokenizer = BaseFolder(self.config_folder, self.reference).load_tokenizer()
        check_ids(tokenizer, self.path)
        return tokenizer

    def load_config(self) -> Any:
        """transformers' configuration, proven equal to the file's metadata.

        Raises:
            ModelFileError: no configuration computes what the file says.
        """
        try:
            with BaseFile(self.path) as file:
                return self._config(file)
        except ConversionError as error:
            raise ModelFileError(error.message, hint=error.hint) from error

    def load_model(self, place: Placement) -> Any:
        """transformers' model with the file's weights, each computed back in float32 and kept in `place.dtype`.

        Raises:
            SettingsError: `place` would quantize them once more.
            ModelFileError: no configuration computes what the file says, or its tensors do not fit it.
            EdgeloraError: not enough memory.
        """
        import torch

        if place.quantization:
            raise SettingsError(
                f"{self.path}: a GGUF base is trained on as it is, and this method would turn it into "
                f"{place.quantization.upper()}",
                hint="Take lora for qlora and loftq, dora for qdora; or give the base's Hugging Face folder.",
            )
        try:
            with BaseFile(self.path) as file:
                return _model(file, self._config(file), place)
        except torch.OutOfMemoryError as error:
            raise EdgeloraError(f"{self.name} does not fit into memory: {error}") from error
        except ConversionError as error:
            raise ModelFileError(error.message, hint=error.hint) from error

    def _config(self, file: BaseFile) -> Any:
        """transformers' configuration, proven equal to the file's metadata."""
        from transformers import AutoConfig

        from edgelora.train.base import BaseFolder

        stored = stored_of(file)
        if self.config_folder is not None:
            config = BaseFolder(self.config_folder, self.reference).load_config()
        else:
            config = AutoConfig.for_model(**self._given(stored))
        said = {**config.to_dict(), "architectures": config.architectures, "model_type": config.model_type}
        if problems := problems_of_stored(said, stored):
            source = self.config_folder / "config.json" if self.config_folder else "transformers"
            raise ModelFileError(f"{self.path}: {source} would compute otherwise:{listed(problems)}", hint=OWN_CONFIG)
        return config

    def _given(self, stored: Stored) -> dict[str, Any]:
        try:
            return configuration(stored)
        except ConversionError as error:
            raise ModelFileError(f"{self.path}: {error.message}", hint=error.hint or OWN_CONFIG) from error


def stored_of(file: BaseFile) -> Stored:
    """An open base, as its configuration is read from it.

    Raises:
        ConversionError: an adapter, or a family that nobody here knows.
    """
    header = file.header
    family_of(header)
    shapes = {name: tensor.shape for name, tensor in header.tensors.items()}
    return Stored(header.architecture, header.metadata, shapes, lambda name: file.rows(name).reshape(shapes[name]))


def restored_tensors(file: BaseFile, config: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    """The checkpoint's tensors under transformers' names, float32, one group of them in memory at a time.

    Args:
        config: as `config.json` has it.

    Raises:
        UnsupportedError: the file has only a part of a tensor, or tensors that this configuration has no place for.
    """
    header = file.header
    family, sizes = FAMILIES[config["architectures"][0]], sizes_of(header)
    extra = header.metadata.get(f"{header.architecture}.nextn_predict_layers", 0)
    full = complete(flatten(config), family, extra)
    places = restored_places(family, sizes, full, header.tensors)
    unknown = {*header.tensors} - {place.gguf_name for place in places} - {*family.computed(full)}
    if unknown:
        raise UnsupportedError(
            f"{header.path}: tensors that a {header.architecture} model has not:{listed(sorted(unknown))}"
        )
    trained = (place for place in places if place.layer is None or place.layer < full["num_hidden_layers"])
    try:
        yield from restore(trained, sizes, lambda name: file.rows(name).reshape(header.tensors[name].shape))
    except ValueError as error:
        raise UnsupportedError(f"{header.path}: {error}") from error


def _model(file: BaseFile, config: Any, place: Placement) -> Any:
    import torch
    import transformers

    settings = {**config.to_dict(), "architectures": config.architectures, "model_type": config.model_type}
    model_class = getattr(transformers, settings["architectures"][0])
    state = {name: torch.from_numpy(values).to(place.dtype) for name, values in restored_tensors(file, settings)}
    model, info = model_class.from_pretrained(
        None, config=config, state_dict=state, output_loading_info=True, **place.loading()
    )
    wrong = [*sorted(info["missing_keys"]), *sorted(info["unexpected_keys"]), *map(str, info["mismatched_keys"])]
    if wrong:
        raise ModelFileError(
            f"{file.header.path}: tensors that do not fit {model_class.__name__}:{listed(wrong)}", hint=OWN_CONFIG
        )
    return model
