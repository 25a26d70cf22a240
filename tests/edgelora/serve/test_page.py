"""The web page in real Chromium, against a server with scripted replies.

Screenshots go to $EDGELORA_ARTIFACTS, or to pytest's temporary folder.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

MISSING = [name for name in ("playwright", "uvicorn", "starlette") if find_spec(name) is None]
CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.skipif(bool(MISSING), reason=f"needs the packages {', '.join(MISSING)}"),
    pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium (apt-get install chromium)"),
]
if not MISSING:
    from playwright.sync_api import Page, expect, sync_playwright

    from tests.edgelora.serve.page_stub import REPLIES, Stub, listed, served
if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator

WIDE = {"width": 1280, "height": 800}
PHONE = {"width": 360, "height": 740}
PATIENCE_MS = 15_000
QUESTION = "How long does the battery last?"
ENDLESS = tuple(f" {number}" for number in range(3000))
ANSWER = {name: "".join(tokens) for name, tokens in REPLIES.items()} if not MISSING else {}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    expect.set_options(timeout=PATIENCE_MS)  # a busy machine is no failure
    with sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def stub() -> Iterator[Stub]:
    with served(Stub()) as running:
        yield running


@pytest.fixture
def page(browser: Browser, stub: Stub) -> Iterator[Page]:
    yield from opened(browser, stub)


@pytest.fixture
def phone(browser: Browser, stub: Stub) -> Iterator[Page]:
    yield from opened(browser, stub, viewport=PHONE, has_touch=True, is_mobile=True)


def opened(browser: Browser, stub: Stub, **settings: Any) -> Iterator[Page]:
    """The page in a browser without a past; nothing that it logs as an error goes unseen."""
    context = browser.new_context(**{"viewport": WIDE, "reduced_motion": "reduce", **settings})
    context.set_default_timeout(PATIENCE_MS)
    page = context.new_page()
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda said: problems.append(said.text) if said.type == "error" else None)
    page.goto(stub.url)
    expect(page.locator("#lanes select").first).not_to_have_value("")
    yield page
    context.close()
    # What the browser says of a refused request is told to the user by the page.
    assert [problem for problem in problems if "Failed to load resource" not in problem] == []


@pytest.fixture(scope="session")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(os.environ.get("EDGELORA_ARTIFACTS") or tmp_path_factory.mktemp("page"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


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


# The chat


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


def test_refused_adapters_say_why_and_one_that_is_dropped_in_appears(page: Page, stub: Stub) -> None:
    page.get_by_text("1 adapter left out").click()
    expect(page.locator("#out")).to_contain_text("broken refused: blk.0.attn_q is 2048x2048 here")
    picker = page.get_by_role("combobox", name="Adapter")
    expect(picker.locator("option")).to_have_text(["base (no adapter)", "support", "extract"])
    stub.models = [listed("base"), listed("new")]
    page.reload()
    expect(picker.locator("option")).to_have_text(["base (no adapter)", "new"])
    expect(picker).to_have_value("new")


# Errors


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


def test_a_key_is_asked_for_and_lasts_as_long_as_the_tab(browser: Browser, stub: Stub) -> None:
    stub.key = "open sesame"
    context = browser.new_context()
    page = context.new_page()
    page.goto(stub.url)
    field = page.get_by_label("This server asks for a key.")
    field.fill("wrong")
    field.press("Enter")
    expect(page.get_by_label("The server does not know this key.")).to_be_visible()
    expect(page.get_by_role("alert")).to_be_hidden()
    page.locator("#key-field").fill("open sesame")
    page.get_by_role("button", name="Use key").click()
    expect(page.locator("#key")).to_be_hidden()
    ask(page)
    expect(reply(page).locator(".text")).to_have_text(ANSWER["support"])
    assert page.evaluate("[sessionStorage.length, localStorage.length]") == [1, 0]
    page.reload()
    expect(page.locator("#load")).to_contain_text("ready")
    page.get_by_role("button", name="Forget key").click()
    expect(page.get_by_label("This server asks for a key.")).to_be_visible()
    context.close()


# Comparing


def test_tokens_that_differ_are_marked_and_tell_their_alternatives(page: Page, stub: Stub) -> None:
    compare(page)
    of_support, of_extract = answer(page, "support"), answer(page, "extract")
    expect(of_support).to_have_text(ANSWER["support"])
    assert of_support.locator(".differs").all_text_contents()[:5] == [" of", " your", " Lumo", " lamp", "."]
    expect(of_support.locator(".parts")).to_have_text(" of")
    expect(of_extract.locator(".parts")).to_have_text(" lasts")
    expect(page.locator(".trial")).to_contain_text("They part at token 3.")
    assert [body["logprobs"] for body in stub.asked] == [True, True]
    assert len({body["seed"] for body in stub.asked}) == 1
    of_support.get_by_text("The", exact=True).hover()
    card = page.locator("#choices")
    expect(card.locator("p").first).to_have_text("The80.0 %")
    expect(card.locator("p").nth(1)).to_have_text("␣lamp10.0 %")
    expect(card.locator(".chosen")).to_have_count(1)
    page.mouse.move(5, 5)
    expect(card).to_be_hidden()


def test_votes_are_kept_and_exported_as_preferences(page: Page, stub: Stub) -> None:
    compare(page, third="base")
    page.get_by_role("button", name="Better: A, support").click()
    page.get_by_role("button", name="Better: B, extract").click()  # one vote a comparison: this one
    expect(page.locator("#votes-say")).to_have_text("1 vote: extract 1")
    page.reload()
    expect(page.locator("#votes-say")).to_have_text("1 vote: extract 1")
    with page.expect_download() as download:
        page.get_by_role("button", name="Export votes as JSONL").click()
    assert download.value.suggested_filename == "preferences.jsonl"
    lines = [json.loads(line) for line in download.value.path().read_text().splitlines()]
    assert [line["rejected_adapter"] for line in lines] == ["support", "base"]
    for line in lines:
        assert line["prompt"] == [{"role": "user", "content": QUESTION}]
        assert line["chosen"] == [{"role": "assistant", "content": ANSWER["extract"]}]
        assert line["rejected"] == [{"role": "assistant", "content": ANSWER[line["rejected_adapter"]]}]
        assert (line["chosen_adapter"], line["chosen_scale"]) == ("extract", 0.8)
    page.once("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Delete votes").click()
    expect(page.locator("#votes")).to_be_hidden()
    assert page.evaluate("localStorage.length") == 0


def test_there_is_no_vote_on_answers_that_broke_off_or_are_the_same(page: Page, stub: Stub) -> None:
    page.get_by_role("link", name="Compare").click()
    stub.replies["extract"] = stub.replies["support"]
    ask(page)
    expect(page.locator(".trial")).to_contain_text("The answers are the same, token for token.")
    stub.replies["extract"], stub.cut_after = REPLIES["extract"], 5
    ask(page)
    expect(page.locator(".trial").last.locator(".failure")).to_have_count(2)
    expect(page.get_by_role("button", name="Better")).to_have_count(0)


def test_the_diff_is_a_longest_common_subsequence(page: Page) -> None:
    """Against a plain recursion over all short sequences of two and three letters."""
    wrong = page.evaluate("""async () => {
        const { compare } = await import("/diff.js");
        const longest = (a, b) => !a.length || !b.length ? 0 : a[0] === b[0]
            ? 1 + longest(a.slice(1), b.slice(1)) : Math.max(longest(a.slice(1), b), longest(a, b.slice(1)));
        let state = 1;
        const random = (n) => (state = (state * 48271) % 2147483647) % n;
        const some = (letters) => Array.from({ length: random(8) }, () => "abc"[random(letters)]);
        const wrong = [];
        for (let turn = 0; turn < 2000; turn++) {
            const [a, b] = [some(2 + turn % 2), some(2 + turn % 2)];
            const { shared, parts } = compare([a, b]);
            const [ofA, ofB] = [a, b].map((each, at) => each.filter((_, place) => shared[at][place]).join(""));
            const start = a.findIndex((each, at) => each !== b[at]);
            const place = start < 0 ? (a.length === b.length ? null : a.length) : start;
            if (ofA !== ofB || ofA.length !== longest(a, b) || parts !== place) wrong.push([a, b, shared, parts]);
        }
        return wrong;
    }""")
    assert wrong == []


def test_of_three_answers_only_what_no_other_has_is_marked(page: Page) -> None:
    answers = [["It", " lasts", " 12", " hours"], ["It", " lasts", " 3", " hours"], ["I", " sleep"]]
    found = page.evaluate("async (answers) => (await import('/diff.js')).compare(answers)", answers)
    own = [
        [t for t, is_shared in zip(*each, strict=True) if not is_shared]
        for each in zip(answers, found["shared"], strict=True)
    ]
    assert own == [[" 12"], [" 3"], ["I", " sleep"]]
    assert found["parts"] == 0


def test_tokens_are_the_replys_text_however_they_come(page: Page) -> None:
    """A character of two tokens, text held back, two tokens in one event, and text without probabilities."""
    pieces = [
        ["", ["\ufffd"]],
        ["é", ["\ufffd"]],
        ["", ["E"]],
        ["", ["N"]],
        [" ENd", ["d"]],
        [" of it", [" of", " it"]],
        ["!", []],
    ]
    read = page.evaluate(
        """async (pieces) => {
            const { TokenReader } = await import("/tokens.js");
            const reader = new TokenReader();
            const tokens = pieces.flatMap(([piece, all]) => reader.push(piece, all.map((token) => ({ token }))));
            return tokens.map(({ text, entry }) => [text, entry?.token ?? null]);
        }""",
        pieces,
    )
    assert read == [["é", "\ufffd"], [" ENd", "E"], [" of", " of"], [" it", " it"], ["!", None]]


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


# Load, keyboard, looks


def test_load_is_told_at_a_glance(page: Page, stub: Stub) -> None:
    load = page.locator("#load")
    for name, value in (("tok/s", "41.2"), ("running", "3"), ("waiting", "1"), ("adapters in memory", "2")):
        expect(load.locator("div", has_text=name).locator("dd")).to_have_text(value)
    stub.status |= {"running": 12, "tokens_per_second": 97.0}
    expect(load).to_contain_text("12")
    expect(load).to_contain_text("97.0")


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
    expect(page.locator("#votes-say")).to_have_text("1 vote: support 1")


def tab_to(page: Page, wanted: Locator) -> None:
    """Presses Tab until there; each stop on the way can be seen to have the focus."""
    for _ in range(40):
        page.keyboard.press("Tab")
        seen = page.evaluate("getComputedStyle(document.activeElement).outlineStyle !== 'none'")
        assert seen or page.evaluate("document.activeElement === document.body")
        if wanted.evaluate("element => element === document.activeElement"):
            return
    pytest.fail(f"Tab does not lead to {wanted}")


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


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("view", ["chat", "compare"])
def test_how_it_looks_and_what_axe_finds(browser: Browser, stub: Stub, artifacts: Path, scheme: str, view: str) -> None:
    pytest.importorskip("axe_playwright_python", reason="axe-playwright-python brings axe-core")
    for width, viewport in (("wide", WIDE), ("phone", PHONE)):
        for page in opened(browser, stub, viewport=viewport, color_scheme=scheme):
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
    for page in opened(browser, stub, color_scheme=scheme):
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


def compare_shown(page: Page) -> None:
    ask(page)
    page.get_by_role("button", name=re.compile("Better: A")).click()
    page.locator(".tokens .parts").first.hover()
    expect(page.locator("#choices")).to_be_visible()


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
