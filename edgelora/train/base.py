"""The base that is trained on: found by folder or hub id, loaded in torch, frozen by PEFT later.

Whatever holds weights to train on is a `Base`; `find_base` tells which one a person means.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from converters.hub import fetch_model
from converters.hub_cache import repository_of
from converters.hub_reference import hub_reference
from edgelora.errors import EdgeloraError, ModelFileError, SettingsError
from edgelora.train.extra import require_packages
from edgelora.train.recipe import Recipe


@dataclass(frozen=True)
class Placement:
    """Where a run computes, in which type, and how the weights that stay frozen are kept.

    Attributes:
        quantization: "nf4" where the base is quantized as it is loaded; "" where its weights stay as they are.
        attention: transformers' `attn_implementation`; "" lets it choose.
    """

    device: str
    dtype_name: str
    quantization: str = ""
    attention: str = ""

    @property
    def dtype(self) -> Any:
        import torch

        return getattr(torch, self.dtype_name)

    def loading(self) -> dict[str, Any]:
        """Arguments of transformers' `from_pretrained`."""
        found: dict[str, Any] = {"dtype": self.dtype}
        if self.attention:
            found["attn_implementation"] = self.attention
        if self.quantization:
            from transformers import BitsAndBytesConfig

            found["device_map"] = {"": self.device}
            found["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type=self.quantization,
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=self.dtype,
            )
        return found

    def as_served(self) -> Placement:
        """The same without what only training does to the base."""
        return replace(self, quantization="", attention="")


class Base(Protocol):
    """What a run trains on, wherever its weights lie."""

    @property
    def path(self) -> Path:
        """What `converters` reads of it: the folder, or the GGUF file."""

    @property
    def reference(self) -> str:
        """What `base_model_name_or_path` says in the adapter: a hub id, or an absolute path."""

    @property
    def name(self) -> str:
        """What people call it: `owner/name` on the hub, or the name of its folder or file."""

    def load_tokenizer(self) -> Any:
        """A fast `transformers` tokenizer that gives the ids of serving.

        Raises:
            ModelFileError: it cannot be read.
            ConversionError: a bare tokenizer.model that llama.cpp cannot stand for.
        """

    def load_config(self) -> Any:
        """The `transformers` configuration of its model, without its weights.

        Raises:
            ModelFileError: it cannot be read.
        """

    def load_model(self, place: Placement) -> Any:
        """Its weights as a `transformers` causal language model, in `place.dtype`, on the CPU unless quantized.

        Raises:
            ModelFileError: files that are broken, or weights that are missing (transformers would make them up).
            EdgeloraError: not enough memory.
        """


@dataclass(frozen=True)
class BaseFolder:
    """A Hugging Face folder on this machine, a `Base`."""

    path: Path
    reference: str

    @property
    def name(self) -> str:
        path = Path(self.reference)
        if not path.is_absolute():
            return self.reference
        return repository_of(path) or path.name

    def load_tokenizer(self) -> Any:
        """`tokenizer.json` itself where there is one, as serving reads that file too.

        AutoTokenizer builds some families' tokenizers anew from the vocabulary (transformers 5: LlamaTokenizer), and
        leaves out what the file says beyond that, such as how characters outside the vocabulary are shown.
        """
        from transformers import AutoTokenizer, PreTrainedTokenizerFast

        from edgelora.train.sentencepiece import load_sentencepiece

        if (self.path / "tokenizer.model").is_file() and not (self.path / "tokenizer.json").is_file():
            return load_sentencepiece(self.path)
        reader = PreTrainedTokenizerFast if (self.path / "tokenizer.json").is_file() else AutoTokenizer
        try:
            return reader.from_pretrained(self.path, local_files_only=True)
        except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
            raise ModelFileError(f"{self.path}: the tokenizer cannot be loaded: {error}") from error

    def load_config(self) -> Any:
        from transformers import AutoConfig

        try:
            return AutoConfig.from_pretrained(self.path, local_files_only=True)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ModelFileError(f"{self.path}: the configuration cannot be read: {error}") from error

    def load_model(self, place: Placement) -> Any:
        import torch
        from safetensors import SafetensorError
        from transformers import AutoModelForCausalLM

        try:
            model, info = AutoModelForCausalLM.from_pretrained(
                self.path, **place.loading(), use_safetensors=True, local_files_only=True, output_loading_info=True
            )
        except torch.OutOfMemoryError as error:
            raise EdgeloraError(f"{self.name} does not fit into memory: {error}") from error
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError, SafetensorError) as error:
            raise ModelFileError(f"{self.path}: the model cannot be loaded: {error}") from error
        if missing := sorted(info["missing_keys"]):
            shown = ", ".join(missing[:5]) + (" ..." if len(missing) > 5 else "")
            raise ModelFileError(
                f"{self.path}: {len(missing)} weights are missing: {shown}",
                hint="Download the model again; a shard may not be there.",
            )
        _keep_quantized(model)
        return model


def _keep_quantized(model: Any) -> None:
    """bitsandbytes packs 4-bit weights for CPUs with AVX512-BF16 anew where no gradient is asked for, and rounds their
    scales to bfloat16: an evaluation would change the base that the rest of the run trains on."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def find_base(base: str, config_folder: str | None = None) -> Base:
    """The base given as a folder, a GGUF file or a hub id.

    Args:
        config_folder: of a GGUF file: config.json and tokenizer files of the model it was made from.

    Raises:
        ModelFileError: not there, a file that is no GGUF base, or a folder that holds no model.
        SettingsError: `config_folder` for another base than a GGUF file.
        ConversionError: a hub id that cannot be downloaded.
    """
    path = Path(base).expanduser()
    if path.is_file():
        from edgelora.train.gguf_base import GGUFBase

        GGUFBase(path).check()
        return GGUFBase(path, Path(config_folder).expanduser() if config_folder else None)
    if config_folder:
        raise SettingsError(f"--base-config goes with a GGUF base, and {base} is none")
    if path.is_dir():
        return BaseFolder(_checked(path), str(path.resolve()))
    if base.startswith((".", "/", "~")) or base.count("/") != 1:
        raise ModelFileError(
            f"{base}: no such folder",
            hint="Give a folder with config.json and *.safetensors, or a hub id (owner/name).",
        )
    return BaseFolder(_checked(fetch_model(base)), hub_reference(base).repository)


def _checked(folder: Path) -> Path:
    missing = [name for name, there in _needed(folder) if not there]
    if not missing:
        return folder
    if (folder / "adapter_config.json").is_file():
        raise ModelFileError(
            f"{folder}: an adapter, not a base", hint="Give the folder of the model it was trained on."
        )
    raise ModelFileError(
        f"{folder}: not a model that can be trained: no {', no '.join(missing)}",
        hint="Weights must be safetensors: pickles (.bin, .pt) can run code.",
    )


def _needed(folder: Path) -> list[tuple[str, bool]]:
    tokenizers = ("tokenizer.json", "tokenizer.model", "vocab.json")
    return [
        ("config.json", (folder / "config.json").is_file()),
        ("*.safetensors", any(folder.glob("*.safetensors"))),
        ("tokenizer.json", any((folder / name).is_file() for name in tokenizers)),
    ]


def placement(recipe: Recipe) -> Placement:
    """How a recipe asks for a run to compute, `auto` settled.

    CPUs and Apple GPUs train in float32: bfloat16 is emulated, or newer than the machines in use. Weights that are
    themselves trained are kept in float32 everywhere: in bfloat16, most updates are smaller than the last digit.

    Raises:
        SettingsError: a device this machine does not have, or one that cannot hold a quantized base.
        MissingExtraError: packages that a setting needs.
    """
    import torch

    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    device = next(d for d in available if available[d]) if recipe.device == "auto" else recipe.device
    if not available[device]:
        raise SettingsError(
            f"device is {device!r}, but torch {torch.__version__} sees none here",
            hint=f"There is: {', '.join(d for d in available if available[d])}.",
        )
    quantization = recipe.row.quantization
    if quantization and device == "mps":
        raise SettingsError(
            f"{recipe.method} quantizes the base with bitsandbytes, which has nothing for Apple GPUs",
            hint="Give --device cpu, or train a plain LoRA.",
        )
    require_packages(recipe)
    automatic = "bfloat16" if device == "cuda" and _has_bfloat16() and not recipe.row.trains_base else "float32"
    dtype = automatic if recipe.dtype == "auto" else recipe.dtype
    return Placement(device, dtype, quantization, "" if recipe.attention == "auto" else recipe.attention)


def _has_bfloat16() -> bool:
    import torch

    return bool(torch.cuda.is_bf16_supported(including_emulation=False))
