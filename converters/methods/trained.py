"""What PEFT saves beside a method's own tensors: modules trained as a whole, biases, norms, rows of the embeddings.

<module>.weight, <module>.bias                     modules_to_save, `bias="all"`, embeddings that were resized
<module>.base_layer.weight                         a frozen copy of the base's, or embeddings that were resized
<module>.base_layer.bias                           the bias of a layer that the method wraps
<module>.modules_to_save.weight                    resized embeddings that were trained as a whole: what PEFT loads is
<module>.original_module.weight                    <module>.weight, beside these two
<module>.token_adapter.trainable_tokens_delta      rows of an embedding (trainable_token_indices)
<module>.trainable_tokens_delta                    likewise (TRAINABLE_TOKENS)

Rows of tied embeddings are trained for the output too; TRAINABLE_TOKENS repeats them for it, LoRA does not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from converters.checkpoint import Floats, Tensors
from converters.methods.changes import Change, ModuleProblem, Replaced, Transformed
from converters.methods.factored import recent
from converters.methods.method import PREFIX, BaseShape, Whole, no_base
from converters.methods.ties import OUTPUTS, alike, short_name
from converters.peft_config import PeftConfig
from converters.peft_settings import short

WRAPPED, TOKEN_ADAPTER, TOKENS = ".base_layer", ".token_adapter", ".trainable_tokens_delta"
COPIES = (".modules_to_save", ".original_module")
MAX_EMBEDDINGS = 16
EMBEDDINGS = ("embed_tokens", "lm_head", "wte", "embed_in", "embed_out", "word_embeddings")


def read_trained(
    config: PeftConfig,
    tensors: Tensors,
    names: Sequence[str],
    modules: frozenset[str],
    shape_in_base: BaseShape = no_base,
) -> tuple[list[Change], list[str]]:
    """Changes and problems of the tensors that are no part of a module's method. Whole tensors come before their rows.

    Args:
        names: as stored.
        modules: those that the method changes.
        shape_in_base: sizes of the base's tensors.
    """
    tokens = {_token_module(name): name for name in names if name.startswith(PREFIX) and name.endswith(TOKENS)}
    trained, of_tokens = _Trained(config, tensors, modules, tokens, shape_in_base), frozenset(tokens.values())
    whole: dict[str, Replaced] = {}
    stored: dict[str, str] = {}
    rows: list[Change] = []
    problems = []
    for name in names:
        try:
            change = None if name in of_tokens else trained.whole(name)
            if change and stored.setdefault(change.tensor, name) != name:
                raise ModuleProblem(f"is {change.tensor}, as {stored[change.tensor]}")
            whole |= {change.tensor: change} if change else {}
        except ModuleProblem as problem:
            problems.append(f"{name}: {problem}")
    if len(tokens) > MAX_EMBEDDINGS:
        problems.append(f"rows of {len(tokens)} modules are trained, and no model has {MAX_EMBEDDINGS} embeddings")
    for module, name in tokens.items() if len(tokens) <= MAX_EMBEDDINGS else ():
        try:
            rows.append(trained.rows(module, whole))
        except ModuleProblem as problem:
            problems.append(f"{name}: {problem}")
    tied = alike(tensors, {tensor.removesuffix(".weight"): name for tensor, name in stored.items()})
    return [
        *(replace(change, keeps_tie=_keeps_tie(change, tied)) for change in whole.values()),
        *rows,
    ], problems


def _keeps_tie(change: Replaced, tied: set[str]) -> bool:
    """Whether a tied output has the same: PEFT saves the frozen weight of embeddings for both."""
    module = change.tensor.removesuffix(".weight")
    return module in tied or (change.is_copy and short_name(module) in OUTPUTS)


def _token_module(name: str) -> str:
    return name.removeprefix(PREFIX).removesuffix(TOKENS).removesuffix(TOKEN_ADAPTER)


@dataclass(frozen=True)
class _Trained:
    """An adapter's tensors beside those of its method.

    Attributes:
        modules: those that the method changes.
        tokens: modules of which rows were trained, to the stored tensor's name.
    """

    config: PeftConfig
    tensors: Tensors
    modules: frozenset[str]
    tokens: Mapping[str, str]
    shape_in_base: BaseShape

    def whole(self, name: str) -> Replaced | None:
        """A tensor that takes the place of the base's; None for a copy that PEFT does not load."""
        owner, _, parameter = name.removeprefix(PREFIX).rpartition(".")
        if not name.startswith(PREFIX) or not owner:
            raise ModuleProblem(f"no tensor of an adapter ({self.config.peft_type})")
        shape = self.tensors.tensors[name].shape
        if not shape or 0 in shape:
            raise ModuleProblem(f"has shape {shape}")
        if owner.endswith(COPIES):
            self._check_copy(owner.rpartition(".")[0], parameter, shape)
            return None
        module = self._wrapped(owner, parameter) if owner.endswith(WRAPPED) else self._plain(owner, parameter)
        is_copy = owner.endswith(WRAPPED) and parameter == "weight"
        return Replaced(f"{module}.{parameter}", shape, partial(_load, self.tensors, name), is_copy)

    def _check_copy(self, module: str, parameter: str, shape: tuple[int, ...]) -> None:
        loaded = self.tensors.tensors.get(f"{PREFIX}{module}.{parameter}")
        if loaded is None or loaded.shape != shape:
            raise ModuleProblem(f"is a copy, and {PREFIX}{module}.{parameter} is not beside it")

    def _wrapped(self, owner: str, parameter: str) -> str:
        module = owner.removesuffix(WRAPPED).removesuffix(TOKEN_ADAPTER)
        if module not in self.modules and module not in self.tokens:
            raise ModuleProblem("belongs to a layer that the adapter does not change")
        if parameter == "bias" or (parameter == "weight" and short_name(module) in EMBEDDINGS):
            return module
        raise ModuleProblem("a copy of a whole layer, which PEFT saves of embeddings only")

    def _plain(self, module: str, parameter: str) -> str:
        saved = self.config.values.get("modules_to_save")
        names = [item for item in saved if isinstance(item, str)] if isinstance(saved, list) else []
        if parameter not in ("weight", "bias") and not any(item in module.split(".") for item in names):
            raise ModuleProblem(f"no tensor of an adapter ({self.config.peft_type})")
        if parameter == "weight" and (module in self.modules or module in self.tokens):
            raise ModuleProblem("a whole layer beside a change of it")
        return module

    def rows(self, module: str, whole: Mapping[str, Replaced]) -> Transformed:
        """Some rows of an embedding, or of the output."""
        name = self.tokens[module]
        shape = self.tensors.tensors[name].shape
        where = self._indices(module)
        if len(shape) != 2 or shape[0] != len(where) or 0 in shape:
            raise ModuleProblem(f"has shape {shape} for {len(where)} tokens")
        resized = whole.get(f"{module}.weight")
        known = resized.shape if resized else self.shape_in_base(f"{module}.weight")
        if known and max(where) >= known[0]:
            raise ModuleProblem(f"trains token {max(where)}, and there are {known[0]}")
        apply = partial(_put, where, partial(_load, self.tensors, name))
        return Transformed(f"{module}.weight", (None, shape[1]), apply, keeps_tie=self._keeps_tie(module))

    def _keeps_tie(self, module: str) -> bool:
        """Whether PEFT trains these rows for the embeddings and a tied output in common."""
        if len(self.tokens) == 1:
            return short_name(module) in OUTPUTS
        same_tokens = all(self._indices(other) == self._indices(module) for other in self.tokens)
        return same_tokens and module in alike(self.tensors, self.tokens)

    def _indices(self, module: str) -> list[int]:
        """`trainable_token_indices` (a list, or a list for each module), or `token_indices` of TRAINABLE_TOKENS."""
        given = self.config.values.get("trainable_token_indices")
        given = self.config.values.get("token_indices") if given is None else given
        if isinstance(given, dict):
            found = [ids for key, ids in given.items() if module.endswith(key)]
            is_repeated = not found and len(given) == 1 and short_name(module) in OUTPUTS.values()  # tied, and resized
            given = next(iter(given.values() if is_repeated else found), None)
        if not isinstance(given, list) or not all(type(item) is int and 0 <= item < 2**31 for item in given):
            raise ModuleProblem(f"{self.config.path.name} does not say which tokens these are ({short(given)})")
        if len(set(given)) != len(given):
            raise ModuleProblem(f"{self.config.path.name} names a token twice ({short(given)})")
        return given


def _load(tensors: Tensors, name: str) -> Floats:
    return tensors.rows(name).reshape(tensors.tensors[name].shape)


def _put(indices: Sequence[int], load: Callable[[], Floats], rows: Floats, start: int) -> Floats:
    """`rows`, the first of which is row `start`, with the trained ones in their places."""
    where: Whole = np.asarray(indices, np.int64)
    inside = (where >= start) & (where < start + len(rows))
    changed = rows.copy()
    changed[where[inside] - start] = recent(load)[inside]
    return changed
