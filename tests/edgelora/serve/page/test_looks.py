"""Screenshots of what the page can look like, and what axe-core finds in each."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.edgelora.serve.page.browsing import ANSWER, PHONE, WIDE, answer, ask, findings, opened, reply
from tests.edgelora.serve.page.stub import Stub, listed


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("view", ["chat", "compare"])
def test_how_it_looks_and_what_axe_finds(browser: Browser, stub: Stub, artifacts: Path, scheme: str, view: str) -> None:
    pytest.importorskip("axe_playwright_python", reason="axe-playwright-python brings axe-core")
    for width, viewport in (("wide", WIDE), ("phone", PHONE)):
        for page in opened(browser, stub.url, viewport=viewport, color_scheme=scheme):
            page.goto(f"{stub.url}#{view}")
            page.screenshot(path=artifacts / f"{view}-empty-{scheme}-{width}.png")
            if view == "compare":
                compare_shown(page)
            else:
                ask(page)
                expect(page.get_by_role("button", name="Again")).to_be_visible()
            page.screenshot(path=artifacts / f"{view}-{scheme}-{width}.png")
            assert findings(page) == []
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_in_the_banner_and_the_key_field(browser: Browser, stub: Stub, scheme: str) -> None:
    pytest.importorskip("axe_playwright_python", reason="axe-playwright-python brings axe-core")
    for page in opened(browser, stub.url, color_scheme=scheme):
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert background == {"light": "rgb(246, 247, 249)", "dark": "rgb(18, 22, 29)"}[scheme]
        stub.status["state"] = "starting"
        ask(page)
        expect(page.get_by_role("alert")).to_contain_text("The engine is starting")
        expect(page.locator(".failure")).to_be_visible()
        assert findings(page) == []
        stub.key = "open sesame"
        expect(page.locator("#key")).to_be_visible()
        assert findings(page) == []


def compare_shown(page: Page) -> None:
    ask(page)
    page.get_by_role("button", name=re.compile("Better: A")).click()
    page.locator(".tokens .parts").first.hover()
    expect(page.locator("#choices")).to_be_visible()


def test_long_names_and_long_words_stay_inside(phone: Page, stub: Stub) -> None:
    name = "customer-" * 12
    stub.models, stub.replies = [listed("base"), listed(name)], {name: ("x" * 500,), "base": ("y" * 500,)}
    phone.reload()
    expect(phone.locator("#settings-say")).to_have_text(name)
    ask(phone, "w" * 500)
    expect(phone.get_by_role("button", name="Again")).to_be_visible()
    for width in (360, 1000, 1300):
        phone.set_viewport_size({"width": width, "height": 740})
        for view in ("Chat", "Compare"):
            phone.get_by_role("link", name=view).click()
            wider = "(all) => all.filter((each) => each.scrollWidth > each.clientWidth).map((each) => each.id)"
            assert phone.locator("html, main, .view").evaluate_all(wider) == []


def test_a_phone_has_all_of_it(phone: Page, stub: Stub, artifacts: Path) -> None:
    expect(phone.get_by_role("combobox", name="Adapter")).to_be_hidden()
    phone.locator("#panel > summary").tap()
    phone.get_by_role("combobox", name="Adapter").select_option("extract")
    phone.screenshot(path=artifacts / "phone-settings.png")
    phone.locator("#panel > summary").tap()
    expect(phone.locator("#panel > summary")).to_contain_text("extract")
    ask(phone)
    expect(reply(phone).locator(".text")).to_have_text(ANSWER["extract"])
    phone.get_by_role("link", name="Compare").tap()
    ask(phone)
    expect(phone.get_by_role("button", name="Better")).to_have_count(2)
    answer(phone, "support").locator(".parts").tap()
    expect(phone.locator("#choices")).to_be_visible()
    inside = "element => (b => b.left >= 0 && b.right <= innerWidth)(element.getBoundingClientRect())"
    assert all(phone.locator(name).evaluate(inside) for name in ("#choices", "#send", "#prompt", "#load", "nav"))
    phone.screenshot(path=artifacts / "phone-choices.png")
