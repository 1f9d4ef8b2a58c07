"""Which modules are replaced, and what of a module survives its replacement."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from qgraft import Quantizer, QuantLinear, Recipe, SVDQW4A4Linear, W8A16Linear
from qgraft.quantizer.surgery import find_sites

INT8 = Recipe.from_dict({"scheme": "w8a32", "min_features": 1})
SVD = Recipe.from_dict({"scheme": {"name": "w4a4_svd", "rank": 4, "group_size": 16}, "min_features": 1})
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def quantize(model, recipe=INT8, **kw):
    return Quantizer(model).quantize(recipe, progress=False, **kw)


def frozen_copy(model):
    """Everything that a failed or refused operation must not change."""
    kinds = {name: (type(m), m.training) for name, m in model.named_modules()}
    return kinds, {name: (t.dtype, bytes_of(t)) for name, t in model.state_dict().items()}


def bytes_of(tensor):
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


class Block(nn.Module):
    def __init__(self, k=19, n=21):
        super().__init__()
        self.up, self.down = nn.Linear(k, n), nn.Linear(n, k, bias=False)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


# -- places ----------


def test_nested_modules_are_replaced_and_compute_nearly_the_same():
    model = nn.Sequential(Block(), nn.ModuleList([]), nn.Sequential(Block(), nn.LayerNorm(19)))
    del model[1]
    x = torch.randn(3, 5, 19)
    exact = model(x)
    assert quantize(model) is model
    names = [name for name, m in model.named_modules() if isinstance(m, QuantLinear)]
    assert names == ["0.up", "0.down", "1.0.up", "1.0.down"]
    assert not any(type(m) is nn.Linear for m in model.modules())
    torch.testing.assert_close(model(x), exact, rtol=0.05, atol=0.05)


def test_a_root_that_is_a_linear_comes_back_as_the_new_layer():
    linear = nn.Linear(33, 17)
    quantizer = Quantizer(linear)
    result = quantizer.quantize(INT8)
    assert isinstance(result, QuantLinear) and quantizer.model is result
    assert result.bias is linear.bias
    assert quantizer.plan(INT8).layers[0].already


def test_a_module_shared_at_two_places_is_replaced_once_and_stays_one_object():
    model = nn.Module()
    model.a = nn.Linear(20, 20)
    model.inner = nn.ModuleList([nn.ReLU(), model.a])
    layers = Quantizer(model).plan(INT8).layers
    assert [layer.names for layer in layers] == [("a", "inner.1")]
    quantize(model)
    assert isinstance(model.a, QuantLinear) and model.a is model.inner[1]


def test_a_container_used_twice_is_handled_as_one():
    block = Block()
    model = nn.Sequential(block, nn.ReLU(), block)
    quantize(model)
    assert model[0] is model[2] is block and isinstance(block.up, QuantLinear)
    assert len(Quantizer(model).report.layers) == 2


@pytest.mark.parametrize("key", ["weird key!", "[0]", "[/red]", "a/b", "schlüssel", "*", "x-y", "7", "$^", "a#", "#1"])
def test_a_module_dict_with_odd_keys_is_planned_replaced_and_shown(key):
    model = nn.ModuleDict({key: nn.Sequential(nn.Linear(18, 18)), "a1": nn.Linear(18, 18)})
    plan = Quantizer(model).plan(Recipe.from_dict({"rules": [{"match": f"{key}.0", "scheme": "w8a32"}]}))
    assert plan.todo[0].name == f"{key}.0" and f"{key}.0" in str(plan)
    result = quantize(model)
    assert isinstance(result[key][0], QuantLinear) and isinstance(result["a1"], QuantLinear)
    assert f"{key}.0" in str(Quantizer(model).report)


def test_module_lists_and_sequentials_keep_their_order_and_keys():
    model = nn.ModuleDict({"list": nn.ModuleList(nn.Linear(16, 16 + i) for i in range(3))})
    model["seq"] = nn.Sequential()
    model["seq"].add_module("odd name", nn.Linear(16, 5))
    model["seq"].add_module("2", nn.ReLU())
    keys = list(model.state_dict())
    quantize(model)
    assert [layer.out_features for layer in model["list"]] == [16, 17, 18]
    assert list(model["seq"]._modules) == ["odd name", "2"]
    assert [k for k in model.state_dict() if k.endswith("bias")] == [k for k in keys if k.endswith("bias")]


def test_names_that_differ_only_in_a_digit_and_a_hash_do_not_break_the_table():
    model = nn.ModuleDict({"layer#": nn.Linear(16, 16), "layer1": nn.Linear(16, 16), "layer2": nn.Linear(16, 16)})
    text = str(Quantizer(model).plan(INT8))
    assert "layer#" in text and "layer{1-2} x2" in text


def test_a_model_without_linear_layers_is_left_as_it_is_with_a_warning():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    before = frozen_copy(model)
    with pytest.warns(UserWarning, match="no layer is left to quantize"):
        assert quantize(model) is model
    assert frozen_copy(model) == before
    assert "no linear layer" in Quantizer(model).plan(INT8).notes[0]


def test_a_second_run_finds_nothing_to_do_says_so_and_changes_nothing():
    model = nn.Sequential(Block(), Block())
    first = Quantizer(model).plan(SVD)
    quantize(model, SVD)
    before = frozen_copy(model)
    plan = Quantizer(model).plan(SVD)
    assert not plan.todo and all("already quantized" in layer.reason for layer in plan.layers)
    assert plan.bytes_before == plan.bytes_after == first.bytes_after and plan.coverage == first.coverage
    with pytest.warns(UserWarning, match="no layer is left"):
        quantize(model, SVD)
    assert frozen_copy(model) == before


# -- what survives ----------


def test_hooks_of_every_kind_go_on_and_their_handles_still_remove_them():
    model = nn.Sequential(nn.Linear(17, 18))
    linear, seen = model[0], []
    handles = [
        linear.register_forward_pre_hook(lambda m, args: seen.append("pre")),
        linear.register_forward_pre_hook(lambda m, args, kw: seen.append("pre_kw"), with_kwargs=True),
        linear.register_forward_hook(lambda m, args, out: seen.append("post")),
        linear.register_forward_hook(lambda m, args, kw, out: seen.append("post_kw"), with_kwargs=True),
        linear.register_forward_hook(lambda m, args, out: seen.append("always"), always_call=True),
        linear.register_full_backward_hook(lambda m, gi, go: seen.append("backward")),
        linear.register_full_backward_pre_hook(lambda m, go: seen.append("backward_pre")),
    ]
    quantize(model)
    x = torch.randn(4, 17, requires_grad=True)
    model(x).sum().backward()
    assert sorted(seen) == sorted(["pre", "pre_kw", "post", "post_kw", "always", "backward", "backward_pre"])
    seen.clear()
    with pytest.raises(ValueError, match="17"):
        model[0](torch.randn(4, 5))
    assert "always" in seen and "post" not in seen
    for handle in handles:
        handle.remove()
    seen.clear()
    model(torch.randn(4, 17))
    assert not seen


def test_attributes_flags_and_the_bias_object_are_kept():
    model = nn.Sequential(nn.Linear(17, 18), nn.Linear(18, 17, bias=False), nn.LayerNorm(17))
    model[0].tag, model[0].quantize = {"mine": 1}, "an attribute that a method is named like"
    model[0].eval()
    model[0].bias.requires_grad_(False)
    model[2].weight.requires_grad_(False)
    tag, bias, norm = model[0].tag, model[0].bias, model[2].weight
    quantize(model)
    assert model[0].tag is tag and callable(model[0].quantize)
    assert not model[0].training and model[1].training and model.training
    assert model[0].bias is bias and not bias.requires_grad and model[1].bias is None
    assert model[2].weight is norm and not norm.requires_grad and model[2].bias.requires_grad


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("recipe", [INT8, SVD, Recipe.from_dict({"scheme": "w8a16"})], ids=["w8a32", "svd", "w8a16"])
def test_dtype_and_device_stay_those_of_the_model(dtype, recipe):
    model = Block(35, 18).to(dtype)
    quantize(model, recipe)
    assert model.up.dtype == model.up.bias.dtype == model.up.weight.dtype == dtype
    assert {t.device.type for t in model.state_dict().values()} == {"cpu"}
    y = model(torch.randn(3, 35, dtype=dtype))
    assert y.dtype == dtype and y.isfinite().all()


@pytest.mark.parametrize(
    "to", [lambda m: m.half(), lambda m: m.float(), lambda m: m.double(), lambda m: m.to(torch.bfloat16)]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_casting_moves_the_bias_and_leaves_codes_scales_and_branch(to, dtype):
    model = quantize(nn.Sequential(nn.Linear(35, 18), nn.Linear(18, 18)).to(dtype), SVD)
    before = {name: bytes_of(b) for name, b in model.named_buffers()}
    assert to(model) is model
    assert {name: bytes_of(b) for name, b in model.named_buffers()} == before
    wanted = model[0].bias.dtype
    assert model[0].dtype == model[1].dtype == wanted == to(torch.nn.Linear(1, 1)).weight.dtype
    assert model(torch.randn(2, 35, dtype=wanted)).isfinite().all()


def test_meta_tensors_are_planned_but_not_quantized():
    with torch.device("meta"):
        model = Block(64, 48)
    plan = Quantizer(model).plan(SVD)
    real = Quantizer(Block(64, 48)).plan(SVD)
    assert len(plan.todo) == 2 and (plan.bytes_before, plan.bytes_after) == (
        real.bytes_before,
        real.bytes_after,
    )
    with pytest.raises(ValueError, match=r"'up' is on the meta device"):
        quantize(model, SVD)
    assert type(model.up) is nn.Linear


# -- copies ----------


def through_torch_save(model):
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=False)


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), through_torch_save],
    ids=["deepcopy", "pickle", "save"],
)
@pytest.mark.parametrize("recipe", [INT8, SVD], ids=["w8a32", "svd"])
def test_a_copy_computes_the_same_shares_nothing_and_keeps_its_report(copied, recipe):
    shared = Block(35, 18)
    model = quantize(nn.Sequential(shared, shared), recipe)
    twin = copied(model)
    x = torch.randn(4, 35)
    assert torch.equal(twin(x), model(x)) and frozen_copy(twin) == frozen_copy(model)
    assert twin[0] is twin[1] and twin[0].up.report == model[0].up.report and twin[0].up.scheme == model[0].up.scheme
    for buffer in twin.buffers():
        buffer.zero_()
    assert not torch.equal(twin(x), model(x))


@pytest.mark.parametrize("recipe", [INT8, SVD], ids=["w8a32", "svd"])
def test_a_state_dict_fits_strictly_into_a_fresh_quantized_skeleton(recipe):
    model, other = quantize(Block(35, 18), recipe), quantize(Block(35, 18), recipe)
    x = torch.randn(4, 35)
    assert not torch.equal(model(x), other(x))
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(model(x), other(x))


def test_not_in_place_leaves_the_original_untouched_and_returns_a_copy():
    model = nn.Sequential(Block(), nn.BatchNorm1d(19))
    before, weight = frozen_copy(model), model[0].up.weight
    quantizer = Quantizer(model)
    result = quantizer.quantize(SVD, inplace=False)
    assert result is not model and quantizer.model is result and isinstance(result[0].up, SVDQW4A4Linear)
    assert frozen_copy(model) == before and model[0].up.weight is weight


def test_from_linear_alone_keeps_hooks_out_and_shares_the_bias():
    linear = nn.Linear(20, 16)
    linear.register_forward_hook(lambda *_: None)
    layer = W8A16Linear.from_linear(linear)
    assert layer.bias is linear.bias and not layer._forward_hooks
    assert find_sites(layer)[0].names == ("",)
