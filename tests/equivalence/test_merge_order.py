"""What an adapter finds when it is merged: an output that was its embeddings, and what was merged before it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from converters import edits
from converters.adapted_base import AdaptedBase, Tie
from converters.adapter import AdapterOptions, convert_adapter
from converters.base import UNTIED, convert_base
from converters.base_file import BaseFile
from converters.checkpoint import Floats
from converters.errors import BaseMismatchError, UnsupportedAdapterError
from converters.merge import Merged, merge
from converters.options import QuantizeOptions
from converters.requantize import requantize
from tests.equivalence import tiny_models
from tests.equivalence.effects import TOLERANCE, Adapted, adapt
from tests.equivalence.hf_logits import load_model
from tests.equivalence.peft_methods import Case, nudged

pytestmark = [pytest.mark.train, pytest.mark.filterwarnings("ignore")]  # of PEFT, about its own methods

SEEN = 20 * TOLERANCE
ROUNDING = 1e-5  # of float32, relative
F32 = QuantizeOptions("f32")
LORA = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
EMBEDDING, OUTPUT = "token_embd.weight", "output.weight"


def lora(folder: Path, model: str = "llama", *, kind: str = "LoraConfig", **settings: Any) -> Adapted:
    chosen = {**LORA, **settings} if kind == "LoraConfig" else settings
    return adapt(Case(kind, chosen, model=model, randomize=nudged(0.3)), folder)


def rows_of(path: Path, name: str) -> Floats:
    with BaseFile(path) as file:
        return file.rows(name)


def change_of(plain: Path, merged: Path, name: str) -> Floats:
    before = name if name in _names(plain) else EMBEDDING
    return rows_of(merged, name) - rows_of(plain, before)


def _names(path: Path) -> set[str]:
    with BaseFile(path) as file:
        return set(file.header.tensors)


def merged(base: Path, adapters: Sequence[Adapted | Merged], out: Path, **settings: Any) -> Path:
    items = [item if isinstance(item, Merged) else Merged(item.folder) for item in adapters]
    return merge(base, items, out, F32, force=True, **settings).path


def relative(found: Floats, wanted: Floats) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


# An output that is the embeddings

BOTH: Mapping[str, Callable[[Path], Adapted]] = {
    "tokens beside LoRA": lambda folder: lora(folder, "qwen2-tied", trainable_token_indices=[*range(20, 120)]),
    "tokens alone": lambda folder: lora(
        folder, "qwen2-tied", kind="TrainableTokensConfig", token_indices=[*range(20, 120)],
        target_modules=["embed_tokens"],
    ),
    "all rows": lambda folder: lora(folder, "qwen2-tied", modules_to_save=["embed_tokens"], ensure_weight_tying=True),
}  # fmt: skip


@pytest.mark.parametrize("name", BOTH)
def test_what_both_have_reaches_an_output_of_its_own(name: str, tmp_path: Path) -> None:
    """Untied while it is merged, before, and by another quantization."""
    trained = BOTH[name](tmp_path)
    again = requantize(trained.plain, tmp_path / "again.gguf", QuantizeOptions("f32", untie=True)).path
    same = requantize(trained.untied, tmp_path / "same.gguf", F32).path
    untie = QuantizeOptions("f32", untie=True)
    asked, done = ((base, untie) for base in (trained.base, trained.plain)), ((base, F32) for base in (again, same))
    for base, options in (*asked, *done, (trained.untied, F32)):
        made = merge(base, [Merged(trained.folder)], tmp_path / "m.gguf", options, force=True).path
        assert OUTPUT in _names(made)
        assert trained.error(trained.plain, merged=made) < TOLERANCE


def test_an_output_without_its_half_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = BOTH["tokens beside LoRA"](tmp_path)
    monkeypatch.setattr(AdaptedBase, "tie", Tie.APART)
    made = merged(trained.untied, [trained], tmp_path / "m.gguf")
    assert trained.error(trained.plain, merged=made) > SEEN


@pytest.mark.parametrize("name", ["tokens beside LoRA", "tokens alone"])
def test_an_adapter_changes_both_too(name: str, tmp_path: Path) -> None:
    trained = BOTH[name](tmp_path)
    assert trained.adapter_error(trained.untied, rank=None) < 4 * TOLERANCE  # approximated: 1 % of each tensor's change


def test_tokens_reach_an_output_that_parted_before(tmp_path: Path) -> None:
    """In one go and one after the other; tokens are set, whatever was there."""
    tokens = BOTH["tokens beside LoRA"](tmp_path / "tokens")
    output = lora(tmp_path / "output", "qwen2-tied", target_modules=["k_proj", "lm_head"])
    only_tokens, only_output = (
        merged(tokens.plain, [each], tmp_path / f"{number}.gguf") for number, each in enumerate((tokens, output))
    )
    together = merged(tokens.plain, [output, tokens], tmp_path / "together.gguf")
    after = merged(only_output, [tokens], tmp_path / "after.gguf")
    of_tokens, of_output = (
        change_of(tokens.plain, only_tokens, EMBEDDING), change_of(tokens.plain, only_output, OUTPUT)
    )  # fmt: skip
    is_token = np.abs(of_tokens).sum(1) > 0
    for made in (together, after):
        found = change_of(tokens.plain, made, OUTPUT)
        assert relative(change_of(tokens.plain, made, EMBEDDING), of_tokens) < ROUNDING
        assert relative(found[is_token], of_tokens[is_token]) < ROUNDING
        assert relative(found[~is_token], of_output[~is_token]) < ROUNDING
    first = merged(tokens.plain, [tokens, output], tmp_path / "first.gguf")
    assert relative(change_of(tokens.plain, first, OUTPUT), of_tokens + of_output) < ROUNDING


def test_a_file_that_does_not_say_whether_it_was_tied(tmp_path: Path) -> None:
    """Refused where it matters, and where the two differ they are two."""
    trained = BOTH["tokens beside LoRA"](tmp_path / "tied")
    strange = without_key(trained.untied, tmp_path / "strange.gguf")
    with pytest.raises(UnsupportedAdapterError, match="whether this file's is cannot be seen"):
        merge(strange, [Merged(trained.folder)], tmp_path / "m.gguf")
    with pytest.raises(UnsupportedAdapterError, match="whether this file's is cannot be seen"):
        convert_adapter(trained.folder, strange, tmp_path / "a.gguf")
    repeated = BOTH["tokens alone"](tmp_path / "both")  # which has the rows of the output too
    assert repeated.error(repeated.plain, merged=merged(strange, [repeated], tmp_path / "m.gguf")) < TOLERANCE
    apart = lora(tmp_path / "apart", trainable_token_indices=[*range(20, 120)])
    assert apart.merged_error() < TOLERANCE


def without_key(path: Path, out: Path) -> Path:
    data = path.read_bytes()
    assert data.count(UNTIED.encode()) == 1
    out.write_bytes(data.replace(UNTIED.encode(), UNTIED.encode()[::-1]))
    return out


@pytest.mark.parametrize("method", ["VeraConfig", "FourierFTConfig", "MissConfig"])
def test_methods_that_ask_for_the_shape_of_a_tied_output(method: str, tmp_path: Path) -> None:
    settings = {"VeraConfig": {"r": 4}, "FourierFTConfig": {"n_frequency": 50, "scaling": 100}, "MissConfig": {"r": 4}}
    trained = lora(tmp_path, "qwen2-tied", kind=method, target_modules=["lm_head"], **settings[method])
    assert trained.merged_error() < TOLERANCE
    assert trained.merged_error(trained.base) < TOLERANCE
    with pytest.raises(BaseMismatchError, match="cannot adapt one tensor in two places") as caught:
        convert_adapter(trained.folder, trained.plain, tmp_path / "a.gguf")
    assert "--untie" in caught.value.hint


def test_a_family_that_never_unties_blames_only_what_would_untie_it(tmp_path: Path) -> None:
    trained = lora(tmp_path, "gemma", target_modules=["embed_tokens", "q_proj"])
    with pytest.raises(UnsupportedAdapterError, match=r"embed_tokens\.weight: changes the embeddings") as caught:
        trained.merged_error()
    assert "q_proj" not in caught.value.message


# What was merged before


def test_an_initialisation_is_taken_out_of_the_base_as_it_was(tmp_path: Path) -> None:
    """PiSSA's first state follows from the weights that it was trained on."""
    before = lora(tmp_path / "before")
    pissa = lora(tmp_path / "pissa", r=4, lora_alpha=8, init_lora_weights="pissa")
    one, other = (
        change_of(before.plain, merged(before.plain, [each], tmp_path / "m.gguf"), "blk.0.attn_q.weight")
        for each in (before, pissa)
    )
    for base in (before.plain, before.base):
        both = merged(base, [before, pissa], tmp_path / "both.gguf")
        found = change_of(before.plain, both, "blk.0.attn_q.weight")
        assert relative(found, one + other) < 1e-4  # of float32, and of the singular values' rounding
    assert relative(one, one + other) > 0.1


@pytest.mark.parametrize("base", ["f32", "q8_0", "folder", "merged"])
def test_copies_of_the_embeddings_undo_nothing(base: str, tmp_path: Path) -> None:
    """PEFT saves the embeddings below a LoRA of them, and its copies are the base's before any adapter."""
    first, second = (lora(tmp_path / end, target_modules=["embed_tokens", end]) for end in ("q_proj", "k_proj"))
    assert any("embed_tokens.base_layer" in name for name in load_file(first.folder / "adapter_model.safetensors"))
    plain = first.base if base == "folder" else requantized(first.plain, "f32" if base == "merged" else base)
    compared = first.plain if base == "folder" else plain
    one, other = (
        change_of(compared, merged(plain, [each], tmp_path / "m.gguf", keep_types=False), EMBEDDING)
        for each in (first, second)
    )
    if base == "merged":
        both = merged(merged(plain, [first], tmp_path / "one.gguf"), [second], tmp_path / "both.gguf")
    else:
        both = merged(plain, [first, second], tmp_path / "both.gguf")
    assert relative(change_of(compared, both, EMBEDDING), one + other) < ROUNDING
    assert relative(one, one + other) > 0.1


def requantized(path: Path, quant: str) -> Path:
    return requantize(path, path.with_name(f"{quant}.gguf"), QuantizeOptions(quant), force=True).path


@pytest.mark.parametrize("quant", ["f16", "bf16"])
def test_a_copy_is_known_though_the_base_is_rounded(quant: str, tmp_path: Path) -> None:
    trained = lora(tmp_path, target_modules=["embed_tokens", "q_proj"])
    rounded = convert_base(trained.base, tmp_path / "rounded.gguf", quant=quant).path
    assert convert_adapter(trained.folder, rounded, tmp_path / "a.gguf").kind == "exact"
    half(trained.folder, EMBEDDINGS)  # and the other way round, as of a model that was loaded in BF16
    assert trained.adapter_error() < TOLERANCE
    half(trained.folder, EMBEDDINGS, 1.02)
    with pytest.raises(UnsupportedAdapterError, match="it was trained as a whole"):
        trained.adapter_error()


EMBEDDINGS = "base_model.model.model.embed_tokens.base_layer.weight"


def half(folder: Path, name: str, factor: float = 1.0) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    rounded = torch.from_numpy(tensors[name] * np.float32(factor)).bfloat16().float().numpy()
    save_file({**tensors, name: rounded}, path)


def test_a_copy_of_other_embeddings_does_not_undo_what_was_merged(tmp_path: Path) -> None:
    first, second = (lora(tmp_path / end, target_modules=["embed_tokens", end]) for end in ("q_proj", "k_proj"))
    half(second.folder, EMBEDDINGS, 2.0)
    for order in ([first, second], [second, first]):
        with pytest.raises(UnsupportedAdapterError, match=r"embed_tokens\.weight: was trained on another base"):
            merged(first.plain, order, tmp_path / "m.gguf")


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_a_change_of_a_whole_matrix_sees_what_came_before_it(scale: float, tmp_path: Path) -> None:
    """A resized vocabulary below DoRA, whose lengths are those of columns: of all rows, the new ones too."""
    base, folder = tiny_models.build("llama", tmp_path / "base"), tmp_path / "adapter"
    embeddings = dora_of_resized(base, folder)
    with BaseFile(merged(base, [Merged(folder, scale)], tmp_path / "m.gguf")) as file:
        found = file.rows(EMBEDDING)
    before, after = embeddings
    assert relative(found[NEW:], (before + scale * (after - before))[NEW:]) < ROUNDING
    assert relative(found, before + scale * (after - before)) < ROUNDING


NEW = 320


def dora_of_resized(base: Path, folder: Path) -> tuple[Floats, Floats]:
    """An adapter on two more tokens; the embeddings before and after it."""
    import peft
    from transformers import AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(base), load_model(base)
    tokenizer.add_tokens(["<new1>", "<new2>"])
    torch.manual_seed(1)
    model.resize_token_embeddings(NEW + 2)
    before = model.get_input_embeddings().weight.detach().numpy().copy()
    config = peft.LoraConfig(**{**LORA, "use_dora": True, "target_modules": ["embed_tokens", "lm_head"]})
    model = peft.get_peft_model(model, config).eval()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            nudged(0.3)(name, parameter)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return before, model.merge_and_unload().get_input_embeddings().weight.detach().numpy()


# GGUF adapters, and names


def test_an_activated_lora_is_not_merged_from_gguf_either(tmp_path: Path) -> None:
    trained = lora(tmp_path)
    config = trained.folder / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "alora_invocation_tokens": [5, 6]}))
    adapter = convert_adapter(trained.folder, trained.plain, tmp_path / "a.gguf").path
    for path in (adapter, trained.folder):
        with pytest.raises(UnsupportedAdapterError, match="leaves everything before its invocation to the base"):
            merge(trained.plain, [Merged(path)], tmp_path / "m.gguf")


def test_experts_that_are_scaled_merge_from_gguf_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experts = ["experts.down_proj", "experts.gate_up_proj"]
    trained = lora(tmp_path, "gemma-4-moe", target_parameters=experts)
    adapter = convert_adapter(trained.folder, trained.plain, tmp_path / "a.gguf", AdapterOptions("f32")).path
    made = merged(trained.plain, [Merged(adapter)], tmp_path / "m.gguf")
    assert trained.error(trained.plain, merged=made) < TOLERANCE
    monkeypatch.setattr(edits, "factors_of", lambda base, tensor: None)
    made = merged(trained.plain, [Merged(adapter)], tmp_path / "m.gguf")
    assert trained.error(trained.plain, merged=made) > SEEN


def test_two_names_of_one_module_are_refused(tmp_path: Path) -> None:
    trained = lora(tmp_path, target_modules=["q_proj", "down_proj"])
    path = trained.folder / "adapter_model.safetensors"
    arrays = load_file(path)
    again = {name.replace("model.model.", "model.model.language_model."): values for name, values in arrays.items()}
    save_file({**arrays, **again}, path)
    for refused in (lambda: trained.merged_error(), lambda: trained.adapter_error()):
        with pytest.raises(UnsupportedAdapterError, match=r"q_proj\.weight: is \S+q_proj\.weight under another name"):
            refused()
