"""The HTML report in a headless Chromium: what a user clicks and types, on a desktop, a phone and on paper."""

import shutil

import pytest
import torch
from report_models import HOSTILE, made_up
from torch import nn

from qgraft import Quantizer, Recipe
from qgraft.quantizer.html import data, page

playwright = pytest.importorskip("playwright.sync_api")
pytest.importorskip("vl_convert")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH")

# Main-thread seconds of the browser, not of the clock: other programs on the machine do not count.
INTERACTIVE_CPU_S = 2.0
MANY = 500


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        # Nothing here may reach out: the page must do without, and so must the browser.
        quiet = ["--no-sandbox", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=quiet)
        yield chromium
        chromium.close()


def of_every_kind(calibration):
    """The report of layers that round inputs or not, with a branch or without, of zeros too."""
    schemes = ("w8a16", "w8a8", {"name": "w4a8_svd", "rank": 0}, {"name": "w4a4_svd", "rank": 3}, "w8a32", "w4a4_svd")
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in schemes))
    for zero in model[4:]:
        nn.init.zeros_(zero.weight)
    rules = [{"match": [str(i)], "scheme": scheme} for i, scheme in enumerate(schemes)]
    quantizer = Quantizer(model)
    quantizer.quantize(
        Recipe.from_dict({"rules": rules, "min_features": 1}), calibration=calibration, progress=False, details=True
    )
    return data.from_report(quantizer.report, model=model)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    base = tmp_path_factory.mktemp("pages")
    a, b = made_up(30, "first"), made_up(30, "second")
    for row in b.rows[:20]:
        row["weight_error"] /= 2
    one, two = made_up(9, HOSTILE, hostile=True, note=HOSTILE), made_up(9, "other", hostile=True)
    pages = {"two": [a, b], "hostile": [one, two], "many": [made_up(MANY)], "none": [made_up(0)]}
    pages["wide"] = [wide := made_up(1000)]
    for i, (row, module) in enumerate(zip(wide.rows, wide.modules, strict=True)):
        row["name"] = module["name"] = f"experts.{i - i % 2}.{i % 2}"
    pages["real"] = [of_every_kind(torch.randn(80, 64))]
    pages["no data"] = [of_every_kind(None)]
    for name, reports in pages.items():
        page.write(reports, base / f"{name}.html")
    return base


@pytest.fixture
def opened(browser, files):
    """Opens a page; at the end nothing must have been said on the console or asked of a network."""
    said, contexts = [], []

    def opened(name, **options):
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 800}, **options})
        contexts.append(context)
        tab = context.new_page()
        tab.set_default_timeout(20_000)
        tab.on("console", lambda message: said.append(message.text))
        tab.on("pageerror", lambda error: said.append(str(error)))
        tab.on("dialog", lambda dialog: (said.append(dialog.message), dialog.dismiss()))
        tab.on("request", lambda r: None if r.url.startswith(("file:", "data:")) else said.append(r.url))
        tab.goto(f"{(files / name).as_uri()}.html")
        tab.wait_for_function("document.documentElement.dataset.ready")
        return tab

    yield opened
    for context in contexts:
        context.close()
    assert said == []


def names(tab):
    return tab.eval_on_selector_all(
        "#table tbody:not([hidden]) tr:not([hidden]) button", "buttons => buttons.map(b => b.textContent)"
    )


def column(tab, index):
    rows = "#table tbody:not([hidden]) tr:not([hidden])"
    return tab.eval_on_selector_all(rows, f"rows => rows.map(r => r.children[{index}].dataset.v)")


def test_a_click_on_a_title_sorts_and_the_next_the_other_way(opened):
    tab = opened("two")
    title = tab.get_by_role("button", name="weight error")
    title.click()
    errors = [float(v) for v in column(tab, 3)]
    assert errors == sorted(errors, reverse=True) and len(errors) == 30
    assert tab.get_attribute("#table thead th:nth-child(4)", "aria-sort") == "descending"
    title.click()
    assert [float(v) for v in column(tab, 3)] == sorted(errors)
    tab.get_by_role("button", name="output SQNR").click()
    assert column(tab, 5)[-1] == "", "what is not known comes last"
    tab.get_by_role("button", name="layer", exact=True).click()
    assert names(tab)[:3] == [f"model.layers.0.proj{i}" for i in range(3)]


def test_the_filter_and_the_tick_choose_rows_and_say_how_many(opened):
    tab = opened("two")
    tab.get_by_label("Name or scheme contains").fill("LAYERS.2")
    assert len(names(tab)) == 7 and tab.inner_text("#count") == "7 of 30 layers"
    tab.get_by_label("Name or scheme contains").fill("")
    tab.get_by_label("only layers to check").check()
    assert set(names(tab)) == {"model.layers.1.proj0", "model.layers.0.proj3"}


def test_a_layer_is_chosen_by_keyboard_alone_and_its_figures_follow(opened):
    tab = opened("two")
    tab.focus("#table tbody tr:nth-child(6) button")
    tab.keyboard.press("ArrowDown")
    tab.keyboard.press("ArrowDown")
    tab.keyboard.press("Enter")
    assert tab.inner_text("#h-layer") == "One layer: model.layers.1.proj0"
    assert tab.evaluate("document.activeElement.id") == "h-layer"
    assert "Raise the rank" in tab.inner_text("#advice") and "rank: 64" in tab.inner_text("#advice pre")
    assert "50.00 %" in tab.inner_text("#facts")
    for figure in ("weights", "activations", "spectrum"):
        tab.wait_for_selector(f"#{figure} svg path")
    assert "32 of the branch" in tab.inner_text("#c-spectrum")
    tab.select_option("#chosen", "model.layers.0.proj1")
    assert tab.inner_text("#h-layer") == "One layer: model.layers.0.proj1" and tab.inner_text("#advice") == ""
    assert tab.get_attribute("tr.chosen", "data-i") == "1"


def test_the_tab_key_stops_once_in_the_table_and_the_focus_is_seen(opened):
    tab = opened("two")
    stops = "#table tbody:not([hidden]) button[tabindex='0']"
    assert tab.locator(stops).count() == 1
    tab.focus(stops)
    assert tab.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    tab.keyboard.press("End")
    assert tab.evaluate("document.activeElement.textContent") == "model.layers.4.proj1"
    assert tab.locator(stops).count() == 1
    tab.keyboard.press("Tab")
    assert tab.evaluate("document.activeElement.id") == "chosen", "the next thing after the table"
    tab.get_by_label("Name or scheme contains").fill("layers.3")
    assert tab.inner_text(stops) == "model.layers.3.proj0", "there is always one to go to"


def test_the_modules_are_listed_with_their_bytes_and_lead_inside(opened):
    tab = opened("two")
    assert tab.inner_text("#inside caption") == "The largest inside model.layers"
    tab.get_by_role("button", name="2", exact=True).click()
    assert tab.input_value("#root") == "model.layers.2" and tab.locator("#inside tbody tr").count() == 7
    tab.get_by_role("table", name="The largest inside").get_by_role("button", name="proj6").press("Enter")
    assert tab.inner_text("#h-layer") == "One layer: model.layers.2.proj6"


@pytest.mark.parametrize(("name", "scheme"), [("two", "light"), ("two", "dark"), ("none", "light")])
def test_axe_has_nothing_to_say(opened, name, scheme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    tab = opened(name, color_scheme=scheme)
    if name == "two":
        tab.select_option("#other", "1")
        tab.click("#table tr.flagged button")
        tab.wait_for_selector("#compare svg path")
    results = axe.run(tab)
    assert results.violations_count == 0, results.generate_report()


def test_a_point_of_the_figure_leads_to_its_layer(opened):
    tab = opened("two")
    point = tab.locator("#error .mark-symbol path").nth(4)
    point.click(force=True)
    tab.wait_for_function("document.getElementById('h-layer').textContent.endsWith('layers.0.proj4')")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_what_hovering_shows_has_the_colours_of_the_page(opened, scheme):
    tab = opened("two", color_scheme=scheme)
    tab.locator("#error .mark-symbol path").nth(7).hover(force=True)
    shown = tab.wait_for_selector("#vg-tooltip-element.visible")
    assert "model.layers.1.proj0" in shown.inner_text() and "50" in shown.inner_text()
    assert shown.evaluate("e => getComputedStyle(e).color == getComputedStyle(document.body).color")
    ground = "getComputedStyle(document.querySelector('.cards > div')).backgroundColor"
    assert shown.evaluate(f"e => getComputedStyle(e).backgroundColor == {ground}")


def test_the_tree_is_entered_by_list_and_by_click(opened):
    tab = opened("two")
    everything = tab.locator("#tree .mark-rect").first.locator("path")
    assert everything.count() == 30
    assert tab.input_value("#root") == "model.layers", "where there is something to choose from"
    tab.select_option("#root", "model.layers.0")
    tab.wait_for_function("document.querySelectorAll('#tree .mark-rect:first-of-type path').length == 7")
    tab.select_option("#root", "(the model)")
    tab.wait_for_function("document.querySelectorAll('#tree .mark-rect:first-of-type path').length == 30")
    tab.locator("#tree svg").click(position={"x": 300, "y": 200})
    tab.wait_for_function("document.getElementById('root').value == 'model'")
    tab.get_by_label("before", exact=True).check()
    assert everything.count() == 30


def test_modules_beyond_those_that_are_listed_are_entered_too(opened):
    tab = opened("wide")
    assert tab.locator("#root option").count() == 400
    tab.get_by_label("before", exact=True).check()
    tab.get_by_role("button", name="998", exact=True).click()
    assert tab.input_value("#root") == "experts.998" and "experts.998" in tab.inner_text("#inside caption")
    tab.get_by_label("after", exact=True).check()
    tab.wait_for_function("document.querySelectorAll('#tree .mark-rect:first-of-type path').length == 2")
    tab.locator("#tree svg").click(position={"x": 600, "y": 200})
    tab.wait_for_function("document.getElementById('h-layer').textContent.includes('experts.998.')")


def test_two_reports_stand_beside_each_other(opened):
    tab = opened("two")
    assert not tab.is_visible("#comparison")
    tab.select_option("#other", "1")
    tab.wait_for_selector("#compare svg path")
    assert "30 layers are in both" in tab.inner_text("#compared") and "Higher is better" in tab.inner_text("#c-compare")
    assert tab.locator("#compare .mark-symbol.role-mark path").count() == 2 * 29, "all but the output that overflows"
    assert "Beside second" in tab.inner_text("#h-compare")
    tab.get_by_role("button", name="error, other").click()
    others = [float(v) for v in column(tab, 4)]
    assert others == sorted(others, reverse=True)
    tab.select_option("#shown", "1")
    tab.select_option("#other", "")
    assert len(names(tab)) == 30 and not tab.is_visible("#comparison")
    assert tab.locator("#table .compared:visible").count() == 0


def test_hostile_names_are_text_everywhere(opened):
    tab = opened("hostile")
    tab.select_option("#other", "1")
    tab.click("#table tbody tr:nth-child(2) button")
    assert tab.inner_text("#h-layer").endswith(HOSTILE)
    tab.hover("#error .mark-symbol path >> nth=0", force=True)
    tab.wait_for_selector("#compare svg path")
    assert tab.locator("img").count() == 0 and tab.locator("script").count() == 3


@pytest.mark.parametrize(("name", "drawn"), [("real", 3), ("no data", 2)])
def test_layers_of_every_kind_are_drawn_without_a_word_on_the_console(opened, name, drawn):
    tab = opened(name)
    for layer in "012345":
        tab.select_option("#chosen", layer)
        figures = drawn - (layer in "45")  # zeros have no singular values
        tab.wait_for_function(f"document.querySelectorAll('#layer .three svg').length == {figures}")
        shown = tab.inner_text("#layer")
        assert not any(word in shown for word in ("NaN", "Infinity", "undefined", "[object")), shown
        assert ("All weights are zero" in shown) == (layer in "45")
        row = tab.locator("#table tbody tr.chosen td").all_inner_texts()
        before, after = (cell for cell in row if cell.endswith("iB"))
        assert f"{before} → {after}" in shown, "16.25 KiB are one number everywhere"


def test_a_page_of_no_layers_opens(opened):
    assert opened("none").inner_text("#count") == "0 of 0 layers"


def test_500_layers_open_in_less_than_two_seconds(browser, files):
    tab = browser.new_page(viewport={"width": 1280, "height": 800})
    session = tab.context.new_cdp_session(tab)
    session.send("Performance.enable", {"timeDomain": "threadTicks"})
    tab.goto((files / "many.html").as_uri())
    tab.wait_for_function("document.documentElement.dataset.ready", timeout=60_000)
    metrics = {m["name"]: m["value"] for m in session.send("Performance.getMetrics")["metrics"]}
    assert len(names(tab)) == MANY
    print(f"{metrics['TaskDuration']:.2f} s of the main thread")
    assert metrics["TaskDuration"] < INTERACTIVE_CPU_S
    tab.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_needs_no_sideways_scrolling_and_text_is_readable(opened, scheme):
    tab = opened("two", viewport={"width": 390, "height": 800}, color_scheme=scheme)
    tab.select_option("#other", "1")
    tab.wait_for_selector("#compare svg path")
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390
    contrast = """selector => {
      const linear = v => (v /= 255) <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
      const numbers = c => c.match(/[\\d.]+/g).slice(0, 3).map(linear);
      const light = c => { const [r, g, b] = numbers(c); return .2126 * r + .7152 * g + .0722 * b };
      const style = getComputedStyle(document.querySelector(selector));
      const ink = light(style.fill !== 'none' && selector.includes('svg') ? style.fill : style.color);
      const paper = light(getComputedStyle(document.body).backgroundColor);
      return (Math.max(ink, paper) + .05) / (Math.min(ink, paper) + .05) }"""
    for selector in (
        "body",
        "figcaption",
        "button.layer",
        "#error svg .role-axis text",
        "#error svg .role-legend text",
    ):
        assert tab.evaluate(contrast, selector) > 4.5, selector  # WCAG 2.1, level AA


def test_on_paper_the_whole_table_is_there_and_the_controls_are_not(opened):
    tab = opened("two", color_scheme="dark")
    tab.emulate_media(media="print")
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    box = tab.locator(".scroll").first
    assert box.evaluate("e => e.scrollHeight <= e.clientHeight + 1")
    assert not tab.is_visible("#filter") and tab.is_visible("#error svg")
    assert tab.pdf(format="A4").startswith(b"%PDF")
