"""From examples to token rows: the base's tokenizer, the template that is served, and what a method asks of both."""

from __future__ import annotations

from typing import Any

from edgelora.train.job import Job, Notes, Prepared


def prepare(job: Job, fingerprint: str, said: Notes) -> Prepared:
    """The rows of a job as tokens, with the contract of serving.

    Raises:
        ModelFileError: the tokenizer cannot be read, or the template shows no assistant text.
        DataFileError: the template refuses rows, or nothing trained is left of them.
        SettingsError: no template, or none that the method can do with.
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
