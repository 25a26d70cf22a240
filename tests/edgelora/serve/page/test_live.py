"""The page of a real server, whose engine is killed in the middle of a stream."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, Route, expect

from tests.edgelora.serve.conftest import Served, serving
from tests.edgelora.serve.page.browsing import QUESTION, ask, findings, opened, reply

COMPLETIONS = "**/v1/chat/completions"
TOLD = re.compile("The engine (is restarting|died and is back)")  # the latter where it was back within two looks


@pytest.fixture
def live(base: Path, shelf: Path) -> Iterator[Served]:
    with serving(base, shelf, "--ctx-size", "4096") as made:
        yield made


@pytest.fixture
def live_page(browser: Browser, live: Served) -> Iterator[Page]:
    yield from opened(browser, live.url + "/")


def endless(route: Route) -> None:
    """Sends the page's request on with a grammar that has no end."""
    body = json.loads(route.request.post_data or "") | {"grammar": "root ::= [a-z ] root", "max_tokens": 4000}
    route.continue_(post_data=json.dumps(body))


def test_a_comparison_that_the_engine_did_not_live_to_end_is_asked_again(live_page: Page, live: Served) -> None:
    live_page.route(COMPLETIONS, endless)
    live_page.get_by_role("link", name="Compare").click()
    ask(live_page)
    expect(live_page.locator(".tokens").first).not_to_be_empty()
    os.kill(live.engine_pid(), signal.SIGKILL)
    expect(live_page.locator(".answer .failure")).to_have_count(2)
    expect(live_page.locator(".tokens").first).not_to_be_empty()
    live_page.unroute(COMPLETIONS)
    live.until(lambda: live.state()["state"] == "ready")
    live_page.get_by_label("Max tokens").fill("8")
    live_page.get_by_role("button", name="Try again").click()
    expect(live_page.locator(".answer .end").last).to_contain_text("tokens")
    expect(live_page.locator(".trial")).to_have_count(1)
    expect(live_page.locator(".failure")).to_have_count(0)
    expect(live_page.locator(".asked")).to_have_text(QUESTION)


def test_killed_in_mid_stream_the_engine_is_missed_and_found_again(
    live_page: Page, live: Served, artifacts: Path
) -> None:
    banner, engine = live_page.get_by_role("alert"), live.engine_pid()
    live_page.route(COMPLETIONS, endless)
    ask(live_page)
    expect(reply(live_page).locator(".text")).not_to_be_empty()
    os.kill(engine, signal.SIGSTOP)  # so that it cannot end before it is killed
    try:
        partial = reply(live_page).locator(".text").text_content() or ""
        assert partial
    finally:
        os.kill(engine, signal.SIGKILL)
    expect(banner).to_contain_text(TOLD)
    expect(reply(live_page).locator(".failure")).to_be_visible()
    assert (reply(live_page).locator(".text").text_content() or "").startswith(partial)
    live_page.screenshot(path=artifacts / "engine-killed.png")
    assert findings(live_page) == []
    expect(banner).to_be_hidden()
    expect(live_page.locator("#load")).to_contain_text("ready")
    assert live.engine_pid() != engine
    live_page.unroute(COMPLETIONS)
    live_page.get_by_label("Max tokens").fill("8")
    live_page.get_by_role("button", name="Try again").click()
    expect(reply(live_page).locator(".end")).to_contain_text("tokens")
    expect(live_page.locator(".failure")).to_have_count(0)
    expect(live_page.locator(".turn")).to_have_count(2)
    expect(live_page.locator(".turn.you .text")).to_have_text(QUESTION)


def test_a_blend_says_what_the_server_says_of_it(browser: Browser, served: Served) -> None:
    asked = {"temperature": 0, "max_tokens": 12}
    alone, blended = [
        served.chat(QUESTION, "blue", **asked, **more)["choices"][0]["message"]["content"]
        for more in ({}, {"adapters": {"blue": 0.7, "red": 0.3}})
    ]
    assert alone != blended, "the blend has to show"
    for page in opened(browser, served.url + "/"):
        page.get_by_role("combobox", name="Adapter", exact=True).select_option("blue")
        page.get_by_role("button", name="Mix in another").click()
        page.get_by_role("combobox", name="Adapter 2").select_option("red")
        page.get_by_role("slider", name="Scale", exact=True).fill("0.7")
        page.get_by_role("slider", name="Scale 2").fill("0.3")
        page.get_by_label("Temperature").fill("0")
        page.get_by_label("Max tokens").fill("12")
        ask(page)
        expect(page.get_by_role("button", name="Again")).to_be_visible()
        assert reply(page).locator(".text").text_content() == blended
