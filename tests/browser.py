"""A headless Chromium for tests of pages, where the machine has one (Debian: chromium,
chromium-driver).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


class Page:
    """A page as someone sees it.

    Args:
        driver: the browser.
    """

    def __init__(self, driver) -> None:
        self._driver = driver

    def open(self, path, *, width=1280, scheme="light", scripts=True):
        """Opens a file in a window of this width, with light or dark colours preferred, with or
        without scripts.
        """
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self._driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self._driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        self._driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": not scripts})
        self._driver.get(path.as_uri())

    def run(self, script, *arguments):
        """Runs a script in the page and returns its value."""
        return self._driver.execute_script(script, *arguments)

    def wait(self, script):
        """Runs a script until its value is true, and returns it."""
        from selenium.webdriver.support.ui import WebDriverWait

        return WebDriverWait(self._driver, 60).until(lambda driver: driver.execute_script(script))

    def text(self, selector):
        """The text that is seen of the first element that a CSS selector finds."""
        return self._driver.find_element("css selector", selector).text

    def texts(self, selector):
        """The texts of all of them."""
        return [element.text for element in self._driver.find_elements("css selector", selector)]

    def shown(self, selector):
        """Whether the first of them is displayed."""
        return self._driver.find_element("css selector", selector).is_displayed()

    def console(self):
        """What the page wrote to the console since it was asked last: errors, refused resources."""
        return [entry["message"] for entry in self._driver.get_log("browser")]


@contextmanager
def browser() -> Iterator[Page]:
    """Starts a browser; skips the test where there is none, or fails it if REQUIRE_BROWSER=1."""
    binary = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    driver = shutil.which("chromedriver")
    if binary is None or driver is None:
        (pytest.fail if os.environ.get("REQUIRE_BROWSER") == "1" else pytest.skip)(
            "no Chromium with its driver; on Debian: apt-get install chromium chromium-driver"
        )
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for argument in (
        "headless",
        "no-sandbox",
        "disable-gpu",
        "disable-dev-shm-usage",
        "disable-background-networking",
    ):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    started = webdriver.Chrome(options=options, service=Service(driver))
    try:
        yield Page(started)
    finally:
        started.quit()
