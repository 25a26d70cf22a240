"""Blended adapters against PEFT's own `add_weighted_adapter`, in the logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from converters.adapter import AdapterOptions, convert_adapter
from converters.base import convert_base
from converters.blend import Part, prepare_blend
from tests.equivalence import llamacpp, tiny_models
from tests.equivalence.hf_logits import load_model
from tests.equivalence.tiny_models import some_ids

pytestmark = [pytest.mark.train, pytest.mark.filterwarnings("ignore")]  # of PEFT, about its own methods

TOLERANCE = 0.005  # relative error of the change in logits; F32 files measure 1e-6
WEIGHTS = (0.7, -0.4)


class Blend:
    """Two LoRAs on one tiny model, and what PEFT makes of them together."""

    def __init__(self, tmp_path: Path, way: str, model: str = "llama") -> None:
        import torch
        from peft import LoraConfig, get_peft_model

        self.base = tiny_models.build(model, tmp_path / "base")
        self.ids = some_ids(self.base, 60)
        loaded = load_model(self.base)

        def logits() -> Any:
            with torch.no_grad():
                return adapted(torch.tensor([self.ids])).logits[0].numpy()

        torch.manual_seed(0)
        settings = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
        first = LoraConfig(r=4, lora_alpha=8, **settings)
        second = LoraConfig(r=4 if way == "linear" else 6, lora_alpha=2, use_rslora=True, **settings)
        adapted = get_peft_model(loaded, first, adapter_name="first").eval()
        adapted.add_adapter("second", second)
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        adapted.save_pretrained(tmp_path)
        self.folders = [tmp_path / "first", tmp_path / "second"]
        with adapted.disable_adapter():
            plain = logits()
        adapted.add_weighted_adapter(["first", "second"], list(WEIGHTS), "both", combination_type=way)
        adapted.set_adapter("both")
        self.effect = logits() - plain
        assert np.abs(self.effect).max() > 0.3

    def error(self, base: Path, out: Path, *sources: Path, way: str) -> float:
        parts = [Part(source, weight) for source, weight in zip(sources, WEIGHTS, strict=True)]
        with prepare_blend(parts, base, AdapterOptions("f32"), way=way) as prepared:
            prepared.write(out, force=True)
        change = llamacpp.logits(base, self.ids, out) - llamacpp.logits(base, self.ids)
        return float(np.linalg.norm(change - self.effect) / np.linalg.norm(self.effect))


@pytest.mark.parametrize("model", ["llama", "phi-3", "qwen3.5"])
@pytest.mark.parametrize("way", ["cat", "linear"])
def test_peft_and_we_blend_alike(way: str, model: str, tmp_path: Path) -> None:
    blend = Blend(tmp_path, way, model)
    base = convert_base(blend.base, tmp_path / "base.gguf", quant="f32").path
    files = []
    for folder in blend.folders:
        files.append(convert_adapter(folder, base, tmp_path / f"{folder.name}.gguf", AdapterOptions("f32")).path)
    out = tmp_path / "out.gguf"
    assert blend.error(base, out, *blend.folders, way=way) < TOLERANCE
    assert blend.error(base, out, *files, way=way) < TOLERANCE
    assert blend.error(base, out, *reversed(files), way=way) > 20 * TOLERANCE


def test_the_two_ways_differ(tmp_path: Path) -> None:
    blend = Blend(tmp_path, "linear")
    base = convert_base(blend.base, tmp_path / "base.gguf", quant="f32").path
    assert blend.error(base, tmp_path / "out.gguf", *blend.folders, way="cat") > 20 * TOLERANCE
