"""Run by test_released_shapes.py, outside the tests' process: python hyperparameter_worker.py JOB ANSWER.

It runs `set_gguf_parameters` and `generate_extra_tensors` of llama.cpp's model classes on folders that hold a
config.json and no weights.
"""

from __future__ import annotations

import json
import logging
import sys
import traceback
from pathlib import Path
from typing import Any

from reference_worker import OLD_KEYS


def _metadata(folder: Path) -> dict[str, Any]:
    import gguf
    from conversion import ModelType, get_model_class
    from conversion.base import ModelBase, get_model_architecture

    config = ModelBase.load_hparams(folder, False)
    for key, value in OLD_KEYS.get(config["model_type"], {}).items():
        config[key] = value(config)
    kind = get_model_class(get_model_architecture(config, ModelType.TEXT))
    model = kind(folder, gguf.LlamaFileType.ALL_F32, folder / "out.gguf", hparams=config, model_name=None)
    model = getattr(model, "impl", model)  # Mistral 3: one of several
    model.set_gguf_parameters()
    tensors = {name: [float(value) for value in tensor] for name, tensor in model.generate_extra_tensors()}
    pairs = {key: pair.value for key, pair in model.gguf_writer.kv_data[0].items()}  # Phi-3's tensors add to them
    return {"metadata": pairs, "tensors": tensors}


def main(job: dict[str, Any], answer: Path) -> None:
    sys.path[:0] = [job["root"], job["root"] + "/gguf-py"]
    logging.disable(logging.CRITICAL)
    from conversion.base import ModelBase

    ModelBase.no_mtp = True  # as its --no-mtp: there are no tensors to see such layers by
    found: dict[str, Any] = {}
    for folder in map(Path, job["folders"]):
        try:
            found[folder.name] = _metadata(folder)
        except BaseException:
            found[folder.name] = {"failed": traceback.format_exc()[-1500:]}
    answer.write_text(json.dumps(found))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), Path(sys.argv[2]))
