"""Importance matrices of the installed llama.cpp, against transformers, against numpy, and against merged weights.

That they equal llama-imatrix's, byte for byte, is shown by `bench/imatrix.py`, which builds that tool.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from converters.imatrix import ImportanceMatrix
from edgelora.calibration_text import CalibrationText, read_calibration
from edgelora.engine import graph
from edgelora.engine.calibration import Collector, compute_imatrix
from edgelora.engine.native import llama
from edgelora.errors import DataFileError, EdgeloraError, ModelFileError, SettingsError
from edgelora.template import BUILTIN, ChatTemplate
from tests.conftest import ROOT, TINY_BASE
from tests.edgelora.engine.gguf_copies import read_tensors, write_copy, write_gguf

SIZE, CHUNKS = 128, 4
TOLERANCE = 1e-4
"""Relative, of each column: float32 programs that add in another order; measured 4e-6 to 2e-5."""
FLOAT16_CACHE = 1e-2
"""The same where keys and values are kept in float16 (llama.cpp's default): 2**-11 = 5e-4 a layer; measured 3e-3."""
Means = Mapping[str, npt.NDArray[np.floating[Any]]]
HF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@pytest.fixture(scope="module", autouse=True)
def float32_cache() -> Iterator[Callable[[], Any]]:
    """Contexts without rounding to float16, so that other programs can be compared closely."""
    defaults = llama().llama_context_default_params

    def exact() -> Any:
        params = defaults()
        params.type_k = params.type_v = params.flash_attn_type = 0
        return params

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llama(), "llama_context_default_params", exact)
        yield defaults


@pytest.fixture(scope="module")
def text() -> str:
    rows = map(json.loads, (ROOT / "examples" / "data" / "support.jsonl").read_text().splitlines())
    return "\n".join(message["content"] for row in rows for message in row["messages"])


@pytest.fixture(scope="module")
def computed(base: Path, text: str) -> ImportanceMatrix:
    return compute_imatrix(base, text, chunk_size=SIZE, chunks=CHUNKS, threads=1)


def means(imatrix: ImportanceMatrix) -> Means:
    return {name: entry.means() for name, entry in imatrix.entries.items()}


def distance(ours: Means, theirs: Means) -> float:
    """The largest relative difference of a column."""
    assert sorted(ours) == sorted(theirs)
    return max(float((np.abs(ours[name] - theirs[name]) / theirs[name]).max()) for name in theirs)


def token_ids(text: str) -> list[int]:
    """By the tokenizer's own file."""
    from tokenizers import Tokenizer

    ids: list[int] = Tokenizer.from_file(str(TINY_BASE / "tokenizer.json")).encode(text, add_special_tokens=False).ids
    return ids


# Against transformers


def transformers_means(windows: list[list[int]]) -> Means:
    """Means of squared inputs of every linear, summed by hooks in float64."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(TINY_BASE, dtype=torch.float32, attn_implementation="eager").eval()
    sums: dict[str, Any] = {}

    def hook(name: str) -> Callable[..., None]:
        def add(_module: Any, inputs: tuple[Any, ...]) -> None:
            sums[name] = sums.get(name, 0) + inputs[0].double().square().reshape(-1, inputs[0].shape[-1]).sum(0)

        return add

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            layer, _, part = name.removeprefix("model.layers.").partition(".")
            module.register_forward_pre_hook(hook(f"blk.{layer}.{HF_NAMES[part]}.weight"))
    with torch.no_grad():
        for window in windows:
            model(torch.tensor([window]))
    rows = sum(map(len, windows))
    return {name: (total / rows).numpy() for name, total in sums.items()}


def cut(ids: list[int]) -> list[list[int]]:
    return [ids[start : start + SIZE] for start in range(0, SIZE * CHUNKS, SIZE)]


@pytest.mark.train
def test_equals_the_inputs_of_transformers_linears(computed: ImportanceMatrix, text: str) -> None:
    windows = cut(token_ids(text))
    theirs = transformers_means(windows)
    assert len(theirs) == 28
    assert distance(means(computed), theirs) < TOLERANCE
    assert {int(c) for entry in computed.entries.values() for c in entry.counts} == {SIZE * CHUNKS}
    assert (computed.chunk_count, computed.chunk_size, computed.datasets) == (CHUNKS, SIZE, ("text",))
    # The twins: one token later; and every window a continuation of the one before.
    assert distance(means(computed), transformers_means(cut(token_ids(text)[1:]))) > 100 * TOLERANCE
    joined = [token for window in windows for token in window]
    assert distance(means(computed), transformers_means([joined])) > 100 * TOLERANCE


@pytest.mark.train
def test_every_window_begins_with_bos_where_the_vocabulary_asks_for_it(base: Path, text: str, tmp_path: Path) -> None:
    asking = write_copy(base, tmp_path / "bos.gguf", {}, {"tokenizer.ggml.add_bos_token": True})
    ours = compute_imatrix(asking, text, chunk_size=SIZE, chunks=CHUNKS, threads=1)
    windows = cut([0, *token_ids(text)])
    replaced = [[0, *window[1:]] for window in windows]
    assert distance(means(ours), transformers_means(replaced)) < TOLERANCE
    assert distance(means(ours), transformers_means(windows)) > 100 * TOLERANCE


@pytest.mark.train
def test_is_close_to_transformers_with_llama_cpps_own_cache(
    base: Path, text: str, float32_cache: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llama(), "llama_context_default_params", float32_cache)
    ours = compute_imatrix(base, text, chunk_size=SIZE, chunks=CHUNKS, threads=1)
    assert TOLERANCE < distance(means(ours), transformers_means(cut(token_ids(text)))) < FLOAT16_CACHE


# Experts, against numpy


D, FF, EXPERTS, USED = 32, 48, 6, 2


@pytest.fixture(scope="module")
def experts_base(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One Mixtral-like layer whose attention adds nothing, so that its experts see the tokens' own embeddings."""
    rng = np.random.default_rng(3)
    vocab = len(read_tensors(base)["token_embd.weight"])
    shapes = {
        "token_embd": (vocab, D),
        "output": (vocab, D),
        **{f"blk.0.attn_{name}": (D, D) for name in "qkv"},
        "blk.0.ffn_gate_inp": (EXPERTS, D),
        "blk.0.ffn_gate_exps": (EXPERTS, FF, D),
        "blk.0.ffn_up_exps": (EXPERTS, FF, D),
        "blk.0.ffn_down_exps": (EXPERTS, D, FF),
    }
    arrays = {f"{name}.weight": rng.standard_normal(shape) * shape[-1] ** -0.5 for name, shape in shapes.items()}
    arrays["blk.0.attn_output.weight"] = np.zeros((D, D))
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        arrays[f"{name}.weight"] = rng.random(D) + 0.5
    sizes = {
        "block_count": 1,
        "context_length": 512,
        "embedding_length": D,
        "feed_forward_length": FF,
        "attention.head_count": 4,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.dimension_count": D // 4,
        "expert_count": EXPERTS,
        "expert_used_count": USED,
    }
    path = tmp_path_factory.mktemp("experts") / "moe.gguf"
    return write_gguf(
        base, path, arrays, {f"llama.{key}": value for key, value in sizes.items()}, only="tokenizer.ggml."
    )


def routed(path: Path, ids: list[int]) -> tuple[dict[str, npt.NDArray[np.float64]], npt.NDArray[np.int64]]:
    """Sums of squares of what each expert sees, and how often each is used, by numpy in float64."""
    weights = {name: array.astype(np.float64) for name, array in read_tensors(path).items()}
    hidden = weights["token_embd.weight"][ids]
    x = hidden / np.sqrt((hidden**2).mean(1, keepdims=True) + 1e-5) * weights["blk.0.ffn_norm.weight"]
    chosen = np.argsort(-(x @ weights["blk.0.ffn_gate_inp.weight"].T), axis=1)[:, :USED]
    sums = {f"blk.0.ffn_{name}_exps.weight": [] for name in ("gate", "up", "down")}
    for expert in range(EXPERTS):
        rows = x[(chosen == expert).any(1)]
        gate, up = (rows @ weights[f"blk.0.ffn_{name}_exps.weight"][expert].T for name in ("gate", "up"))
        inner = gate / (1 + np.exp(-gate)) * up
        for name, seen in (("gate", rows), ("up", rows), ("down", inner)):
            sums[f"blk.0.ffn_{name}_exps.weight"].append((seen**2).sum(0))
    return {name: np.array(total) for name, total in sums.items()}, np.bincount(chosen.reshape(-1), minlength=EXPERTS)


def test_experts_are_measured_on_the_tokens_routed_to_them(experts_base: Path, text: str) -> None:
    ids = token_ids(text)[: SIZE * CHUNKS]
    imatrix = compute_imatrix(experts_base, ids, chunk_size=SIZE, threads=1)
    sums, counts = routed(experts_base, ids)
    for name, wanted in sums.items():
        entry = imatrix.entries[name]
        np.testing.assert_array_equal(entry.counts, counts)
        np.testing.assert_allclose(entry.sums.reshape(wanted.shape), wanted, rtol=TOLERANCE)
        found = imatrix.means_for(name, wanted.shape[1], EXPERTS)
        assert found is not None
        np.testing.assert_allclose([*found], wanted / counts[:, None], rtol=TOLERANCE)
    router = imatrix.entries["blk.0.ffn_gate_inp.weight"]
    assert router.counts.tolist() == [len(ids)]
    np.testing.assert_allclose(router.sums * USED, sums["blk.0.ffn_up_exps.weight"].sum(0), rtol=TOLERANCE)
    other, _ = routed(experts_base, ids[1:] + ids[:1] * 2)
    assert not np.allclose(imatrix.entries["blk.0.ffn_up_exps.weight"].sums, other["blk.0.ffn_up_exps.weight"].ravel())


def test_a_stack_of_matrices_is_measured_matrix_by_matrix() -> None:
    """As MLA has it (a matrix for each head): `i2 % ne02` says which one rows belong to; one count for all."""
    rows = np.random.default_rng(0).standard_normal((1, 4, 150, 8)).astype(np.float32)
    collector = Collector()
    collector._add_plain("blk.0.attn_k_b.weight", (1, 2), rows)
    entry = collector.matrix("text", SIZE).entries["blk.0.attn_k_b.weight"]
    wanted = [(rows[0, first::2].astype(np.float64) ** 2).sum((0, 1)) for first in (0, 1)]
    np.testing.assert_allclose(entry.sums.reshape(2, 8), wanted, rtol=TOLERANCE)
    assert entry.counts.tolist() == [4 * 150 // 2]


def test_values_that_lie_on_a_device_are_fetched(
    experts_base: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copy that a GPU needs, through the CPU's own buffers."""
    settings: dict[str, Any] = {"chunk_size": SIZE, "chunks": 2, "threads": 1}
    mapped = compute_imatrix(experts_base, text, **settings)
    monkeypatch.setattr(graph, "is_host", lambda node: False)
    fetched = compute_imatrix(experts_base, text, **settings)
    assert distance(means(fetched), means(mapped)) == 0


# With an adapter


def merged(base: Path, adapter: Path, out: Path, scale: float) -> Path:
    weights, pairs = read_tensors(base), read_tensors(adapter)
    changes = {
        name: weights[name] + scale * pairs[f"{name}.lora_b"] @ pairs[f"{name}.lora_a"]
        for name in weights
        if f"{name}.lora_a" in pairs
    }
    return write_copy(base, out, changes)


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_with_an_adapter_equals_merged_weights(
    base: Path, adapters: dict[str, Path], text: str, computed: ImportanceMatrix, tmp_path: Path, scale: float
) -> None:
    settings: dict[str, Any] = {"chunk_size": SIZE, "chunks": CHUNKS, "threads": 1}
    active = compute_imatrix(base, text, adapter=adapters["red"], adapter_scale=scale, **settings)
    wanted = compute_imatrix(merged(base, adapters["red"], tmp_path / "merged.gguf", scale), text, **settings)
    assert distance(means(active), means(wanted)) < TOLERANCE
    assert distance(means(active), means(computed)) > 100 * TOLERANCE
    assert not [name for name in active.entries if "lora" in name]


# Which weights, which windows


def test_output_is_left_out_unless_it_is_asked_for(experts_base: Path, text: str) -> None:
    settings: dict[str, Any] = {"chunk_size": SIZE, "chunks": 1, "threads": 1}
    plain = compute_imatrix(experts_base, text, **settings)
    asked = compute_imatrix(experts_base, text, process_output=True, **settings)
    assert set(asked.entries) - set(plain.entries) == {"output.weight"}
    assert all(name.startswith("blk.") for name in plain.entries)
    assert asked.entries["output.weight"].counts.tolist() == [SIZE]


@pytest.mark.parametrize("batch_tokens", [SIZE, 64, 300])
def test_windows_side_by_side_or_in_parts_are_the_same(
    base: Path, text: str, computed: ImportanceMatrix, batch_tokens: int
) -> None:
    again = compute_imatrix(base, text, chunk_size=SIZE, chunks=CHUNKS, threads=1, batch_tokens=batch_tokens)
    assert distance(means(again), means(computed)) < TOLERANCE
    assert again.chunk_count == computed.chunk_count


def test_progress_counts_windows(base: Path, text: str) -> None:
    seen: list[tuple[int, int]] = []
    compute_imatrix(
        base,
        text,
        chunk_size=SIZE,
        chunks=3,
        threads=1,
        batch_tokens=SIZE,
        progress=lambda *counts: seen.append(counts),
    )
    assert seen == [(1, 3), (2, 3), (3, 3)]


# Texts

BASE_TEMPLATE = ChatTemplate((TINY_BASE / "chat_template.jinja").read_text())


def test_conversations_are_measured_as_the_template_renders_them(base: Path, tmp_path: Path) -> None:
    data = tmp_path / "talk.jsonl"
    rows = (ROOT / "examples" / "data" / "support.jsonl").read_text().splitlines()[:40]
    data.write_text("\n".join([*rows, rows[0]]))
    given = ChatTemplate("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    settings: dict[str, Any] = {"chunk_size": SIZE, "chunks": 2, "threads": 1}
    found = compute_imatrix(base, read_calibration(data), chat_template=given, **settings)
    assert found.datasets == (str(data),)
    conversations = read_calibration(data).conversations
    assert len(conversations) == 41
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(TINY_BASE / "tokenizer.json"))

    def ids(with_template: ChatTemplate) -> list[int]:
        texts = [with_template.render(c.messages, add_generation_prompt=False) for c in conversations]
        return [token for text in texts for token in tokenizer.encode(text, add_special_tokens=False).ids]

    assert distance(means(found), means(compute_imatrix(base, ids(given), **settings))) == 0
    own = compute_imatrix(base, read_calibration(data), **settings)
    assert distance(means(found), means(own)) > TOLERANCE
    assert distance(means(own), means(compute_imatrix(base, ids(BASE_TEMPLATE), **settings))) == 0


def test_rows_of_plain_text_are_measured_without_a_template(base: Path, tmp_path: Path) -> None:
    data = tmp_path / "text.json"
    texts = ["Is it waterproof? Yes, it is. " * 40, "How long does it last? " * 40]
    data.write_text(json.dumps([{"text": text} for text in texts]))
    source = read_calibration(data)
    assert [conversation.plain for conversation in source.conversations] == [True, True]
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(TINY_BASE / "tokenizer.json"))
    plain = ChatTemplate(BUILTIN["plain"])
    named = json.loads((TINY_BASE / "tokenizer_config.json").read_text())
    ends = {which: named[which] for which in ("bos_token", "eos_token")}
    whole = [plain.render(c.messages, add_generation_prompt=False, **ends) for c in source.conversations]
    ids = [token for text in whole for token in tokenizer.encode(text, add_special_tokens=False).ids]
    settings: dict[str, Any] = {"chunk_size": SIZE, "chunks": 2, "threads": 1}
    assert (
        distance(means(compute_imatrix(base, source, **settings)), means(compute_imatrix(base, ids, **settings))) == 0
    )


def test_conversations_need_a_template(experts_base: Path, tmp_path: Path) -> None:
    data = tmp_path / "talk.jsonl"
    data.write_text('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n' * 99)
    with pytest.raises(ModelFileError, match=r"no chat template, which .*talk\.jsonl:1 needs"):
        compute_imatrix(experts_base, read_calibration(data), chunk_size=SIZE)
    data.write_text('{"prompt": "Is it red?", "completion": " No."}\n' * 99)  # text to go on with needs none
    found = compute_imatrix(experts_base, read_calibration(data), chunk_size=SIZE, threads=1)
    assert found.chunk_count >= 3


def test_conversations_that_the_template_refuses_are_named(base: Path, tmp_path: Path) -> None:
    data = tmp_path / "talk.jsonl"
    data.write_text('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n' * 2)
    refusing = ChatTemplate("{{ raise_exception('only poems') }}")
    with pytest.raises(DataFileError, match=r"2 problems\): .*talk\.jsonl:1: .*only poems.*talk\.jsonl:2"):
        compute_imatrix(base, read_calibration(data), chunk_size=SIZE, chat_template=refusing)


def test_plain_text_is_read_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b" one\r\n\r\ntwo\n\n")
    assert read_calibration(path) == CalibrationText(str(path), " one\r\n\r\ntwo\n")
    for data, message in ((b"\n", "empty"), (b"", "empty"), (b"ab\xff", r"not UTF-8 text \(byte 2\)")):
        path.write_bytes(data)
        with pytest.raises(DataFileError, match=message):
            read_calibration(path)
    with pytest.raises(DataFileError, match="No such file"):
        read_calibration(tmp_path / "none.txt")


# What goes wrong


@pytest.mark.parametrize("source", ["a lamp", [5, 6, 7], CalibrationText("poem.txt", "a lamp")])
def test_too_little_text_says_how_much_is_needed(base: Path, source: Any) -> None:
    name = r"poem\.txt" if isinstance(source, CalibrationText) else "the text"
    with pytest.raises(DataFileError, match=rf"{name} is \d tokens long; a window takes 512"):
        compute_imatrix(base, source)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"chunk_size": 8}, "chunk_size is 8, expected a whole number, 16 or more"),
        ({"chunks": 0}, "chunks is 0"),
        ({"threads": -1}, "threads is -1"),
        ({"batch_tokens": 2.5}, r"batch_tokens is 2\.5"),
        ({"chunk_size": 513}, r"windows of 513 tokens; .* was trained with 512"),
        ({"adapter": Path("x.gguf"), "adapter_scale": float("nan")}, "scale is nan"),
    ],
)
def test_settings_out_of_range(base: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        compute_imatrix(base, "a lamp", **settings)


def test_files_that_are_no_bases_or_adapters(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="this is a GGUF adapter"):
        compute_imatrix(adapters["red"], "a lamp")
    with pytest.raises(ModelFileError, match="this is a GGUF base"):
        compute_imatrix(base, "a lamp", adapter=base)
    with pytest.raises(ModelFileError, match="cannot be read"):
        compute_imatrix(tmp_path / "none.gguf", "a lamp")


def test_tokens_that_the_base_does_not_have(base: Path) -> None:
    with pytest.raises(DataFileError, match=r"token 4096: .* has 4096 tokens"):
        compute_imatrix(base, [1] * SIZE + [4096], chunk_size=SIZE)


def test_broken_weights_are_told(base: Path, text: str, tmp_path: Path) -> None:
    weight = read_tensors(base)["blk.1.ffn_up.weight"].copy()
    weight[3, 5] = np.nan
    broken = write_copy(base, tmp_path / "nan.gguf", {"blk.1.ffn_up.weight": weight})
    with pytest.raises(EdgeloraError, match=r"blk\.1\.ffn_down\.weight: .* not finite"):
        compute_imatrix(broken, text, chunk_size=SIZE, threads=1)


def test_what_the_callback_raises_comes_out(base: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(node: graph.Node) -> Any:
        raise MemoryError("no room for rows")

    monkeypatch.setattr("edgelora.engine.calibration.values", fail)
    with pytest.raises(MemoryError, match="no room for rows"):
        compute_imatrix(base, text, chunk_size=SIZE, threads=1)


@pytest.fixture
def interrupt() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interrupt")
def test_ctrl_c_gives_up_and_frees_everything(base: Path, text: str) -> None:
    seen: list[int] = []

    def press(done: int, _total: int) -> None:
        seen.append(done)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        compute_imatrix(base, text, chunk_size=SIZE, threads=1, batch_tokens=SIZE, progress=press)
    assert len(seen) < 5
    assert compute_imatrix(base, text, chunk_size=SIZE, chunks=1, threads=1).chunk_count == 1


def test_a_llama_cpp_of_another_layout_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    fields = [field for field in graph.Node._fields_ if field[0] != "view_offset"]  # what is behind it moves up
    moved = type("Node", (graph.ctypes.Structure,), {"_fields_": fields, "source": graph.Node.source})
    monkeypatch.setattr(graph, "Node", moved)
    graph.operations.cache_clear()
    try:
        with pytest.raises(EdgeloraError, match="lays out its graphs"):
            graph.operations()
    finally:
        graph.operations.cache_clear()
