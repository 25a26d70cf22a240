"""Blends: several adapters at their scales, chosen in the picker, in the chat and beside each other."""

from __future__ import annotations

import json

from playwright.sync_api import Page, expect

from tests.edgelora.serve.page.browsing import ANSWER, QUESTION, answer, ask, reply, tab_to
from tests.edgelora.serve.page.stub import Stub, listed


def test_a_blend_is_asked_for_with_the_scale_of_each(page: Page, stub: Stub) -> None:
    page.get_by_role("button", name="Mix in another").click()
    expect(page.get_by_role("combobox", name="Adapter 2")).to_be_focused()
    expect(page.get_by_role("combobox", name="Adapter 2")).to_have_value("extract")
    page.get_by_role("slider", name="Scale", exact=True).fill("0.7")
    page.get_by_role("slider", name="Scale 2").fill("0.3")
    expect(page.get_by_label("System prompt")).to_have_attribute(
        "placeholder", "You answer questions about the Lumo lamp."
    )
    ask(page)
    expect(reply(page).locator(".text")).to_have_text(ANSWER["support"])
    expect(reply(page).locator("h2")).to_have_text("support × 0.7 + extract × 0.3")
    [body] = stub.asked
    assert (body["model"], body["adapters"]) == ("support", {"support": 0.7, "extract": 0.3})
    assert "lora_scale" not in body


def test_an_adapter_is_in_a_blend_once_and_the_base_never(page: Page, stub: Stub) -> None:
    mix = page.get_by_role("button", name="Mix in another")
    mix.click()
    expect(mix).to_be_hidden()  # there are but two
    first = page.get_by_role("combobox", name="Adapter", exact=True)
    second = page.get_by_role("combobox", name="Adapter 2")
    expect(second.locator("option")).to_have_text(["support", "extract"])
    expect(second.locator("option:disabled")).to_have_text(["support"])
    expect(first.locator("option:disabled")).to_have_text(["extract"])
    first.select_option("base")
    expect(second).to_be_hidden()
    ask(page)
    expect(reply(page).locator(".text")).to_have_text(ANSWER["base"])
    assert "adapters" not in stub.asked[0]
    first.select_option("support")
    expect(second).to_have_value("extract")
    page.get_by_role("button", name="Remove extract").click()
    expect(mix).to_be_focused()
    ask(page)
    expect(reply(page).locator(".text")).to_have_text(ANSWER["support"])
    assert "adapters" not in stub.asked[1]


def test_the_settings_shown_are_those_of_the_adapter_that_the_server_takes_first(page: Page, stub: Stub) -> None:
    """JSON objects have names that are numbers first, whatever was chosen first."""
    stub.models = [listed("base"), listed("ten"), listed("7", system="You are seven.")]
    page.reload()
    expect(page.get_by_role("combobox", name="Adapter", exact=True)).to_have_value("ten")
    page.get_by_role("button", name="Mix in another").click()
    expect(page.get_by_label("System prompt")).to_have_attribute("placeholder", "You are seven.")


def test_a_blend_is_a_column_of_a_comparison_and_votes_name_its_scales(page: Page, stub: Stub) -> None:
    page.get_by_role("link", name="Compare").click()
    page.get_by_role("button", name="Mix another into A").click()
    page.get_by_role("slider", name="Scale A2").fill("0.25")
    ask(page)
    blend = "support × 1 + extract × 0.25"
    expect(answer(page, blend)).to_have_text(ANSWER["support"])
    assert [body.get("adapters") for body in stub.asked] == [{"support": 1, "extract": 0.25}, None]
    page.get_by_role("button", name=f"Better: A, {blend}").click()
    with page.expect_download() as download:
        page.get_by_role("button", name="Export votes as JSONL").click()
    [line] = map(json.loads, download.value.path().read_text().splitlines())
    assert (line["chosen_adapter"], line["chosen_scale"]) == (blend, None)
    assert (line["rejected_adapter"], line["rejected_scale"]) == ("extract", 0.8)


def test_a_blend_by_keyboard_alone(page: Page, stub: Stub) -> None:
    keyboard = page.keyboard
    tab_to(page, page.get_by_role("button", name="Mix in another"))
    keyboard.press("Enter")
    tab_to(page, page.get_by_role("slider", name="Scale 2"))
    keyboard.press("ArrowRight")
    tab_to(page, page.get_by_role("textbox", name="Prompt", exact=True))
    keyboard.type(QUESTION)
    keyboard.press("Enter")
    expect(reply(page).locator(".text")).to_have_text(ANSWER["support"])
    assert stub.asked[0]["adapters"] == {"support": 1, "extract": 0.45}


def test_a_blend_on_a_phone(phone: Page, stub: Stub) -> None:
    phone.locator("#panel > summary").tap()
    phone.get_by_role("button", name="Mix in another").tap()
    phone.get_by_role("slider", name="Scale 2").tap()  # in its middle
    phone.locator("#panel > summary").tap()
    expect(phone.locator("#panel > summary")).to_contain_text("support × 1 + extract × 1")
    ask(phone)
    expect(reply(phone).locator(".text")).to_have_text(ANSWER["support"])
    assert stub.asked[0]["adapters"] == {"support": 1, "extract": 1}
