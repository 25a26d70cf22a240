"""What `show` says: compared with what the files were made from, by other readers of theirs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from converters.base import convert_base
from converters.errors import ConversionError
from converters.options import QuantizeOptions
from edgelora.adapter_description import AdapterDescription
from edgelora.base_description import BaseDescription
from edgelora.contract import Contract
from edgelora.description import TemplateSummary, describe, to_dict
from edgelora.errors import ModelFileError
from edgelora.peft_description import PeftDescription
from edgelora.registration import add, find
from edgelora.store import Store
from edgelora.template import BUILTIN
from tests.conftest import TINY_BASE
from tests.edgelora.conftest import LINEARS, MakeAdapter
from tests.edgelora.test_certificate import made
from tests.peft_folders import write_lora

EXACTNESS = {
    "kind": "approximate",
    "method": "LOHA",
    "rounding": 4e-4,
    "scales": {"attn_q": [2.0], "ffn_down": [0.5, 4.0]},
    "max_error": 0.008,
    "residual_energy": {f"blk.{n}.attn_q.weight": n / 1000 for n in range(4)},
}


def described(path: Path, store: Store | None = None) -> Any:
    return describe(path, store or Store())


def config() -> dict[str, Any]:
    values: dict[str, Any] = json.loads((TINY_BASE / "config.json").read_text())
    return values


@pytest.fixture
def contract(base: Path) -> Contract:
    return Contract(
        base_name="Fennick",
        base_fingerprint=Store().fingerprint(base),
        chat_template=BUILTIN["chatml"],
        golden_tokens=(1, 2, 3),
        stop=("<|im_end|>", "\n"),
        sampling={"temperature": 0.0},
        system="Be kind.",
        training={"rows": 700},
        exactness=EXACTNESS,
    )


def test_a_gguf_base_is_what_its_folder_says(bases: dict[str, Path]) -> None:
    said, wanted = described(bases["q8_0"]), config()
    tensors = gguf.GGUFReader(bases["q8_0"]).tensors
    assert isinstance(said, BaseDescription)
    assert (said.architecture, said.quantization, said.is_tied) == ("llama", "q8_0", wanted["tie_word_embeddings"])
    assert said.vocabulary_size == wanted["vocab_size"]
    assert said.sizes == {
        "context_length": wanted["max_position_embeddings"],
        "layers": wanted["num_hidden_layers"],
        "embedding_length": wanted["hidden_size"],
        "feed_forward_length": wanted["intermediate_size"],
        "heads": wanted["num_attention_heads"],
        "heads_kv": wanted["num_key_value_heads"],
    }
    assert said.parameters == sum(int(tensor.n_elements) for tensor in tensors)
    assert sum(said.tensor_types.values()) == len(tensors)
    assert said.size_bytes == bases["q8_0"].stat().st_size
    assert said.template is not None
    assert said.template.n_characters == len((TINY_BASE / "chat_template.jinja").read_text())
    assert said.fingerprint == Store().fingerprint(TINY_BASE)


def test_a_folder_and_its_gguf_agree(bases: dict[str, Path]) -> None:
    folder, file = described(TINY_BASE), described(bases["f32"])
    same = ("architecture", "sizes", "vocabulary_size", "is_tied", "template", "fingerprint", "parameters", "tokenizer")
    assert {name: getattr(folder, name) for name in same} == {name: getattr(file, name) for name in same}
    assert folder.tensor_types == {"BF16": sum(file.tensor_types.values())}
    assert folder.use == f"edgelora convert {TINY_BASE}"


def test_parts_are_one_base(tmp_path: Path, bases: dict[str, Path]) -> None:
    convert_base(TINY_BASE, tmp_path / "tiny.gguf", options=QuantizeOptions("q8_0", split_max_tensors=20))
    first, second = (described(path) for path in sorted(tmp_path.glob("*.gguf")))
    assert first == second
    whole = described(bases["q8_0"])
    assert first.n_files == 2
    assert (first.parameters, first.tensor_types) == (whole.parameters, whole.tensor_types)


def test_a_family_that_is_not_known_is_described_as_far_as_it_goes(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(TINY_BASE, tmp_path / "model"))
    (folder / "config.json").write_text(json.dumps({**config(), "architectures": ["MambaForCausalLM"]}))
    said = described(folder)
    assert "MambaForCausalLM" in said.problem
    assert (said.architecture, said.fingerprint, said.use) == ("MambaForCausalLM", "", "")
    assert said.parameters == described(TINY_BASE).parameters


def test_adapters_that_are_merged_in_are_named(tmp_path: Path, base: Path) -> None:
    from converters.writer import Value

    merged: dict[str, Value] = {"edgelora.merged": ["support", "extract"]}
    out = convert_base(TINY_BASE, tmp_path / "merged.gguf", quant="q8_0", metadata=merged).path
    assert described(out).merged == ("support", "extract")
    assert described(base).merged == ()


def test_an_adapter_and_its_base_name_each_other(base: Path, make_adapter: MakeAdapter, contract: Contract) -> None:
    store, adapter = Store(), make_adapter("support", contract=contract)
    assert described(adapter).bases == ()
    assert described(adapter).use.endswith("--base BASE.gguf")
    add(store, [base, adapter, TINY_BASE])
    assert [fit.path for fit in described(adapter).bases] == [base, TINY_BASE]  # what can be run first
    assert described(adapter).use == f"edgelora chat --adapter {adapter}"
    assert [fit.name for fit in described(base).adapters] == ["support"]
    stranger = make_adapter("stranger", contract=contract.with_changes(base_fingerprint="f" * 64))
    add(store, [stranger])
    assert described(stranger).bases == ()
    assert [fit.name for fit in described(base).adapters] == ["support"]


def test_an_adapter_says_what_its_contract_does(make_adapter: MakeAdapter, contract: Contract) -> None:
    said = described(make_adapter(contract=contract))
    assert isinstance(said, AdapterDescription)
    assert (said.base_name, said.base_fingerprint, said.method) == ("Fennick", contract.base_fingerprint, "LOHA")
    assert said.template is not None
    assert said.template.name == "chatml"
    assert (said.stop, said.system, said.golden_tokens) == (contract.stop, "Be kind.", 3)
    assert (said.sampling, said.training) == ({"temperature": 0.0}, {"rows": 700})
    assert said.exactness is not None
    assert (said.exactness.kind, said.exactness.rounding, said.exactness.max_error) == ("approximate", 4e-4, 0.008)
    assert said.exactness.worst == {f"blk.{n}.attn_q.weight": n / 1000 for n in (3, 2, 1)}
    assert said.certificate is None


def test_ranks_come_from_shapes_and_scales_from_the_contract(make_adapter: MakeAdapter, contract: Contract) -> None:
    said = described(make_adapter(rank=4, contract=contract))
    groups = {group.name: group for group in said.groups}
    assert set(groups) == set(LINEARS)
    assert {group.n_modules for group in said.groups} == {config()["num_hidden_layers"]}
    assert {group.ranks for group in said.groups} == {(4,)}
    assert (groups["attn_q"].scales, groups["ffn_down"].scales, groups["attn_k"].scales) == ((2.0,), (0.5, 4.0), (1.0,))
    assert said.scales_from == "contract"


def test_without_a_contract_scales_follow_llama_cpps_rule(make_adapter: MakeAdapter) -> None:
    said = described(make_adapter(rank=4, metadata={"adapter.lora.alpha": 8.0}))
    assert ({group.scales for group in said.groups}, said.scales_from) == ({(2.0,)}, "alpha / rank")
    assert not said.has_contract
    said = described(make_adapter(rank=4))
    assert ({group.scales for group in said.groups}, said.scales_from) == ({(1.0,)}, "folded into B")


def test_a_rank_of_its_own_and_an_embedding(make_adapter: MakeAdapter) -> None:
    """An embedding's A is stored transposed: its rank is the last dimension of both."""
    vocabulary, width = config()["vocab_size"], config()["hidden_size"]
    tensors = {
        "token_embd.weight.lora_a": np.ones((vocabulary, 6), np.float32),
        "token_embd.weight.lora_b": np.ones((width, 6), np.float32),
        "blk.1.attn_q.weight.lora_a": np.ones((2, width), np.float32),
        "blk.1.attn_q.weight.lora_b": np.ones((width, 2), np.float32),
    }
    groups = {group.name: group for group in described(make_adapter(rank=4, tensors=tensors)).groups}
    assert (groups["token_embd"].ranks, groups["token_embd"].n_modules) == ((6,), 1)
    assert groups["attn_q"].ranks == (2, 4)


@pytest.mark.parametrize(
    "report",
    [
        {"scales": "2", "rounding": "x", "residual_energy": [1], "kind": 3, "method": 7},
        {"scales": {"attn_q": ["x", None], "attn_k": {}}, "residual_energy": {"a": "b"}, "max_error": True},
        {"anything": {"else": []}},
    ],
)
def test_nonsense_in_a_report_says_nothing(make_adapter: MakeAdapter, contract: Contract, report: Any) -> None:
    said = described(make_adapter(contract=contract.with_changes(exactness=report)))
    assert {group.scales for group in said.groups} == {(1.0,)}
    assert said.exactness.worst == {}
    assert json.loads(json.dumps(to_dict(said)))


def test_invocation_tokens(make_adapter: MakeAdapter, contract: Contract) -> None:
    said = described(make_adapter(contract=contract, metadata={"adapter.alora.invocation_tokens": [5, 6, 7]}))
    assert said.invocation_tokens == (5, 6, 7)


def test_a_certificate_is_counted_and_a_damaged_one_named(make_adapter: MakeAdapter, contract: Contract) -> None:
    certified = contract.with_changes(certificate=made(n_probes=3).encode())
    said = described(make_adapter(contract=certified)).certificate
    assert (said.n_probes, said.size_bytes, said.problem) == (3, len(certified.certificate), "")
    damaged = described(make_adapter(contract=contract.with_changes(certificate="QUJD" * 100))).certificate
    assert (damaged.n_probes, "certificate is damaged" in damaged.problem) == (0, True)


def test_a_peft_folder(tmp_path: Path) -> None:
    folder = write_lora(
        tmp_path / "support", TINY_BASE, seed=1, rank=4, lora_alpha=16, use_rslora=True, rank_pattern={"q_proj": 4}
    )
    said = described(folder)
    assert isinstance(said, PeftDescription)
    assert (said.method, said.rank, said.alpha, said.rank_pattern) == ("LORA", 4, 16, {"q_proj": 4})
    assert said.settings == {"use_rslora": True}
    assert [fit.path for fit in said.bases] == [TINY_BASE]
    assert (said.convert, said.has_contract) == (f"edgelora convert {folder}", False)
    assert said.size_bytes == (folder / "adapter_model.safetensors").stat().st_size
    assert said.n_tensors == said.dtypes["F32"] == 2 * 7 * config()["num_hidden_layers"]


def test_every_setting_of_a_peft_folder_is_told(tmp_path: Path) -> None:
    keys = {"peft_type": "LOHA", "module_dropout": 0.1, "something_new": {"a": 1}, "base_model_name_or_path": "no/such"}
    folder = write_lora(tmp_path / "loha", TINY_BASE, seed=1, **keys)
    said = described(folder)
    assert (said.method, said.settings) == ("LOHA", {"module_dropout": 0.1, "something_new": {"a": 1}})
    assert (said.bases, said.base_name, said.convert) == ((), "no/such", f"edgelora convert {folder} --base BASE")


def test_a_peft_folder_with_a_contract_finds_the_gguf(tmp_path: Path, base: Path, contract: Contract) -> None:
    folder = write_lora(tmp_path / "support", TINY_BASE, seed=1, base_model_name_or_path="gone")
    contract.save(folder)
    add(Store(), [base])
    said = described(folder)
    assert ([fit.path for fit in said.bases], said.has_contract, said.stop) == ([base], True, contract.stop)
    assert said.use == f"edgelora chat --adapter {folder}"


def test_pickled_weights_are_not_opened(tmp_path: Path) -> None:
    folder = write_lora(tmp_path / "support", TINY_BASE, seed=1)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    said = described(folder)
    assert "pickle" in said.problem
    assert (said.parameters, said.rank) == (None, 8)
    (folder / "adapter_model.bin").unlink()
    with pytest.raises(ConversionError, match="no adapter_model"):
        described(folder)


def test_a_name_stands_for_what_is_known(base: Path, make_adapter: MakeAdapter, tmp_path: Path) -> None:
    adapter = make_adapter("support")
    add(Store(), [base, adapter])
    assert find(Store(), "support") == adapter
    assert find(Store(), str(base)) == base
    with pytest.raises(ConversionError, match="nobody"):
        find(Store(), "nobody")
    (tmp_path / "twin").mkdir()
    add(Store(), [Path(shutil.copy(adapter, tmp_path / "twin" / "support.gguf"))])
    with pytest.raises(ModelFileError, match="several"):
        find(Store(), "support")


@pytest.mark.parametrize("what", ["base", "adapter", "model folder", "peft"])
def test_json_is_plain(what: str, tmp_path: Path, base: Path, make_adapter: MakeAdapter, contract: Contract) -> None:
    paths = {"base": base, "model folder": TINY_BASE}
    path = paths.get(what) or (
        write_lora(tmp_path / "p", TINY_BASE, seed=1) if what == "peft" else make_adapter(contract=contract)
    )
    values = json.loads(json.dumps(to_dict(described(path)), allow_nan=False))
    assert values["path"] == str(path)
    assert "" not in values.values()


def test_templates() -> None:
    assert TemplateSummary.of("") is None
    assert TemplateSummary.of(3) is None
    said = TemplateSummary.of("\n\n" + "x" * 100 + "\nmore")
    assert said is not None
    assert (said.name, len(said.first_line), said.n_characters) == ("", 60, 107)
