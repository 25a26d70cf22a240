"""A model of transformers, or PEFT's around one, on token ids: its greedy answers and its likeliest next tokens."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgelora.certificate import TOP, TopTokens
from edgelora.errors import EdgeloraError


@dataclass(frozen=True)
class Half:
    """What one model made of a prompt.

    Attributes:
        continuation: its own answer, greedily.
        top: its likeliest next tokens on the prompt and the adapter's answer.
        at: float32, its log-probabilities of the tokens it was asked for.
    """

    continuation: tuple[int, ...]
    top: TopTokens
    at: npt.NDArray[np.float32]
    n_vocab: int


class Runner:
    """A model of transformers, or PEFT's around one, on ids."""

    def __init__(self, model: Any, new_tokens: int, ends: Collection[int]) -> None:
        self._model = model.eval()
        self._new_tokens, self._ends = new_tokens, ends
        config = getattr(model, "active_peft_config", None)
        # Where an activated LoRA begins, PEFT sees in the ids that it is given: each time all of them.
        self._remembers = not getattr(config, "alora_invocation_tokens", None)
        self._room = int(getattr(model.config.get_text_config(), "max_position_embeddings", 2**31))

    def half(self, prompt: Sequence[int], adapted: Half | None = None) -> Half:
        """Its own answer, and what it predicts where `adapted` answers: about its own likeliest tokens, and that's."""
        import torch

        with torch.inference_mode():
            own = tuple(self._greedy(prompt))
            log_probs = self._log_probs([*prompt, *(adapted.continuation if adapted else own)])
            values, ids = (part.cpu().numpy() for part in log_probs.topk(min(TOP, log_probs.shape[-1]), dim=-1))
            top = TopTokens(ids.astype(np.int32), values)
            asked = torch.from_numpy((adapted.top if adapted else top).ids.astype(np.int64)).to(log_probs.device)
            at = log_probs.gather(-1, asked).cpu().numpy()
        return Half(own, top, at, int(log_probs.shape[-1]))

    def _greedy(self, prompt: Sequence[int]) -> list[int]:
        import torch

        ids, past = torch.tensor([list(prompt)], device=self._model.device), None
        written: list[int] = []
        while len(written) < min(self._new_tokens, self._room - len(prompt)):
            output = self._model(input_ids=ids, past_key_values=past, use_cache=self._remembers)
            written.append(int(output.logits[0, -1].float().argmax()))
            if written[-1] in self._ends:
                break
            past = output.past_key_values if self._remembers else None
            following = written[-1:] if self._remembers else [*prompt, *written]
            ids = torch.tensor([following], device=self._model.device)
        return written

    def _log_probs(self, tokens: Sequence[int]) -> Any:
        """Of every next token at every position: a float32 tensor (n_tokens, n_vocab)."""
        import torch

        output = self._model(input_ids=torch.tensor([list(tokens)], device=self._model.device), use_cache=False)
        logits = output.logits[0].float()
        if not bool(torch.isfinite(logits).all()):
            raise EdgeloraError(
                "the model computes logits that are not finite numbers in torch, so there is nothing to certify",
                hint="Its weights are broken, or too large for their type.",
            )
        return torch.log_softmax(logits, dim=-1)
