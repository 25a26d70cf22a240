"""Trainable tokens: some rows of the embeddings, trained. `converters.methods.trained` reads them, for LoRA too."""

from __future__ import annotations

from converters.methods.method import Method
from converters.peft_settings import token_ids

METHOD = Method(
    "Trainable tokens",
    read=lambda module: (),
    settings={"token_indices": token_ids()},
    free=("init_weights",),
)
