"""How to train: one frozen record of every setting, with the help text and the bounds that the command line shows.

The defaults are the literature's. LoRA: Hu et al., arXiv:2106.09685. QLoRA: Dettmers et al., arXiv:2305.14314, whose
section 4 and appendix B found adapters on all linear layers to matter most, and used learning rate 2e-4 and batches of
16 for 7B and 13B models. alpha = 2 * rank is PEFT's and TRL's own habit. Where methods differ, their rows say
(`edgelora.train.methods`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from edgelora.errors import SettingsError
from edgelora.train.bounds import COUNT, FLAG, MODULES, TEXT, Bound, number, one_of, some_of, whole
from edgelora.train.methods import ALL_LINEAR, METHODS, Method
from edgelora.train.objectives import OBJECTIVES, Objective

SCHEDULERS = ("cosine", "linear", "constant")
DEVICES = ("auto", "cpu", "cuda", "mps")
DTYPES = ("auto", "float32", "bfloat16")
ATTENTIONS = ("auto", "sdpa", "eager", "flash_attention_2")
REPORTS = ("tensorboard", "wandb")
DPO_LOSSES = ("sigmoid", "hinge", "ipo", "robust", "sigmoid_norm")
SHARED = ("learning_rate",)  # which every row of METHODS has
OWNED = tuple(dict.fromkeys(name for method in METHODS.values() for name in method.defaults if name not in SHARED))


def _setting(default: Any, bound: Bound, text: str, *, free_on_resume: bool = False) -> Any:
    """A field whose help, bound and "may it change on --resume" live in its metadata."""
    return field(default=default, metadata={"help": text, "bound": bound, "free_on_resume": free_on_resume})


def _of_row(bound: Bound, text: str, *, free_on_resume: bool = False) -> Any:
    """A field that some methods or objectives read, with a default in their rows."""
    return _setting(None, bound.or_none(), text, free_on_resume=free_on_resume)


@dataclass(frozen=True)
class Recipe:
    """The settings of a training run; each field's `metadata["help"]` describes it, `metadata["bound"]` checks it.

    A setting that the method or the objective has a default for is filled in; one that neither reads stays None.

    Raises:
        SettingsError: values out of bounds, and settings that this method or objective does not read; all problems in
            one message.
    """

    method: str = _setting(None, one_of(tuple(METHODS)).or_none(), "fine-tuning method")
    objective: str = _setting("sft", one_of(tuple(OBJECTIVES)), "what is learnt: replies, or preferences among them")
    rank: int | None = _of_row(COUNT, "rank of the update: its capacity and its size")
    alpha: float | None = _of_row(
        number(0, 1e6, "a number above 0", above=True), "the update is scaled by alpha / rank"
    )
    dropout: float | None = _of_row(
        number(0, 0.99, "a number from 0, below 1"), "dropout on the adapter's input (QLoRA: 0.05 to 0.1)"
    )
    target_modules: str | None = _of_row(
        MODULES, "layers that get an adapter: all-linear, or names such as q_proj,v_proj"
    )
    eva_rho: float | None = _of_row(
        number(1, 100, "a number from 1"), "how far above the rank EVA may go where the data asks for it; 1 keeps it"
    )
    lora_plus_ratio: float | None = _of_row(
        number(1, 1e4, "a number from 1"), "B's learning rate, as a multiple of A's"
    )
    block_size: int | None = _of_row(COUNT, "side of a rotated block; it divides the inputs of each layer")
    invocation: str | None = _of_row(
        TEXT, "the text from which an activated LoRA acts; none given, what the template puts before a reply"
    )
    peft_config: str | None = _of_row(
        TEXT,
        "a JSON file with peft_type and the settings of that class of PEFT, instead of a method",
        free_on_resume=True,
    )  # what it holds is compared, not where it lies
    torch_only: bool = _setting(
        False, FLAG, "train also what no GGUF file can hold: the adapter is for PEFT alone", free_on_resume=True
    )
    learning_rate: float = _of_row(
        number(0, 1, "a number above 0, at most 1", above=True), "highest learning rate (QLoRA: 2e-4)"
    )
    epochs: float = _setting(3.0, number(0, 1e6, "a number above 0", above=True), "times to go through the data")
    max_steps: int | None = _setting(None, COUNT.or_none(), "stop after this many optimizer steps; overrides epochs")
    batch_size: int = _setting(8, COUNT, "conversations in memory at once")
    gradient_accumulation: int = _setting(
        2, COUNT, "batches per optimizer step; batch size times this is what the optimizer sees (QLoRA: 16)"
    )
    max_length: int = _setting(1024, whole(2, "a whole number, 2 or more"), "tokens of a conversation that are kept")
    packing: bool = _setting(
        False, FLAG, "put several short rows into one sequence of max length, kept apart: same loss, less padding"
    )
    warmup_ratio: float = _setting(
        0.03, number(0, 0.99, "a number from 0, below 1"), "share of the steps in which the learning rate rises"
    )
    scheduler: str = _setting("cosine", one_of(SCHEDULERS), "course of the learning rate after the warm-up")
    weight_decay: float = _setting(0.0, number(0, 1, "a number from 0 to 1"), "AdamW's weight decay")
    max_grad_norm: float = _setting(
        1.0, number(0, 1e6, "a number above 0", above=True), "gradients are scaled down to this norm"
    )
    dpo_beta: float | None = _of_row(
        number(0, 100, "a number above 0", above=True), "how strongly preferences are held to the base"
    )
    dpo_loss: str | None = _of_row(one_of(DPO_LOSSES), "TRL's loss of preferences")
    dpo_label_smoothing: float | None = _of_row(
        number(0, 0.49, "a number from 0, below 0.5"), "share of the pairs that may be the wrong way round (robust)"
    )
    gradient_checkpointing: bool = _setting(
        False, FLAG, "recompute activations in the backward pass: less memory, about a fifth slower"
    )
    attention: str = _setting("auto", one_of(ATTENTIONS), "transformers' implementation of attention")
    liger: bool = _setting(False, FLAG, "Liger's fused kernels (needs liger-kernel and a GPU)")
    seed: int = _setting(42, whole(0, "a whole number from 0, below 2**32"), "same seed, same adapter")
    chat_template: str | None = _setting(
        None, TEXT.or_none(), "a built-in name or a Jinja file [default: the base's own]", free_on_resume=True
    )  # what it holds is compared, not where it lies
    base_config: str | None = _setting(
        None,
        TEXT.or_none(),
        "of a GGUF base: folder of its model's config.json and tokenizer [default: read from the file]",
        free_on_resume=True,
    )
    dtype: str = _setting("auto", one_of(DTYPES), "type of the base's weights; auto is bfloat16 on CUDA, else float32")
    device: str = _setting("auto", one_of(DEVICES), "where to train", free_on_resume=True)
    save_steps: int = _setting(100, COUNT, "optimizer steps between checkpoints", free_on_resume=True)
    eval_steps: int | None = _setting(
        None, COUNT.or_none(), "optimizer steps between evaluations [default: save steps]", free_on_resume=True
    )
    keep_best: bool = _setting(False, FLAG, "end with the checkpoint of the lowest loss on --eval-data, not the last")
    early_stopping_patience: int | None = _setting(
        None, COUNT.or_none(), "stop after this many evaluations without a lower loss, and end with the best"
    )
    logging_steps: int = _setting(10, COUNT, "optimizer steps between lines of metrics.jsonl", free_on_resume=True)
    report_to: str | None = _setting(
        None, some_of(REPORTS).or_none(), "also log to tensorboard, wandb, or both", free_on_resume=True
    )
    certificate_probes: int = _setting(
        8,
        whole(0, "a whole number, 0 or more"),
        "prompts to record for `edgelora verify`, 0 for none",
        free_on_resume=True,
    )

    def __post_init__(self) -> None:
        problems = [
            f"{f.name} is {getattr(self, f.name)!r}, expected {f.metadata['bound'].wanted}"
            for f in fields(self)
            if not f.metadata["bound"].accepts(getattr(self, f.name))
        ]
        if problems:
            raise SettingsError("recipe: " + "; ".join(problems))
        if not self.method:
            object.__setattr__(self, "method", "lora" if self.peft_config is None else "peft-config")
        if unread := self._unread():
            raise SettingsError("recipe: " + "; ".join(unread), hint="Leave them out, or choose another method.")
        for name, value in self._defaults().items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)

    @property
    def row(self) -> Method:
        """The method's row."""
        return METHODS[self.method]

    @property
    def objective_row(self) -> Objective:
        return OBJECTIVES[self.objective]

    def _defaults(self) -> dict[str, Any]:
        method, objective = self.row, self.objective_row
        found = {**method.defaults, **objective.defaults}
        found |= {name: 0.0 for name in objective.unread if name in method.defaults}
        rate = method.defaults["learning_rate"] * objective.learning_rate
        return {**found, "learning_rate": float(f"{rate:.3g}")}

    def _unread(self) -> list[str]:
        """What is given and has no meaning here."""
        method, objective = self.row, self.objective_row
        given = {name: getattr(self, name) for name in OWNED if getattr(self, name) is not None}
        problems = [
            f"{name} is given, and {method.name} does not read it" for name in given if name not in method.defaults
        ]
        problems += [
            f"{name} is given, and {objective.name} does not read it"
            for name, value in given.items()
            if name in objective.unread and value and name in method.defaults
        ]
        problems += [
            f"{name} is given, and {objective.name} does not read it"
            for other in OBJECTIVES.values()
            for name in other.defaults
            if name not in objective.defaults and getattr(self, name) is not None
        ]
        if self.packing and not objective.packs:
            problems.append(f"packing is given, and {objective.name} does not read it")
        if self.packing and "invocation" in method.defaults:
            problems.append(f"packing is given, and {method.name} acts from one place in a sequence on")
        if method.name == "peft-config" and self.peft_config is None:
            problems.append("peft_config is not given, and the method is what it describes")
        return problems

    @property
    def target_module_names(self) -> str | list[str]:
        """What PEFT takes: "all-linear", or the list of names."""
        names = [name.strip() for name in (self.target_modules or ALL_LINEAR).split(",")]
        return ALL_LINEAR if names == [ALL_LINEAR] else names

    @property
    def ends_with_best(self) -> bool:
        return self.keep_best or self.early_stopping_patience is not None

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Recipe:
        """The recipe in a config file or from options; None means "not given", a list of modules is joined.

        Raises:
            SettingsError: unknown names or values out of bounds.
        """
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise SettingsError(
                f"unknown recipe settings: {', '.join(unknown)}", hint=f"Known: {', '.join(sorted(known))}."
            )
        given = {name: value for name, value in values.items() if value is not None}
        modules = given.get("target_modules")
        if isinstance(modules, (list, tuple)):
            given["target_modules"] = ",".join(str(name) for name in modules)
        return cls(**given)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def differences(self, other: Mapping[str, Any]) -> list[str]:
        """What a resumed run would change of `other`, a recipe's `to_dict`, in ways that change the result."""
        found = [
            f"{f.name} was {other.get(f.name)!r}, now {getattr(self, f.name)!r}"
            for f in fields(self)
            if not f.metadata["free_on_resume"] and other.get(f.name) != getattr(self, f.name)
        ]
        before, now = (each.get("eval_steps") or each.get("save_steps") for each in (other, self.to_dict()))
        if self.ends_with_best and before != now:  # which checkpoint is the best depends on when it is looked for
            found.append(f"there was an evaluation every {before} steps, now every {now}")
        return found


def default_text(name: str) -> str:
    """What a setting is where it is not given, for a person: "16; loha, lokr 8; vera 256"; "" where nothing is."""
    (found,) = (f for f in fields(Recipe) if f.name == name)
    if name == "method":
        return "lora"
    if found.default is not None:
        return "" if isinstance(found.default, bool) else str(found.default)
    by_value: dict[Any, list[str]] = {}
    rows: list[Method | Objective] = [*METHODS.values(), *OBJECTIVES.values()]
    for row in rows:
        if row.defaults.get(name) is not None:
            by_value.setdefault(row.defaults[name], []).append(row.name)
    texts = [
        _shown(value) if "lora" in names or "dpo" in names else f"{', '.join(names)} {_shown(value)}"
        for value, names in by_value.items()
    ]
    return "; ".join(texts)


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
