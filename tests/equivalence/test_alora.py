"""Activated LoRA (arXiv:2504.12397): PEFT applies it from the last invocation on, to its first token already.

llama-server begins one token earlier: it feeds all but one of the tokens before the invocation without the adapter
(`alora_invocation_start - 1`, tools/server/server-context.cpp), so what it computes is not what was trained.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
import pytest

from converters.adapter import AdapterOptions, convert_adapter
from converters.errors import UnsupportedAdapterError
from tests.equivalence import llamacpp
from tests.equivalence.effects import TOLERANCE, Adapted, adapt, tokens_of
from tests.equivalence.peft_methods import Case
from tests.equivalence.tiny_models import build, some_ids

pytestmark = [pytest.mark.train, pytest.mark.filterwarnings("ignore")]  # of PEFT, about its own methods

KEY = "adapter.alora.invocation_tokens"
SEEN = 10 * TOLERANCE
MODELS = ("llama", "qwen3", "phi-3", "gpt-neox")


def invocation(model: str, folder: Path) -> tuple[list[int], int]:
    """Three tokens of those that are compared, and where they come last."""
    ids = tokens_of(model, build(model, folder))
    return ids[20:23], 20


def activated(model: str, folder: Path) -> tuple[Adapted, int]:
    tokens, start = invocation(model, folder / "seen")
    lora = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "alora_invocation_tokens": tokens}
    return adapt(Case("LoraConfig", lora, model=model), folder), start


def error(adapted: Adapted, adapter: Path, begins: int) -> float:
    change = llamacpp.logits(adapted.plain, adapted.ids, adapter, begins=begins) - llamacpp.logits(
        adapted.plain, adapted.ids
    )
    return float(np.linalg.norm(change - adapted.effect) / np.linalg.norm(adapted.effect))


@pytest.mark.parametrize("model", MODELS)
def test_it_begins_with_the_invocation(model: str, tmp_path: Path) -> None:
    adapted, start = activated(model, tmp_path)
    out = convert_adapter(adapted.folder, adapted.base, tmp_path / "a.gguf", AdapterOptions("f32")).path
    assert not adapted.effect[:start].any()
    assert error(adapted, out, start) < TOLERANCE
    assert error(adapted, out, start - 1) > SEEN, "where llama-server begins"
    assert error(adapted, out, start + 1) > SEEN
    assert error(adapted, out, 0) > SEEN


def test_the_last_of_several_invocations_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = some_ids(activated("llama", tmp_path / "first")[0].base, 40)
    monkeypatch.setattr("tests.equivalence.effects.some_ids", lambda base, count: [*ids[20:23], *ids[:30]])
    adapted = adapt(
        Case("LoraConfig", {"r": 4, "target_modules": ["q_proj", "v_proj"], "alora_invocation_tokens": ids[20:23]}),
        tmp_path,
    )
    out = convert_adapter(adapted.folder, adapted.base, tmp_path / "a.gguf", AdapterOptions("f32")).path
    assert error(adapted, out, 23) < TOLERANCE


def test_the_tokens_are_where_llama_cpp_reads_them(tmp_path: Path) -> None:
    adapted, start = activated("llama", tmp_path)
    out = convert_adapter(adapted.folder, adapted.base, tmp_path / "a.gguf").path
    field = gguf.GGUFReader(out).fields[KEY]
    assert field.types == [gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.UINT32]
    assert field.contents() == adapted.ids[start : start + 3]
    assert list(invoked(adapted.plain, out)) == adapted.ids[start : start + 3]


def invoked(base: Path, adapter: Path) -> Iterator[int]:
    """The tokens by llama.cpp's own reading."""
    with llamacpp.loaded(base) as model:
        loaded = llama_cpp.llama_adapter_lora_init(model, str(adapter).encode())
        count = llama_cpp.llama_adapter_get_alora_n_invocation_tokens(loaded)
        tokens: Sequence[int] = llama_cpp.llama_adapter_get_alora_invocation_tokens(loaded)
        yield from (int(tokens[number]) for number in range(count))


def test_it_is_not_merged(tmp_path: Path) -> None:
    adapted, _ = activated("llama", tmp_path)
    with pytest.raises(UnsupportedAdapterError, match="leaves everything before its invocation to the base"):
        adapted.merged_error()
    assert not (tmp_path / "merged.gguf").exists()


def test_no_invocation_tokens_are_a_plain_adapter(tmp_path: Path) -> None:
    """PEFT takes an empty list for none."""
    case = Case("LoraConfig", {"r": 4, "target_modules": ["q_proj", "v_proj"], "alora_invocation_tokens": []})
    adapted = adapt(case, tmp_path)
    assert adapted.adapter_error() < TOLERANCE
    assert KEY not in gguf.GGUFReader(tmp_path / "adapter.gguf").fields
    assert adapted.merged_error() < TOLERANCE
