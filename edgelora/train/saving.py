"""What training leaves: PEFT's files on the base as it was released, or a model folder of its own."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from converters.low_rank import balanced
from edgelora.train.folder import ADAPTER_WEIGHTS
from edgelora.train.trainee import ADAPTER, Trainee


def save_weights(model: Any, folder: Path, state_dict: Any = None) -> None:
    """The trained weights as they stand: an adapter's, or all of a model without one.

    Embeddings are left out of an adapter: they are only needed where the vocabulary was enlarged, which does not
    happen here, and PEFT's "auto" would ask the hub about it.

    Args:
        state_dict: of the model, where another process holds a part of it.
    """
    if hasattr(model, "peft_config"):
        model.save_pretrained(
            folder, selected_adapters=[ADAPTER], save_embedding_layers=False, **_given(state_dict=state_dict)
        )
        (folder / "README.md").unlink(missing_ok=True)
    else:
        model.save_pretrained(folder, **_given(state_dict=state_dict))


def save_trained(trainee: Trainee, folder: Path) -> None:
    """The result: an adapter whose initialisation took a part of the base gives it back.

    B @ A - B0 @ A0 is a LoRA of twice the rank on the base as it was released; PEFT writes it as [B, -B0] and [A, A0],
    which half precision would not let cancel: its factors are replaced by others of the same product.
    """
    if not trainee.is_moved or trainee.initial is None:
        save_weights(trainee.model, folder)
        return
    beginning = folder / "initial"  # PEFT writes into it
    shutil.copytree(trainee.initial, beginning)
    try:
        trainee.model.save_pretrained(
            folder,
            selected_adapters=[ADAPTER],
            save_embedding_layers=False,
            path_initial_model_for_weight_conversion=str(beginning),
        )
    finally:
        shutil.rmtree(beginning)
    (folder / "README.md").unlink(missing_ok=True)
    _balance(folder / ADAPTER_WEIGHTS)


def _balance(file: Path) -> None:
    """Factors as large as their product, in float32: rounding them is rounding it."""
    from safetensors.torch import load_file, save_file
    from torch import from_numpy

    tensors = load_file(file)
    for a_name in [name for name in tensors if ".lora_A." in name]:
        b_name = a_name.replace(".lora_A.", ".lora_B.")
        b, a = balanced(tensors[b_name].float().numpy(), tensors[a_name].float().numpy())
        tensors[b_name], tensors[a_name] = from_numpy(b), from_numpy(a)
    save_file(tensors, file, metadata={"format": "pt"})


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}
