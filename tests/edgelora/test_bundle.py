"""`edgelora bundle` and what edgelora does with a bundle: the texts are those of the adapters beside their base."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from converters.bundle import TEMPLATE, BundleReport
from converters.errors import OutputExistsError, UnsupportedError
from converters.reader import read_header
from edgelora.adapter_ref import AdapterRef
from edgelora.bundle_reading import PREFIX, bundled_adapters, is_bundle
from edgelora.bundling import bundle_adapters
from edgelora.cli import cli
from edgelora.contract import Contract
from edgelora.engine.engine import Engine, Request
from edgelora.engine.model import Model
from edgelora.engine.preflight import content_hash
from edgelora.errors import BaseMismatchError, BaseNotFoundError, ModelFileError, SettingsError
from edgelora.store import Store
from edgelora.template import BUILTIN, ChatTemplate
from tests.conftest import TINY_BASE
from tests.converters.bundle_files import copy_of
from tests.edgelora.conftest import MakeAdapter
from tests.peft_folders import write_lora

GREEDY = {"temperature": 0.0, "max_tokens": 24}
QUESTIONS = ("Who are you?", "Tell me of the storm.", "What does bread cost?")


def refs(adapters: Mapping[str, Path]) -> list[AdapterRef]:
    return [AdapterRef(name, path) for name, path in adapters.items()]


@pytest.fixture(scope="module")
def made(base: Path, adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> BundleReport:
    folder = tmp_path_factory.mktemp("bundle")
    return bundle_adapters(base, refs(adapters), folder / "bundle.gguf", store=Store(folder / "store"))


@pytest.fixture(scope="module")
def inside(made: BundleReport) -> Iterator[Engine]:
    with Engine(made.path, threads=1) as engine:
        yield engine


def texts(engine: Engine, name: str | None, **options: Any) -> list[str]:
    return [engine.chat(each, adapter=name, sampling=GREEDY, **options).text for each in QUESTIONS]


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    result = CliRunner().invoke(cli, [*map(str, arguments)])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return subprocess.CompletedProcess([], result.exit_code, result.stdout, result.stderr)


# The engine


def test_texts_are_those_of_the_adapters_beside_their_base(inside: Engine, engine: Engine) -> None:
    assert inside.adapters == ["red", "blue"]
    for name in ("red", "blue", None):
        assert texts(inside, name) == texts(engine, name)
    assert texts(inside, "red") != texts(inside, "blue") != texts(inside, None)


def test_the_account_names_the_adapter(inside: Engine, adapters: dict[str, Path]) -> None:
    completion = inside.chat("Hello", adapter="red", sampling=GREEDY)
    assert (completion.adapter, completion.adapter_hash) == ("red", content_hash(adapters["red"]))
    assert inside.chat("Hello", sampling=GREEDY).adapter == "none"
    assert completion.prompt_tokens == inside.count_tokens("Hello", "red") == inside.count_tokens("Hello")


def test_a_token_typed_in_a_message_is_text(inside: Engine, engine: Engine, made: BundleReport) -> None:
    """edgelora knows text from tokens, and renders with the base's own template, which spaces nothing out."""
    messages = "Say <|red|> and <|blue|>, then <|red|>"
    for name in ("red", None):
        assert inside.count_tokens(messages, name) == engine.count_tokens(messages, name)
        assert (
            inside.chat(messages, adapter=name, sampling=GREEDY).text
            == engine.chat(messages, adapter=name, sampling=GREEDY).text
        )
    with contextlib.closing(Model(made.path, vocab_only=True)) as model:
        own = model.chat_template()
        assert own is not None
        assert own.source == read_header(engine.base).metadata[TEMPLATE] != model.header.metadata[TEMPLATE]


def test_many_at_once_are_what_each_is_alone(inside: Engine) -> None:
    names = ["red", None, "blue", "red", "none", "blue"] * 4
    requests = [
        Request(QUESTIONS[index % len(QUESTIONS)], name, sampling={**GREEDY, "max_tokens": 12})
        for index, name in enumerate(names)
    ]
    together = [completion.text for completion in inside.batch(requests)]
    alone = [inside.chat(each.messages, adapter=each.adapter, sampling=each.sampling).text for each in requests]
    assert together == alone


def test_a_bundled_adapter_has_one_scale_and_no_company(inside: Engine, adapters: dict[str, Path]) -> None:
    for scale in (None, 1.0):
        assert inside.chat("Hello", adapter="red", scale=scale, sampling=GREEDY).text
    with pytest.raises(SettingsError, match=r"at scale 1 for good; asked for was 0\.5"):
        inside.chat("Hello", adapter="red", scale=0.5, sampling=GREEDY)
    with pytest.raises(SettingsError, match="one adapter at a time"):
        inside.chat("Hello", adapter={"red": 1.0, "blue": 1.0}, sampling=GREEDY)
    assert inside.chat("Hello", adapter={"red": 1.0}, sampling=GREEDY).adapter == "red"
    with pytest.raises(ModelFileError, match=r"beside .* a bundle, .* it has red, blue"):
        inside.load_adapter("green", adapters["red"])
    with pytest.raises(SettingsError, match="a part of the base"):
        inside.unload_adapter("red")
    assert inside.adapters == ["red", "blue"]


def test_another_template_than_it_was_made_with(made: BundleReport) -> None:
    with Engine(made.path, threads=1, chat_template="plain") as engine:
        assert engine.chat("Hello", sampling=GREEDY).adapter == "none"
        with pytest.raises(ModelFileError, match=r"begins with token 0, .* takes the place of token 1"):
            engine.chat("Hello", adapter="red", sampling=GREEDY)


def test_a_contract_goes_with_its_adapter(base: Path, make_adapter: MakeAdapter, tmp_path: Path) -> None:
    fingerprint = Store().fingerprint(base)
    contract = Contract(
        base_name="fennick",
        base_fingerprint=fingerprint,
        chat_template=BUILTIN["plain"],
        stop=("e",),
        sampling={"temperature": 0.0},
        system="You are a pirate.",
        training={"steps": 3},
    )
    files = {"own": make_adapter("own", 5, contract=contract), "bare": make_adapter("bare", 6)}
    report = bundle_adapters(base, refs(files), tmp_path / "out.gguf")
    own, bare = bundled_adapters(read_header(report.path))
    assert own.contract == contract
    assert bare.contract is None
    assert (own.substitute, bare.substitute) == (0, 1)
    assert [notice for notice in report.notices if "no contract" in notice] == list(report.notices)
    with Engine(base, files, threads=1) as beside, Engine(report.path, threads=1) as engine:
        for name in files:
            assert texts(engine, name) == texts(beside, name)
        assert engine.count_tokens("Hello", "own") == beside.count_tokens("Hello", "own")
        stopped = engine.chat("Hello", adapter="own", sampling={"max_tokens": 200})
        assert stopped.text == beside.chat("Hello", adapter="own", sampling={"max_tokens": 200}).text


def test_scales_and_folders(base: Path, tmp_path: Path) -> None:
    folder = write_lora(tmp_path / "peft", TINY_BASE, seed=4)
    half = AdapterRef("half", folder, 0.5)
    report = bundle_adapters(base, [half, AdapterRef("whole", folder)], tmp_path / "out.gguf")
    with Engine(report.path, threads=1) as engine:
        found = {name: texts(engine, name) for name in engine.adapters}
        assert texts(engine, "half", scale=0.5) == found["half"]
    from edgelora.adapter_conversion import adapter_from_folder

    converted = adapter_from_folder(folder, base, Store())
    with Engine(base, {"peft": converted}, threads=1) as beside:
        assert found["whole"] == texts(beside, "peft")
        assert found["half"] == texts(beside, "peft", scale=0.5)
        assert found["half"] != found["whole"]


def test_a_bundle_is_nobodys_base(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    """An adapter that names no base takes the only one beside it, which a bundle of it is not."""
    for source in (base, adapters["red"]):
        shutil.copy(source, tmp_path)
    beside, red, store = tmp_path / base.name, tmp_path / "red.gguf", Store()
    assert store.find_base(None, red).path == beside
    report = bundle_adapters(beside, [AdapterRef("red", red)], tmp_path / "bundle.gguf")
    assert store.find_base(None, red).path == beside
    shutil.copy(base, tmp_path / "another.gguf")
    with pytest.raises(BaseNotFoundError):
        store.find_base(None, red)
    assert store.fingerprint(report.path) != store.fingerprint(beside)


def test_a_store_that_cannot_be_written_is_told(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "store").write_text("a file")
    report = bundle_adapters(base, refs(adapters), tmp_path / "out.gguf", store=Store(tmp_path / "store"))
    assert any("not remembered" in notice for notice in report.notices)
    assert report.path.is_file()


# What a control token stands for


def test_a_base_whose_conversations_begin_with_bos(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    keys = {"tokenizer.ggml.add_bos_token": True, "tokenizer.chat_template": "{{ bos_token }}" + BUILTIN["chatml"]}
    with_bos = copy_of(base, tmp_path / "bos.gguf", metadata=keys)
    report = bundle_adapters(with_bos, refs(adapters), tmp_path / "out.gguf")
    assert {token.substitute for token in report.tokens} == {0}
    assert any("adds no <|endoftext|>" in notice for notice in report.notices)
    with Engine(with_bos, adapters, threads=1) as beside, Engine(report.path, threads=1) as engine:
        assert texts(engine, "red") == texts(beside, "red") != texts(beside, "blue")


def test_a_template_that_leaves_bos_to_llama_cpp(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    source = "{% for m in messages %}Q {{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
    keys = {"tokenizer.ggml.add_bos_token": True, "tokenizer.chat_template": source}
    with_bos = copy_of(base, tmp_path / "bos.gguf", metadata=keys)
    report = bundle_adapters(with_bos, refs(adapters), tmp_path / "out.gguf")
    assert {token.substitute for token in report.tokens} == {0}
    written = ChatTemplate("{{ bos_token }}" + source)
    with Engine(with_bos, adapters, threads=1, chat_template=written) as beside:
        wanted = {name: texts(beside, name) for name in adapters}
    with Engine(report.path, threads=1) as engine:
        assert {name: texts(engine, name) for name in adapters} == wanted
    assert wanted["red"] != wanted["blue"]


def test_conversations_without_a_first_token_are_refused(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    source = "{% for m in messages %}{{ m.content }}{% endfor %}"
    plain = copy_of(base, tmp_path / "plain.gguf", metadata={"tokenizer.chat_template": source})
    with pytest.raises(ModelFileError, match="begin with ordinary text"):
        bundle_adapters(plain, refs(adapters), tmp_path / "out.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["plain.gguf"]


def test_a_base_without_a_template(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    silent = copy_of(base, tmp_path / "silent.gguf", metadata={"tokenizer.chat_template": None})
    report = bundle_adapters(silent, refs(adapters), tmp_path / "out.gguf")
    assert any("begin a prompt with the token itself" in notice for notice in report.notices)
    assert "tokenizer.chat_template" not in read_header(report.path).metadata
    with Engine(report.path, threads=1, chat_template="plain") as engine:
        assert engine.chat("Hello", adapter="red", sampling=GREEDY).adapter == "red"


def test_a_template_that_cannot_be_adapted_is_left_alone(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    source = BUILTIN["chatml"] + "{{ bundle_adapter | default('') }}"
    strange = copy_of(base, tmp_path / "strange.gguf", metadata={"tokenizer.chat_template": source})
    report = bundle_adapters(strange, refs(adapters), tmp_path / "out.gguf")
    assert any("left as it was" in notice and "<|red|>, <|blue|>" in notice for notice in report.notices)
    assert read_header(report.path).metadata["tokenizer.chat_template"] == source


# Refusals


def test_refusals_before_anything_is_written(
    base: Path, adapters: dict[str, Path], make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    other = Contract(base_name="another", base_fingerprint="0" * 64)
    golden = Contract(
        base_fingerprint=Store().fingerprint(base),
        chat_template=BUILTIN["chatml"],
        golden_messages=({"role": "user", "content": "x"},),
        golden_tokens=(1, 2, 3),
    )
    out = tmp_path / "out.gguf"
    wrong, damaged = make_adapter("wrong", 8, contract=other), make_adapter("damaged", 9, contract=golden)
    for refused, error, message in (
        ([], SettingsError, "no adapter named"),
        ([AdapterRef("a", wrong)], BaseMismatchError, "trained on another"),
        ([AdapterRef("a", damaged)], ModelFileError, "its test conversation"),
        ([AdapterRef("a", base)], ModelFileError, "is a base, not an adapter"),
        ([*refs(adapters), AdapterRef("red", adapters["blue"])], SettingsError, "two adapters are called red"),
        ([AdapterRef("im_start", adapters["red"])], UnsupportedError, "the base has a token"),
    ):
        with pytest.raises(error, match=message):
            bundle_adapters(base, refused, out)
        assert not out.exists()
    for path in (wrong, damaged):
        report = bundle_adapters(base, [AdapterRef("a", path)], out, force=True)
        assert any("used all the same" in notice for notice in report.notices)
    with pytest.raises(OutputExistsError):
        bundle_adapters(base, refs(adapters), out)
    with pytest.raises(ModelFileError, match="Hugging Face folder"):
        bundle_adapters(TINY_BASE, refs(adapters), tmp_path / "two.gguf")
    with pytest.raises(UnsupportedError, match="a bundle already"):
        bundle_adapters(out, refs(adapters), tmp_path / "two.gguf")
    small = make_adapter("small", 3, tensors={"blk.0.attn_q.weight.lora_b": None, "blk.0.attn_q.weight.lora_a": None})
    assert bundle_adapters(base, [AdapterRef("small", small)], tmp_path / "two.gguf").path.is_file()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({f"{PREFIX}version": 2}, "version 2"),
        ({f"{PREFIX}names": ["red"]}, "contradict"),
        ({f"{PREFIX}names": ["red", "red"]}, "contradict"),
        ({f"{PREFIX}names": [1, 2]}, "contradict"),
        ({f"{PREFIX}names": None}, "contradict"),
        ({f"{PREFIX}scales": [1.0]}, "contradict"),
        ({f"{PREFIX}hashes": "red"}, "contradict"),
        ({"graniteswitch.adapters.token_ids_activate": [4096, 9999]}, "contradict"),
        ({"graniteswitch.adapters.token_ids_substitute": [-1, 1]}, "contradict"),
        ({f"{PREFIX}names": ["none", "blue"]}, "names the bare base"),
        ({f"{PREFIX}names": ["../x", "blue"]}, "cannot name an adapter"),
        ({f"{PREFIX}0.edgelora.contract.version": 99}, "version 99"),
    ],
)
def test_a_bundle_that_lies(made: BundleReport, tmp_path: Path, changes: Any, message: str) -> None:
    lying = read_header(copy_of(made.path, tmp_path / "lying.gguf", metadata=changes))
    with pytest.raises(ModelFileError, match=message):
        bundled_adapters(lying)


def test_other_files_are_no_bundles(base: Path, made: BundleReport, tmp_path: Path) -> None:
    assert not is_bundle(read_header(base))
    assert bundled_adapters(read_header(base)) == ()
    foreign = copy_of(made.path, tmp_path / "foreign.gguf", metadata={f"{PREFIX}version": None})
    assert bundled_adapters(read_header(foreign)) == ()
    assert len(bundled_adapters(read_header(made.path))) == 2


# The command line


def test_from_the_command_line(base: Path, adapters: dict[str, Path], engine: Engine, tmp_path: Path) -> None:
    out = tmp_path / "shop.gguf"
    options = [f"--adapter={name}={path}" for name, path in adapters.items()]
    result = run("bundle", base, *options, "-o", out)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(str(out))
    assert "<|red|>  token 4096" in result.stderr
    assert run("bundle", base, *options, "-o", out).returncode == 3
    assert run("bundle", base, *options, "-o", out, "--force").returncode == 0
    shown = run("show", out).stdout
    assert "red: <|red|> (token 4096)" in shown
    assert "GGUF bundle" in shown
    described = json.loads(run("show", out, "--json").stdout)
    assert [each["name"] for each in described["bundled"]] == ["red", "blue"]
    assert described["bundled"][0]["content_hash"] == content_hash(adapters["red"])
    options = ["--temperature", 0, "--max-tokens", 24, "--threads", 1, QUESTIONS[2]]
    said = run("chat", "--base", out, "--adapter", "red", *options)
    assert said.stdout.rstrip("\n") == texts(engine, "red")[2].rstrip("\n"), said.stderr
    assert run("chat", "--base", out, *options).stdout != said.stdout
    assert run("chat", "--base", out, "--adapter", "red@0.5", *options).returncode == 2
    assert run("chat", "--base", out, "--adapter", "green", *options).returncode == 3
    beside = run("chat", "--base", out, "--adapter", adapters["red"], *options)
    assert beside.returncode == 3
    assert "beside" in beside.stderr


def test_a_batch_names_adapters_of_a_bundle(made: BundleReport, engine: Engine, tmp_path: Path) -> None:
    rows = [{"id": str(i), "prompt": QUESTIONS[0], "adapter": name} for i, name in enumerate(["red", "blue", "none"])]
    source, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = run("batch", source, "-o", out, "--base", made.path, "--temperature", 0, "--max-tokens", 24)
    assert result.returncode == 0, result.stderr
    replies = {row["id"]: row["text"] for row in map(json.loads, out.read_text().splitlines())}
    assert [replies[str(i)] for i in range(3)] == [texts(engine, name)[0] for name in ("red", "blue", None)]


def test_exit_codes(base: Path, adapters: dict[str, Path], make_adapter: MakeAdapter, tmp_path: Path) -> None:
    misfit = make_adapter("misfit", 3, metadata={"general.architecture": "qwen2"})
    out = tmp_path / "out.gguf"
    for code, message, arguments in (
        (2, "no adapter named", [base]),
        (2, "Missing argument", []),
        (3, "its architecture is qwen2", [base, "--adapter", misfit]),
        (3, "no such file", [tmp_path / "absent.gguf", "--adapter", adapters["red"]]),
        (3, "no folder", [base, "--adapter", adapters["red"], "-o", tmp_path / "absent" / "out.gguf"]),
        (2, "is not one of", [base, "--adapter", adapters["red"], "--dtype", "q4_0"]),
    ):
        result = run("bundle", *(["-o", out] if "-o" not in arguments else []), *arguments)
        assert (result.returncode, message in result.stderr) == (code, True), result.stderr
        assert not out.exists()
