"""Quantize one layer of a model, and put it in its place."""

import math
import time

from torch import nn

from ..layers import Stats
from ..layers.algorithms.compensation import compensate, search_damping
from .kinds import as_linear, quantized
from .plan import PlannedLayer
from .report import measure
from .rules import ALL
from .sharing import tied_head
from .surgery import replace


def graft(
    model: nn.Module,
    planned: PlannedLayer,
    stats: Stats | None = None,
    heads: list[PlannedLayer] | tuple[()] = (),
    details: bool = False,
) -> nn.Module:
    """The model, in which a quantized layer with its report stands where the float one was.

    stats: of the layer's inputs. heads: what is tied to this embedding, and shares its codes. details: as for
    `Quantizer.quantize`. Raises Unsuitable if the layer should stay as it is, ArithmeticError if the result is not
    finite, and whatever the scheme raises; the model is then as it was.
    """
    start = time.perf_counter()
    module = _compensated(model.get_submodule(planned.name), stats)
    layer = quantized(module, ALL[planned.scheme_name], planned.scheme, stats)
    seconds = time.perf_counter() - start
    layer.report = measure(planned.name, as_linear(module), layer, stats, planned.bytes_before, seconds, details)
    if not math.isfinite(layer.report.weight_error):
        raise ArithmeticError("the quantized weight is not finite")
    tied = ((head.names, tied_head(model.get_submodule(head.name), head, layer)) for head in heads)
    return replace(model, (planned.names, layer), *tied)


def _compensated(module: nn.Module, stats: Stats | None) -> nn.Module:
    """The module, or a linear layer in its place that makes up for what the layers before it lost."""
    if stats is None or not stats.drifts:
        return module
    linear = as_linear(module)
    weight = linear.weight.detach()
    damping = search_damping(weight, stats.halves)
    if damping is None:
        return module
    weight = compensate(weight, stats.second_moment, stats.drift_moment, damping)
    other = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta")
    other.weight = nn.Parameter(weight.to(linear.weight.dtype), requires_grad=False)
    other.bias = linear.bias
    return other.train(module.training)


def with_heads(todo: tuple[PlannedLayer, ...]) -> dict[str, list[PlannedLayer]]:
    """The layers of a plan by the name of the embedding whose codes they share; under "" those with their own."""
    found: dict[str, list[PlannedLayer]] = {"": []}
    for planned in todo:
        found.setdefault(planned.codes_of, []).append(planned)
    return found
