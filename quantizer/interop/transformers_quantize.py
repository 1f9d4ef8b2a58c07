"""A float model through `from_pretrained`, quantized weight by weight as its loader reads them.

Each weight is in memory as a float from when it is read until its layer is quantized, so the peak is the quantized
model and one layer (one module of fused experts). Without data, and therefore by schemes that need none.
"""

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from ...layers import Unsuitable
from ...recipes.suggest import did_you_mean
from ..errors import CalibrationError, CheckpointError, PlanError, QuantizeError, some
from ..graft import graft, with_heads
from ..plan import FREED, UNTIED, PlannedLayer
from ..quantizer import Quantizer
from ..surgery import find_sites, split_experts
from .transformers_config import QGraftConfig

try:
    from transformers.core_model_loading import ConversionOps
except ImportError:  # 4.57 hands the weights to the quantizer itself
    ConversionOps = object


class QuantizingWhileLoading:
    """The plan for a skeleton on meta, carried out as the weights come.

    Raises RecipeError, PlanError and CalibrationError before any weight is read.
    """

    def __init__(self, model: nn.Module, config: QGraftConfig):
        _tie(model)
        self.quantizer = Quantizer(model)
        self.plan = self.quantizer.plan(config.read_recipe())
        _check_skipped(model, config.modules_to_not_convert)
        if not self.plan.todo:
            raise PlanError(f"recipe {self.plan.recipe.name}: quantizes no layer of this model; see Quantizer.plan()")
        for planned in self.plan.todo:
            if complaint := planned.scheme.needs_data():
                raise CalibrationError(f"layer '{planned.label}': {complaint}; quantize it once it is loaded")
        self.left: list[str] = []
        self.waiting: dict[str, list[PlannedLayer]] = {}  # parameter -> what it is the weight of
        self.late: list[PlannedLayer] = []  # what is tied to a weight that others want as well
        self.fused: dict[str, str] = {}  # parameter -> the module of fused experts that holds it
        self._sort(model)
        self._untie(model)

    def _sort(self, model: nn.Module) -> None:
        fused = {n: s.fused for s in find_sites(model) if s.fused is not None for n in s.names}
        homes = {id(m): n for n, m in model.named_modules()}
        heads = with_heads(self.plan.todo)
        for planned in heads[""]:  # a head that shares codes comes with its embedding
            if planned.name in fused:
                module = fused[planned.name]
                self.fused.update({f"{homes[id(module)]}.{leaf}": homes[id(module)] for leaf in module._parameters})
            elif planned.reason in (UNTIED, FREED):
                self.late.append(planned)
            else:
                group = [planned, *heads.get(planned.name, ())]
                self.waiting.update({f"{name}.weight": group for layer in group for name in layer.names})

    def _untie(self, model: nn.Module) -> None:
        """transformers must not tie, by a weight, what will have none by then."""
        tied = getattr(model, "all_tied_weights_keys", {})  # 5.x
        for target, source in list(tied.items()):
            if target in self.waiting or source in self.waiting:
                del tied[target]
        head = model.get_output_embeddings()
        if head is not None and any(model.get_submodule(n.removesuffix(".weight")) is head for n in self.waiting):
            model.config.get_text_config(decoder=True).tie_word_embeddings = False
            model.config.tie_word_embeddings = False

    def wants(self, name: str) -> bool:
        return name in self.waiting or name in self.fused

    def take(self, name: str, tensor: Tensor) -> None:
        """A weight, loaded, in the type and on the device that it is to have."""
        model, (path, _, leaf) = self.quantizer.model, name.rpartition(".")
        if name in self.fused:
            module = model.get_submodule(path)
            module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
            if not any(p.is_meta for p in module._parameters.values() if p is not None):
                self._split(self.fused[name])
        elif name in self.waiting:
            planned, *heads = self.waiting[name]
            for other in [n for n, group in self.waiting.items() if group[0] is planned]:
                del self.waiting[other]
            weight = nn.Parameter(tensor, requires_grad=False)
            for layer in (planned, *heads):
                model.get_submodule(layer.name)._parameters["weight"] = weight
            self._graft(planned, heads)

    def _split(self, home: str) -> None:
        for name in [n for n, module in self.fused.items() if module == home]:
            del self.fused[name]
        inside = [planned for planned in self.plan.todo if planned.name.startswith(f"{home}.")]
        self.quantizer.model = split_experts(self.quantizer.model, (planned.name for planned in inside))
        for planned in inside:
            self._graft(planned, [])

    @torch.no_grad()
    def _graft(self, planned: PlannedLayer, heads: list[PlannedLayer]) -> None:
        try:
            self.quantizer.model = graft(self.quantizer.model, planned, heads=heads)
        except Unsuitable as reason:
            self.left.append(f"'{planned.label}': {reason}")
        except Exception as error:
            raise QuantizeError(
                f"layer '{planned.label}' ({planned.scheme_name}, {planned.out_features} x {planned.in_features}): "
                f"{type(error).__name__}: {error}"
            ) from error
        for layer in (planned, *heads):  # nothing is left for transformers to initialize
            module = self.quantizer.model.get_submodule(layer.name)
            module._is_hf_initialized = True
            for tensor in (*module.parameters(), *module.buffers()):
                if not tensor.is_meta:
                    tensor._is_hf_initialized = True

    def check_missing(self, missing: list[str]) -> list[str]:
        left = [name for name in missing if self.wants(name)]
        if left:
            raise CheckpointError(f"the files have no values for {some(left)}, which would be random")
        return missing

    def finish(self, model: nn.Module) -> None:
        """Quantize what waited for its tie; CheckpointError for a layer whose weight never came."""
        self.check_missing(list(dict.fromkeys((*self.waiting, *self.fused))))
        for planned in self.late:
            self._graft(planned, [])
        if self.left:
            warnings.warn("these layers stay as they are:\n" + some(self.left, "\n", show=10), stacklevel=2)


class QuantizeOp(ConversionOps):
    """5.x: one weight, once it is loaded. It goes where it belongs; nothing is left to be set."""

    def __init__(self, work: QuantizingWhileLoading):
        self.work = work

    def convert(
        self, input_dict: dict[str, Any], *, missing_keys: set[str] | None = None, **_: Any
    ) -> dict[str, Tensor]:
        for name, tensors in input_dict.items():
            together = set(self.work.waiting) if name in self.work.waiting else {name}
            self.work.take(name, tensors[0] if isinstance(tensors, list) else tensors)
            if missing_keys is not None:
                missing_keys -= together - self.work.waiting.keys()
                missing_keys.discard(name)
        return {}


def _tie(model: nn.Module) -> None:
    """5.x builds the skeleton with weights untied; a plan must see which are."""
    for target, source in getattr(model, "all_tied_weights_keys", {}).items():
        owner, _, leaf = target.rpartition(".")
        model.get_submodule(owner)._parameters[leaf] = model.get_parameter(source)


def _check_skipped(model: nn.Module, names: list[str]) -> None:
    known = [name for site in find_sites(model) for name in site.names]
    for skipped in names:
        if not any(f".{skipped}." in f".{name}." for name in known):
            raise PlanError(
                f"modules_to_not_convert: {skipped!r} is no linear layer, and holds none{did_you_mean(skipped, known)}"
            )
