"""What a model or a server says is text, and nothing but the page's own files is run."""

from __future__ import annotations

import json
import re
from pathlib import Path

import httpx
from playwright.sync_api import Browser, Page, expect

from edgelora.serve.app import PAGE_POLICY
from tests.edgelora.serve.conftest import Served
from tests.edgelora.serve.page.browsing import answer, ask, reply
from tests.edgelora.serve.page.stub import PAGE, Stub, listed

OWNED = "document.documentElement.dataset.owned=1"
MARKUP = f'<img src=x onerror="{OWNED}"><b>bold</b>\n<script>{OWNED}</script>'
# What makes markup or code of a text.
SINKS = (
    r"innerHTML|outerHTML|insertAdjacentHTML|setHTML|document\.write|DOMParser|createContextualFragment|srcdoc|"
    r"\beval\b|Function\(|javascript:"
)


def assert_harmless(page: Page) -> None:
    assert page.locator("body img, body script, #banner *, b:text-is('bold')").count() == 0
    assert page.evaluate("document.documentElement.dataset.owned") is None


def test_what_a_model_says_is_never_markup(page: Page, stub: Stub) -> None:
    stub.replies["support"] = (MARKUP, f"\n```{MARKUP.split()[0]}\n", MARKUP, "\n```\n", MARKUP)
    ask(page, MARKUP)
    expect(reply(page).locator(".text")).to_contain_text(MARKUP)
    expect(reply(page).locator("pre")).to_have_text(MARKUP)
    page.reload()  # from what the browser kept
    expect(reply(page).locator(".text")).to_contain_text(MARKUP)
    expect(reply(page).locator("pre")).to_have_text(MARKUP)
    assert_harmless(page)
    stub.replies["support"] = (MARKUP,)
    page.get_by_role("link", name="Compare").click()
    ask(page, MARKUP)
    expect(answer(page, "support")).to_have_text(MARKUP)
    answer(page, "support").locator("span").click()
    expect(page.locator("#choices .chosen")).to_contain_text("<img")
    assert_harmless(page)


def test_what_a_server_says_is_never_markup(page: Page, stub: Stub) -> None:
    stub.models = [listed("base"), listed(MARKUP, system=MARKUP, sampling={"seed": MARKUP})]
    stub.models += [listed("bad", state="refused", problem=MARKUP)]
    stub.models[0]["root"] = MARKUP
    stub.status |= {"state": MARKUP, "running": MARKUP, "waiting": MARKUP}
    page.reload()
    expect(page.get_by_role("alert")).to_contain_text("<img")
    expect(page.locator("#base")).to_contain_text("<img")
    expect(page.locator("#out")).to_contain_text("<img")
    ask(page)
    expect(reply(page).locator(".failure")).to_be_visible()
    expect(reply(page).locator("h2")).to_contain_text("<img")
    assert_harmless(page)


def test_what_is_kept_in_the_browser_is_never_markup(page: Page) -> None:
    turns = [{"role": role, "content": MARKUP, "name": MARKUP, "note": MARKUP} for role in ("user", "assistant")]
    votes = [{"id": MARKUP, "answers": [{"adapter": MARKUP, "text": MARKUP}], "chosen": 0, "messages": []}]
    for name, value in (("conversation", turns), ("votes", votes)):
        page.evaluate("([name, text]) => localStorage.setItem(name, text)", [f"edgelora.{name}", json.dumps(value)])
    page.goto(f"{page.url.partition('#')[0]}#compare")
    page.reload()
    expect(page.locator("#votes-say")).to_contain_text("<img")
    page.get_by_role("link", name="Chat").click()
    expect(reply(page)).to_contain_text("<img")
    assert_harmless(page)


def test_a_script_that_got_in_would_not_run(browser: Browser, stub: Stub) -> None:
    """The policy stands even where the page should fail: nothing inline, no text as markup, nothing from elsewhere."""
    page = browser.new_page()
    page.goto(stub.url)
    refused = page.evaluate(
        """async (code) => {
            const script = document.createElement("script");
            script.append(code);
            const tries = {
                markup: () => (document.body.innerHTML = "<p>"),
                inline: () => { document.body.append(script); if (!document.documentElement.dataset.owned) throw 0; },
                policy: () => trustedTypes.createPolicy("mine", { createHTML: (text) => text }),
                elsewhere: () => fetch("https://example.invalid/"),
            };
            const refused = [];
            addEventListener("securitypolicyviolation", (event) => refused.push(event.effectiveDirective));
            const passed = [];
            for (const [name, attempt] of Object.entries(tries)) {
                try { await attempt(); passed.push(name); } catch {}
            }
            await new Promise((done) => setTimeout(done));
            return { passed, refused: [...new Set(refused)].sort() };
        }""",
        OWNED,
    )
    page.close()
    assert refused["passed"] == []
    assert {"connect-src", "require-trusted-types-for", "trusted-types"} <= set(refused["refused"])


def test_the_server_sends_this_policy_with_every_file_of_the_page(served: Served) -> None:
    for path in ("/", *(f"/{file.name}" for file in PAGE.iterdir())):
        answered = httpx.get(served.url + path)
        assert answered.status_code == 200
        assert answered.headers["Content-Security-Policy"] == PAGE_POLICY
        assert answered.headers["X-Content-Type-Options"] == "nosniff"


def test_the_page_is_whole_in_itself() -> None:
    """No module makes markup or code of text, nothing comes from elsewhere, nothing stands inline."""
    for file in PAGE.iterdir():
        text = file.read_text()
        assert not re.search(SINKS, text), file.name
        assert not re.search(r"(src|href|from|import|url)\W{0,3}https?:", text), file.name
    index = Path(PAGE / "index.html").read_text()
    assert not re.search(r"<style|<script(?![^>]*src=)|\son\w+=|\sstyle=", index)
