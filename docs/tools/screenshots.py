"""The screenshots of the documentation, taken by a headless Chromium:

    qgraft report w4a4 w8a8 --html report.html
    make docs
    python docs/tools/screenshots.py report.html site

The page of two reports becomes docs/images/report-*.png, the site docs/images/site-*.png.
"""

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

from playwright.sync_api import Browser, Page, sync_playwright

IMAGES = Path(__file__).parents[1] / "images"
DESKTOP, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 800}


def main(report: str, site: str) -> None:
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        of_report(browser, Path(report).resolve().as_uri())
        with served(site) as address:
            of_site(browser, address)
        browser.close()


@contextmanager
def served(folder: str) -> Iterator[str]:
    """Over HTTP: from a disk the site has no search."""
    handler = partial(SimpleHTTPRequestHandler, directory=folder)
    handler.func.log_message = lambda *_: None
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def of_report(browser: Browser, address: str) -> None:
    page = opened(browser, address, DESKTOP, "light")
    page.select_option("#other", "1")
    page.wait_for_selector("#compare svg path")
    part(page, "report-desktop", 1400)
    page = opened(browser, address, DESKTOP, "dark")
    page.locator("#layer").screenshot(path=IMAGES / "report-dark.png")
    part(opened(browser, address, PHONE, "light"), "report-phone", 1400)


def of_site(browser: Browser, address: str) -> None:
    for name, size, scheme, chapter in (
        ("site-desktop", DESKTOP, "light", "surgery"),
        ("site-dark", DESKTOP, "dark", "w4a4-svd"),
        ("site-phone", PHONE, "light", "numbers"),
    ):
        page = browser.new_page(viewport=size, color_scheme=scheme)
        page.goto(f"{address}/{chapter}.html")
        page.wait_for_timeout(1500)  # until Mermaid has drawn
        page.screenshot(path=IMAGES / f"{name}.png")


def opened(browser: Browser, address: str, size: dict, scheme: str) -> Page:
    page = browser.new_page(viewport=size, color_scheme=scheme)
    page.goto(address)
    page.wait_for_function("document.documentElement.dataset.ready")
    return page


def part(page: Page, name: str, height: int) -> None:
    """The first pixels of a page."""
    clip = {"x": 0, "y": 0, "width": page.viewport_size["width"], "height": height}
    page.screenshot(path=IMAGES / f"{name}.png", full_page=True, clip=clip)


if __name__ == "__main__":
    main(*sys.argv[1:])
