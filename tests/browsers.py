"""A real browser without a window, for tests of the page of meters."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-dev-shm-usage", "--hide-scrollbars",
)  # fmt: skip


@contextmanager
def browser(profile: Path) -> Iterator[Any]:
    """Chromium with a new profile in ``profile``, which is empty; the test is skipped without one."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("no chromium with chromedriver: apt-get install chromium chromium-driver")
    webdriver = pytest.importorskip("selenium.webdriver", reason="no selenium: install .[test]")
    exceptions = pytest.importorskip("selenium.common.exceptions")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*_FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    try:
        it = webdriver.Chrome(options, webdriver.ChromeService(driver))
    except exceptions.WebDriverException as error:  # a snap's stub, say
        pytest.skip(f"chromium does not start: {error}")
    try:
        yield it
    finally:
        it.quit()
