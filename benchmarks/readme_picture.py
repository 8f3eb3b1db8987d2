"""The README's picture of a report, light and dark: python benchmarks/readme_picture.py RUN

It needs Chromium with its driver, and the package selenium. The picture shows the title, what was
found in a sentence, the cells, and the weights of the classes.
"""

from __future__ import annotations

import base64
import sys
from pathlib import Path

from selenium import webdriver

DOCS = Path(__file__).resolve().parents[1] / "docs"

SHOWN = "header, #cells, #weights"
WITHOUT = "section:not(#cells, #weights), header > :not(h1, p), nav, footer, .status"
WIDTH, MARGIN = 1180, 16
SCHEMES = ("light", "dark")


def browser() -> webdriver.Chrome:
    """A browser without a window."""
    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--hide-scrollbars"):
        options.add_argument(argument)
    return webdriver.Chrome(options=options)


def take(driver: webdriver.Chrome, page: Path, scheme: str) -> bytes:
    """The page in a colour scheme as a PNG file, without what the picture leaves out."""
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    driver.set_window_size(WIDTH, 4000)
    driver.get(page.resolve().as_uri())
    driver.execute_script(
        "document.querySelectorAll(arguments[0]).forEach(e => { e.style.display = 'none'; })",
        WITHOUT,
    )
    ends = [
        element.rect["y"] + element.rect["height"]
        for element in driver.find_elements("css selector", SHOWN)
    ]
    clip = {"x": 0, "y": 0, "width": WIDTH, "height": max(ends) + MARGIN, "scale": 1}
    shot = driver.execute_cdp_cmd("Page.captureScreenshot", {"clip": clip})
    return base64.b64decode(shot["data"])


def main(run: Path) -> None:
    """Writes both pictures."""
    driver = browser()
    try:
        for scheme in SCHEMES:
            file = DOCS / f"report-{scheme}.png"
            file.write_bytes(take(driver, run / "report.html", scheme))
            print(file.name)
    finally:
        driver.quit()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
