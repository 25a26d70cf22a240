"""LoRA adapters whose initialisation is not random: made by PEFT, moved a little as training would, and saved.

Beside each adapter lie, as people keep them, `initial` (before training) and `converted`
(`path_initial_model_for_weight_conversion`, for those that PEFT can undo itself).
"""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
import sys
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from tests.equivalence.outcomes import Adapted, Base, logits_of
from tests.equivalence.peft_methods import LINEARS, layers

SETTINGS: Mapping[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": list(LINEARS), "task_type": "CAUSAL_LM"}
MOVED = 0.04  # of each matrix's size: what training moved it by
Prepare = Callable[[Any, Any, torch.Tensor], None]


def _corda(network: Any, config: Any, ids: torch.Tensor) -> None:
    attrs = types.ModuleType("attr")  # of which PEFT's CorDA takes a decorator, and no package here needs
    attrs.dataclass = dataclasses.dataclass  # type: ignore[attr-defined]
    with patch.dict(sys.modules, {} if "attr" in sys.modules else {"attr": attrs}):
        from peft.tuners.lora.corda import preprocess_corda

        preprocess_corda(network, config, run_model=lambda: network(ids))


def _lora_ga(network: Any, config: Any, ids: torch.Tensor) -> None:
    from peft.tuners.lora.loraga import preprocess_loraga

    def step() -> None:
        with torch.enable_grad():
            network(ids, labels=ids).loss.backward()

    preprocess_loraga(network, config, step)
    network.zero_grad()


def _nothing(network: Any, config: Any, ids: torch.Tensor) -> None:
    pass


def _own_settings(init: str) -> dict[str, Any]:
    from peft import EvaConfig, LoraGAConfig
    from peft.tuners.lora.config import CordaConfig

    settings: dict[str, dict[str, Any]] = {
        "corda": {"corda_config": CordaConfig(corda_method="kpm")},
        "lora_ga": {"lora_ga_config": LoraGAConfig()},
        "eva": {"eva_config": EvaConfig(rho=1.5)},
    }
    return settings.get(init, {})


PREPARE: Mapping[str, Prepare] = {"corda": _corda, "lora_ga": _lora_ga}
UNDONE_BY_PEFT = ("pissa", "pissa_niter_4", "olora", "corda", "lora_ga")


def initialised(init: Any, base: Base, folder: Path, **settings: Any) -> Adapted:
    """An adapter on a copy of the base, begun with one of PEFT's initialisations.

    Args:
        init: `init_lora_weights`.
        folder: gets `adapter`, `initial`, and `converted` where PEFT can undo the initialisation.
        settings: of `LoraConfig`.
    """
    import peft

    torch.manual_seed(3)
    network, ids = copy.deepcopy(base.network), torch.tensor([list(base.ids)])
    config = peft.LoraConfig(**{**SETTINGS, "init_lora_weights": init, **_own_settings(init), **settings})
    PREPARE.get(init, _nothing)(network, config, ids)
    network = peft.get_peft_model(network, config).eval()
    if init == "eva":
        batch = {"input_ids": ids.repeat(2, 1), "attention_mask": torch.ones(2, ids.shape[1], dtype=torch.long)}
        peft.initialize_lora_eva_weights(network, [batch] * 4, show_progress_bar=False)
    return _trained(network, base, folder, is_undone=init in UNDONE_BY_PEFT and not config.use_rslora)


def loftq(base: Base, folder: Path) -> Adapted:
    """An adapter as LoftQ begins one: the base rounded, and the adapter what that takes away, as far as it can hold it.

    PEFT's own needs a CUDA device; this rounds to 17 steps. `folder` gets `base` too, the rounded one.
    """
    import peft

    network = peft.get_peft_model(copy.deepcopy(base.network), peft.LoraConfig(**SETTINGS)).eval()
    for layer in layers(network).values():
        weight = layer.get_base_layer().weight
        step = weight.detach().abs().max() / 8
        rounded = (weight.detach() / step).round() * step
        u, s, vt = torch.linalg.svd(weight.detach() - rounded, full_matrices=False)
        layer.lora_A["default"].weight.data = s[:4, None].sqrt() * vt[:4]
        layer.lora_B["default"].weight.data = u[:, :4] * s[:4].sqrt() / layer.scaling["default"]
        weight.data = rounded
    adapted = _trained(network, base, folder, is_undone=False)
    for name in ("initial", "adapter"):
        path = folder / name / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "init_lora_weights": "loftq"}))
    copy.deepcopy(network).unload().save_pretrained(folder / "base")
    for file in base.folder.glob("tokenizer*"):
        shutil.copy(file, folder / "base")
    return adapted


def _trained(network: Any, base: Base, folder: Path, *, is_undone: bool) -> Adapted:
    network.save_pretrained(folder / "initial")
    for name, parameter in network.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            size = parameter.data.std() if parameter.data.any() else 0.5
            parameter.data += torch.randn_like(parameter) * size * MOVED
    if is_undone:
        network.save_pretrained(folder / "converted", path_initial_model_for_weight_conversion=str(folder / "initial"))
    network.save_pretrained(folder / "adapter")
    return Adapted(base, folder / "adapter", network, logits_of(network, base.ids) - base.logits)
