"""Linear layers that are more than a linear layer: left alone, each with a reason."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from qgraft import Quantizer, QuantLinear, Recipe

INT8 = Recipe.from_dict({"scheme": "w8a32", "min_features": 1})


def quantize(model):
    return Quantizer(model).quantize(INT8, progress=False)


def bytes_of(tensor):
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def reason(model, name):
    layers = {n: layer for layer in Quantizer(model).plan(INT8).layers for n in layer.names}
    assert layers[name].scheme is None
    return layers[name].reason


def block():
    return nn.Sequential(nn.Linear(18, 20), nn.Linear(20, 18))


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def subclass():
    return Doubled(18, 18)


def new_weight_norm():
    return parametrizations.weight_norm(nn.Linear(18, 18))


def new_spectral_norm():
    return parametrizations.spectral_norm(nn.Linear(18, 18))


def old_weight_norm():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(nn.Linear(18, 18))


def old_spectral_norm():
    return nn.utils.spectral_norm(nn.Linear(18, 18))


def pruned():
    return prune.l1_unstructured(nn.Linear(18, 18), "weight", amount=0.3)


def lazy():
    return nn.LazyLinear(18)


def accelerate_hooked():
    hooks = pytest.importorskip("accelerate.hooks")
    return hooks.add_hook_to_module(nn.Linear(18, 18), hooks.ModelHook())


def forward_replaced():
    linear = nn.Linear(18, 18)
    linear.forward = lambda x: x
    return linear


def integer_weight():
    linear = nn.Linear(18, 18)
    linear.weight = nn.Parameter(torch.ones(18, 18, dtype=torch.int8), requires_grad=False)
    return linear


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (subclass, "subclass of nn.Linear"),
        (new_weight_norm, "parametrized"),
        (new_spectral_norm, "parametrized"),
        (old_weight_norm, "weight_g, weight_v"),
        (old_spectral_norm, "weight_orig, weight_u"),
        (pruned, "weight_mask"),
        (lazy, "lazy"),
        (accelerate_hooked, "forward is replaced"),
        (forward_replaced, "forward is replaced"),
        (integer_weight, "int8, not float"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_linear_that_is_more_than_a_linear_is_left_with_a_reason(make, why):
    model = nn.ModuleDict({"odd": make(), "fc": nn.Linear(18, 18)})
    odd = model["odd"]
    state = {k: v for k, v in odd.state_dict().items() if not isinstance(v, nn.UninitializedParameter)}
    before = {name: bytes_of(t) for name, t in state.items()}
    assert why in reason(model, "odd")
    assert "odd" in str(Quantizer(model).plan(INT8))  # the table has a line for it, also without a shape
    Quantizer(model).plan(INT8).to_dict()
    quantize(model)
    assert model["odd"] is odd and isinstance(model["fc"], QuantLinear)
    assert {name: bytes_of(odd.state_dict()[name]) for name in before} == before


class OwnStart(nn.Linear):
    """Only begins in its own way."""

    std: float

    def __init__(self, *args, std=0.1):
        self.std = std
        super().__init__(*args)

    def reset_parameters(self):
        nn.init.normal_(self.weight, std=self.std)
        nn.init.zeros_(self.bias)

    def extra_repr(self):
        return f"std={self.std}"


class StillOwnStart(OwnStart):
    pass


class Tempered(nn.Linear):
    temperature = 2.0


class Computed(OwnStart):
    def __getattr__(self, name):
        return super().__getattr__(name)


class Called(StillOwnStart):
    def __call__(self, x):
        return -super().__call__(x)


@pytest.mark.parametrize("kind", [OwnStart, StillOwnStart])
def test_a_subclass_that_only_makes_itself_in_its_own_way_is_quantized(kind):
    model = nn.Sequential(kind(18, 18))
    expected = nn.functional.linear(x := torch.randn(4, 18), model[0].weight, model[0].bias)
    quantize(model)
    assert isinstance(model[0], QuantLinear) and (model(x) - expected).abs().max() < 0.05 * expected.abs().max()


def test_the_linear_layer_of_falcon_is_quantized():
    falcon = pytest.importorskip("transformers.models.falcon.modeling_falcon")
    model = nn.Sequential(falcon.FalconLinear(18, 20))
    expected = model(x := torch.randn(4, 18))
    quantize(model)
    assert isinstance(model[0], QuantLinear) and (model(x) - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize("kind", [Tempered, Computed, Called])
def test_a_subclass_with_anything_else_of_its_own_is_left(kind):
    model = nn.ModuleDict({"odd": kind(18, 18), "fc": nn.Linear(18, 18)})
    assert "subclass of nn.Linear" in reason(model, "odd")


def test_a_layer_with_an_attribute_by_the_name_of_a_tensor_is_left():
    """A number in the place of the scales would be found at the first forward only."""
    model = nn.ModuleDict({"odd": nn.Linear(18, 18), "fc": nn.Linear(18, 18)})
    model["odd"].scale = model["fc"].alpha = 0.5
    assert "has an attribute 'scale'" in reason(model, "odd")
    quantize(model)
    assert type(model["odd"]) is nn.Linear and isinstance(model["fc"], QuantLinear) and model["fc"].alpha == 0.5


def test_planning_does_not_run_a_parametrization():
    """spectral_norm takes a step at each access of the weight while training: planning must not be one."""
    seen = []

    class Spy(nn.Module):
        def forward(self, weight):
            seen.append(1)
            return weight

    linear = nn.Linear(18, 18)
    parametrize.register_parametrization(linear, "weight", Spy())
    seen.clear()
    model = nn.Sequential(linear)
    Quantizer(model).plan(INT8)
    assert not seen


def test_lazy_modules_elsewhere_do_not_disturb_the_plan():
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.Flatten(), nn.Linear(16, 16))
    assert [layer.name for layer in Quantizer(model).plan(INT8).todo] == ["3"]


def test_a_linear_of_no_inputs_is_left_alone():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch: initializing zero-element tensors
        model = nn.Sequential(nn.Linear(0, 5), nn.Linear(5, 0), nn.Linear(16, 16))
    plan = Quantizer(model).plan(INT8)
    assert [layer.name for layer in plan.todo] == ["2"] and "5x0" in str(plan)


@pytest.mark.parametrize("kind", ["LoraConfig", "LoHaConfig", "IA3Config"])
def test_a_peft_adapter_is_left_whole_and_the_rest_is_quantized(kind):
    peft = pytest.importorskip("peft")
    options = {"feedforward_modules": []} if kind == "IA3Config" else {"r": 2}
    config = getattr(peft, kind)(target_modules=["0.0"], **options)
    model = peft.get_peft_model(nn.Sequential(block(), block()), config)
    before = {n for n, m in model.named_modules() if type(m) is nn.Linear and ".0.0." in n}
    assert len(before) == (3 if kind == "LoraConfig" else 1)
    x = torch.randn(2, 18)
    exact = model(x)
    quantize(model)
    assert {n for n, m in model.named_modules() if type(m) is nn.Linear} == before
    assert all("inside an adapter" in reason(model, name) for name in before)
    assert sum(isinstance(m, QuantLinear) for m in model.modules()) == 3
    torch.testing.assert_close(model(x), exact, rtol=0.1, atol=0.1)
