"""Adapters whose weights are numbers and whose logits are none: tried when they are loaded, once for each content."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgelora.engine import adapters as loading
from edgelora.engine.engine import Engine
from edgelora.errors import ModelFileError
from tests.edgelora.conftest import MakeAdapter

QUESTION = "Where does the miller live?"
GREEDY = {"temperature": 0, "max_tokens": 8}
MODES = ["mixed", "switching"]


def huge(make_adapter: MakeAdapter) -> Path:
    """Finite weights in float32, with which the model overflows."""
    return make_adapter("huge", strength=1e30)


@pytest.fixture
def trials(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The scales that adapters were tried at, as it happens."""
    scales, really = list[float](), loading.gives_numbers

    def counted(model: object, weights: object, pointer: object, scale: float, threads: int) -> bool:
        scales.append(scale)
        return really(model, weights, pointer, scale, threads)  # type: ignore[arg-type]

    monkeypatch.setattr(loading, "gives_numbers", counted)
    return scales


@pytest.mark.parametrize("mode", MODES)
def test_an_adapter_without_numbers_stays_out(
    base: Path, adapters: dict[str, Path], make_adapter: MakeAdapter, mode: str
) -> None:
    bad = huge(make_adapter)
    with Engine(base, adapters, threads=1, n_ctx=256, mode=mode) as engine:
        said = engine.chat(QUESTION, adapter="red", sampling=GREEDY).text
        for _ in range(2):
            for refused in (lambda: engine.check_adapter(bad), lambda: engine.load_adapter("red", bad, tried=())):
                with pytest.raises(ModelFileError, match=r"huge\.gguf: with it the model's output is not a number"):
                    refused()
        assert engine.state()["adapters"] == ["red", "blue"]
        assert engine.chat(QUESTION, adapter="red", sampling=GREEDY).text == said
        engine.load_adapter("untried", bad)  # the twin: nothing but the trial keeps it out
        with pytest.raises(ModelFileError, match="not a number"):
            engine.chat(QUESTION, adapter="untried", sampling=GREEDY)


@pytest.mark.parametrize("mode", MODES)
def test_a_content_is_tried_once_at_a_scale(
    base: Path, adapters: dict[str, Path], trials: list[float], mode: str
) -> None:
    with Engine(base, threads=1, n_ctx=256, mode=mode) as engine:
        engine.check_adapter(adapters["red"])
        digest = engine.load_adapter("red", adapters["red"], tried=()).content_hash
        engine.load_adapter("again", adapters["red"], tried=())
        engine.unload_adapter("red")
        engine.load_adapter("red", adapters["red"], tried=())
        assert trials == [1.0]
        engine.load_adapter("half", adapters["red"], 0.5, tried=())
        assert trials == [1.0, 0.5]
    with Engine(base, threads=1, n_ctx=256, mode=mode) as engine:
        engine.load_adapter("red", adapters["red"], tried=[digest])
        engine.load_adapter("blue", adapters["blue"])
        assert trials == [1.0, 0.5]


def test_a_scale_that_is_too_large_is_found(base: Path, adapters: dict[str, Path]) -> None:
    with Engine(base, threads=1, n_ctx=256) as engine:
        with pytest.raises(ModelFileError, match="not a number"):
            engine.load_adapter("red", adapters["red"], 1e30, tried=())
        engine.load_adapter("red", adapters["red"], tried=())


@pytest.mark.parametrize("mode", MODES)
def test_a_reply_under_way_does_not_notice(
    base: Path, adapters: dict[str, Path], make_adapter: MakeAdapter, mode: str
) -> None:
    wanted = {**GREEDY, "max_tokens": 60}
    with Engine(base, {"red": adapters["red"]}, threads=1, n_ctx=256, mode=mode) as engine:
        said = engine.chat(QUESTION, adapter="red", sampling=wanted).text
        stream = engine.stream(QUESTION, adapter="red", sampling=wanted)
        first = next(stream)
        engine.check_adapter(adapters["blue"])
        with pytest.raises(ModelFileError):
            engine.check_adapter(huge(make_adapter))
        assert first + "".join(stream) == said
