"""What the browser keeps of a conversation, and whose it is."""

from __future__ import annotations

import json
from typing import Any

from playwright.sync_api import Browser, Page, expect

from tests.edgelora.serve.page.browsing import ANSWER, ENDLESS, QUESTION, ask, reply
from tests.edgelora.serve.page.stub import REPLIES, Stub

KEPT = "edgelora.conversation"


def kept(page: Page, storage: str = "localStorage") -> list[dict[str, Any]]:
    turns: list[dict[str, Any]] = json.loads(page.evaluate(f"{storage}.getItem('{KEPT}')") or "[]")
    return turns


def test_a_conversation_goes_on_after_a_reload(page: Page, stub: Stub) -> None:
    ask(page)
    expect(reply(page).locator(".text")).to_have_text(ANSWER["support"])
    expect(page.locator("#kept")).to_have_text("Kept in this browser")
    page.reload()
    expect(reply(page).locator("h2")).to_have_text("support")
    expect(reply(page).locator(".text")).to_have_text(ANSWER["support"])
    expect(reply(page).locator(".end")).to_contain_text(f"{len(REPLIES['support'])} tokens")
    ask(page, "And then?")
    expect(reply(page, 1).locator(".text")).to_have_text(ANSWER["support"])
    said = [(message["role"], message["content"]) for message in stub.asked[-1]["messages"]]
    assert said == [("user", QUESTION), ("assistant", ANSWER["support"]), ("user", "And then?")]
    expect(page.get_by_role("button", name="Again")).to_have_count(1)


def test_what_was_written_when_the_page_was_left_stays(page: Page, stub: Stub) -> None:
    stub.replies["support"], stub.pause = ENDLESS, 0.01
    ask(page)
    expect(reply(page).locator(".text")).to_contain_text(" 5 ")
    page.reload()
    expect(reply(page).locator(".text")).to_contain_text(" 0 1 2 3 4 5 ")
    expect(reply(page).locator(".end")).to_contain_text("stopped")
    stub.replies = dict(REPLIES)
    page.get_by_role("button", name="Again").click()
    expect(reply(page).locator(".text")).to_have_text(ANSWER["support"])
    expect(page.locator(".turn")).to_have_count(2)


def test_a_question_whose_answer_failed_can_be_asked_again_after_a_reload(page: Page, stub: Stub) -> None:
    stub.cut_after = 3
    ask(page)
    expect(reply(page).locator(".failure")).to_be_visible()
    page.reload()
    expect(page.locator(".turn")).to_contain_text("The answer was lost.")
    stub.cut_after = None
    page.get_by_role("button", name="Try again").click()
    expect(reply(page).locator(".text")).to_have_text(ANSWER["support"])
    expect(page.get_by_text("The answer was lost.")).to_be_hidden()
    assert stub.asked[-1]["messages"] == [{"role": "user", "content": QUESTION}]


def test_a_new_conversation_keeps_nothing_of_the_old_one(page: Page, stub: Stub) -> None:
    ask(page)
    expect(reply(page).locator(".text")).to_have_text(ANSWER["support"])
    page.get_by_role("button", name="New conversation").click()
    expect(page.locator(".turn")).to_have_count(0)
    assert page.evaluate("[sessionStorage.length, localStorage.length]") == [0, 0]
    page.reload()
    expect(page.locator("#chat .empty")).to_be_visible()


def test_of_a_long_conversation_the_last_turns_are_kept_and_the_page_says_so(page: Page, stub: Stub) -> None:
    stub.replies["support"] = ("x" * 400_000,)
    for number in range(3):
        ask(page, f"{number}")
        expect(page.get_by_role("button", name="Again")).to_be_visible()
        expect(page.locator(".turn")).to_have_count(2 * number + 2)
    expect(page.locator("#kept")).to_have_text("Kept in this browser: the last 4 turns")
    assert [turn["content"] for turn in kept(page) if turn["role"] == "user"] == ["1", "2"]
    stub.replies["support"] = ("x" * 1_100_000,)
    ask(page)
    expect(page.locator("#kept")).to_have_text("This browser has no room to keep the conversation")
    assert kept(page) == []


def test_a_browser_that_keeps_nothing_is_told_of(page: Page, stub: Stub) -> None:
    page.evaluate("() => { Storage.prototype.setItem = () => { throw new DOMException('', 'QuotaExceededError') } }")
    ask(page)
    expect(reply(page).locator(".text")).to_have_text(ANSWER["support"])
    expect(page.locator("#kept")).to_have_text("This browser has no room to keep the conversation")


def test_what_something_else_has_kept_there_does_no_harm(page: Page, stub: Stub) -> None:
    for text in ("{", "7", '[{"role": "user"}, null, {"role": "system", "content": "x"}]'):
        page.evaluate(f"(text) => localStorage.setItem('{KEPT}', text)", text)
        page.reload()
        expect(page.locator("#chat .empty")).to_be_visible()
    ask(page)
    expect(reply(page).locator(".text")).to_have_text(ANSWER["support"])


def use_key(page: Page, key: str) -> None:
    page.locator("#key-field").fill(key)
    page.get_by_role("button", name="Use key").click()


def test_a_key_is_asked_for_and_lasts_as_long_as_the_tab(browser: Browser, stub: Stub) -> None:
    stub.key = "open sesame"
    context = browser.new_context()
    page = context.new_page()
    page.goto(stub.url)
    expect(page.get_by_label("This server asks for a key.")).to_be_visible()
    use_key(page, "wrong")
    expect(page.get_by_label("The server does not know this key.")).to_be_visible()
    expect(page.get_by_role("alert")).to_be_hidden()
    use_key(page, "open sesame")
    expect(page.locator("#key")).to_be_hidden()
    page.reload()
    expect(page.locator("#load")).to_contain_text("ready")
    assert page.evaluate("[sessionStorage.length, localStorage.length]") == [1, 0]
    page.get_by_role("button", name="Forget key").click()
    expect(page.get_by_label("This server asks for a key.")).to_be_visible()
    context.close()


def test_a_keys_conversation_is_kept_in_its_tab_and_forgotten_with_it(page: Page, stub: Stub) -> None:
    stub.key = "open sesame"
    expect(page.locator("#key")).to_be_visible()
    use_key(page, "open sesame")
    ask(page)
    expect(reply(page).locator(".text")).to_have_text(ANSWER["support"])
    expect(page.locator("#kept")).to_have_text("Kept in this tab")
    assert (len(kept(page, "sessionStorage")), kept(page)) == (2, [])
    page.reload()
    expect(reply(page).locator(".text")).to_have_text(ANSWER["support"])
    page.get_by_role("button", name="Forget key").click()
    expect(page.locator(".turn")).to_have_count(0)
    assert page.evaluate("[sessionStorage.length, localStorage.length]") == [0, 0]


def test_another_key_finds_nothing_of_the_one_before(page: Page, stub: Stub) -> None:
    stub.key = "first"
    expect(page.locator("#key")).to_be_visible()
    use_key(page, "first")
    ask(page)
    expect(reply(page).locator(".text")).to_have_text(ANSWER["support"])
    page.get_by_role("link", name="Compare").click()
    ask(page)
    expect(page.get_by_role("button", name="Better")).to_have_count(2)
    stub.key = "second"
    expect(page.locator("#key")).to_be_visible()
    use_key(page, "second")
    expect(page.locator("#load")).to_contain_text("ready")
    expect(page.locator(".trial")).to_have_count(0)
    page.get_by_role("link", name="Chat").click()
    expect(page.locator(".turn")).to_have_count(0)
    assert (kept(page, "sessionStorage"), kept(page)) == ([], [])


def test_a_question_that_wanted_a_key_is_there_when_it_is_given(page: Page, stub: Stub) -> None:
    stub.key = "open sesame"
    ask(page)
    expect(reply(page).locator(".failure")).to_be_visible()
    use_key(page, "wrong")
    expect(page.get_by_label("The server does not know this key.")).to_be_visible()
    use_key(page, "open sesame")
    page.get_by_role("button", name="Try again").click()
    expect(reply(page).locator(".text")).to_have_text(ANSWER["support"])
    assert (len(kept(page, "sessionStorage")), kept(page)) == (2, [])
