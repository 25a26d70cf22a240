"""What the tests do in the page."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, Locator, Page, expect

from tests.edgelora.serve.page.stub import REPLIES

WIDE = {"width": 1280, "height": 800}
PHONE = {"width": 390, "height": 844}
PATIENCE_MS = 15_000
QUESTION = "How long does the battery last?"
ENDLESS = tuple(f" {number}" for number in range(3000))
ANSWER = {name: "".join(tokens) for name, tokens in REPLIES.items()}


def opened(browser: Browser, url: str, **settings: Any) -> Iterator[Page]:
    """The page in a browser without a past; nothing that it logs as an error goes unseen."""
    context = browser.new_context(**{"viewport": WIDE, "reduced_motion": "reduce", **settings})
    context.set_default_timeout(PATIENCE_MS)
    page = context.new_page()
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda said: problems.append(said.text) if said.type == "error" else None)
    page.goto(url)
    expect(page.locator("#lanes select").first).not_to_have_value("")
    yield page
    context.close()
    # What the browser says of a refused request is told to the user by the page.
    assert [problem for problem in problems if "Failed to load resource" not in problem] == []


def ask(page: Page, text: str = QUESTION) -> None:
    page.get_by_role("textbox", name="Prompt", exact=True).fill(text)
    page.get_by_role("button", name="Send").click()


def reply(page: Page, at: int = -1) -> Locator:
    return page.locator(".turn.reply").nth(at)


def until(page: Page, holds: Callable[[], bool]) -> None:
    for _ in range(PATIENCE_MS // 50):
        if holds():
            return
        page.wait_for_timeout(50)
    pytest.fail("it did not come to that")


def compare(page: Page, third: str = "") -> None:
    page.get_by_role("link", name="Compare").click()
    if third:
        page.get_by_role("combobox", name="Adapter C").select_option(third)
    ask(page)
    expect(page.get_by_role("button", name="Better")).to_have_count(3 if third else 2)


def answer(page: Page, name: str) -> Locator:
    return page.get_by_role("group", name=f"Answer of {name}")


def tab_to(page: Page, wanted: Locator) -> None:
    """Presses Tab until there; each stop on the way can be seen to have the focus."""
    for _ in range(40):
        page.keyboard.press("Tab")
        seen = page.evaluate("getComputedStyle(document.activeElement).outlineStyle !== 'none'")
        assert seen or page.evaluate("document.activeElement === document.body")
        if wanted.evaluate("element => element === document.activeElement"):
            return
    pytest.fail(f"Tab does not lead to {wanted}")


def findings(page: Page) -> list[str]:
    """What axe-core calls serious or critical."""
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page).response["violations"]
    return [
        f"{each['id']}: {node['html']}"
        for each in found
        if each["impact"] in ("serious", "critical")
        for node in each["nodes"]
    ]
