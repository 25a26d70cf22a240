"""KV of one tenant is never used for another, beyond the tokens that the operator wrote."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from edgelora.contract import Contract
from edgelora.engine.engine import Engine
from edgelora.engine.planning import MAX_BEGINNINGS
from edgelora.engine.runtime import Settings
from edgelora.engine.stream import Request
from edgelora.errors import SettingsError
from tests.edgelora.conftest import write_adapter
from tests.edgelora.engine.runtimes import prompt_logits, runtime

SYSTEM = "Fennick is a village at a river where a miller and a fisherman live, and boats bring bread. " * 3
SECRET = "the storm took the boats of the old fisherman, and nobody told the miller of it " * 4
ONE = {"temperature": 0, "max_tokens": 1}
ROUNDING = 0.05  # as in test_stale_kv


@pytest.fixture(scope="module")
def pip(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter whose system prompt is the operator's."""
    contract = Contract(chat_template=None, system=SYSTEM)
    return write_adapter(tmp_path_factory.mktemp("pip") / "pip.gguf", base, 7, contract=contract)


def asked(text: str, tenant: str | None, adapter: str = "pip") -> Request:
    return Request(text, adapter, sampling=ONE, tenant=tenant)


@pytest.mark.parametrize("parallel", [1, 3])
def test_another_tenants_words_are_read_anew(parallel: int, base: Path, pip: Path) -> None:
    """Where they were said last: in a sequence, in another one, or in a copy that had to make room."""
    with Engine(base, {"pip": pip}, threads=1, parallel=parallel, n_ctx=512) as engine:
        own = engine.count_tokens("a", "pip")
        first = engine.submit(asked(SECRET, "alice")).completion
        assert first.cached_tokens == 0
        again = engine.submit(asked(SECRET, "alice")).completion
        assert again.cached_tokens == again.prompt_tokens - 1
        for tenant in ("bob", None):
            other = engine.submit(asked(SECRET, tenant)).completion
            assert other.cached_tokens < own, "somebody else's words were known already"
        assert engine.submit(asked(SECRET, "bob")).completion.cached_tokens > own
        assert not engine.submit(asked("hello", "carol", "none")).completion.cached_tokens
        assert engine.submit(asked(SECRET, "carol")).completion.cached_tokens < own


def test_what_the_operator_wrote_is_read_once_for_all(base: Path, pip: Path) -> None:
    with Engine(base, {"pip": pip}, threads=1, parallel=2, n_ctx=512) as engine:
        system = engine.count_tokens("a", "pip") - engine.count_tokens("a", "none")
        assert not engine.submit(asked("What is the river like?", "alice")).completion.cached_tokens
        for tenant in ("bob", "carol"):
            done = engine.submit(asked("Where are the boats?", tenant)).completion
            assert system - 8 <= done.cached_tokens <= engine.count_tokens("", "pip")


def test_a_system_prompt_of_the_tenants_own_is_theirs(base: Path, adapters: dict[str, Path]) -> None:
    conversation = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "hello"}]
    with Engine(base, adapters, threads=1, parallel=2, n_ctx=512) as engine:
        for tenant, most in (("alice", 0), ("bob", 12), ("alice", 1000)):
            done = engine.chat(conversation, adapter="red", sampling=ONE, tenant=tenant)
            assert done.cached_tokens <= most
        assert done.cached_tokens == done.prompt_tokens - 1


def test_what_was_kept_on_disk_stays_theirs(base: Path, pip: Path, tmp_path: Path) -> None:
    for tenant, is_known in (("alice", False), ("bob", False), ("alice", True), ("bob", True), (None, False)):
        with Engine(base, {"pip": pip}, threads=1, parallel=1, n_ctx=512, cache_dir=tmp_path) as engine:
            done = engine.submit(asked(SECRET, tenant)).completion
            assert (done.cached_tokens == done.prompt_tokens - 1) == is_known
            assert is_known or done.cached_tokens < engine.count_tokens("a", "pip")


def test_logits_after_a_random_history_are_those_of_a_fresh_engine(
    base: Path, pip: Path, adapters: dict[str, Path]
) -> None:
    chosen, shared = random.Random(4), 0
    settings = Settings(base, threads=1, parallel=2, n_ctx=512, cache_bytes=1 << 20)
    loaded = {"pip": pip, **adapters}
    with runtime(settings, loaded) as used, runtime(settings, loaded) as fresh:
        for _ in range(40):
            text = " ".join(chosen.choices([SECRET, "hello", "boats and bread", "the miller"], k=2))
            request = asked(text, chosen.choice(["alice", "bob", None]), chosen.choice(["pip", "red", "none"]))
            got, completion = prompt_logits(used, request)
            shared += completion.cached_tokens
            for sequence in fresh.cache.sequences:
                fresh.cache.drop(sequence)
            fresh.cache._kept.clear()
            want, _ = prompt_logits(fresh, request)
            assert np.abs(got - want).max() < ROUNDING
    assert shared > 500


def test_the_beginnings_that_are_known_do_not_grow_without_end(base: Path, pip: Path) -> None:
    with runtime(Settings(base, threads=1, n_ctx=512), {"pip": pip}) as made:
        known = made.planner._beginnings
        known.update({(str(n), ""): [] for n in range(MAX_BEGINNINGS)})
        plan = made.planner.plan(asked(SECRET, "alice"))
        assert len(known) == 1
        assert 0 < plan.public < len(plan.tokens)
        assert made.planner.plan(asked(SECRET, None)).public == 0


def test_a_tenant_is_a_name(base: Path) -> None:
    with Engine(base, threads=1) as engine, pytest.raises(SettingsError, match="tenant is 7, expected text"):
        engine.chat("hello", tenant=7)  # type: ignore[arg-type]
