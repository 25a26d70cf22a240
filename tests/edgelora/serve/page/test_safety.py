"""What a model or a server says is text, and nothing but the page's own files is run."""

from __future__ import annotations

from playwright.sync_api import Page, expect

from tests.edgelora.serve.page.browsing import answer, ask, reply
from tests.edgelora.serve.page.stub import Stub


def test_what_a_model_says_is_never_markup(page: Page, stub: Stub) -> None:
    said = "<img src=x onerror=\"document.title='owned'\"><b>bold</b>\n<script>document.title='owned'</script>"
    stub.replies["support"] = (said,)
    ask(page, said)
    expect(reply(page).locator(".text")).to_have_text(said)
    page.get_by_role("link", name="Compare").click()
    ask(page, said)
    expect(answer(page, "support")).to_have_text(said)
    assert page.locator("main img, main script, article b").count() == 0
    assert page.title() == "edgelora"
