"""The site: it builds without a warning, holds every page and every public name, and needs nothing from elsewhere."""

import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

import qgraft

pytest.importorskip("mkdocs", reason="the site needs the extra `docs`")
ROOT = Path(qgraft.__file__).parent
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


class Loaded(HTMLParser):
    """What a browser fetches to show a page."""

    def __init__(self, page: Path):
        super().__init__()
        self.urls: list[str] = []
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag in ("script", "img", "iframe") and "src" in attrs:
            self.urls.append(attrs["src"])
        if tag == "link" and attrs.get("rel") in ("stylesheet", "icon", "preload"):
            self.urls.append(attrs["href"])


def test_every_page_of_the_tutorial_is_in_it(site):
    pages = {path.relative_to(site).with_suffix("").as_posix() for path in site.rglob("*.html")}
    for source in (ROOT / "docs").rglob("*.md"):
        name = source.relative_to(ROOT / "docs").with_suffix("").as_posix()
        assert name.replace("README", "index") in pages
    navigation = (site / "index.html").read_text(encoding="utf-8")
    for source in (ROOT / "docs").glob("*.md"):
        assert source.name == "README.md" or f'href="{source.stem}.html"' in navigation, f"{source.name} is in no menu"


def test_pages_need_nothing_from_elsewhere(site):
    for page in site.rglob("*.html"):
        assert 'data-md-component="source"' not in page.read_text(encoding="utf-8"), f"{page.name} asks GitHub"
        if page.name != "404.html":  # which is served at any address, so its links are absolute
            for url in Loaded(page).urls:
                assert not re.match(r"https?:|//", url), f"{page.name} fetches {url}"
                assert (page.parent / url.split("?")[0]).exists(), f"{page.name}: no {url}"


def test_the_reference_knows_every_public_name(site):
    reference = "".join(page.read_text(encoding="utf-8") for page in (site / "api").glob("*.html"))
    for name in qgraft.__all__:
        owner = getattr(qgraft, name)
        module = getattr(owner, "__module__", "qgraft")
        places = {f"qgraft.{name}", f"{module}.{name}"}
        assert any(f'id="{place}"' in reference for place in places), f"{name} is not in the reference"


def test_formulas_are_drawn_without_a_script(site):
    formulas = [text for page in site.glob("*.html") if "<math" in (text := page.read_text(encoding="utf-8"))]
    assert formulas and not any("arithmatex" in text for text in formulas)


def test_quotations_name_their_file(site):
    assert "layers/w8a32.py" in (site / "layers.html").read_text(encoding="utf-8")


def test_the_reference_leads_to_the_source(site):
    for page, file in (("qgraft", "quantizer/quantizer.py"), ("layers", "layers/base.py")):
        text = (site / "api" / f"{page}.html").read_text(encoding="utf-8")
        assert f'/blob/main/{file}">{file}</a>' in text
    links = re.findall(r"/blob/main/([^\"#]+)", "".join(p.read_text(encoding="utf-8") for p in site.rglob("*.html")))
    assert links and all((ROOT / link).exists() for link in links)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH")
def test_pages_are_accessible_and_fit_a_phone_in_light_and_dark(site):
    playwright = pytest.importorskip("playwright.sync_api")
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    asked = []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for scheme, width in (("light", 1280), ("dark", 390)):
            tab = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
            tab.on("request", lambda r: None if r.url.startswith(("file:", "data:", "blob:")) else asked.append(r.url))
            for name in ("index", "w4a4-svd", "numbers"):
                tab.goto((site / f"{name}.html").as_uri(), wait_until="load")
                tab.wait_for_timeout(300)
                assert tab.evaluate("document.documentElement.scrollWidth") <= width, name
                found = axe.run(tab, options={"resultTypes": ["violations"]}).response["violations"]
                # Minor ones are the theme's, and tables whose first column needs no title.
                grave = [v for v in found if v["impact"] in ("serious", "critical")]
                assert not grave, (name, scheme, [(v["id"], v["nodes"][0]["html"]) for v in grave])
        browser.close()
    # Without `make docs` there is no Mermaid beside the pages.
    assert [url for url in asked if "mermaid" not in url] == []


def test_the_search_knows_the_chapters(site):
    index = (site / "search" / "search_index.json").read_text(encoding="utf-8")
    assert "two-level" in index.lower() and "sign-flip" in index.lower()
