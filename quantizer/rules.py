"""What the schemes and rules of a recipe mean in a model: names to classes, patterns to sites."""

import re
from collections import ChainMap

from pydantic import ValidationError
from torch import nn

from ..layers import EMBEDDINGS, SCHEMES, QuantLayer, Scheme
from ..recipes import Recipe, SchemeSpec, did_you_mean, pattern_matches, suggest
from ..recipes.schema import Rule
from .errors import PlanError, some
from .surgery import Site

Resolved = tuple[type[QuantLayer], Scheme]
ALL = ChainMap(SCHEMES, EMBEDDINGS)  # a view: a layer that is registered later is found too


def resolve_all(recipe: Recipe) -> tuple[dict[tuple, Resolved], list[str]]:
    """Every scheme of the recipe by its path in it, and what is wrong with the others, used or not."""
    specs = [
        (("scheme",), recipe.scheme),
        *((("rules", i, "scheme"), r.scheme) for i, r in enumerate(recipe.rules)),
    ]
    schemes, problems = {}, []
    for path, spec in specs:
        if spec is None:
            continue
        try:
            schemes[path] = resolve_scheme(recipe, path, spec)
        except PlanError as error:
            problems.append(str(error))
    return schemes, problems


def resolve_scheme(recipe: Recipe, path: tuple, spec: SchemeSpec) -> Resolved:
    """The layer class and checked options that a recipe's scheme means; PlanError with file and line."""
    cls = ALL.get(spec.name)
    if cls is None:
        hint = did_you_mean(spec.name, ALL)
        raise PlanError(str(recipe.error((*path, "name"), f"no scheme '{spec.name}'{hint} (known: {', '.join(ALL)})")))
    if spec.name in EMBEDDINGS and path == ("scheme",):
        what = (
            f"'{spec.name}' is for embeddings, which only rules reach: write {{match: Embedding, scheme: {spec.name}}}"
        )
        raise PlanError(str(recipe.error((*path, "name"), what)))
    try:
        return cls, cls.Scheme(**spec.options)
    except ValidationError as error:
        raise PlanError(
            "\n".join(str(recipe.error((*path, *e["loc"]), _in_words(e, cls))) for e in error.errors())
        ) from None


def _in_words(error: dict, cls: type[QuantLayer]) -> str:
    if error["type"] == "extra_forbidden":
        name, known = str(error["loc"][-1]), list(cls.Scheme.model_fields)
        hint = did_you_mean(name, known)
        return f"scheme {cls.scheme_name} has no option '{name}'{hint} (options: {', '.join(known) or 'none'})"
    if error["type"] == "value_error":  # options that exclude each other: the Scheme's own words
        return str(error["ctx"]["error"])
    return f"{error['msg'][0].lower()}{error['msg'][1:]}, got {error['input']!r}"


def rule_for(site: Site, recipe: Recipe) -> tuple[int | None, Rule | None]:
    """The rule that decides over a site, with its index: the first that matches it and is meant for its kind."""
    for index, rule in enumerate(recipe.rules):
        if _is_meant_for(rule, site, recipe) and _matches(rule.match, site):
            return index, rule
    return None, None


def _is_meant_for(rule: Rule, site: Site, recipe: Recipe) -> bool:
    if rule.skip is not None:
        return not site.is_embedding or any(map(_quantizes_embeddings, recipe.rules))
    return _quantizes_embeddings(rule) == site.is_embedding


def _quantizes_embeddings(rule: Rule) -> bool:
    return rule.scheme is not None and rule.scheme.name in EMBEDDINGS


def _matches(patterns: tuple[str, ...], site: Site) -> bool:
    kinds = (type(site.module).__name__,)
    if isinstance(site.module, QuantLayer):
        # It still counts as what it may have been, so that a run can be continued.
        kinds += ("Embedding",) if site.is_embedding else ("Linear", "Conv1D", "Conv2d")
    kinds += (site.inside,) if site.inside else ()
    return any(pattern_matches(p, name, c) for p in patterns for name in site.names for c in kinds)


def unmatched(recipe: Recipe, sites: list[Site], model: nn.Module) -> list[str]:
    """What to tell of each pattern that matches nothing of the kind that its rule is for."""
    problems = []
    for i, rule in enumerate(recipe.rules):
        meant = [site for site in sites if _is_meant_for(rule, site, recipe)]
        for j, pattern in enumerate(rule.match):
            if not rule.optional and not any(_matches((pattern,), site) for site in meant):
                what = "embedding" if _quantizes_embeddings(rule) else "linear layer"
                why = _why_unmatched(pattern, what, meant, model)
                problems.append(str(recipe.error(("rules", i, "match", j), why)))
    return problems


def _why_unmatched(pattern: str, what: str, meant: list[Site], model: nn.Module) -> str:
    names = [name for site in meant for name in site.names]
    for other, module in model.named_modules(remove_duplicate=False):
        if other and pattern_matches(pattern, other, type(module).__name__):
            inside = any(name.startswith(f"{other}.") for name in names)
            hint = f"; for those inside it write '{other}.*'" if inside else ""
            if isinstance(module, nn.Embedding):
                hint = f" (schemes for embeddings: {', '.join(EMBEDDINGS)})"
            return f"'{pattern}' matches '{other}', a {type(module).__name__}, but no {what}{hint}"
    near = suggest(pattern, names)
    kinds = dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name) for name in names)
    if near:
        hint = f"the nearest names are {', '.join(map(repr, near))}"
    else:
        hint = f"the names here are like {some([repr(kind) for kind in kinds])}" if names else "the model has none"
    return f"'{pattern}' matches no {what}; {hint} (a rule with `optional: true` may match nothing)"
