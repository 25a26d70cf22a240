"""`verify` on the bundled base: a sound adapter passes on every quantization, and each damage is caught by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from converters.base import convert_base
from converters.fingerprint import fingerprint
from edgelora.adapter_contract import ContractTerms, contract_for
from edgelora.adapter_ref import AdapterRef
from edgelora.certificate import decode
from edgelora.contract import Contract
from edgelora.conversion import ConvertOptions, convert
from edgelora.errors import DataFileError, ModelFileError, SettingsError
from edgelora.messages import Conversation, user_message
from edgelora.store import Store
from edgelora.template import BUILTIN
from edgelora.verification.checks import CERTIFIED
from edgelora.verification.report import Report
from edgelora.verification.thresholds import Thresholds
from edgelora.verify import VerifySettings, verify
from tests.conftest import TINY_BASE
from tests.e2e.conftest import roll_tensor
from tests.edgelora.adapter_damage import Damage, filled, permuted_queries, scaled, without, write_damaged
from tests.peft_folders import write_lora

pytestmark = [
    pytest.mark.train,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

QUANTS = ("f32", "q8_0", "q4_k_m", "q2_k")
PROMPTS = [
    (user_message(text),)
    for text in ("Hello! Who are you?", "Where is the mill?", "What does Fennick sell in the autumn?", "Good night.")
]
ONE_THREAD = VerifySettings(threads=1)
# Of a sound F16 adapter, measured: 0.0005. Rounding to F16 moves a value by at most 0.0005 of it.
F16_ERROR = 2e-3


@pytest.fixture(scope="module", params=[0.5, 0.05], ids=["strong", "weak"])
def strength(request: pytest.FixtureRequest) -> float:
    return float(request.param)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {quant: convert_base(TINY_BASE, folder / f"{quant}.gguf", quant=quant).path for quant in QUANTS}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, strength: float) -> Path:
    """A PEFT folder with a contract and a certificate, as training leaves it."""
    from edgelora.train.certificate import RecordSettings, certify

    made = write_lora(tmp_path_factory.mktemp("peft") / "mine", TINY_BASE, seed=3, strength=strength)
    contract = contract_for(made, TINY_BASE, Store(tmp_path_factory.mktemp("store"))).contract
    certify(contract, TINY_BASE, made, PROMPTS, RecordSettings(new_tokens=16)).save(made)
    return made


@pytest.fixture(scope="module")
def sound(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = Store(tmp_path_factory.mktemp("store"))
    out = tmp_path_factory.mktemp("gguf") / "sound.gguf"
    return convert(folder, out, ConvertOptions(base=TINY_BASE), store=store).path


def report_of(adapter: Path, base: Path, settings: VerifySettings = ONE_THREAD, scale: float = 1.0) -> Report:
    return verify(AdapterRef("mine", adapter, scale), base, settings)


def number(report: Report, name: str) -> float:
    (found,) = (check.number for check in report.checks if check.name == name)
    assert found is not None
    return found


@pytest.mark.parametrize("quant", QUANTS)
def test_a_sound_adapter_passes(sound: Path, bases: Mapping[str, Path], quant: str) -> None:
    report = report_of(sound, bases[quant])
    assert report.failed == ()
    assert report.unchecked == ()
    assert {check.name for check in report.checks} >= {"fits", "fingerprint", "golden", "coverage", *CERTIFIED}
    assert number(report, "weights") < F16_ERROR


def test_quantization_is_told_from_the_adapter(sound: Path, bases: Mapping[str, Path]) -> None:
    reports = [report_of(sound, bases[quant]) for quant in QUANTS]
    costs = [number(report, "kl") for report in reports]
    assert costs == sorted(costs)
    assert costs[0] < 1e-4 < costs[1] < 1e-2 < costs[2] < costs[3]
    assert (
        len({round(number(report, "weights"), 12) for report in reports}) == 1
    )  # the base's weights are not looked at


DAMAGES: dict[str, Damage] = {
    "twice the scale": scaled(2.0),
    "half the scale": scaled(0.5),
    "a tenth more": scaled(1.1),
    "permuted queries": permuted_queries,
    "a dropped pair": without("blk.1.ffn_down."),
    "a zero matrix": filled("blk.2.attn_v.weight.lora_b", 0.0),
}


@pytest.mark.parametrize("quant", ["f32", "q2_k"])
@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_weights_are_caught(
    tmp_path: Path, sound: Path, bases: Mapping[str, Path], name: str, quant: str
) -> None:
    report = report_of(write_damaged(sound, tmp_path / "damaged.gguf", DAMAGES[name]), bases[quant])
    assert "weights" in report.failed
    if quant == "f32":  # there, the output alone says it too
        assert "effect" in report.failed


def test_a_copy_without_damage_passes(tmp_path: Path, sound: Path, bases: Mapping[str, Path]) -> None:
    """The twin: it is the damage that fails, not the copying."""
    assert report_of(write_damaged(sound, tmp_path / "copy.gguf"), bases["q2_k"]).passed


@pytest.mark.parametrize("scale", [2.0, 0.5, -1.0])
def test_a_scale_of_the_user_counts(sound: Path, bases: Mapping[str, Path], scale: float) -> None:
    assert "weights" in report_of(sound, bases["q8_0"], scale=scale).failed


def test_the_farthest_weight_is_named(tmp_path: Path, sound: Path, bases: Mapping[str, Path]) -> None:
    damaged = write_damaged(sound, tmp_path / "damaged.gguf", without("blk.1.ffn_down."))
    (check,) = (check for check in report_of(damaged, bases["q8_0"]).checks if check.name == "weights")
    assert check.note == "off: model.layers.1.mlp.down_proj.weight"
    assert check.number == pytest.approx(1.0, abs=1e-3)


def test_a_wrong_template_is_caught(tmp_path: Path, sound: Path, bases: Mapping[str, Path]) -> None:
    wrong = write_damaged(sound, tmp_path / "wrong.gguf", metadata={"tokenizer.chat_template": BUILTIN["llama2"]})
    assert {"template", "tokens"} <= set(report_of(wrong, bases["q8_0"]).failed)


def test_a_broken_template_is_caught(tmp_path: Path, sound: Path, bases: Mapping[str, Path]) -> None:
    wrong = write_damaged(sound, tmp_path / "wrong.gguf", metadata={"tokenizer.chat_template": "{% if"})
    report = report_of(wrong, bases["q8_0"])
    assert report.failed == ("contract",)
    assert {check.name for check in report.unchecked} == {"coverage", *CERTIFIED}


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of the same shapes whose norms differ."""
    made = Path(shutil.copytree(TINY_BASE, tmp_path_factory.mktemp("other") / "model"))
    for layer in range(4):
        roll_tensor(made / "model.safetensors", f"model.layers.{layer}.input_layernorm.weight")
    return convert_base(made, made.parent / "other.gguf", quant="q8_0").path


def test_another_base_is_caught(sound: Path, other: Path) -> None:
    report = report_of(sound, other)
    assert report.failed == ("fingerprint",)
    assert {check.name for check in report.unchecked} == {"coverage", *CERTIFIED}
    forced = report_of(sound, other, replace(ONE_THREAD, force=True))
    assert forced.failed[0] == "fingerprint"
    assert number(forced, "kl") > 0.1


def test_a_certificate_of_another_adapter_is_caught(
    tmp_path: Path, sound: Path, bases: Mapping[str, Path], own_store: Path
) -> None:
    stranger = write_lora(tmp_path / "stranger", TINY_BASE, seed=4, strength=0.5)
    made = convert(stranger, tmp_path / "stranger.gguf", ConvertOptions(base=TINY_BASE)).path
    contract = contract_in(sound)
    wrong = write_damaged(made, tmp_path / "wrong.gguf", metadata={"edgelora.certificate": contract.certificate})
    assert {"weights", "effect"} <= set(report_of(wrong, bases["q8_0"]).failed)


def contract_in(adapter: Path) -> Contract:
    from edgelora.resolution import contract_of

    found = contract_of(adapter)
    assert found is not None
    return found


def test_ids_that_differ_are_caught(tmp_path: Path, sound: Path, bases: Mapping[str, Path]) -> None:
    certificate = decode(contract_in(sound).certificate)
    first = certificate.probes[0]
    changed = replace(first, prompt=(*first.prompt[:2], first.prompt[2] + 1, *first.prompt[3:]))
    text = replace(certificate, probes=(changed, *certificate.probes[1:])).encode()
    wrong = write_damaged(sound, tmp_path / "wrong.gguf", metadata={"edgelora.certificate": text})
    report = report_of(wrong, bases["q8_0"])
    (check,) = (check for check in report.checks if check.name == "tokens")
    assert (check.outcome, check.value) == ("FAIL", "3 of 4 probes equal")
    assert check.note.startswith("probe 1: ids part at 2: here")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (filled("blk.0.attn_q.weight.lora_a", float("nan")), "not finite numbers"),
        (without("blk.0.attn_q.weight.lora_a"), "lora_a is missing"),
    ],
)
def test_what_cannot_be_run_is_caught(
    tmp_path: Path, sound: Path, bases: Mapping[str, Path], damage: Damage, words: str
) -> None:
    report = report_of(write_damaged(sound, tmp_path / "broken.gguf", damage), bases["q8_0"])
    assert report.failed == ("fits",)
    assert words in next(check.note for check in report.checks if check.name == "fits")
    assert "weights" in {check.name for check in report.unchecked}


def test_logits_that_overflow_are_caught(tmp_path: Path, sound: Path, bases: Mapping[str, Path]) -> None:
    def huge(tensors: dict[str, Any]) -> dict[str, Any]:
        return {name: np.full(array.shape, 1e30, np.float32) for name, array in tensors.items()}

    report = report_of(write_damaged(sound, tmp_path / "huge.gguf", huge), bases["f32"])
    assert {"weights", "adapter_kl"} <= set(report.failed)
    assert "not finite" in next(check.note for check in report.checks if check.name == "adapter_kl")


def test_without_a_certificate_the_rest_is_checked(tmp_path: Path, sound: Path, bases: Mapping[str, Path]) -> None:
    bare = write_damaged(sound, tmp_path / "bare.gguf", metadata={"edgelora.certificate": None})
    report = report_of(bare, bases["q8_0"])
    assert report.passed
    assert [check.name for check in report.checks if check.outcome == "ok"] == [
        "fits",
        "fingerprint",
        "golden",
        "coverage",
    ]
    assert {check.name for check in report.unchecked} == set(CERTIFIED)


def test_without_a_contract_the_graph_is_checked(tmp_path: Path, sound: Path, bases: Mapping[str, Path]) -> None:
    keys = dict.fromkeys([*contract_in(sound).to_metadata()])
    bare = write_damaged(sound, tmp_path / "bare.gguf", metadata=keys)
    report = report_of(bare, bases["q8_0"])
    assert report.passed
    assert [check.name for check in report.checks if check.outcome == "ok"] == ["fits", "coverage"]
    assert "carries no contract" in report.notices[0]


def test_tensors_that_the_graph_never_applies_are_caught(tmp_path: Path) -> None:
    """llama.cpp convolves with ssm_conv1d: no product, and so no adapter, though it loads one and says so."""
    from converters.reader import read_header
    from tests.edgelora.conftest import write_adapter
    from tests.equivalence.tiny_models import build

    base = convert_base(build("qwen3.5", tmp_path / "model"), tmp_path / "base.gguf", quant="f32").path
    n_out, n_in = read_header(base).tensors["blk.0.ssm_conv1d.weight"].shape
    pair = {
        "blk.0.ssm_conv1d.weight.lora_a": np.ones((2, n_in), np.float32),
        "blk.0.ssm_conv1d.weight.lora_b": np.ones((n_out, 2), np.float32),
    }
    report = report_of(write_adapter(tmp_path / "unseen.gguf", base, 1, tensors=pair), base)
    assert report.failed == ("coverage",)
    (check,) = (check for check in report.checks if check.name == "coverage")
    assert check.note == f"never computed with: {', '.join(pair)}"
    assert report_of(write_adapter(tmp_path / "seen.gguf", base, 1), base).passed


@pytest.mark.parametrize("text", ["", "AAAA", "no certificate"])
def test_a_damaged_certificate_is_caught(tmp_path: Path, sound: Path, bases: Mapping[str, Path], text: str) -> None:
    broken = write_damaged(sound, tmp_path / "broken.gguf", metadata={"edgelora.certificate": text})
    assert report_of(broken, bases["q8_0"]).failed == (("contract",) if text else ())


def test_a_file_that_is_no_adapter_is_an_error(bases: Mapping[str, Path], sound: Path) -> None:
    with pytest.raises(ModelFileError, match="expected a GGUF adapter"):
        report_of(bases["f32"], bases["f32"])
    with pytest.raises(ModelFileError, match="expected a GGUF base"):
        report_of(sound, sound)


def test_thresholds_decide(sound: Path, bases: Mapping[str, Path]) -> None:
    strict = Thresholds(max_kl=1e-9, max_weight_error=0.0, min_greedy=1.1)
    report = report_of(sound, bases["q8_0"], replace(ONE_THREAD, thresholds=strict))
    assert set(report.failed) == {"weights", "kl", "adapter_greedy"}
    with pytest.raises(SettingsError, match="max_kl is -1"):
        Thresholds(max_kl=-1)


def test_a_report_is_json(sound: Path, bases: Mapping[str, Path]) -> None:
    report = report_of(sound, bases["q8_0"])
    read = json.loads(json.dumps(report.to_dict()))
    assert read["passed"] is True
    assert read["recorded"]["probes"] == len(PROMPTS)
    assert {check["outcome"] for check in read["checks"]} == {"ok", "shown"}


@pytest.mark.parametrize("family", ["gpt2", "phi-3", "gpt-neox", "qwen3-moe", "gemma-3"])
@pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match:RuntimeWarning")  # PEFT's own patterns
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")
def test_families_with_other_rows_pass(tmp_path: Path, family: str) -> None:
    """Transposed weights, fused projections, heads side by side, experts: rows of the file are not transformers'."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    from edgelora.train.certificate import RecordSettings, certify
    from tests.equivalence.tiny_models import build

    base = build(family, tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(0)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter += 0.1 * torch.randn_like(parameter)
    adapted.save_pretrained(tmp_path / "peft", save_embedding_layers=False)
    contract = contract_for(tmp_path / "peft", base, Store(), ContractTerms("plain")).contract
    made = certify(contract, base, tmp_path / "peft", PROMPTS[:2], RecordSettings(new_tokens=8))
    made.save(tmp_path / "peft")
    gguf_base = convert_base(base, tmp_path / "base.gguf", quant="f32").path
    sound = convert(tmp_path / "peft", tmp_path / "sound.gguf", ConvertOptions(base=base)).path
    report = report_of(sound, gguf_base)
    assert report.failed == (), [check for check in report.checks if check.outcome == "FAIL"]
    assert "weights" not in {check.name for check in report.unchecked}
    assert "weights" in report_of(sound, gguf_base, scale=0.5).failed


METHODS: dict[str, Callable[[Any], Any]] = {
    "lora": lambda peft: peft.LoraConfig(r=4, lora_alpha=7, target_modules=["q_proj", "down_proj"]),
    "rslora": lambda peft: peft.LoraConfig(r=4, lora_alpha=7, use_rslora=True, target_modules=["v_proj"]),
    "dora": lambda peft: peft.LoraConfig(r=4, lora_alpha=7, use_dora=True, target_modules=["q_proj", "up_proj"]),
    "pissa": lambda peft: peft.LoraConfig(r=4, lora_alpha=4, init_lora_weights="pissa", target_modules=["o_proj"]),
    "loha": lambda peft: peft.LoHaConfig(r=4, alpha=7, target_modules=["k_proj"]),
    "ia3": lambda peft: peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
}


@pytest.mark.parametrize("method", METHODS)
def test_samples_are_those_of_the_merged_weights(tmp_path: Path, method: str) -> None:
    """Recorded module by module from the saved folder; compared with merged weights less the base's."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    from edgelora.change_samples import inputs_of, sample
    from edgelora.train.base import BaseFolder
    from edgelora.train.certificate import RecordSettings, record

    def load() -> Any:
        return AutoModelForCausalLM.from_pretrained(TINY_BASE, dtype=torch.float32)

    torch.manual_seed(0)
    model = peft.get_peft_model(load(), METHODS[method](peft))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter) if "magnitude" not in name else 0.01
    model.save_pretrained(tmp_path / "peft", save_embedding_layers=False)
    contract = contract_for_tests()
    base = BaseFolder(TINY_BASE, str(TINY_BASE))
    made = record(base, tmp_path / "peft", PROMPTS[:1], contract, RecordSettings(new_tokens=2))
    merged, plain = model.merge_and_unload().state_dict(), load().state_dict()
    assert made.changes
    assert made.n_unsampled == 0
    for change in made.changes:
        difference = (merged[change.tensor].double() - plain[change.tensor].double()).numpy()
        wanted = sample(change.tensor, inputs_of(change.tensor, change.shape[1]) @ difference.T)
        # float32 products of vectors with 256 values: rounding of the base's outputs, 1e-6 of numbers about 100
        assert change.values == pytest.approx(wanted, abs=1e-3 * float(np.abs(wanted).max()))


def contract_for_tests() -> Contract:
    template = (TINY_BASE / "chat_template.jinja").read_text()
    return Contract(base_fingerprint=fingerprint(TINY_BASE), chat_template=template)


def test_a_trained_model_in_memory_gives_the_same(folder: Path) -> None:
    import peft
    import torch
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    from edgelora.train.certificate import RecordSettings, record_trained

    base = AutoModelForCausalLM.from_pretrained(TINY_BASE, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(TINY_BASE)
    contract = Contract.load(folder)
    assert contract is not None
    wanted = decode(contract.certificate)
    found = record_trained(model, tokenizer, PROMPTS, contract, RecordSettings(new_tokens=16))
    assert found is not None
    for one, other in zip(found.probes, wanted.probes, strict=True):
        assert (one.tokens, one.base_continuation) == (other.tokens, other.base_continuation)
        assert (one.adapter.ids[:, 0] == other.adapter.ids[:, 0]).all()
    for change, recorded in zip(found.changes, wanted.changes, strict=True):
        assert change.values == pytest.approx(recorded.values, rel=1e-3, abs=1e-3)


def test_prompts(tmp_path: Path) -> None:
    from edgelora.train.probes import before_the_reply, read_prompts

    rows = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "c"}]},
        {"prompt": "d"},
        {"prompt": "e", "completion": "f"},
    ]
    path = tmp_path / "probes.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [prompt[-1]["content"] for prompt in read_prompts(path)] == ["a", "c", "d", "e"]
    path.write_text('{"colour": "red"}\n\n{"messages": []}\n')
    with pytest.raises(DataFileError, match=r":1: .*\n.*:3: "):
        read_prompts(path)
    turns = tuple({"role": role, "content": role} for role in ("user", "assistant", "user", "assistant"))
    assert before_the_reply(Conversation(turns, "x")) == turns[:3]  # type: ignore[arg-type]


def test_prompts_that_cannot_be_served_alike_are_no_probes() -> None:
    from transformers import PreTrainedTokenizerFast

    from edgelora.template import ChatTemplate
    from edgelora.train.probes import choose_probes

    tokenizer = PreTrainedTokenizerFast.from_pretrained(TINY_BASE)
    template = ChatTemplate(contract_for_tests().chat_template)
    special = next(token for token in tokenizer.get_added_vocab() if token.strip())
    prompts = [(user_message("one"),), (user_message(f"{special} two"),), (user_message("three " * 99),)]
    assert [chosen.messages for chosen in choose_probes(prompts * 2, tokenizer, template, 8, 90)] == [prompts[0]]
    with pytest.raises(DataFileError, match="none of 2 prompts"):
        choose_probes(prompts[1:], tokenizer, template, 8, 90)
