"""The documentation tells the truth: its code runs, its quotations are in the source, its links lead somewhere."""

import re
import textwrap
from pathlib import Path

import pytest

import qgraft
from qgraft import Recipe
from qgraft.benchmarks.models import MissingModels

ROOT = Path(qgraft.__file__).parent
PAGES = sorted([*ROOT.glob("docs/*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"])
FENCE = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str):
    text = page.read_text(encoding="utf-8")
    for match in FENCE.finditer(text):
        if match[1] == language:
            yield match[2].strip(), match[3], text[: match.start()].count("\n") + 2


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_python_blocks_run_in_order(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__docs__"}
    for info, code, line in blocks(page, "python"):
        if info.startswith("file="):
            continue
        try:
            exec(compile("\n" * (line - 1) + code, str(page), "exec"), names)
        except MissingModels as missing:  # a chapter that looks at a real model
            pytest.skip(str(missing))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_quotations_stand_in_the_source(page):
    for info, code, line in (*blocks(page, "python"), *blocks(page, "cpp")):
        if not info.startswith("file="):
            continue
        source = (ROOT / info.removeprefix("file=")).read_text(encoding="utf-8")
        assert textwrap.dedent(code).strip() in textwrap.dedent(source) or code.strip("\n") in source, (
            f"{page.name}:{line} quotes what {info.removeprefix('file=')} no longer says"
        )


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_yaml_blocks_are_recipes(page):
    for _, text, line in blocks(page, "yaml"):
        Recipe.from_yaml(text, source=f"{page.name}:{line}")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_there_is_something_to_run():
    assert sum(len(list(blocks(page, "python"))) for page in PAGES) > 30
