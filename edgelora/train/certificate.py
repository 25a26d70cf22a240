"""Recording a certificate: what transformers and PEFT make of some prompts, with an adapter and without.

The reference is what the adapter was trained in: the base as transformers loads it, PEFT's own layers on top, whatever
its method. The adapter's answers come first; then both read the same tokens, prompt and answer, and their likeliest
next tokens are kept (`edgelora.certificate`).
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgelora.certificate import Certificate, Probe
from edgelora.contract import Contract
from edgelora.errors import ModelFileError
from edgelora.template import ChatTemplate
from edgelora.train.changes import Outputs, adapted_modules, chosen_modules, outputs_of, samples
from edgelora.train.probes import GENERAL_PROMPTS, EncodedPrompt, Prompt, choose_probes, read_prompts, with_system
from edgelora.train.reference import Half, Runner

if TYPE_CHECKING:
    from edgelora.train.base import Base

Progress = Callable[[int, int], None]
"""Called with runs done and runs in all: two for each probe."""

PACKAGES = ("peft", "transformers", "torch")


@dataclass(frozen=True)
class RecordSettings:
    """How much to record, and in what to compute it.

    Attributes:
        probes: prompts, at most; those given are taken evenly.
        new_tokens: length of the greedy continuations, at most.
        max_prompt_tokens: longer prompts are not used.
        dtype: of the base's weights in torch.
    """

    probes: int = 8
    new_tokens: int = 32
    max_prompt_tokens: int = 256
    dtype: str = "float32"
    device: str = "cpu"


def certify(
    contract: Contract,
    base_folder: Path,
    peft_folder: Path,
    probes: Path | Sequence[Prompt] | None = None,
    settings: RecordSettings | None = None,
    progress: Progress | None = None,
) -> Contract:
    """`contract` with a certificate.

    Args:
        contract: of the adapter, with its base's fingerprint and its chat template.
        probes: prompts, or a JSONL or CSV file of them (`edgelora.train.probes`); None for general ones.

    Raises:
        ModelFileError, DataFileError, EdgeloraError: see `record` and `read_prompts`.
    """
    prompts = read_prompts(probes) if isinstance(probes, Path) else probes or GENERAL_PROMPTS
    from edgelora.train.base import BaseFolder

    base = BaseFolder(base_folder, str(base_folder.resolve()))
    found = record(base, peft_folder, prompts, contract, settings, progress)
    return contract.with_changes(certificate=found.encode())


def record(
    base: Base,
    peft_folder: Path,
    prompts: Sequence[Prompt],
    contract: Contract,
    settings: RecordSettings | None = None,
    progress: Progress | None = None,
) -> Certificate:
    """Load the base twice, with the adapter and then without, and run each on some of `prompts`.

    Args:
        peft_folder: an adapter of any method that PEFT loads.
        contract: of the adapter: its chat template, its system prompt, its base's fingerprint.

    Raises:
        ModelFileError: base or adapter cannot be loaded, or there is no chat template.
        DataFileError: none of the prompts can be used.
        EdgeloraError: logits that are not finite.
    """
    from edgelora.train.base import Placement
    from edgelora.train.library_log import library_log

    settings = settings or RecordSettings()
    with library_log():
        recording = _Recording(base.load_tokenizer(), contract, settings, prompts, progress)
        place = Placement(settings.device, settings.dtype)
        recording.run_adapter(_load_adapter(base.load_model(place).to(place.device), peft_folder))
        recording.run_base(base.load_model(place).to(place.device))
        return recording.certificate()


def record_trained(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    contract: Contract,
    settings: RecordSettings,
    progress: Progress | None = None,
) -> Certificate:
    """The certificate of a model that is in memory, with PEFT switching its adapter off for the base's part.

    Only for adapters that leave the base as it was: no initialisation took a part of it, and nothing quantized it.
    `record` loads both again.

    Raises:
        ModelFileError, DataFileError, EdgeloraError: see `record`.
    """
    recording = _Recording(tokenizer, contract, settings, prompts, progress)
    recording.run_adapter(model)
    with model.disable_adapter():
        recording.run_base(model)
    return recording.certificate()


def _load_adapter(model: Any, folder: Path) -> Any:
    from peft import PeftModel
    from safetensors import SafetensorError

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Found missing adapter keys")  # PEFT would make them up
            return PeftModel.from_pretrained(model, folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, UserWarning, SafetensorError) as error:
        raise ModelFileError(f"{folder}: PEFT cannot load it on this base: {error}") from error


class _Recording:
    """The two halves of every probe, as they come."""

    def __init__(
        self,
        tokenizer: Any,
        contract: Contract,
        settings: RecordSettings,
        prompts: Sequence[Prompt],
        progress: Progress | None,
    ) -> None:
        if not contract.chat_template:
            raise ModelFileError(
                "neither the adapter nor its base has a chat template, so there is no prompt to record",
                hint="Name one with --chat-template: chatml, llama2, plain, or a Jinja file.",
            )
        self._contract, self._settings = contract, settings
        self._progress = progress or (lambda done, total: None)
        self._ends = _end_tokens(tokenizer, contract.stop)
        self.chosen: list[EncodedPrompt] = choose_probes(
            [with_system(prompt, contract.system) for prompt in prompts],
            tokenizer,
            ChatTemplate(contract.chat_template),
            settings.probes,
            settings.max_prompt_tokens,
        )
        self._adapter: list[Half] = []
        self._base: list[Half] = []
        self._modules: Mapping[str, tuple[int, int]] = {}
        self._outputs: list[Mapping[str, Outputs]] = []
        self._n_modules = 0

    def run_adapter(self, model: Any) -> None:
        modules = adapted_modules(model)
        # An activated LoRA is applied after certain tokens only, and not to bare vectors.
        is_partial = getattr(model.peft_config["default"], "alora_invocation_tokens", None)
        self._modules, self._n_modules = {} if is_partial else chosen_modules(modules), len(modules)
        self._outputs.append(outputs_of(model, self._modules))
        runner = Runner(model, self._settings.new_tokens, self._ends)
        for prompt in self.chosen:
            self._adapter.append(runner.half(prompt.tokens))
            self._progress(len(self._adapter), 2 * len(self.chosen))

    def run_base(self, model: Any) -> None:
        self._outputs.append(outputs_of(model, self._modules))
        runner = Runner(model, self._settings.new_tokens, self._ends)
        for prompt, adapted in zip(self.chosen, self._adapter, strict=True):
            self._base.append(runner.half(prompt.tokens, adapted))
            self._progress(len(self.chosen) + len(self._base), 2 * len(self.chosen))

    def certificate(self) -> Certificate:
        from importlib.metadata import version

        halves = zip(self.chosen, self._adapter, self._base, strict=True)
        found = Certificate(
            probes=tuple(_probe(prompt, adapted, bare) for prompt, adapted, bare in halves),
            versions={name: version(name) for name in PACKAGES},
            dtype=self._settings.dtype,
            base_fingerprint=self._contract.base_fingerprint,
            template_sha256=hashlib.sha256(self._contract.chat_template.encode()).hexdigest(),
            n_vocab=self._base[0].n_vocab,
            changes=tuple(samples(self._modules, *self._outputs)),
            n_unsampled=self._n_modules - len(self._modules),
        )
        return found.within()


def _probe(prompt: EncodedPrompt, adapted: Half, bare: Half) -> Probe:
    n_tokens = len(prompt.tokens) + len(adapted.continuation)
    return Probe(
        messages=prompt.messages,
        prompt=prompt.tokens,
        continuation=adapted.continuation,
        base_continuation=bare.continuation,
        positions=np.arange(n_tokens, dtype=np.int32),
        adapter=adapted.top,
        base=bare.top,
        base_at=bare.at,
    )


def _end_tokens(tokenizer: Any, stops: Sequence[str]) -> frozenset[int]:
    """The ids that end a reply: the tokenizer's, and stop strings that are one token."""
    added = tokenizer.get_added_vocab()
    ends = {tokenizer.eos_token_id} | {added[stop] for stop in stops if stop in added}
    return frozenset(end for end in ends if end is not None)
