"""Answers beside each other: where they part, what else a token could have been, votes."""

from __future__ import annotations

import json

from playwright.sync_api import Page, expect

from tests.edgelora.serve.page.browsing import ANSWER, QUESTION, answer, ask, compare
from tests.edgelora.serve.page.stub import REPLIES, Stub


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
    expect(page.locator("#votes-say")).to_have_text("1 vote: extract (1)")
    page.reload()
    expect(page.locator("#votes-say")).to_have_text("1 vote: extract (1)")
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
