"""An embedding and the output head that is tied to it: they share their codes, as they shared the weight."""

from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor, nn

from ..layers import QuantEmbedding, QuantLayer, QuantLinear, Scheme, tie
from ..recipes import Recipe
from .kinds import empty, is_conv1d, shape_of
from .rules import ALL, Resolved, rule_for
from .surgery import Site

if TYPE_CHECKING:
    from .plan import PlannedLayer


def shared_codes(sites: list[Site], recipe: Recipe, schemes: dict[tuple, Resolved]) -> tuple[dict[str, str], list[str]]:
    """Which sites hold codes in common, or will: name of each -> name of the embedding; and what stands in the way.

    An embedding to be quantized is among the keys, as its own owner.
    """
    by_weight = {f"{name}.weight".lstrip("."): site for site in sites for name in site.names}
    names = {id(site.module): site.name for site in sites}
    owners, problems = {}, []
    for site in sites:
        if isinstance(site.module, QuantEmbedding):
            owners.update({names[id(head)]: site.name for head in site.module.tied_to if id(head) in names})
            continue
        index, rule = rule_for(site, recipe) if site.is_embedding and site.tied and not site.obstacle else (None, None)
        path = ("rules", index, "scheme")
        if rule is None or rule.scheme is None or rule.untie or path not in schemes:
            continue
        scheme = schemes[path][1]
        heads = [by_weight.get(name) for name in site.tied]
        for head, name in zip(heads, site.tied, strict=True):
            why = _why_not(site, head, name, recipe, schemes, scheme)
            if why:
                what = f"layer '{site.label}' is tied to {name}, {why}; `untie: true` would quantize a copy"
                problems.append(str(recipe.error(path, what)))
                break
        else:
            owners.update({s.name: site.name for s in (site, *heads)})
    return owners, problems


def _why_not(site: Site, head: Site | None, name: str, recipe: Recipe, schemes: dict, scheme: Scheme) -> str:
    if head is None or head.is_embedding or is_conv1d(head.module):
        return "which is no linear layer that could read its codes"
    if head.obstacle:
        return f"which has to stay as it is ({head.obstacle})"
    if not _same(site.module.weight, head.module.weight):
        return "which is only a part of it, or has another shape"
    index, rule = rule_for(head, recipe)
    advice = f"give '{head.label}' the scheme {scheme.heads()} by a rule"
    if rule is not None and rule.skip is not None:
        return f"which a rule leaves in float ({rule.skip}): {advice}"
    cls, options = schemes.get(("scheme",) if index is None else ("rules", index, "scheme"), (None, None))
    if cls is None:
        return f"which has no scheme: {advice}"
    if not scheme.fits(cls.scheme_name, options):
        return f"whose scheme {cls.scheme_name} cannot read its codes: {advice}"
    return ""


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two weights are one and the same, as objects or in memory."""
    if a is b:
        return True
    return not a.is_meta and a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()


def tied_head(linear: nn.Module, planned: "PlannedLayer", embedding: QuantLayer) -> QuantLinear:
    """The layer in the place of a float head: with the codes of the embedding, and its report, sizes apart."""
    head = empty(ALL[planned.scheme_name], shape_of(linear), planned.scheme, planned.dtype)
    head._buffers.update({name: embedding._buffers[name] for name, b in head._buffers.items() if b is not None})
    tie(embedding, head)
    head.bias = linear.bias
    head.report = replace(
        embedding.report,
        name=planned.name,
        scheme=planned.scheme_name,
        bytes_before=planned.bytes_before,
        bytes_after=planned.bytes_after,
        seconds=0.0,
    )
    return head
