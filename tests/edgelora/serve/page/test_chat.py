"""The conversation: asked, streamed, stopped, asked again, with what was set and no more."""

from __future__ import annotations

import json

from playwright.sync_api import Page, expect

from tests.edgelora.serve.page.browsing import ANSWER, ENDLESS, QUESTION, ask, reply, until
from tests.edgelora.serve.page.stub import REPLIES, Stub, listed


def test_a_question_is_answered_by_the_chosen_adapter(page: Page, stub: Stub) -> None:
    ask(page)
    expect(reply(page).locator(".text")).to_have_text(ANSWER["support"])
    expect(reply(page).locator(".end")).to_contain_text(f"{len(REPLIES['support'])} tokens")
    expect(page.get_by_role("textbox", name="Prompt", exact=True)).to_have_value("")
    [body] = stub.asked
    assert body["messages"] == [{"role": "user", "content": QUESTION}]
    assert (body["model"], body["stream"], body["stream_options"]) == ("support", True, {"include_usage": True})
    assert not {"lora_scale", "temperature", "top_p", "max_tokens", "seed", "logprobs"} & set(body)


def test_text_is_there_while_it_is_written_and_stop_keeps_it(page: Page, stub: Stub) -> None:
    stub.replies["support"], stub.pause = ENDLESS, 0.01
    ask(page)
    expect(reply(page).locator(".text")).to_contain_text(" 5 ")
    page.get_by_role("button", name="Stop").click()
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    expect(reply(page).locator(".end")).to_contain_text("stopped")
    written = reply(page).locator(".text").text_content() or ""
    assert "".join(ENDLESS).startswith(written)
    assert len(written) < len("".join(ENDLESS))
    until(page, lambda: stub.given_up == 1)
    stub.replies["support"] = (" ok",)
    ask(page, "And then?")
    expect(reply(page).locator(".text")).to_have_text(" ok")
    assert stub.asked[-1]["messages"] == [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": written},
        {"role": "user", "content": "And then?"},
    ]


def test_each_turn_may_be_another_adapters(page: Page, stub: Stub) -> None:
    ask(page)
    expect(reply(page).locator(".text")).to_have_text(ANSWER["support"])
    page.get_by_role("combobox", name="Adapter").select_option("base")
    expect(page.get_by_role("slider", name="Scale")).to_be_disabled()
    ask(page, "And you?")
    expect(reply(page).locator("h2")).to_have_text("base")
    expect(reply(page).locator(".text")).to_have_text(ANSWER["base"])
    expect(reply(page, 0).locator("h2")).to_have_text("support")
    assert [body["model"] for body in stub.asked] == ["support", "base"]


def test_only_what_was_set_is_sent(page: Page, stub: Stub) -> None:
    page.get_by_role("combobox", name="Adapter").select_option("extract")
    expect(page.get_by_label("Max tokens")).to_have_attribute("placeholder", "96")
    scale = page.get_by_role("slider", name="Scale")
    expect(scale).to_have_value("0.8")
    scale.press("ArrowLeft")
    page.get_by_label("System prompt").fill("Answer in JSON.")
    page.get_by_label("Temperature").fill("0.5")
    page.get_by_label("Max tokens").fill("3")
    page.get_by_label("Seed").fill("7")
    ask(page)
    expect(reply(page).locator(".text")).to_have_text("The battery lasts")
    [body] = stub.asked
    assert body["messages"][0] == {"role": "system", "content": "Answer in JSON."}
    sent = {name: body.get(name) for name in ("lora_scale", "temperature", "top_p", "max_tokens", "seed")}
    assert sent == {"lora_scale": 0.75, "temperature": 0.5, "top_p": None, "max_tokens": 3, "seed": 7}
    page.get_by_label("Temperature").fill("-1")
    ask(page)
    page.wait_for_timeout(100)
    assert len(stub.asked) == 1


def test_again_asks_the_same_of_another_adapter(page: Page, stub: Stub) -> None:
    ask(page)
    expect(reply(page).locator(".text")).to_have_text(ANSWER["support"])
    page.get_by_role("combobox", name="Adapter").select_option("base")
    page.get_by_role("button", name="Again").click()
    expect(reply(page).locator(".text")).to_have_text(ANSWER["base"])
    expect(page.locator(".turn.reply")).to_have_count(1)
    assert stub.asked[1]["messages"] == stub.asked[0]["messages"]


def test_refused_adapters_say_why_and_one_that_is_dropped_in_appears(page: Page, stub: Stub) -> None:
    page.get_by_text("1 adapter left out").click()
    expect(page.locator("#out")).to_contain_text("broken refused: blk.0.attn_q is 2048x2048 here")
    picker = page.get_by_role("combobox", name="Adapter")
    expect(picker.locator("option")).to_have_text(["base (no adapter)", "support", "extract"])
    stub.models = [listed("base"), listed("new")]
    page.reload()
    expect(picker.locator("option")).to_have_text(["base (no adapter)", "new"])
    expect(picker).to_have_value("new")


def test_load_is_told_at_a_glance(page: Page, stub: Stub) -> None:
    load = page.locator("#load")
    for name, value in (("tok/s", "41.2"), ("running", "3"), ("waiting", "1"), ("adapters in memory", "2")):
        expect(load.locator("div", has_text=name).locator("dd")).to_have_text(value)
    stub.status |= {"running": 12, "tokens_per_second": 97.0}
    expect(load).to_contain_text("12")
    expect(load).to_contain_text("97.0")


def test_events_are_read_wherever_the_network_cuts_them(page: Page) -> None:
    said = page.evaluate(r"""async () => {
        const { Api } = await import("/api.js");
        const events = ': hello\r\n\r\ndata: {"choices": ["é",\r\ndata: 1]}\r\n\r\n'
            + 'data:{"choices":[]}\n\ndata: [DONE]\n\n';
        const bytes = new TextEncoder().encode(events);
        const said = new Set();
        for (let size = 1; size <= bytes.length; size++) {
            window.fetch = async () => new Response(new ReadableStream({ start(controller) {
                for (let at = 0; at < bytes.length; at += size) controller.enqueue(bytes.slice(at, at + size));
                controller.close();
            } }));
            const chunks = [];
            for await (const chunk of new Api(() => {}).stream({})) chunks.push(chunk);
            said.add(JSON.stringify(chunks));
        }
        return [...said];
    }""")
    assert said == ['[{"choices":["é",1]},{"choices":[]}]']


def test_code_between_fences_is_shown_as_code_wherever_the_pieces_are_cut(page: Page) -> None:
    text = "Two ``ticks`` and:\n```python\nif a:\n    b = '```'\n```\nThen ```inline``` and\n\n  ```\nan open end"
    shown = page.evaluate(
        """async (text) => {
            const { Prose } = await import("/prose.js");
            const shown = new Set();
            for (let size = 1; size <= text.length; size++) {
                const element = document.createElement("div");
                const prose = new Prose(element);
                for (let at = 0; at < text.length; at += size) prose.append(text.slice(at, at + size));
                prose.finish();
                shown.add(JSON.stringify([...element.childNodes].map((node) => [node.nodeName, node.textContent])));
            }
            return [...shown];
        }""",
        text,
    )
    assert [json.loads(each) for each in shown] == [
        [
            ["#text", "Two ``ticks`` and:\n"],
            ["PRE", "if a:\n    b = '```'\n"],
            ["#text", "Then ```inline``` and\n\n"],
            ["PRE", "an open end"],
        ]
    ]
