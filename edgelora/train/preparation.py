"""From examples to token rows: the base's tokenizer, the template that is served, and what a method asks of both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from edgelora.errors import SettingsError
from edgelora.train.job import Job, Notes, Prepared

if TYPE_CHECKING:
    from edgelora.train.rows import Rows

ROTARY = ("rope_parameters", "rope_theta", "rope_scaling")
"""Settings in the configurations of models whose positions are computed."""


def prepare(job: Job, fingerprint: str, said: Notes) -> Prepared:
    """The rows of a job as tokens, with the contract of serving.

    Raises:
        ModelFileError: the tokenizer cannot be read, or the template shows no assistant text.
        DataFileError: the template refuses rows, or nothing trained is left of them.
        SettingsError: no template, or none that the method can do with; or rows that the model has no positions for.
    """
    from edgelora.template import ChatTemplate
    from edgelora.train.contract import contract_of_run
    from edgelora.train.data import finder_for
    from edgelora.train.passages import chosen_template

    tokenizer, recipe = job.base.load_tokenizer(), job.recipe
    everything = [*job.examples, *job.eval_examples]
    source = chosen_template(
        recipe.chat_template, tokenizer.chat_template, chat_needed=any(map(job.data.is_templated, everything))
    )
    finder = finder_for(tokenizer, ChatTemplate(source))
    contract = contract_of_run(job.base, fingerprint, tokenizer, finder, list(map(job.data.prompt, job.examples)))
    rows: dict[str, Any] = {}
    for name, examples in (("training data", job.examples), ("evaluation data", job.eval_examples)):
        if examples:
            rows[name] = job.data.tokenize(examples, tokenizer, finder, recipe.max_length)
            for note in rows[name].notes(name, recipe.max_length):
                said.keep(note)
    _check_window(job, rows, said)
    found: dict[str, Any] = {}
    if "invocation" in recipe.row.defaults:
        from edgelora.train.alora import activated, invocation_tokens

        tokens = invocation_tokens(recipe.invocation, finder, tokenizer)
        rows = {name: activated(each, tokens) for name, each in rows.items()}
        found["alora_invocation_tokens"] = tokens
    if recipe.packing:
        from edgelora.train.packing import packed

        rows["training data"] = packed(rows["training data"], recipe.max_length)
        said.keep(rows["training data"].packing_note())
    return Prepared(tokenizer, rows["training data"], rows.get("evaluation data"), contract, found)


def _check_window(job: Job, rows: Mapping[str, Rows], said: Notes) -> None:
    """Tell of rows beyond the model's window, where rotary models compute and have never been.

    Raises:
        SettingsError: positions are learned, and there are none beyond it.
    """
    from edgelora.train.row_lengths import lengths

    config = job.base.load_config().get_text_config()
    window = int(getattr(config, "max_position_embeddings", None) or 0)  # state space models have none
    for name, each in rows.items() if window else ():
        if (longest := max(lengths(each))) <= window:
            continue
        told = f"{name}: a row has {longest} tokens, and {job.base.name} was made for {window} at most"
        if not any(getattr(config, setting, None) for setting in ROTARY):
            raise SettingsError(told, hint=f"Cut rows there: --max-length {window}.")
        said.keep(f"{told}: --max-length {window} cuts rows there")
