"""All of it without a mouse, and for a screen reader."""

from __future__ import annotations

from playwright.sync_api import Page, expect

from tests.edgelora.serve.page.browsing import ANSWER, ENDLESS, QUESTION, answer, ask, reply, tab_to
from tests.edgelora.serve.page.stub import REPLIES, Stub


def test_all_of_it_by_keyboard_alone(page: Page, stub: Stub) -> None:
    keyboard = page.keyboard
    expect(page.get_by_role("textbox", name="Prompt", exact=True)).to_be_focused()
    keyboard.type("first line")
    keyboard.press("Shift+Enter")
    keyboard.type("second")
    keyboard.press("Enter")
    expect(reply(page).locator(".text")).to_have_text(ANSWER["support"])
    assert stub.asked[0]["messages"][0]["content"] == "first line\nsecond"
    stub.replies["support"], stub.pause = ENDLESS, 0.01
    keyboard.type("more")
    keyboard.press("Enter")
    expect(reply(page).locator(".text")).to_contain_text(" 3 ")
    keyboard.press("Escape")
    expect(reply(page).locator(".end")).to_contain_text("stopped")
    stub.replies, stub.pause = dict(REPLIES), 0
    tab_to(page, page.get_by_role("link", name="Compare"))
    keyboard.press("Enter")
    tab_to(page, page.get_by_role("textbox", name="Prompt", exact=True))
    keyboard.type(QUESTION)
    keyboard.press("Enter")
    expect(page.get_by_role("button", name="Better")).to_have_count(2)
    tab_to(page, answer(page, "support"))
    keyboard.press("ArrowDown")
    expect(answer(page, "support").locator(".at")).to_have_text(" of")
    expect(page.locator("#choices .chosen")).to_contain_text("␣of")
    keyboard.press("ArrowLeft")
    expect(page.locator("#choices .chosen")).to_contain_text("␣battery")
    keyboard.press("Escape")
    expect(page.locator("#choices")).to_be_hidden()
    tab_to(page, page.get_by_role("button", name="Better: A, support"))
    keyboard.press("Space")
    expect(page.locator("#votes-say")).to_have_text("1 vote: support (1)")


def test_a_screen_reader_hears_sentences(page: Page, stub: Stub) -> None:
    ask(page)
    expect(reply(page).locator(".end")).to_contain_text("tokens")
    said = page.locator("#spoken p").all_text_contents()
    assert said[:3] == [
        "support answers.",
        "The battery of your Lumo lamp lasts 12 hours.",
        "A full charge takes 3 hours.",
    ]
    assert page.locator("[aria-live] .turn, [role=log] .turn, .turn [aria-live]").count() == 0
