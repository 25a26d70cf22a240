"""Chat templates render as transformers renders them, inside a sandbox."""

from __future__ import annotations

import pytest

from edgelora.errors import ModelFileError, SettingsError
from edgelora.messages import Message
from edgelora.template import BUILTIN, ChatTemplate, resolve

TALK: list[Message] = [
    {"role": "system", "content": "Be <b>brief</b> & kind."},
    {"role": "user", "content": "Hi\nthere"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "日本"},
]


def render(source: str, messages: list[Message] = TALK, *, prompt: bool = True) -> str:
    return ChatTemplate(source).render(messages, add_generation_prompt=prompt, bos_token="<s>", eos_token="</s>")


def test_chatml() -> None:
    assert render(BUILTIN["chatml"], TALK[1:3], prompt=False) == (
        "<|im_start|>user\nHi\nthere<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n"
    )
    assert render(BUILTIN["chatml"], TALK[1:2]).endswith("<|im_start|>assistant\n")


def test_llama2_folds_the_system_prompt_into_the_first_turn() -> None:
    assert render(BUILTIN["llama2"]) == (
        "<s>[INST] <<SYS>>\nBe <b>brief</b> & kind.\n<</SYS>>\n\nHi\nthere [/INST] Hello. </s><s>[INST] 日本 [/INST]"
    )


AWKWARD = """{%- for m in messages %}
    {%- if m.role == 'assistant' %}
        {%- generation %}{{ m.content | tojson }}{{ eos_token }}{%- endgeneration %}
    {%- else %}
        {{- m.content | tojson(indent=2) }}
        {%- if loop.index > 3 %}{% break %}{% endif %}
    {%- endif %}
  {% endfor %}
{% if tools is none %}no tools{% endif %}"""


@pytest.mark.train
@pytest.mark.parametrize("source", [*BUILTIN.values(), AWKWARD], ids=[*BUILTIN, "awkward"])
def test_same_text_as_transformers(source: str) -> None:
    render_jinja_template = pytest.importorskip("transformers.utils.chat_template_utils").render_jinja_template
    for prompt in (True, False):
        (theirs,), _ = render_jinja_template(
            [TALK], chat_template=source, add_generation_prompt=prompt, bos_token="<s>", eos_token="</s>"
        )
        assert render(source, prompt=prompt) == theirs


def test_a_template_may_refuse_a_conversation() -> None:
    source = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}ok"
    assert render(source, TALK[1:]) == "ok"
    with pytest.raises(ModelFileError, match="no system role"):
        render(source)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ self._TemplateReference__context.environment.globals.clear() }}",
    ],
)
def test_the_sandbox_holds(source: str) -> None:
    with pytest.raises(ModelFileError):
        render(source)


@pytest.mark.parametrize("source", ["{% for %}", "{{ 'open", "{% include '/etc/passwd' %}"])
def test_what_is_not_a_template(source: str) -> None:
    with pytest.raises(ModelFileError):
        render(source)


def test_resolve(tmp_path: object) -> None:
    assert resolve("chatml") == BUILTIN["chatml"]
    with pytest.raises(SettingsError, match="unknown chat template 'chatlm'") as caught:
        resolve("chatlm")
    assert "chatml" in caught.value.hint


@pytest.mark.parametrize(
    "source", ["{% for a in [1] %}" * 25 + "x" + "{% endfor %}" * 25, "{{" + "(" * 250 + "1" + ")" * 250 + "}}"]
)
def test_a_template_that_python_cannot_compile_is_refused(source: str) -> None:
    with pytest.raises(ModelFileError, match="not a chat template"):
        ChatTemplate(source)


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'a' * 10**13 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    ],
)
def test_a_template_that_takes_all_there_is_is_stopped(source: str) -> None:
    with pytest.raises(ModelFileError, match="does not accept this conversation"):
        ChatTemplate(source).render([{"role": "user", "content": "x"}], add_generation_prompt=True)


def test_a_template_that_takes_too_long_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgelora.template.RENDER_SECONDS", 0.05)
    source = "{% set r = range(99999) %}{% for a in r %}{% for b in r %}{{ b }}{% endfor %}{% endfor %}"
    with pytest.raises(ModelFileError, match="took longer"):
        ChatTemplate(source).render([{"role": "user", "content": "x"}], add_generation_prompt=True)


def test_twin_an_ordinary_loop_is_not_stopped() -> None:
    source = "{% for a in range(3) %}{{ a }}{{ loop.length }}{% endfor %}"
    assert ChatTemplate(source).render([], add_generation_prompt=True) == "031323"
