"""What is peculiar to a method: how it begins, what its optimizer does, what its rows are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from converters.base import convert_base
from edgelora.errors import SettingsError
from edgelora.messages import Conversation
from edgelora.template import BUILTIN, ChatTemplate
from edgelora.train import Recipe, train
from edgelora.train.folder import RunFolder
from edgelora.train.passages import PassageFinder

from .conftest import Watcher, chat
from .test_method_runs import SHORT

pytestmark = [
    pytest.mark.train,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


@pytest.fixture
def begun(base: Path, data: Path, tokenizer: Any, tmp_path: Path) -> Callable[[Recipe], Any]:
    """The trainer of a recipe, before its first step."""
    from edgelora.train.base import find_base, placement
    from edgelora.train.data import finder_for, tokenize_conversations
    from edgelora.train.rows import DATA
    from edgelora.train.trainee import begin
    from edgelora.train.trainer import batches, build_trainer

    def of(recipe: Recipe) -> Any:
        finder = finder_for(tokenizer, ChatTemplate(BUILTIN["chatml"]))
        rows = tokenize_conversations(DATA["sft"].read(data, 0), tokenizer, finder, 512)
        place, found = placement(recipe), find_base(str(base))
        run = RunFolder(tmp_path / recipe.method)
        run.checkpoints.mkdir(parents=True)
        model = found.load_model(place)
        trainee = begin(model, found, recipe, {}, run, lambda: batches(rows, tokenizer, recipe, "cpu"))
        return build_trainer(trainee, tokenizer, rows, None, recipe, place, run, Watcher())[0]

    return of


def layers(trainer: Any) -> dict[str, Any]:
    from edgelora.train.trainee import lora_layers

    return dict(lora_layers(trainer.model))


def test_qlora_quantizes_the_base_twice_and_trains_in_float32_on_a_cpu(begun: Callable[[Recipe], Any]) -> None:
    import bitsandbytes
    import torch

    trainer = begun(Recipe(method="qlora", rank=4))
    found = layers(trainer)
    assert len(found) == 14
    for layer in found.values():
        stored = layer.get_base_layer()
        assert isinstance(stored, bitsandbytes.nn.Linear4bit)
        assert (stored.weight.quant_type, stored.weight.quant_state.nested) == ("nf4", True)
        assert layer.lora_A["default"].weight.dtype == torch.float32
    assert not isinstance(trainer.model.get_output_embeddings(), bitsandbytes.nn.Linear4bit)


def test_loftq_begins_nearer_to_the_base_than_nf4_alone(begun: Callable[[Recipe], Any], base: Path) -> None:
    import torch
    from bitsandbytes.functional import dequantize_4bit
    from safetensors.torch import load_file

    released = load_file(base / "model.safetensors")
    for name, layer in layers(begun(Recipe(method="loftq", rank=8))).items():
        stored = layer.get_base_layer().weight
        kept, whole = dequantize_4bit(stored.data, stored.quant_state).float(), released[f"{name}.weight"]
        singular = torch.linalg.svdvals(whole - kept)
        error = torch.linalg.norm(whole - kept - layer.get_delta_weight("default").detach())
        # Eckart and Young: no matrix of rank 8 comes nearer than the singular values that are left.
        assert float(error) == pytest.approx(float(singular[8:].norm()), rel=1e-3)
        assert float(error) < 0.9 * float(singular.norm())


def test_eva_begins_with_directions_of_the_data(begun: Callable[[Recipe], Any]) -> None:
    import torch

    trainer = begun(Recipe(method="eva", rank=4))
    plain = begun(Recipe(method="lora", rank=4))
    for layer in layers(trainer).values():
        a = layer.lora_A["default"].weight
        assert torch.allclose(a @ a.T, torch.eye(len(a)), atol=1e-3)
        assert float(layer.lora_B["default"].weight.detach().abs().max()) == 0.0
    random = next(iter(layers(plain).values())).lora_A["default"].weight
    assert not torch.allclose(random @ random.T, torch.eye(4), atol=1e-1)  # the twin: LoRA's are any directions


def test_eva_says_where_the_rows_are_too_few(base: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="EVA cannot begin"):
        train(data, str(base), tmp_path / "out", Recipe(**{**SHORT, "method": "eva", "rank": 4096}))


def test_eva_gives_up_where_its_directions_never_settle(
    begun: Callable[[Recipe], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import edgelora.train.trainee as module

    monkeypatch.setattr(module, "EVA_BATCHES", 1)
    with pytest.raises(SettingsError, match="its directions still move after 1 batches"):
        begun(Recipe(method="eva", rank=4))


def test_dora_names_rows_of_zeros_instead_of_dividing_by_them(data: Path, tmp_path: Path) -> None:
    from tests.conftest import TINY_BASE

    recipe = Recipe(**{**SHORT, "method": "dora", "rank": 4, "max_steps": 1})
    with pytest.raises(
        SettingsError, match=r"180 rows of this base are zero: model\.layers\.0\.self_attn\.q_proj"
    ) as caught:
        train(data, str(TINY_BASE), tmp_path / "out", recipe)
    assert "Leave out k_proj, q_proj" in caught.value.hint


def test_lora_plus_teaches_b_faster(begun: Callable[[Recipe], Any]) -> None:
    trainer = begun(Recipe(method="lora+", rank=4, lora_plus_ratio=8.0, learning_rate=1e-3, weight_decay=0.1))
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    rates = {
        names[id(parameter)]: (group["lr"], group["weight_decay"])
        for group in trainer.create_optimizer().param_groups
        for parameter in group["params"]
    }
    assert {rate for name, rate in rates.items() if "lora_A" in name} == {(1e-3, 0.1)}
    assert {rate for name, rate in rates.items() if "lora_B" in name} == {(8e-3, 0.1)}
    assert len(rates) == 28


class TestActivated:
    def finder(self, tokenizer: Any, template: str) -> PassageFinder:
        from edgelora.train.data import finder_for

        return finder_for(tokenizer, ChatTemplate(BUILTIN[template]))

    def rows(self, tokenizer: Any, template: str = "chatml") -> Any:
        from edgelora.train.data import tokenize_conversations

        talks = [Conversation(tuple(chat("Is it red?", "Yes.", "Sure?", "Very.")), "data.jsonl:1")]
        return tokenize_conversations(talks, tokenizer, self.finder(tokenizer, template), 512)

    def test_each_reply_is_a_row_that_ends_with_it(self, tokenizer: Any) -> None:
        from edgelora.train.alora import activated, invocation_tokens

        invocation = invocation_tokens(None, self.finder(tokenizer, "chatml"), tokenizer)
        assert tokenizer.decode(invocation) == "<|im_start|>assistant\n"
        whole = self.rows(tokenizer)
        rows = activated(whole, invocation).rows
        assert len(whole.rows) == 1
        trained = [tokenizer.decode([t for t in row.labels if t != -100]) for row in rows]
        assert trained == ["Yes.<|im_end|>", "Very.<|im_end|>"]
        for row, end in zip(rows, trained, strict=True):
            assert tokenizer.decode(row.input_ids).endswith(f"<|im_start|>assistant\n{end}")
            assert len(row.labels) == len(row.input_ids)

    def test_an_invocation_that_is_not_there_is_refused(self, tokenizer: Any) -> None:
        from edgelora.train.alora import activated, invocation_tokens

        finder = self.finder(tokenizer, "chatml")
        with pytest.raises(SettingsError, match=r"does not occur before the reply in 1 rows, the first of them data"):
            activated(self.rows(tokenizer), invocation_tokens("[CHECK]", finder, tokenizer))
        with pytest.raises(SettingsError, match="puts nothing before a reply") as caught:
            invocation_tokens(None, self.finder(tokenizer, "llama2"), tokenizer)
        assert "--invocation" in caught.value.hint


def test_what_is_served_is_said_to_be_another_quantization(base: Path, data: Path, tmp_path: Path) -> None:
    watcher = Watcher()
    recipe = Recipe(**{**SHORT, "method": "qlora", "rank": 4, "max_steps": 1})
    report = train(data, str(base), tmp_path / "out", recipe, progress=watcher)
    (said,) = [note for note in report.notes if "another quantization" in note]
    assert said.startswith("qlora trains on the base in NF4")
    assert said in watcher.notes


def test_what_a_rank_makes_of_a_method_on_this_base_is_said_and_true(base: Path, data: Path, tmp_path: Path) -> None:
    """LoHa's product has rank squared ranks: of 64, matrices of 16 rows hold none exactly."""
    from converters.adapter import convert_adapter

    recipe = Recipe(**{**SHORT, "method": "loha", "rank": 8, "max_steps": 2, "learning_rate": 0.1})
    report = train(data, str(base), tmp_path / "out", recipe)
    assert report.export == "approximate"
    assert any(note.startswith("loha: becomes a GGUF adapter that comes close") for note in report.notes)
    assert convert_adapter(tmp_path / "out", base, tmp_path / "out.gguf").kind == "approximate"


def test_a_gguf_base_is_not_quantized_once_more(base: Path, data: Path, tmp_path: Path) -> None:
    gguf = convert_base(base, tmp_path / "base.gguf", quant="q8_0").path
    with pytest.raises(SettingsError, match=r"a GGUF base is trained on as it is, .* into NF4") as caught:
        train(data, str(gguf), tmp_path / "out", Recipe(**{**SHORT, "method": "qlora", "rank": 4}))
    assert "lora for qlora" in caught.value.hint
    report = train(data, str(gguf), tmp_path / "dora", Recipe(**{**SHORT, "method": "dora", "rank": 4, "max_steps": 1}))
    assert report.export == "approximate"
