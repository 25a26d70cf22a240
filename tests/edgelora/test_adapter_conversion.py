"""Adapters that are converted, blended and merged: whose base they are, and what is still true of them afterwards."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from converters.base import convert_base
from converters.errors import BaseMismatchError as OtherBase
from converters.errors import UnsupportedAdapterError, WriteError
from converters.reader import read_header
from edgelora.adapter_conversion import adapter_from_folder
from edgelora.adapter_ref import AdapterRef
from edgelora.adapter_settings import AdapterSettings
from edgelora.base_settings import BaseSettings
from edgelora.contract import GOLDEN_MESSAGES, Contract
from edgelora.conversion import ConvertOptions, blend_adapters, convert
from edgelora.errors import BaseMismatchError, ModelFileError, SettingsError
from edgelora.resolution import contract_of
from edgelora.store import Store
from tests.conftest import TINY_BASE
from tests.converters.folders import make_model
from tests.peft_folders import write_lora


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert_base(TINY_BASE, tmp_path_factory.mktemp("base") / "tiny-q8_0.gguf", quant="q8_0").path


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("other") / "model")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_lora(tmp_path / "support", TINY_BASE, seed=1)


def made(folder: Path, base: Path, out: Path, **settings: object) -> Path:
    return convert(folder, out, ConvertOptions(base=base, adapter=AdapterSettings(**settings))).path  # type: ignore[arg-type]


def refs(*paths: Path) -> list[AdapterRef]:
    return [AdapterRef(f"a{number}", path, 0.5) for number, path in enumerate(paths)]


def test_nothing_that_is_read_is_replaced(folder: Path, tmp_path: Path) -> None:
    base = convert_base(TINY_BASE, tmp_path / "base.gguf", quant="q8_0").path
    adapter, before = made(folder, base, tmp_path / "a.gguf"), base.read_bytes()
    options = ConvertOptions(base=base, force=True)
    for target in (base, adapter):
        with pytest.raises(WriteError, match="which is read for it"):
            convert(adapter, target, options)
        with pytest.raises(WriteError, match="which is read for it"):
            blend_adapters(refs(adapter, folder), target, options)
    assert base.read_bytes() == before


def test_another_base_is_refused_and_with_force_loudly_taken(folder: Path, base: Path, tmp_path: Path) -> None:
    Contract(base_name="elsewhere", base_fingerprint="f" * 64).save(folder)
    store = Store()
    with pytest.raises(BaseMismatchError, match="was trained on elsewhere"):
        convert(folder, tmp_path / "a.gguf", ConvertOptions(base=base))
    report = convert(folder, tmp_path / "a.gguf", ConvertOptions(base=base, force=True))
    assert "used all the same (--force)" in report.notices[0]
    with pytest.raises(BaseMismatchError, match="was trained on elsewhere"):
        convert(base, tmp_path / "b.gguf", ConvertOptions(settings=BaseSettings(merge=tuple(refs(folder)))))
    adapter_from_folder(folder, base, store, force=True)
    with pytest.raises(BaseMismatchError, match="was trained on elsewhere"):
        adapter_from_folder(folder, base, store)  # what was made with force is not served without


def test_every_part_of_a_blend_is_asked_for_its_base(folder: Path, base: Path, tmp_path: Path) -> None:
    second = write_lora(tmp_path / "second", TINY_BASE, seed=2)
    Contract(base_name="elsewhere", base_fingerprint="f" * 64).save(second)
    for order in ((folder, second), (second, folder)):
        with pytest.raises(BaseMismatchError, match="second was trained on elsewhere"):
            blend_adapters(refs(*order), tmp_path / "x.gguf", ConvertOptions(base=base))
    report = blend_adapters(refs(folder, second), tmp_path / "x.gguf", ConvertOptions(base=base, force=True))
    assert any("--force" in notice for notice in report.notices)


def test_a_gguf_adapter_is_held_against_the_base_that_is_named(
    folder: Path, base: Path, other: Path, tmp_path: Path
) -> None:
    adapter = made(folder, base, tmp_path / "a.gguf")
    with pytest.raises(BaseMismatchError):
        convert(adapter, tmp_path / "b.gguf", ConvertOptions(base=other))
    with pytest.raises(OtherBase, match="the base has"):
        convert(adapter, tmp_path / "b.gguf", ConvertOptions(base=other, force=True))
    assert not (tmp_path / "b.gguf").exists()


def test_what_a_contract_said_does_not_outlive_it(folder: Path, base: Path, tmp_path: Path) -> None:
    Contract(
        base_fingerprint=Store().fingerprint(base), chat_template="{{ messages[0].content }}", system="Be kind.",
        golden_messages=GOLDEN_MESSAGES, golden_tokens=(1, 2), training={"method": "lora"}, certificate="x",
    ).save(folder)  # fmt: skip
    adapter = made(folder, base, tmp_path / "a.gguf")
    again = convert(adapter, tmp_path / "b.gguf", ConvertOptions(chat_template="chatml")).path
    contract = contract_of(again)
    assert contract
    assert (contract.golden_tokens, contract.certificate, contract.system) == ((), "", "Be kind.")
    second = write_lora(tmp_path / "second", TINY_BASE, seed=2)
    blended = contract_of(blend_adapters(refs(adapter, second), tmp_path / "c.gguf", ConvertOptions(base=base)).path)
    assert blended
    assert (blended.system, blended.training, blended.certificate, blended.golden_tokens) == ("", {}, "", ())
    both = blend_adapters(refs(adapter, again), tmp_path / "d.gguf", ConvertOptions(chat_template="chatml"))
    found = contract_of(both.path)
    assert found
    assert "im_start" in found.chat_template
    assert read_header(both.path).metadata["general.name"] == "a.gguf + b.gguf"


def test_what_was_lost_stays_said(folder: Path, base: Path, tmp_path: Path) -> None:
    adapter = made(folder, base, tmp_path / "a.gguf", rank=4, max_error=0.9)
    again = convert(adapter, tmp_path / "b.gguf", ConvertOptions(adapter=AdapterSettings(dtype="f32")))
    assert again.kind == "approximate"
    assert again.max_residual > 0.1
    blended = blend_adapters(refs(adapter, folder), tmp_path / "c.gguf", ConvertOptions(base=base))
    assert blended.kind == "approximate"


def test_a_hostile_report_of_exactness_is_no_crash(folder: Path, base: Path, tmp_path: Path) -> None:
    for number, said in enumerate(
        ({"residual_energy": [1], "rounding": "x", "kind": 3}, {"rounding": None, "method": []})
    ):
        Contract(base_fingerprint=Store().fingerprint(base), exactness=said).save(folder)
        adapter = made(folder, base, tmp_path / f"{number}.gguf")
        convert(adapter, tmp_path / f"{number}-again.gguf")


def test_names_that_no_file_could_have(folder: Path, base: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "x" * 5000}))
    with pytest.raises(ModelFileError, match="does not say which base"):
        convert(folder, tmp_path / "a.gguf")
    strange = folder.rename(tmp_path / "caf\udce9")  # a name that is not UTF-8
    assert read_header(made(strange, base, tmp_path / "a.gguf")).metadata["general.name"] == "caf?"
    merge = BaseSettings(merge=(AdapterRef("a", strange),))
    convert(base, tmp_path / "m.gguf", ConvertOptions(settings=merge))


def test_a_contract_with_half_a_character_is_damaged(folder: Path, base: Path, tmp_path: Path) -> None:
    (folder / "edgelora.json").write_text('{"version": 1, "system": "\\ud83d"}')
    with pytest.raises(ModelFileError, match="its contract is damaged: system"):
        convert(folder, tmp_path / "a.gguf", ConvertOptions(base=base))


def test_a_template_that_refuses_the_golden_conversation_is_no_obstacle(
    folder: Path, base: Path, tmp_path: Path
) -> None:
    template = tmp_path / "strict.jinja"
    template.write_text("{% if messages[-1].role != 'tool' %}{{ raise_exception('tools only') }}{% endif %}")
    options = ConvertOptions(base=TINY_BASE, chat_template=str(template))
    report = convert(folder, tmp_path / "a.gguf", options)
    assert any("no token ids to compare" in notice for notice in report.notices)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (AdapterSettings(dtype="f32"), "--dtype: for adapters that are converted"),
        (AdapterSettings(rank=3), "--rank"),
        (AdapterSettings(max_error=0.5), "--max-error"),
        (AdapterSettings(certify=Path("general")), "--certify"),
    ],
)
def test_options_that_a_merge_would_ignore(
    settings: AdapterSettings, message: str, folder: Path, base: Path, tmp_path: Path
) -> None:
    options = ConvertOptions(settings=BaseSettings(merge=tuple(refs(folder))), adapter=settings)
    with pytest.raises(SettingsError, match=message):
        convert(base, tmp_path / "m.gguf", options)


def test_options_that_an_adapter_would_ignore(folder: Path, base: Path, tmp_path: Path) -> None:
    adapter = made(folder, base, tmp_path / "a.gguf")
    with pytest.raises(SettingsError, match="--threads"):
        convert(folder, tmp_path / "b.gguf", ConvertOptions(base=base, threads=2))
    for settings in (AdapterSettings(initial=folder), AdapterSettings(allow_bin=True)):
        with pytest.raises(SettingsError, match="is a GGUF adapter"):
            convert(adapter, tmp_path / "b.gguf", ConvertOptions(adapter=settings))
    with pytest.raises(SettingsError, match="--threads"):
        blend_adapters(refs(adapter, adapter), tmp_path / "b.gguf", ConvertOptions(threads=2))
    with pytest.raises(SettingsError, match="--certify"):
        blend_adapters(refs(adapter), tmp_path / "b.gguf", ConvertOptions(adapter=AdapterSettings(certify=Path("x"))))


def test_a_gguf_adapter_has_its_type_in_its_default_name(
    folder: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made(folder, base, tmp_path / "support.gguf")
    assert convert(Path("support.gguf"), options=ConvertOptions(adapter=AdapterSettings(dtype="f32"))).path.name == (
        "support-f32.gguf"
    )


def test_adapters_that_act_from_different_tokens_do_not_blend(folder: Path, base: Path, tmp_path: Path) -> None:
    activated = write_lora(tmp_path / "activated", TINY_BASE, seed=2, alora_invocation_tokens=[5, 6])
    with pytest.raises(UnsupportedAdapterError, match="begin to act at different tokens"):
        blend_adapters(refs(folder, activated), tmp_path / "b.gguf", ConvertOptions(base=base))
    alone = blend_adapters(refs(activated, activated), tmp_path / "b.gguf", ConvertOptions(base=base))
    assert read_header(alone.path).metadata["adapter.alora.invocation_tokens"] == [5, 6]
