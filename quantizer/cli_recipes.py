"""`qgraft recipes`: what ships, and how to write one's own."""

from typing import Annotated

import typer
from rich.table import Table

from ..recipes import load_recipe, shipped_recipes
from ..recipes.files import locate, read_text
from .cli_options import Debug
from .cli_output import show


def recipes(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Print this one.", show_default=False)] = None,
    debug: Debug = False,
) -> None:
    """List the recipes that ship with qgraft, or print one.

    What is printed is a recipe again, to start one of your own from.

    \b
    Example: qgraft recipes w4a4_svd > my_recipe.yaml
    """
    if name is None:
        list_recipes()
    else:
        print_recipe(name)


def list_recipes() -> None:
    table = Table(show_lines=True)
    table.add_column("recipe", no_wrap=True)
    table.add_column("description")
    for name, path in shipped_recipes().items():
        table.add_row(name, load_recipe(path).description)
    show(table, "`qgraft recipes NAME` prints one, to start your own from.")


def print_recipe(reference: str) -> None:
    """As it is written; what it takes from others follows as a comment, so that all of it is one recipe."""
    text = read_text(locate(reference))
    recipe = load_recipe(reference)
    print(text.rstrip("\n"))
    if any(line.startswith("extends:") for line in text.splitlines()):
        print("\n# With all that it extends:\n#")
        print("\n".join(f"#   {line}".rstrip() for line in recipe.to_yaml().splitlines()))
