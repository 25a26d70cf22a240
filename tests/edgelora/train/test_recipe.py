from __future__ import annotations

import subprocess
import sys
from dataclasses import fields

import pytest

from edgelora.errors import SettingsError
from edgelora.train import METHODS, Recipe
from edgelora.train.recipe import default_text


def test_all_problems_in_one_message() -> None:
    with pytest.raises(SettingsError) as caught:
        Recipe(rank=0, dropout=1.5, scheduler="zigzag", learning_rate=float("nan"), target_modules="q_proj,")
    for part in ("rank is 0", "dropout is 1.5", "cosine, linear, constant", "learning_rate is nan", "'q_proj,'"):
        assert part in caught.value.message


def test_every_default_is_accepted_and_every_field_explained() -> None:
    recipe = Recipe()
    for field in fields(recipe):
        assert field.metadata["help"], field.name
        assert field.metadata["bound"].accepts(field.default), field.name
        assert not field.metadata["bound"].accepts(object()), field.name


def test_from_mapping() -> None:
    recipe = Recipe.from_mapping({"rank": 8, "alpha": None, "target_modules": ["q_proj", "v_proj"]})
    assert (recipe.rank, recipe.alpha) == (8, Recipe().alpha)
    assert recipe.target_module_names == ["q_proj", "v_proj"]
    assert Recipe.from_mapping(recipe.to_dict()) == recipe
    with pytest.raises(SettingsError, match="ranks") as caught:
        Recipe.from_mapping({"ranks": 8})
    assert "rank" in caught.value.hint


def test_differences_name_only_what_changes_the_result() -> None:
    before = Recipe(rank=8, save_steps=10, device="cpu").to_dict()
    assert Recipe(rank=8, save_steps=99, logging_steps=3).differences(before) == []
    assert Recipe(rank=16).differences(before) == ["rank was 8, now 16"]


def test_reading_the_tables_loads_no_torch() -> None:
    heavy = ["torch", "transformers", "peft", "trl", "datasets", "numpy"]
    code = f"import sys, edgelora.train; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_setting_that_the_method_or_the_objective_does_not_read_is_refused_by_name() -> None:
    with pytest.raises(SettingsError, match="rank is given, and ia3 does not read it; alpha is given, and ia3"):
        Recipe(method="ia3", rank=4, alpha=8)
    with pytest.raises(SettingsError, match="target_modules is given, and full does not read it"):
        Recipe(method="full", target_modules="q_proj")
    with pytest.raises(SettingsError, match="dpo_beta is given, and sft does not read it"):
        Recipe(dpo_beta=0.2)
    with pytest.raises(SettingsError, match="dropout is given, and dpo does not read it"):
        Recipe(objective="dpo", dropout=0.1)
    with pytest.raises(SettingsError, match="peft_config is given, and dora does not read it"):
        Recipe(method="dora", peft_config="boft.json")
    with pytest.raises(SettingsError, match="peft_config is not given"):
        Recipe(method="peft-config")


def test_each_method_has_its_own_defaults() -> None:
    assert (Recipe().rank, Recipe().alpha, Recipe().learning_rate) == (16, 32.0, 2e-4)
    assert (Recipe(method="vera").rank, Recipe(method="vera").alpha) == (256, None)
    assert Recipe(method="full").learning_rate == 2e-5
    assert Recipe(peft_config="boft.json").method == "peft-config"
    assert Recipe(method="full", objective="dpo").learning_rate == 1e-6  # Rafailov et al., appendix B
    assert Recipe(method="ia3", learning_rate=0.5).learning_rate == 0.5
    assert default_text("rank") == "16; loha, lokr 8; vera 256"


@pytest.mark.train
@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.config_class])
def test_methods_build_their_config(name: str) -> None:
    import peft

    config = METHODS[name].peft_config(Recipe(method=name, target_modules="q_proj,v_proj"))
    assert isinstance(config, getattr(peft, METHODS[name].config_class))
    assert config.task_type == "CAUSAL_LM"
    assert config.target_modules == {"q_proj", "v_proj"}


@pytest.mark.train
def test_lora_takes_the_recipes_numbers() -> None:
    config = METHODS["lora"].peft_config(Recipe(rank=4, alpha=8, dropout=0.25))
    assert (config.r, config.lora_alpha, config.lora_dropout, config.target_modules) == (4, 8, 0.25, "all-linear")
    assert isinstance(config.lora_alpha, int)


def test_when_evaluations_are_may_not_change_where_the_best_is_kept() -> None:
    for settings in ({"keep_best": True}, {"early_stopping_patience": 2}):
        begun = Recipe(**settings, eval_steps=10)  # type: ignore[arg-type]
        assert begun.differences(Recipe(**settings, eval_steps=10, save_steps=7).to_dict()) == []  # type: ignore[arg-type]
        (told,) = begun.differences(Recipe(**settings).to_dict())  # type: ignore[arg-type]
        assert told == "there was an evaluation every 100 steps, now every 10"
    assert Recipe(eval_steps=10).differences(Recipe().to_dict()) == []
