"""What a recipe may say.

Shapes only: whether a scheme exists and knows an option is for the plan to check.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    PrivateAttr,
    StrictBool,
    StrictInt,
    StrictStr,
    ValidationError,
    model_serializer,
    model_validator,
)

from .complaints import complaints
from .errors import RecipeError, dotted, spell, spell_not_text
from .extends import resolve
from .match import compile_pattern
from .node import KeyPath, Node, from_plain, nearest
from .reader import read_yaml
from .writer import write_yaml

VERSION = 1
MAX_INT = 2**63 - 1


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("must not be empty")
    return text


def _not_nothing(patterns: tuple[str, ...]) -> tuple[str, ...]:
    if not patterns:
        raise ValueError("must hold at least one pattern")
    return patterns


def _pattern(text: str) -> str:
    compile_pattern(text)
    return text


def _option(value: Any) -> Any:
    if value is None or isinstance(value, bool):
        return value
    # Subclasses, such as numpy's float64, become the plain type: YAML can write no other.
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        if abs(value) > MAX_INT:
            raise ValueError("is far too large")
        return int(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"must be a finite number, got {value}")
        return float(value)
    hint = "; options stand beside the name: {name: ..., rank: 64}" if isinstance(value, Mapping) else ""
    raise ValueError(f"must be text, a number, true, false or null, got {spell(value)}{hint}")


def _version(value: int) -> int:
    if value != VERSION:
        raise ValueError(f"this qgraft reads version {VERSION} of the recipe format, got {spell(value)}")
    return value


def _scheme(value: Any) -> Any:
    """``"w8a16"`` and ``{name: w4a4_svd, rank: 64}`` in the form of SchemeSpec's fields."""
    if isinstance(value, str):
        return {"name": value}
    if isinstance(value, Mapping):
        fields: dict[str, Any] = {"options": {key: option for key, option in value.items() if key != "name"}}
        return {**fields, "name": value["name"]} if "name" in value else fields
    if value is None or isinstance(value, SchemeSpec):
        return value
    raise ValueError(f"must be the name of a scheme, or a mapping with a name, got {spell_not_text(value)}")


# The leaves are strict, so that "128" is not a number and 1 is not a bool. The models themselves are not: in
# pydantic a strict tuple refuses the lists that YAML gives.
Text = Annotated[StrictStr, AfterValidator(_not_blank)]
Count = Annotated[StrictInt, Field(ge=1, le=MAX_INT)]
Pattern = Annotated[StrictStr, AfterValidator(_pattern)]
Patterns = Annotated[
    tuple[Pattern, ...],
    AfterValidator(_not_nothing),
    BeforeValidator(lambda value: (value,) if isinstance(value, str) else value),
]
Option = Annotated[str | int | float | bool | None, PlainValidator(_option)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SchemeSpec(_Frozen):
    """A scheme by name, with the options that differ from the scheme's defaults."""

    name: Text
    options: dict[StrictStr, Option] = {}

    @model_validator(mode="after")
    def _name_is_taken(self) -> SchemeSpec:
        if "name" in self.options:
            raise ValueError("an option cannot be called 'name'")
        return self

    def __hash__(self) -> int:
        return hash((self.name, frozenset(self.options.items())))

    @model_serializer
    def to_plain(self) -> str | dict[str, Any]:
        """The short form of a recipe: the name alone, or a flat mapping of name and options."""
        return {"name": self.name, **self.options} if self.options else self.name


Scheme = Annotated[SchemeSpec | None, BeforeValidator(_scheme)]


class Rule(_Frozen):
    """The layers that any of ``match`` means get ``scheme``, or are left alone for the reason in ``skip``.

    optional: the rule may match nothing. untie: also quantize a layer whose weight another module shares, at
    the price of a copy.
    """

    match: Patterns
    scheme: Scheme = None
    skip: Text | None = None
    optional: StrictBool = False
    untie: StrictBool = False

    @model_validator(mode="after")
    def _one_of_scheme_and_skip(self) -> Rule:
        if self.scheme is not None and self.skip is not None:
            raise ValueError("has both 'scheme' and 'skip'; a rule does one of them")
        if self.scheme is None and self.skip is None:
            raise ValueError("needs 'scheme', or 'skip' with the reason")
        if self.untie and self.scheme is None:
            raise ValueError("'untie' goes with 'scheme': a skipped layer stays tied")
        return self


class CalibrationSpec(_Frozen):
    """How much data the schemes that calibrate see: ``samples`` sequences of at most ``tokens`` tokens.

    Of float matrices, whose rows are tokens, they see as many rows as that makes.
    ``sequential``: each layer is calibrated with what the layers before it, quantized already, make of the data.
    """

    samples: Count = 128
    tokens: Count = 512
    sequential: StrictBool = True


class Recipe(_Frozen):
    """What to do to a model: the first rule that matches a linear layer decides, else ``scheme`` does.

    Without ``scheme`` only the rules quantize. Layers with fewer than ``min_features`` inputs or outputs stay
    as they are. ``extends`` is resolved while reading and is not a field. Where each value was written is
    remembered for messages and plays no part in ``==``. The constructor raises pydantic's ValidationError,
    the ``from_`` methods RecipeError.
    """

    name: Text = "recipe"
    description: StrictStr = ""
    version: Annotated[StrictInt, AfterValidator(_version)] = VERSION
    scheme: Scheme = None
    rules: tuple[Rule, ...] = ()
    calibration: CalibrationSpec = CalibrationSpec()
    min_features: Count = 16

    _places: dict[KeyPath, str] = PrivateAttr(default_factory=dict)

    @model_validator(mode="after")
    def _does_something(self) -> Recipe:
        if self.scheme is None and not self.rules:
            raise ValueError("needs 'scheme', 'rules' or both")
        return self

    def __eq__(self, other: object) -> bool:
        return dict(self) == dict(other) if isinstance(other, Recipe) else NotImplemented

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], source: str = "<dict>") -> Recipe:
        """A recipe from the form that YAML would give: dicts, lists and scalars. ``data`` is copied.

        ``source`` names it in messages; a relative ``extends`` starts at its folder. Raises RecipeError with
        every fault.
        """
        if not isinstance(data, Mapping):
            raise RecipeError(f"{source}: a recipe is a mapping of keys to values, got {spell(data)}")
        return cls._from_tree(resolve(from_plain(data, source)))

    @classmethod
    def from_yaml(cls, text: str, source: str = "<string>") -> Recipe:
        """A recipe from YAML text; as ``from_dict``, with lines in the messages."""
        return cls._from_tree(resolve(read_yaml(text, source)))

    @classmethod
    def _from_tree(cls, root: Node, **defaults: Any) -> Recipe:
        places = dict(root.places())
        try:
            recipe = cls.model_validate({**defaults, **root.plain()})
        except ValidationError as error:
            raise RecipeError(complaints(error, places, _known_keys)) from None
        recipe._places.update(places)
        return recipe

    def to_dict(self) -> dict[str, Any]:
        """Dicts, lists and scalars that ``from_dict`` reads back to an equal recipe."""
        data: dict[str, Any] = {"name": self.name, "description": self.description, "version": self.version}
        if self.scheme is not None:
            data["scheme"] = self.scheme.to_plain()
        data["rules"] = [_rule_to_plain(rule) for rule in self.rules]
        data["calibration"] = self.calibration.model_dump()
        data["min_features"] = self.min_features
        return data

    def to_yaml(self) -> str:
        """YAML text that ``from_yaml`` reads back to an equal recipe."""
        return write_yaml(self.to_dict())

    def where(self, *path: str | int) -> str:
        """The ``file:line`` of a value, such as ``where("rules", 0, "scheme", "rank")``.

        A path that was not written gives the nearest part above it that was. A recipe that was built in
        Python has no lines and answers with its name.
        """
        written = nearest(self._places, path)
        return f"recipe {self.name!r}" if written is None else self._places[written]

    def error(self, path: tuple[str | int, ...], message: str) -> RecipeError:
        """A RecipeError, not raised, that says ``message`` about the value at ``path``."""
        about = f"{dotted(path)}: " if path else ""
        return RecipeError(f"{self.where(*path)}: {about}{message}")


def _rule_to_plain(rule: Rule) -> dict[str, Any]:
    data: dict[str, Any] = {"match": list(rule.match)}
    if rule.scheme is not None:
        data["scheme"] = rule.scheme.to_plain()
    if rule.skip is not None:
        data["skip"] = rule.skip
    return {**data, **{flag: True for flag in ("optional", "untie") if getattr(rule, flag)}}


def _known_keys(path: KeyPath) -> list[str]:
    if not path:
        return [*Recipe.model_fields, "extends"]
    return list((Rule if path[0] == "rules" else CalibrationSpec).model_fields)
