"""Run by test_vocabularies.py, outside the tests' process: python vocabulary_worker.py ROOT JOBS ANSWER.

It runs `set_vocab` of llama.cpp's model classes, on folders that hold tokenizers and no weights.
"""

from __future__ import annotations

import json
import logging
import sys
import traceback
from pathlib import Path
from typing import Any


def _plain(value: Any) -> Any:
    if isinstance(value, (bytes, bytearray)):
        return value.decode("utf-8")
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _metadata(folder: Path, architecture: str, pre: str) -> dict[str, Any]:
    import gguf
    from conversion import get_model_class
    from conversion.base import ModelBase, TextModel

    known = TextModel.get_vocab_base_pre

    def pretokenizer(self: Any, tokenizer: Any) -> str:
        try:
            return str(known(self, tokenizer))
        except NotImplementedError:
            return pre  # of a tokenizer that was trained for the test

    kind = get_model_class(architecture)
    model = object.__new__(kind)
    config = ModelBase.load_hparams(folder, False)
    model.dir_model, model.hparams, model.target_model_dir = folder, {**config, **config.get("text_config", {})}, None
    model.origin_hf_arch = model.hf_arch = architecture
    model.gguf_writer = gguf.GGUFWriter(path=None, arch=gguf.MODEL_ARCH_NAMES[kind.model_arch])
    TextModel.get_vocab_base_pre = pretokenizer
    try:
        model.set_vocab()
    finally:
        TextModel.get_vocab_base_pre = known
    pairs = model.gguf_writer.kv_data[0].items()
    return {key: [pair.type.name, _plain(pair.value)] for key, pair in pairs if key != "general.architecture"}


def main(root: str, jobs: list[list[str]], answer: Path) -> None:
    sys.path[:0] = [root, root + "/gguf-py"]
    logging.disable(logging.CRITICAL)
    found: dict[str, Any] = {}
    for name, folder, architecture, pre in jobs:
        try:
            found[name] = _metadata(Path(folder), architecture, pre)
        except BaseException:
            found[name] = traceback.format_exc()[-1500:]
    answer.write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], json.loads(Path(sys.argv[2]).read_text()), Path(sys.argv[3]))
