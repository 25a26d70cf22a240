"""What the page says and does when something breaks, and that it goes on by itself."""

from __future__ import annotations

from pathlib import Path

from playwright.sync_api import Page, expect

from tests.edgelora.serve.page.browsing import ANSWER, QUESTION, ask, reply
from tests.edgelora.serve.page.stub import Stub


def test_the_banner_comes_when_the_engine_restarts_and_goes_by_itself(page: Page, stub: Stub, artifacts: Path) -> None:
    banner = page.get_by_role("alert")
    expect(page.locator("#load")).to_contain_text("ready")
    expect(banner).to_be_hidden()
    stub.pause, stub.cut_after = 0.02, 4
    ask(page)
    expect(reply(page).locator(".failure")).to_have_text("The engine died while it answered")
    stub.status["state"] = "restarting"
    expect(banner).to_contain_text("The engine is restarting")
    page.get_by_role("button", name="Try again").click()
    expect(reply(page).locator(".failure")).to_contain_text("try again in 2 seconds")
    page.screenshot(path=artifacts / "banner.png")
    stub.status["state"], stub.cut_after = "ready", None
    expect(banner).to_be_hidden()
    page.get_by_role("button", name="Try again").click()
    expect(reply(page).locator(".text")).to_have_text(ANSWER["support"])
    expect(page.locator(".turn")).to_have_count(2)
    assert [message["role"] for message in stub.asked[-1]["messages"]] == ["user"]


def test_the_banner_tells_of_a_server_that_does_not_answer(page: Page, stub: Stub) -> None:
    stub.reachable = False
    expect(page.get_by_role("alert")).to_contain_text("Trying again every 2 seconds")
    expect(page.locator("#load")).to_contain_text("no answer")
    stub.reachable = True
    expect(page.get_by_role("alert")).to_be_hidden()


def test_a_restart_between_two_looks_is_told_all_the_same(page: Page, stub: Stub) -> None:
    expect(page.locator("#load")).to_contain_text("ready")
    stub.status["restarts"] += 1
    expect(page.get_by_role("alert")).to_contain_text("The engine died and is back")
    expect(page.get_by_role("alert")).to_be_hidden()


def test_a_question_without_answer_is_not_sent_with_the_next(page: Page, stub: Stub) -> None:
    stub.cut_after = 0
    ask(page, "lost")
    expect(reply(page).locator(".failure")).to_be_visible()
    stub.cut_after = None
    ask(page)
    expect(reply(page).locator(".text")).to_have_text(ANSWER["support"])
    assert stub.asked[-1]["messages"] == [{"role": "user", "content": QUESTION}]


def test_a_banner_does_not_push_the_end_of_the_answer_out_of_sight(phone: Page, stub: Stub) -> None:
    stub.replies["support"], stub.cut_after = (*("word " for _ in range(600)), "", ""), 601
    ask(phone)
    again = phone.get_by_role("button", name="Try again")
    expect(again).to_be_in_viewport(ratio=1)
    stub.status["state"] = "restarting"
    expect(phone.get_by_role("alert")).to_be_visible()
    expect(again).to_be_in_viewport(ratio=1)
    phone.locator("#chat").evaluate("view => (view.scrollTop = 0)")  # who reads above is left there
    phone.wait_for_timeout(50)
    stub.status["state"] = "ready"
    expect(phone.get_by_role("alert")).to_be_hidden()
    assert phone.locator("#chat").evaluate("view => view.scrollTop") == 0
