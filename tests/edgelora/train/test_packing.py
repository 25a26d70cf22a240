"""Packed rows have the loss and the gradients of rows alone, on real models; what would mix rows is refused."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgelora.errors import SettingsError
from edgelora.train import Recipe, train
from edgelora.train.data import IGNORED, TokenRow, TokenRows

from .conftest import Watcher, chat, write_rows

pytestmark = pytest.mark.train

N_VOCAB = 96
SMALL = {"vocab_size": N_VOCAB, "hidden_size": 32, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "intermediate_size": 48}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {**SMALL, **HEADS, "num_key_value_heads": 2},
    "gpt2": {"vocab_size": N_VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "mistral": {**SMALL, **HEADS, "num_key_value_heads": 2, "sliding_window": 6},
    "qwen3": {**SMALL, **HEADS, "num_key_value_heads": 2, "head_dim": 8},
}
MIXING: dict[str, dict[str, Any]] = {
    "mamba": {**SMALL, "state_size": 8},
    "bloom": {"vocab_size": N_VOCAB, "hidden_size": 32, "n_layer": 2, "n_head": 4},
}


def tiny(name: str, settings: dict[str, Any], attention: str = "sdpa") -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        name, **settings, initializer_range=0.2, pad_token_id=0, bos_token_id=1, eos_token_id=2
    )
    options = {} if name in MIXING else {"attn_implementation": attention}
    return AutoModelForCausalLM.from_config(config, **options).eval()


def some_rows(n_rows: int = 9) -> TokenRows:
    rng = random.Random(0)
    rows = []
    for number in range(n_rows):
        ids = [rng.randrange(3, N_VOCAB) for _ in range(rng.randrange(4, 24))]
        trained = rng.randrange(1, len(ids))
        labels = [IGNORED] * trained + ids[trained:] if number else list(ids)  # the first is plain text
        rows.append(TokenRow(ids, labels, f"d.jsonl:{number + 1}"))
    return TokenRows(rows, 0, 0, 0, 0)


def test_rows_are_packed_whole() -> None:
    from edgelora.train.packing import packed

    rows = some_rows()
    found = packed(rows, 40)
    assert 1 < len(found.rows) < len(rows.rows)
    pieces = []
    for row, names in zip(found.rows, found.sources, strict=True):
        assert sum(row.lengths) == len(row.input_ids) == len(row.labels) <= 40
        start = 0
        for length, name in zip(row.lengths, names.split(", "), strict=True):
            pieces.append(TokenRow(row.input_ids[start:][:length], row.labels[start:][:length], name))
            start += length
    assert sorted(pieces, key=lambda piece: piece.source) == rows.rows
    assert found.token_rows() == rows.rows
    assert found.packing_note() == f"9 rows are packed into {len(found.rows)} sequences"


def loss_of(model: Any, batch: dict[str, Any]) -> tuple[float, Any]:
    """The mean over trained tokens, and the gradient of the output layer."""
    model.zero_grad()
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    return float(loss.detach()), model.get_output_embeddings().weight.grad.clone()


def batches_of(model: Any, *, flat: bool = False) -> tuple[dict[str, Any], dict[str, Any]]:
    """Everything packed, and everything as it is."""
    from edgelora.train.packing import PackingCollator, packed

    def examples(columns: dict[str, list[list[int]]]) -> list[dict[str, list[int]]]:
        return [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]

    rows, collator = some_rows(), PackingCollator(0, flat=flat)
    return collator(examples(packed(rows, 40).columns())), collator(examples(rows.columns()))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_the_loss_is_that_of_rows_alone(name: str, attention: str) -> None:
    model = tiny(name, MODELS[name], attention)
    together, alone = batches_of(model)
    assert "attention_mask" not in together
    assert "attention_mask" in alone
    assert together["input_ids"].numel() < alone["input_ids"].numel()
    (packed_loss, packed_gradient), (loss, gradient) = loss_of(model, together), loss_of(model, alone)
    assert packed_loss == pytest.approx(loss, abs=2e-6)  # float32, sums in another order
    assert float((packed_gradient - gradient).abs().max()) < 2e-6
    together["attention_mask"] = together["input_ids"] != 0  # the twin: a mask of one block
    assert loss_of(model, together)[0] != pytest.approx(loss, abs=1e-4)


def test_one_flat_sequence_as_flash_attention_takes_it_has_the_same_loss() -> None:
    model = tiny("llama", MODELS["llama"])
    together, alone = batches_of(model, flat=True)
    assert together["input_ids"].shape[0] == 1
    assert together["cu_seq_lens_q"].diff().sum() == together["input_ids"].numel()
    assert loss_of(model, together)[0] == pytest.approx(loss_of(model, alone)[0], abs=2e-6)


@pytest.mark.parametrize("name", MODELS)
def test_models_that_keep_rows_apart_are_taken(name: str) -> None:
    from edgelora.train.packing import collator_for, require_rows_apart

    model = tiny(name, MODELS[name]).train()
    require_rows_apart(model, some_rows().rows, collator_for(model, 0))
    assert model.training


@pytest.mark.parametrize("name", MIXING)
def test_models_that_mix_rows_are_refused(name: str) -> None:
    from edgelora.train.packing import collator_for, require_rows_apart

    model = tiny(name, MIXING[name])
    with pytest.raises(SettingsError, match=f"packing: {name} with .* does not keep rows apart") as caught:
        require_rows_apart(model, some_rows().rows, collator_for(model, 0))
    assert "--packing" in caught.value.hint


def test_the_proof_sees_a_mask_that_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    from edgelora.train.packing import collator_for, require_rows_apart

    model = tiny("llama", MODELS["llama"])
    collator = collator_for(model, 0)
    beside: Callable[..., dict[str, Any]] = collator._beside

    def masked(examples: Any) -> dict[str, Any]:
        batch = beside(examples)
        return {**batch, "attention_mask": batch["input_ids"] >= 0}

    monkeypatch.setattr(collator, "_beside", masked)
    with pytest.raises(SettingsError, match="differ by"):
        require_rows_apart(model, some_rows().rows, collator)


def test_what_cannot_be_packed_is_refused_by_the_recipe() -> None:
    for settings in ({"objective": "dpo"}, {"method": "alora"}):
        with pytest.raises(SettingsError, match="packing is given"):
            Recipe.from_mapping({**settings, "packing": True})
    assert Recipe(packing=True).packing


def test_a_run_with_packing_has_the_loss_of_one_without(base: Path, tmp_path: Path) -> None:
    rows = [{"messages": chat(f"Lamp {n}?", "Yes, it is. " * (1 + n % 3))} for n in range(12)]
    data = write_rows(tmp_path / "d.jsonl", rows)
    shared = {"rank": 2, "max_steps": 2, "gradient_accumulation": 1, "certificate_probes": 0, "dropout": 0.0}
    shared |= {"max_length": 128, "logging_steps": 1, "device": "cpu"}
    watcher = Watcher()
    losses = {}
    for packing, batch_size in ((True, 12), (False, 12)):  # every row in each step
        recipe = Recipe.from_mapping({**shared, "packing": packing, "batch_size": batch_size})
        out = tmp_path / str(packing)
        report = train(data, str(base), out, recipe, eval_data=data, progress=watcher)
        losses[packing] = (report.loss, report.eval_loss)
        assert any("12 rows are packed into" in note for note in report.notes) == packing
    assert losses[True] == pytest.approx(losses[False], abs=1e-5)
