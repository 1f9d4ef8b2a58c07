"""Two habits of our docstrings, told to the site: a Griffe extension.

Code is named as Sphinx does, :func:`so`, and shown as code. The options of a scheme are described in the `Field` that
also checks them.
"""

import ast
import re
from typing import Any

from griffe import Attribute, Docstring, ExprCall, ExprKeyword, Extension, Object

ROLE = re.compile(r":\w+:`~?([^`]+)`")


class Docstrings(Extension):
    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = ROLE.sub(r"`\1`", obj.docstring.value)

    def on_attribute(self, *, attr: Attribute, **_: Any) -> None:
        if isinstance(attr.value, ExprCall) and str(attr.value.function) == "Field":
            for argument in attr.value.arguments:
                if isinstance(argument, ExprKeyword) and argument.name == "description":
                    attr.docstring = Docstring(ast.literal_eval(str(argument.value)), parent=attr)
            attr.value = attr.value.arguments[0]  # what is left to say is the default
