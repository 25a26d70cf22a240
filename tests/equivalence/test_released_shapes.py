"""Released models' settings against llama.cpp's converter; their shapes, made narrow, against transformers' logits.

What the tables refuse is shown to be right: with the check off, llama.cpp does not load it, or computes otherwise.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from converters.architectures import FAMILIES, MODEL_TYPES
from converters.architectures.settings import complete, full_rope
from converters.base import BaseReport, convert_base
from converters.checkpoint import read_json
from tests.converters.released_models import RELEASED, every
from tests.converters.test_released_models import metadata, read
from tests.equivalence import llamacpp, reference, tiny_models
from tests.equivalence.test_checkpoint_variants import rewritten
from tests.equivalence.test_families import assert_equal
from tests.equivalence.tiny_models import GELU_TOLERANCE, LLAMA3, TINY, some_ids

pytestmark = pytest.mark.train
torch = pytest.importorskip("torch")
WORKER = Path(__file__).parent / "hyperparameter_worker.py"
SECONDS = 300
# The reference takes True for files older than transformers' own class, whose layers follow each other. None reads it.
OTHERWISE = {("stabilityai/stablelm-3b-4e1t (first)", "stablelm.use_parallel_residual")}
# YaRN's frequencies: powers in float32 on one side, exponentials of logarithms on the other.
TOLERANCE = 1e-3
SEEN = 10 * GELU_TOLERANCE  # what a refused setting changes at least: ten times what the GELU's table does


# -- settings -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Any]:
    """What llama.cpp's converter makes of each config.json: metadata and computed tensors."""
    from safetensors.numpy import save_file

    root, folders = tmp_path_factory.mktemp("released"), {}
    for number, (name, facts) in enumerate(RELEASED.items()):
        folders[str(number)] = name
        (root / str(number)).mkdir()
        (root / str(number) / "config.json").write_text(json.dumps(facts))
        save_file({"nothing": np.zeros(1, np.float32)}, root / str(number) / "model.safetensors")
    job = {"root": str(reference.reference_root()), "folders": [str(root / number) for number in folders]}
    done = subprocess.run(
        [sys.executable, str(WORKER), json.dumps(job), str(root / "answer.json")],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert (root / "answer.json").is_file(), done.stderr[-2000:]
    return {folders[number]: answer for number, answer in read_json(root / "answer.json").items()}


@pytest.mark.parametrize("name", RELEASED)
def test_the_metadata_of_llama_cpps_converter(name: str, answers: Mapping[str, Any]) -> None:
    family, config, _ = read(RELEASED[name])
    theirs = answers[name]
    assert "failed" not in theirs, theirs
    own = ("general.", "tokenizer.")
    values = {key: value for key, value in theirs["metadata"].items() if not key.startswith(own)}
    ours = metadata(family, config)
    assert {key for key in ours.keys() | values if ours.get(key) != values.get(key)} == {
        key for model, key in OTHERWISE if model == name
    }
    computed = {key: value.astype(float).tolist() for key, value in family.computed(config).items()}
    assert computed == theirs["tensors"]


SMALL = {
    "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4, "vocab_size": 300,
}  # fmt: skip
# What no class of transformers has as it is called here: it is in `rope_parameters`, or ours alone.
OURS = ("rope_theta", "rope_local_base_freq", "partial_rotary_factor", "rope_parameters", "has_intermediate_size")
ROPE_KEYS = ("rope_type", "rope_theta", "partial_rotary_factor", "factor", "beta_fast", "beta_slow", "truncate")
# transformers does not read it where there is no window
ASIDE = {("Qwen2MoeForCausalLM", "sliding_window")}


def attribute(config: Any, name: str, default: Any = None) -> Any:
    """Of a configuration; Gemma 4 has some for each layer only."""
    try:
        return getattr(config, name, default)
    except Exception:
        return default


@pytest.mark.parametrize("name", [name for name in FAMILIES if not name.endswith("ForConditionalGeneration")])
def test_what_a_file_leaves_out_is_what_transformers_fills_in(name: str) -> None:
    """Every setting that is filled in here, and the rotary embedding."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    theirs, family = CONFIG_MAPPING[MODEL_TYPES[name]](**SMALL), FAMILIES[name]
    ours = complete({"architectures": [name], **SMALL}, family)
    keys = {"num_key_value_heads", "sliding_window", *family.defaults, *family.derived(ours)} & ours.keys() - {*OURS}
    for key in keys:
        names = [key, *(other for other, ours_is in family.aliases.items() if ours_is == key)]
        found = [value for value in (attribute(theirs, each) for each in names) if value is not None]
        assert not found or ours[key] == found[0] or (name, key) in ASIDE, key
    rope = attribute(theirs, "rope_parameters") or {}
    rope, mine = rope.get("full_attention", rope), full_rope(ours)
    assert {key: mine.get(key) for key in rope if key in ROPE_KEYS} == {
        key: value for key, value in rope.items() if key in ROPE_KEYS
    }


# -- logits ---------------------------------------------------------------------------------------------------------


def load(path: Path, ids: list[int], context: int = 512) -> npt.NDArray[np.float32] | None:
    """llama.cpp's logits; None where it does not load the file. In a process of its own, which llama.cpp may end."""
    code = (
        "import sys, json, numpy; from pathlib import Path; from tests.equivalence import llamacpp; "
        "numpy.save(sys.argv[2], llamacpp.logits(Path(sys.argv[1]), json.loads(sys.argv[3]), context=int(sys.argv[4])))"
    )
    out = path.with_suffix(".npy")
    done = subprocess.run(
        [sys.executable, "-c", code, str(path), str(out), json.dumps(ids), str(context)],
        capture_output=True,
        timeout=SECONDS,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    return np.load(out) if done.returncode == 0 else None


def hf(folder: Path, ids: list[int]) -> npt.NDArray[np.float32]:
    from tests.equivalence.hf_logits import hf_logits

    logits = hf_logits(folder, ids)
    assert logits.std() > 0.05, "logits that are all alike would prove nothing"
    return logits


def differences(folder: Path, out: Path, *, of: Path | None = None) -> npt.NDArray[np.float32] | None:
    """The largest difference of a logit at each position; None where llama.cpp does not load the file.

    Args:
        of: whose logits transformers computes, where it is not `folder`.
    """
    ids = some_ids(folder)
    report = convert_base(folder, out, quant="f32", force=True)
    ours = load(report.path, ids)
    return None if ours is None else np.abs(ours - hf(of or folder, ids)).max(axis=1)


def yarn(factor: float, **more: Any) -> dict[str, Any]:
    return {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": factor,
        "original_max_position_embeddings": 64,
        **more,
    }


LINEAR_8 = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
}
OLMO_3_ROPE = {
    "full_attention": yarn(8.0, attention_factor=1.2079441541679836, beta_fast=32.0, beta_slow=1.0),
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
}
E2B = {"num_hidden_layers": 10, "num_kv_shared_layers": 5, "layer_types": every(5, 10), "use_double_wide_mlp": True}

# A row of `TINY`, and the settings of a released model that change what llama.cpp computes.
SHAPES: Mapping[str, tuple[str, dict[str, Any]]] = {
    "gemma-2-27b": ("gemma-2", {"num_hidden_layers": 46, "query_pre_attn_scalar": 16}),
    "gemma-3-4b": ("gemma-3", {"rope_parameters": LINEAR_8}),
    "gemma-3-27b": ("gemma-3", {"num_hidden_layers": 62, "query_pre_attn_scalar": 16, "rope_parameters": LINEAR_8}),
    "gemma-4-E2B": ("gemma-4", E2B),
    "gemma-4-31B": ("gemma-4-dense", {"use_bidirectional_attention": "vision", "layer_types": every(6, 6),
                                      "num_hidden_layers": 6}),
    "exaone-4-32b": ("exaone-4", {"rope_parameters": LLAMA3, "sliding_window_pattern": "LLLG",
                                  "layer_types": every(4, 64)}),
    "olmo-3-7b": ("olmo3", {"rope_parameters": OLMO_3_ROPE}),
    "olmo-2-32b": ("olmo2", {"num_hidden_layers": 64}),
    "qwen2.5-yarn": ("qwen2", {"rope_parameters": yarn(4.0)}),
    "qwen3-yarn": ("qwen3", {"rope_parameters": yarn(4.0)}),
    "llama-yarn": ("llama", {"rope_parameters": yarn(4.0)}),
    "glm-4-32b": ("glm-4", {"attention_bias": False}),
    "falcon-11b": ("falcon-40b", {"num_ln_in_parallel_attn": 1}),
    "command-r-40": ("command-r", {"num_hidden_layers": 40}),
    "granite-llama3": ("granite", {"rope_parameters": LLAMA3}),
    "stablelm-1.6b": ("stablelm", {"num_hidden_layers": 24, "num_key_value_heads": 4}),
    "phi-2": ("phi-2", {"hidden_size": 80, "intermediate_size": 320, "rope_parameters": {
        "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.4}}),
    "falcon-7b": ("falcon", {"hidden_size": 80, "num_attention_heads": 5, "ffn_hidden_size": 320}),
    "mixtral-8x22b": ("mixtral", {"num_local_experts": 8, "num_hidden_layers": 56}),
    "smollm3-yarn": ("smollm3", {"rope_parameters": yarn(2.0)}),
}  # fmt: skip
ROPE = "rope_parameters"
LONG = ("gemma-2-27b", "gemma-3-27b", "exaone-4-32b", "olmo-2-32b", "command-r-40", "mixtral-8x22b", "stablelm-1.6b")


def shaped(tiny: str, settings: dict[str, Any], folder: Path) -> Path:
    """A narrow model. Where Gemma has very many layers, a calm one.

    Over 62 layers the few values that the GELU's table rounds otherwise grow to 0.7 in the logits, and sharp attention
    makes 2e-2 of what float32 rounds: so the norm after the MLP gives nothing, and those of q and k are near 1.
    """

    def calm(tensors: dict[str, Any]) -> dict[str, Any]:
        factors = {"post_feedforward_layernorm": 0.0, "q_norm": 0.1, "k_norm": 0.1}  # norms to which one is added
        changed = {}
        for name, value in tensors.items():
            kind = name.split(".")[-2]
            changed[name] = value * factors[kind] - float("feedforward" in kind) if kind in factors else value
        return changed

    tiny_models.build(tiny, folder, **settings)
    is_deep = tiny in ("gemma-2", "gemma-3") and settings.get("num_hidden_layers", 0) > 6
    return rewritten(folder, calm) if is_deep else folder


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in LONG else ()) for name in SHAPES]
)
def test_a_released_shape_gives_the_logits_of_transformers(name: str, tmp_path: Path) -> None:
    tiny, settings = SHAPES[name]
    folder = shaped(tiny, settings, tmp_path / "model")
    found = differences(folder, tmp_path / "base.gguf")
    assert found is not None
    assert found.max() < max(TINY[tiny].tolerance, TOLERANCE)


@pytest.mark.parametrize("name", [name for name in SHAPES if name not in LONG and [*SHAPES[name][1]] == [ROPE]])
def test_its_rotary_embedding_is_seen(name: str, tmp_path: Path) -> None:
    """The same weights without the settings give other logits."""
    tiny, settings = SHAPES[name]
    folder = tiny_models.build(tiny, tmp_path / "model", **settings)
    plain = tiny_models.build(tiny, tmp_path / "plain")
    found = differences(plain, tmp_path / "base.gguf", of=folder)
    assert found is not None
    assert found.max() > 10 * TINY[tiny].tolerance


def test_keys_and_values_that_nothing_reads(tmp_path: Path) -> None:
    """Gemma 4 E2B's checkpoint has them; transformers does not load them, llama.cpp's converter writes them."""

    def add(tensors: dict[str, Any]) -> dict[str, Any]:
        own = {
            key.replace(f"layers.{like}.", f"layers.{layer}."): torch.randn_like(value)
            for layer, like in ((5, 3), (6, 3), (7, 3), (8, 3), (9, 4))
            for key, value in tensors.items()
            if f"layers.{like}.self_attn.k" in key or f"layers.{like}.self_attn.v" in key
        }
        assert len(own) == 15
        return {**tensors, **own}

    plain = tiny_models.build("gemma-4", tmp_path / "plain", **E2B)
    folder = rewritten(tiny_models.build("gemma-4", tmp_path / "model", **E2B), add)
    one, two = (convert_base(each, tmp_path / f"{each.name}.gguf", quant="f32") for each in (plain, folder))
    assert two.n_tensors == one.n_tensors + 15
    assert_equal(two.path, reference.convert({"theirs": folder}, tmp_path)["theirs"])
    ids = some_ids(folder, 40)
    np.testing.assert_array_equal(llamacpp.logits(one.path, ids), llamacpp.logits(two.path, ids))


@pytest.mark.parametrize("name", ["gemma-3", "gemma-4"])
def test_an_output_that_is_not_the_embeddings(name: str, tmp_path: Path) -> None:
    """Gemma 1 and 2 always tie in llama.cpp, the later ones need not; and it is used."""
    folder = tiny_models.build(name, tmp_path / "model", tie_word_embeddings=False)
    found = differences(folder, tmp_path / "base.gguf")
    assert found is not None
    assert found.max() < TINY[name].tolerance
    theirs = reference.convert({"theirs": folder}, tmp_path)["theirs"]
    assert assert_equal(tmp_path / "base.gguf", theirs) > 20
    tied = tiny_models.build(name, tmp_path / "tied")
    found = differences(tied, tmp_path / "tied.gguf", of=folder)
    assert found is not None
    assert found.max() > 10 * TINY[name].tolerance


@pytest.mark.parametrize("name", ["mistral", "phi-3", "starcoder2"])
def test_a_window_that_llama_cpp_does_not_apply(name: str, tmp_path: Path) -> None:
    """As the notice says: equal up to the window, and not beyond."""
    folder = tiny_models.build(name, tmp_path / "model", sliding_window=100)
    found = differences(folder, tmp_path / "base.gguf")
    assert found is not None
    assert found[:100].max() < TINY[name].tolerance
    assert found[100:].max() > 10 * TINY[name].tolerance
    assert any("sliding_window 100" in notice for notice in notices(folder, tmp_path))


def notices(folder: Path, tmp_path: Path) -> tuple[str, ...]:
    report: BaseReport = convert_base(folder, tmp_path / "again.gguf", quant="f32", force=True)
    return tuple(report.notices)


# -- what is refused ------------------------------------------------------------------------------------------------

FULL = "full_attention"
# Row of `TINY`, settings with which llama.cpp computes otherwise.
COMPUTED_OTHERWISE: Mapping[str, tuple[str, dict[str, Any]]] = {
    "gemma-2-27b-scale": ("gemma-2", {"num_hidden_layers": 46, "query_pre_attn_scalar": 32}),
    "gemma-2-scale": ("gemma-2", {"query_pre_attn_scalar": 16}),
    "gemma-2-layers": ("gemma-2", {"layer_types": [FULL] * 3}),
    "gemma-3-27b-scale": ("gemma-3", {"num_hidden_layers": 62, "query_pre_attn_scalar": 32}),
    "gemma-3-scale": ("gemma-3", {"query_pre_attn_scalar": 16}),
    "gemma-3-layers": ("gemma-3", {"layer_types": every(2, 6)}),
    "exaone-4-windows": ("exaone-4", {"num_hidden_layers": 8, "layer_types": every(4, 8), "sliding_window": 64}),
    "exaone-4-no-windows": ("exaone-4", {"sliding_window": None, "layer_types": [FULL] * 64}),
    "command-r7b-layers": ("command-r7b", {"layer_types": every(2, 4)}),
    "gpt-oss-layers": ("gpt-oss", {"layer_types": [FULL] * 4}),
    "smollm3-layers": ("smollm3", {"no_rope_layers": [1, 1, 1, 1]}),
    "qwen2-moe-normalized": ("qwen2-moe", {"norm_topk_prob": True}),
    "qwen3-moe-as-they-are": ("qwen3-moe", {"norm_topk_prob": False}),
    "yarn-attention": ("llama", {"rope_parameters": yarn(4.0, attention_factor=2.0)}),
    "yarn-mscale": ("llama", {"rope_parameters": yarn(16.0, mscale=1.0, mscale_all_dim=1.0)}),
    "yarn-betas": ("llama", {"rope_parameters": yarn(4.0, beta_fast=4.0, beta_slow=0.05)}),
    "ministral-mscale": ("ministral-3", {"rope_parameters": {
        **TINY["ministral-3"].settings["rope_parameters"], "mscale": 4.0}}),
    "phi-3.5-attention": ("phi-3.5", {"rope_parameters": {
        **TINY["phi-3.5"].settings["rope_parameters"], "attention_factor": 3.0}}),
    "olmo-3-thetas": ("olmo3", {"rope_parameters": {
        FULL: {"rope_type": "default", "rope_theta": 10000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0}}}),
}  # fmt: skip
# Those whose file llama.cpp does not load, or at which it ends the process
NOT_LOADED: Mapping[str, tuple[str, dict[str, Any]]] = {
    "gemma-4-sharing": ("gemma-4", {"num_hidden_layers": 6, "num_kv_shared_layers": 2, "layer_types": [
        FULL, "sliding_attention", "sliding_attention", "sliding_attention", "sliding_attention", FULL]}),
    "olmo-2-tied": ("olmo2", {"tie_word_embeddings": True}),
    "olmoe-tied": ("olmoe", {"tie_word_embeddings": True}),
    "stablelm-tied": ("stablelm", {"tie_word_embeddings": True}),
    "gpt-neox-tied": ("gpt-neox", {"tie_word_embeddings": True}),
    "qwen2-moe-tied": ("qwen2-moe", {"tie_word_embeddings": True}),
    "gpt-oss-tied": ("gpt-oss", {"tie_word_embeddings": True}),
    "qwen2-heads": ("qwen2", {"head_dim": 32}),
    "qwen2-moe-heads": ("qwen2-moe", {"head_dim": 32}),
    "olmo-2-heads": ("olmo2", {"head_dim": 32}),
    "starcoder2-heads": ("starcoder2", {"head_dim": 32}),
    "command-r-heads": ("command-r", {"head_dim": 32}),
    "command-r7b-heads": ("command-r7b", {"head_dim": 32}),
    "phi-3-heads": ("phi-3", {"head_dim": 32}),
    "exaone-4-heads": ("exaone-4-1.2b", {"head_dim": 32}),
    "starcoder2-without-biases": ("starcoder2", {"use_bias": False}),
    "smollm3-attention-biases": ("smollm3", {"attention_bias": True}),
    "smollm3-mlp-biases": ("smollm3", {"mlp_bias": True}),
    "command-r-norms": ("command-r", {"use_qk_norm": True}),
    "command-r-plus-without-norms": ("command-r", {"num_hidden_layers": 64}),
}  # fmt: skip


def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("converters.model.problems_of", lambda config, given, family: [])


def is_refused(folder: Path) -> bool:
    return bool(read(read_json(folder / "config.json"))[2])


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPUTED_OTHERWISE)
def test_what_is_refused_is_computed_otherwise(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny, settings = COMPUTED_OTHERWISE[name]
    folder = shaped(tiny, settings, tmp_path / "model")
    assert is_refused(folder)
    unchecked(monkeypatch)
    found = differences(folder, tmp_path / "base.gguf")
    assert found is not None
    assert found.max() > 10 * TINY[tiny].tolerance


@pytest.mark.slow
@pytest.mark.parametrize("name", NOT_LOADED)
def test_what_is_refused_is_not_loaded(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny, settings = NOT_LOADED[name]
    folder = tiny_models.build(tiny, tmp_path / "model", **settings)
    assert is_refused(folder)
    unchecked(monkeypatch)
    assert differences(folder, tmp_path / "base.gguf") is None


@pytest.mark.slow
@pytest.mark.parametrize("key", ["attn_logit_softcapping", "final_logit_softcapping"])
def test_gemma_2_caps_logits_whatever_the_file_says(key: str, tmp_path: Path) -> None:
    capped = tiny_models.build("gemma-2", tmp_path / "capped", **{key: 5.0})
    free = tiny_models.build("gemma-2", tmp_path / "free", **{key: None})
    assert is_refused(free)
    found = differences(capped, tmp_path / "base.gguf", of=free)
    assert found is not None
    assert found.max() > SEEN
