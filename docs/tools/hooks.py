"""What the site does to pages that are written for GitHub: MkDocs hooks, named in mkdocs.yml.

Links that leave docs/ lead to the repository, figures come along, quotations show where they are from, formulas become
MathML (which every current browser draws by itself, without a script), notebooks become pages, and the pages of the
reference list what there is.
"""

import ast
import html
import posixpath
import re
import tempfile
from pathlib import Path
from typing import Any

import jupytext
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

LINK = re.compile(r"\]\((\.\./[^)#\s]*)")
FIGURE = re.compile(r"!\[([^\]]*)\]\(\.\./([^)#\s]*)")
NOTEBOOK = re.compile(r"\]\((notebooks/\w+)\.py\)")
QUOTATION = re.compile(r"^```(\w+) file=(\S+)$", re.MULTILINE)
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


ROOT = Path(__file__).parents[2]
REPOSITORY = re.search(r"^repo_url: (\S+)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)[1]
MERMAID = "build/mermaid/*.min.js"  # from `make docs`; the theme looks for one on the page before it asks a CDN
PACKAGE = ("__init__.py", "functional.py", "kernels", "layers", "quantizer", "recipes")


@event_priority(100)  # before mkdocstrings reads its paths
def on_config(config: MkDocsConfig) -> MkDocsConfig:
    # The repository root is the package, whatever the clone is called, and Griffe goes by the name of the folder.
    folder = Path(tempfile.mkdtemp(), "qgraft")
    folder.mkdir()
    for name in PACKAGE:
        (folder / name).symlink_to(ROOT / name)
    if found := sorted(ROOT.glob(MERMAID)):
        config.extra_javascript.append(f"javascripts/{found[-1].name}")
    config.plugins["mkdocstrings"].config.handlers["python"]["paths"] = [str(folder.parent)]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for notebook in sorted(Path(config.docs_dir).glob("notebooks/*.py")):
        text = jupytext.writes(jupytext.read(notebook), fmt="md")
        text = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)  # the header is for Jupyter
        files.append(File.generated(config, f"notebooks/{notebook.stem}.md", content=text))
    for page in Path(config.docs_dir).glob("*.md"):
        for _, figure in FIGURE.findall(page.read_text(encoding="utf-8")):
            if files.get_file_from_path(figure) is None:
                files.append(File.generated(config, figure, abs_src_path=str(ROOT / figure)))
    for script in sorted(ROOT.glob(MERMAID))[-1:]:
        files.append(File.generated(config, f"javascripts/{script.name}", abs_src_path=str(script)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, **_: Any) -> str:
    if page.file.src_uri in REFERENCE:
        return markdown + REFERENCE[page.file.src_uri]()
    folder = posixpath.dirname(page.file.src_uri)

    def to_repository(match: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join("docs", folder, match[1]))
        return match[0] if path.startswith("docs/") else f"]({config.repo_url}/blob/main/{path}"

    # Markdown inside <details> is shown as such by GitHub; Python-Markdown wants to be told.
    markdown = markdown.replace("<details>", '<details markdown="1">')
    markdown = NOTEBOOK.sub(r"](\1.md)", markdown)
    markdown = FIGURE.sub(r"![\1](\2", markdown)
    return LINK.sub(to_repository, QUOTATION.sub(r'```\1 title="\2"', markdown))


def on_page_content(content: str, **_: Any) -> str:
    def to_mathml(match: re.Match[str]) -> str:
        return convert(html.unescape(match[2]).strip(), display="block" if match[1] == "div" else "inline")

    return FORMULA.sub(to_mathml, content)


def on_post_page(output: str, **_: Any) -> str:
    # The theme would ask GitHub for the number of stars; and its search is a dialog without a name.
    output = output.replace('data-md-component="source"', "")
    return output.replace(
        'data-md-component="search" role="dialog"', 'data-md-component="search" role="dialog" aria-label="Search"'
    )


def on_post_template(output_content: str, **_: Any) -> str:
    return on_post_page(output_content)  # the page for addresses that are not there


def public_names() -> str:
    """What the package exports, but for the layers, which have a page of their own."""
    tree = ast.parse((ROOT / "__init__.py").read_text(encoding="utf-8"))
    lists = (node for node in tree.body if isinstance(node, ast.Assign) and node.targets[0].id == "__all__")
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.module not in (None, "layers")]
    exported = {name for node in lists for name in ast.literal_eval(node.value)}
    sources = {alias.name: source(alias.name, node.module) for node in imports for alias in node.names}
    names = sorted(exported & sources.keys(), key=str.lower)
    return "\n".join(f"\n::: qgraft.{name}\n\n{link(sources[name])}\n" for name in names)


def source(name: str, module: str) -> str:
    """The file that defines a name which a package of ours hands on."""
    path = module.replace(".", "/")
    if not (ROOT / path).is_dir():
        return f"{path}.py"
    for node in ast.parse((ROOT / path / "__init__.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.level == 1 and name in {alias.name for alias in node.names}:
            return source(name, f"{module}.{node.module}")
    return f"{path}/__init__.py"


def link(path: str) -> str:
    return f"Source: [{path}]({REPOSITORY}/blob/main/{path})"


def modules(folder: str, first: str = "") -> str:
    """The modules of a folder, each with its docstring and all that is public in it."""
    names = sorted((path.stem for path in (ROOT / folder).glob("[a-z]*.py")), key=lambda name: (name != first, name))
    return "".join(
        f"\n## {name}.py\n\n{link(f'{folder}/{name}.py')}\n"
        f"\n::: qgraft.{folder.replace('/', '.')}.{name}\n    options: {SECTION}\n"
        for name in names
    )


SECTION = "{show_root_heading: false, show_root_toc_entry: false, heading_level: 3}"
REFERENCE = {
    "api/qgraft.md": public_names,
    "api/layers.md": lambda: modules("layers", first="base"),
    "api/algorithms.md": lambda: modules("layers/algorithms"),
}
