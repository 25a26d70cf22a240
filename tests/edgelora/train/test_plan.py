"""What a run is reckoned to take, beside what torch really allocates; and the plan as it is printed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from edgelora.cli import cli
from edgelora.train import Recipe
from edgelora.train.base import BaseFolder, placement
from edgelora.train.plan import Plan, plan, steps_of

pytestmark = [
    pytest.mark.train,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

ROWS, LENGTH = 4, 48
# Fake and real tensors do the same operations; real ones also make the 4-D mask from the batch's own.
SAME_BYTES = 0.05
METHODS = ("lora", "dora", "qlora", "qdora", "full", "vera")


def planned(base: Path, recipe: Recipe) -> Any:
    from edgelora.train.outline import outline

    return outline(BaseFolder(base, str(base)), recipe, placement(recipe), {})


def really(base: Path, recipe: Recipe) -> Any:
    """The model of a run, with TRL's loss."""
    from trl.trainer.utils import add_fused_lm_head

    from edgelora.train.outline import METRICS

    model = BaseFolder(base, str(base)).load_model(placement(recipe))
    add_fused_lm_head(model, outputs=METRICS)
    if recipe.row.trains_base:
        return model.train()
    from peft import get_peft_model

    return get_peft_model(model, recipe.row.peft_config(recipe)).train()


def really_alive(model: Any) -> int:
    """The most bytes of real tensors in a forward and backward pass."""
    import torch

    from edgelora.train.step_memory import LiveBytes

    live = LiveBytes([*model.parameters(), *model.buffers()], "cpu", model.config.vocab_size)
    ids = torch.zeros((ROWS, LENGTH), dtype=torch.long)
    mask = torch.ones_like(ids)
    mask[0, LENGTH // 2 :] = 0
    with live:
        output = model(input_ids=ids, labels=ids, attention_mask=mask, use_cache=False, fused_lm_head=True)
        loss = -output.log_probs.sum()
        del output
        loss.backward()
    return live.peak


class TestAnOutline:
    @pytest.mark.parametrize("method", METHODS)
    def test_counts_the_parameters_of_the_model_itself(self, base: Path, method: str) -> None:
        recipe = Recipe(method=method)
        model, found = really(base, recipe), planned(base, recipe)
        assert found.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
        if placement(recipe).quantization:
            # bitsandbytes keeps the code of 16 values and the mean of the scales with each layer as well.
            assert found.weights < 4 * found.total
        else:
            assert found.weights == sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])

    def test_takes_no_memory_for_a_7b_and_a_seventh_of_its_bytes_in_nf4(self, tmp_path: Path) -> None:
        from transformers import LlamaConfig

        LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, vocab_size=32000).save_pretrained(
            tmp_path
        )
        found = planned(tmp_path, Recipe(method="qlora", dtype="bfloat16"))
        assert found.total > 6.7e9
        # 6.48e9 weights at 4.127 bits (QLoRA, section 3), embeddings and output in bfloat16, the adapter in float32.
        assert found.weights == pytest.approx(6.476e9 * 4.127 / 8 + 2 * 32000 * 4096 * 2 + found.trained * 4, rel=0.005)


class TestTheMemoryOfAStep:
    @pytest.mark.parametrize("method", ["lora", "dora", "full", "vera"])
    def test_is_what_real_tensors_take(self, base: Path, method: str) -> None:
        from edgelora.train.step_memory import BatchShape, step_memory

        recipe = Recipe(method=method, **({"dropout": 0.0} if method != "full" else {}))
        found = step_memory(planned(base, recipe), BatchShape(ROWS, LENGTH))
        assert found.peak == pytest.approx(really_alive(really(base, recipe)), rel=SAME_BYTES)

    def test_falls_with_checkpointing_and_rises_with_length_rows_and_accumulation(self, base: Path) -> None:
        from edgelora.train.step_memory import BatchShape, step_memory

        model = planned(base, Recipe(method="full"))
        plain = step_memory(model, BatchShape(8, 128)).peak
        assert step_memory(model, BatchShape(8, 128), checkpointing=True).peak < plain
        assert step_memory(model, BatchShape(8, 128)).peak == plain  # it was switched off again
        assert step_memory(model, BatchShape(8, 256)).peak > 1.9 * plain
        assert step_memory(model, BatchShape(16, 128)).peak > 1.9 * plain
        kept = step_memory(model, BatchShape(8, 128), accumulates=True)
        assert kept.peak > plain


@pytest.fixture(scope="module")
def found(base: Path, data: Path) -> Plan:
    return plan(data, str(base), Recipe(batch_size=4, gradient_accumulation=2, epochs=2), eval_data=data)


class TestAPlan:
    def test_measures_steps_and_leaves_nothing(self, found: Plan) -> None:
        assert found.fits
        assert found.changes == ()
        assert found.measured is not None
        assert found.measured.steps == 3
        assert found.seconds is not None
        assert found.seconds > 0
        assert (found.rows, found.steps) == (24, 6)

    def test_has_parts_that_make_the_whole(self, found: Plan) -> None:
        memory = found.memory
        parts = [memory.weights, memory.gradients, memory.optimizer, memory.activations, memory.rest]
        assert memory.training == sum(parts)
        assert memory.optimizer == 2 * memory.gradients == 8 * memory.trained

    def test_that_does_not_fit_says_what_to_change(
        self, base: Path, data: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("edgelora.train.peak_memory.free_memory", lambda device: 61 << 20)
        result = CliRunner().invoke(
            cli, ["train", str(data), "--base", str(base), "--plan", "--json", "--batch-size", "64"]
        )
        told = json.loads(result.stdout)
        assert result.exit_code == 1
        assert not told["fits"]
        assert told["measured"] is None
        options = [change["options"] for change in told["changes"]]
        assert options[:2] == ["--gradient-checkpointing", "--batch-size 1 --gradient-accumulation 128"]
        assert all(change["saves"] > 0 for change in told["changes"])

    def test_is_printed_in_a_screen(self, found: Plan) -> None:
        from edgelora.cli.train_plan import lines

        text = "\n".join(lines(found))
        assert "16 to 20 bytes a parameter" in text
        assert "fits:" in text
        assert "s a step" in text
        assert "does not fit" in "\n".join(lines(replace(found, free=0)))


def test_steps_are_counted_as_the_trainer_counts_them() -> None:
    recipe = Recipe(batch_size=2, gradient_accumulation=2, epochs=1)
    assert [steps_of(recipe, rows) for rows in (1, 4, 5, 8, 9)] == [1, 1, 2, 2, 3]
    assert [steps_of(recipe, rows, processes=2) for rows in (1, 4, 9, 17)] == [1, 1, 2, 3]
    assert steps_of(replace(recipe, max_steps=7), 100) == 7


def test_a_run_without_a_folder_for_it_is_refused(base: Path, data: Path) -> None:
    result = CliRunner().invoke(cli, ["train", str(data), "--base", str(base)])
    assert result.exit_code == 2
    assert "--output" in result.output
