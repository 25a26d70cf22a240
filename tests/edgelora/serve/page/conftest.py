"""A real Chromium, and a server with scripted replies for it.

Screenshots go to $EDGELORA_ARTIFACTS, or to pytest's temporary folder.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.edgelora.serve.page.browsing import PATIENCE_MS, PHONE, opened
from tests.edgelora.serve.page.stub import Stub, served

CHROMIUM = shutil.which("chromium")


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("needs Debian's chromium (apt-get install chromium)")
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
    yield from opened(browser, stub.url)


@pytest.fixture
def phone(browser: Browser, stub: Stub) -> Iterator[Page]:
    yield from opened(browser, stub.url, viewport=PHONE, has_touch=True, is_mobile=True)


@pytest.fixture(scope="session")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(os.environ.get("EDGELORA_ARTIFACTS") or tmp_path_factory.mktemp("page"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder
