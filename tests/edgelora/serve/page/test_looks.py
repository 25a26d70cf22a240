"""Screenshots of what the page can look like, and what axe-core finds in each."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.edgelora.serve.page.browsing import ANSWER, PHONE, QUESTION, WIDE, answer, ask, findings, opened, reply
from tests.edgelora.serve.page.stub import REPLIES, Stub, listed

CODE = f"So:\n\n```python\nprint(engine.chat({QUESTION!r}, adapter='support', sampling={{'seed': 7}}).text)\n```\n"
LONG = "customer-{:02d}-north-western-distribution-centre-support-german-v2"
DEVICES: dict[str, dict[str, Any]] = {
    "wide": {"viewport": WIDE},
    "phone": {"viewport": PHONE, "has_touch": True, "is_mobile": True},
}
WHY = "blk.0.attn_q is 2048x2048 here and 4096x4096 in the base"


def states(page: Page, stub: Stub) -> Iterator[str]:
    """Brings the page into one state after another, and names them."""
    again = page.get_by_role("button", name="Again")
    settings = page.locator("#panel > summary")
    yield "empty"
    ask(page)
    expect(again).to_be_visible()
    stub.replies["support"] = tuple(re.findall(r"\S+\s*", CODE))
    ask(page, "How do I ask from Python?")
    expect(page.locator("pre")).to_be_visible()
    expect(again).to_be_visible()
    yield "chat"
    stub.replies, stub.cut_after = dict(REPLIES), 6
    ask(page, "And in the cold?")
    expect(page.locator(".failure")).to_be_visible()
    stub.status["state"], stub.cut_after = "restarting", None
    expect(page.get_by_role("alert")).to_contain_text("The engine is restarting")
    yield "error"
    stub.status["state"] = "ready"
    expect(page.get_by_role("alert")).to_be_hidden()
    if settings.is_visible():
        settings.click()
    page.get_by_role("button", name="Mix in another").click()
    yield "blend"
    page.get_by_role("link", name="Compare").click()
    page.get_by_role("combobox", name="Adapter C").select_option("base")
    if settings.is_visible():
        settings.click()
    ask(page)
    page.get_by_role("button", name=re.compile("Better: A")).click()
    page.locator(".tokens .parts").first.hover()
    expect(page.locator("#choices")).to_be_visible()
    yield "compare"
    names = [LONG.format(number) for number in range(40)]
    stub.models = [listed("base"), *map(listed, names)]
    stub.models += [listed(f"old-{number}", state="refused", problem=WHY) for number in range(5)]
    stub.replies = {name: ("word " * 2000,) for name in names}
    page.evaluate("localStorage.clear()")
    page.goto(stub.url)
    page.reload()
    ask(page, "w" * 300)
    expect(again).to_be_visible()
    if settings.is_visible():
        settings.click()
    page.get_by_role("button", name="Mix in another").click()
    page.get_by_text("5 adapters left out").click()
    yield "many"
    stub.key = "open sesame"
    expect(page.locator("#key")).to_be_visible()
    yield "key"


@pytest.mark.parametrize(
    ("scheme", "width"),
    [
        ("light", "wide"),
        ("dark", "phone"),
        pytest.param("dark", "wide", marks=pytest.mark.slow),
        pytest.param("light", "phone", marks=pytest.mark.slow),
    ],
)
def test_how_it_looks_and_what_axe_finds(
    browser: Browser, stub: Stub, artifacts: Path, scheme: str, width: str
) -> None:
    for page in opened(browser, stub.url, color_scheme=scheme, **DEVICES[width]):
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert background == {"light": "rgb(246, 247, 249)", "dark": "rgb(18, 22, 29)"}[scheme]
        for state in states(page, stub):
            page.screenshot(path=artifacts / f"{state}-{scheme}-{width}.png")
            assert findings(page) == [], state
            wider = "(all) => all.filter((each) => each.scrollWidth > each.clientWidth).map((each) => each.id)"
            assert page.locator("html, main, .view, #settings, header").evaluate_all(wider) == [], state


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
