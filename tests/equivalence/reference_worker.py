"""Run by `reference.convert`, outside the tests' process: python reference_worker.py JOB ANSWER."""

from __future__ import annotations

import json
import logging
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Keys that transformers 5.23 writes under new names, and this converter knows by the old ones.
OLD_KEYS: dict[str, dict[str, Callable[[Any], Any]]] = {
    "gpt_neox": {"rotary_pct": lambda config: config["rope_parameters"].get("partial_rotary_factor", 0.25)},
    "falcon": {
        "num_kv_heads": lambda config: (
            config["num_kv_heads"] if config["new_decoder_architecture"] or not config["multi_query"] else 1
        )
    },
    "gpt2": {"n_ctx": lambda config: config["n_positions"]},
    "cohere2": {"rotary_pct": lambda config: config["rope_parameters"].get("partial_rotary_factor", 1.0)},
}


def _tensor_names(folder: Path) -> list[str]:
    names: list[str] = []
    for path in folder.glob("*.safetensors"):
        with open(path, "rb") as file:
            names += json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return names


def main(job: dict[str, Any], answer: Path) -> None:
    sys.path[:0] = [job["root"], job["root"] + "/gguf-py"]
    logging.disable(logging.CRITICAL)
    import gguf
    import torch
    from conversion import ModelType, get_model_class
    from conversion.base import ModelBase, TextModel, get_model_architecture

    known = TextModel.get_vocab_base_pre

    def pretokenizer(self: Any, tokenizer: Any) -> str:
        try:
            return str(known(self, tokenizer))
        except NotImplementedError:
            return str(job["pre"])

    TextModel.get_vocab_base_pre = pretokenizer
    types = {
        "f32": gguf.LlamaFileType.ALL_F32,
        "f16": gguf.LlamaFileType.MOSTLY_F16,
        "bf16": gguf.LlamaFileType.MOSTLY_BF16,
        "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    }
    said = {}
    for name, folder, out in job["models"]:
        try:
            config = ModelBase.load_hparams(Path(folder), False)
            for key, value in OLD_KEYS.get(config["model_type"], {}).items():
                config[key] = value(config)
            has_mtp = any("mtp." in tensor for tensor in _tensor_names(Path(folder)))
            ModelBase.no_mtp = not has_mtp  # as its --no-mtp: it cannot know without being told
            model_class = get_model_class(get_model_architecture(config, ModelType.TEXT))
            holds_both = gguf.MODEL_TENSOR.FFN_GATE_UP_EXP in gguf.MODEL_TENSORS[model_class.model_arch]
            fused = {"fuse_qkv": job["fused"], "fuse_gate_up_exps": job["fused"] and holds_both}
            with torch.inference_mode():
                model_class(
                    Path(folder), types[job["outtype"]], Path(out), hparams=config, model_name=None, **fused
                ).write()
            said[name] = ""
        except BaseException:
            said[name] = traceback.format_exc()[-1500:]
    answer.write_text(json.dumps(said))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), Path(sys.argv[2]))
