"""class Quantizer: read a recipe, look at the model, replace each layer that a rule means."""

import copy
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ..layers import Unsuitable
from ..recipes import Recipe, load_recipe
from . import calibration as calibrate
from .errors import CalibrationError, PlanError, QuantizeError, some
from .graft import graft, with_heads
from .interop.clients import attach
from .plan import Plan, PlannedLayer, make_plan
from .report import Report
from .stages import Stages
from .surgery import find_sites, split_experts


class Quantizer:
    """Quantizes the linear layers of a model, and the embeddings that a recipe names.

    model: any `nn.Module`, on CPU or GPU, in float32, bfloat16 or float16.
    """

    def __init__(self, model: nn.Module):
        if not isinstance(model, nn.Module):
            hint = "; load the model first, or take `qgraft quantize`" if isinstance(model, str | Path) else ""
            raise TypeError(f"Quantizer takes an nn.Module, got {type(model).__name__}{hint}")
        self.model = model

    @property
    def report(self) -> Report:
        """Error, size and time of each layer quantized so far."""
        return Report.of(self.model)

    def plan(self, recipe: str | Path | Recipe) -> Plan:
        """What `quantize` would do, without touching anything; also works on a model on the meta device.

        recipe: a shipped name ("w4a4_svd"), the path of a YAML file, or a Recipe.
        Raises RecipeError or PlanError with every problem, with file and line.
        """
        return make_plan(self.model, load_recipe(recipe))

    def quantize(
        self,
        recipe: str | Path | Recipe,
        *,
        calibration: Any = None,
        tokenizer: Any = None,
        inplace: bool = True,
        progress: bool = True,
        details: bool = False,
    ) -> nn.Module:
        """Quantize as the recipe says, and return the model.

        calibration: a tensor or dict (one batch), a list of tensors, dicts or tuples, a DataLoader, a
        function that takes the model and runs it, or a list of texts together with `tokenizer`. Without it,
        schemes that want data work from the weights alone.
        inplace: False quantizes a copy (and needs the memory for it); `self.model` is then the copy.
        progress: bars for calibration and layers, shown on a terminal only.
        details: record histograms and singular values of each layer for the HTML report; a few kB a layer. With
        data, layers of w4a4_svd and w4a8_svd take about three times as long: what each step is worth in them is
        found by leaving it out.

        Memory: each float weight is released as its layer is replaced, so the peak stays under the model and
        one layer's working set, plus up to 1 GiB of statistics if there is calibration data, the activations of
        one block where calibration is sequential, and a copy of the experts of one fused module while they are
        split.
        Interrupted or failed, every layer is either the original or finished; calling again goes on from
        there. Raises RecipeError and PlanError before anything is touched, CalibrationError if the data does
        not run, and QuantizeError if a layer fails. A layer that its options make no smaller stays as it is,
        with a warning.
        """
        plan = self.plan(recipe)
        _check_weights(self.model, plan)
        if not inplace:
            self.model = copy.deepcopy(self.model)
        if not plan.todo:
            why = some([f"'{layer.label}': {layer.reason}" for layer in plan.layers], "\n", 3)
            warnings.warn(f"recipe {plan.recipe.name}: no layer is left to quantize\n{why}".rstrip(), stacklevel=2)
        run = None
        if calibration is not None:
            run = calibrate.make_runner(calibration, plan.recipe.calibration, tokenizer, progress)
        _check_data(plan, run)
        self.model = split_experts(self.model, (planned.name for planned in plan.todo))
        done, left = 0, []
        heads = with_heads(plan.todo)
        todo = heads.pop("")  # a head that shares an embedding's codes is quantized together with it
        stages = Stages(lambda: self.model, run, plan.recipe.calibration.sequential)
        with tqdm(total=len(todo), desc="quantize", disable=None if progress else True) as bar:
            for wave, stats in stages.of(todo):
                for planned in wave:
                    bar.set_postfix_str(planned.name, refresh=True)
                    try:
                        of_it, tied = stats.get(planned.name), heads.get(planned.name, [])
                        self.model = graft(self.model, planned, of_it, tied, details)
                    except Unsuitable as reason:
                        left.append(f"'{planned.label}': {reason}")
                    except (Exception, KeyboardInterrupt) as error:
                        attach(self.model)
                        raise _explain(error, planned, done, len(todo)) from error
                    stats.pop(planned.name, None)
                    done += 1
                    bar.update()
        attach(self.model)
        if left:
            warnings.warn("these layers stay as they are:\n" + some(left, "\n", show=10), stacklevel=2)
        return self.model


def _check_weights(model: nn.Module, plan: Plan) -> None:
    problems = []
    modules = {site.name: site.module for site in find_sites(model)}
    for planned in plan.todo:
        weight = modules[planned.name].weight.detach()
        if weight.is_meta:
            problems.append(f"layer '{planned.label}' is on the meta device: load the model's weights first")
        elif not torch.isfinite(weight).all():
            problems.append(f"layer '{planned.label}' has NaN or infinite weights")
    if problems:
        raise PlanError(some(problems, "\n", show=10))


def _check_data(plan: Plan, run: calibrate.Runner | None) -> None:
    """Options that cannot do without calibration data are found before the first layer, not at it."""
    if run is not None:
        return
    for planned in plan.todo:
        complaint = planned.scheme.needs_data()
        if complaint:
            raise CalibrationError(f"layer '{planned.label}': {complaint}")


def _explain(error: BaseException, planned: PlannedLayer, done: int, total: int) -> BaseException:
    what = "interrupted" if isinstance(error, KeyboardInterrupt) else f"{type(error).__name__}: {error}"
    shape = f"{planned.out_features} x {planned.in_features}"
    progress = f"{done} of {total} layers are done"
    message = (
        f"layer '{planned.label}' ({planned.scheme_name}, {shape}): {what}. {progress}, "
        "this one and the others are as they were; call quantize() again to go on."
    )
    return KeyboardInterrupt(message) if isinstance(error, KeyboardInterrupt) else QuantizeError(message)
