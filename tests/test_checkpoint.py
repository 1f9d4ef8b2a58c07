"""Saving and loading: what comes back is bit for bit what was saved."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from qgraft import Quantizer, QuantLinear, Recipe, load, save
from qgraft.quantizer import CheckpointError, checkpoint

SCHEMES = {
    "w8a32": "w8a32",
    "w8a16": {"name": "w8a16", "dtype": "float16"},
    "svd": {"name": "w4a4_svd", "rank": 3, "group_size": 16},
    "w8a8": {"name": "w8a8", "zero_point": True},
    "w4a16": {"name": "w4a16", "group_size": 32, "zero_point": True, "rank": 3},
    "w4a8": {"name": "w4a8_svd", "rank": 3, "group_size": 16},
    "groups": {"name": "w4a4_svd", "rank": 0, "scales": "group", "group_size": 32, "smooth": "none"},
}


class Net(nn.Module):
    def __init__(self, bias=True):
        super().__init__()
        self.embed = nn.Embedding(30, 24)
        self.up, self.down = nn.Linear(24, 41, bias=bias), nn.Linear(41, 24, bias=bias)
        self.norm = nn.BatchNorm1d(24)
        self.register_buffer("scratch", torch.arange(5.0), persistent=False)
        self.register_buffer("flag", torch.tensor([True, False]))

    def forward(self, tokens):
        x = self.embed(tokens).flatten(0, 1)
        return self.norm(x + self.down(torch.relu(self.up(x))))


class Tied(Net):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(24, 30, bias=False)
        self.head.weight = self.embed.weight
        self.same_module_tie = self.embed.weight

    def forward(self, tokens):
        return self.head(super().forward(tokens))


class Shared(Net):
    def __init__(self):
        super().__init__()
        self.twin = self.up
        self.extra_bias = self.up.bias


def recipe(scheme="w8a32", **kw):
    return Recipe.from_dict({"scheme": SCHEMES[scheme], "min_features": 1, **kw})


def quantized(make=Net, scheme="w8a32", **kw):
    model = make()
    if isinstance(getattr(model, "norm", None), nn.Module):
        model(torch.randint(0, 30, (4, 3)))  # running statistics that are not the initial ones
    return Quantizer(model).quantize(recipe(scheme, **kw), progress=False).eval()


def bits(tensor):
    return str(tensor.dtype), tuple(tensor.shape), tensor.detach().contiguous().reshape(-1).view(torch.uint8).tolist()


def content(model):
    return {name: bits(t) for name, t in model.state_dict().items()}


def assert_same(loaded, model, tokens=None):
    assert content(loaded) == content(model)
    for name, m in model.named_modules(remove_duplicate=False):
        other = loaded.get_submodule(name)
        assert type(other) is type(m), name
        if isinstance(m, QuantLinear):
            assert (other.scheme, other.dtype, other.report) == (m.scheme, m.dtype, m.report)
    if tokens is not None:
        assert torch.equal(loaded.eval()(tokens), model(tokens))


TOKENS = torch.randint(0, 30, (2, 7))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_round_trip_is_bit_for_bit(tmp_path, scheme, bias, dtype):
    model = quantized(lambda: Net(bias).to(dtype), scheme)
    save(model, tmp_path / "out")
    fresh = Net(bias).to(dtype)
    assert load(tmp_path / "out", model=fresh) is fresh
    assert_same(fresh, model, TOKENS)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_model_that_was_cast_after_quantizing_comes_back_as_it_was(tmp_path, scheme):
    model = quantized(Net, scheme).half()
    save(model, tmp_path / "out")
    assert_same(load(tmp_path / "out", model=Net()), model, TOKENS)


def test_a_root_linear_round_trips(tmp_path):
    model = Quantizer(nn.Linear(35, 18)).quantize(recipe("svd"))
    save(model, tmp_path / "out")
    loaded = load(tmp_path / "out", model=nn.Linear(35, 18))
    assert_same(loaded, model, torch.randn(3, 35))


@pytest.mark.parametrize("shard_bytes", [1, 900, 10**9])
@pytest.mark.parametrize("make", [Net, Tied, Shared])
def test_shards_ties_and_shared_modules_come_back(tmp_path, make, shard_bytes):
    model = quantized(make, "svd")
    save(model, tmp_path / "out", shard_bytes=shard_bytes)
    files = sorted(f.name for f in (tmp_path / "out").glob("*.safetensors"))
    assert (
        (files == ["model.safetensors"])
        == (shard_bytes == 10**9)
        == (not (tmp_path / "out" / checkpoint.INDEX).exists())
    )
    loaded = load(tmp_path / "out", model=make())
    assert_same(loaded, model, TOKENS)
    if make is Tied:
        assert loaded.head.weight is loaded.embed.weight is loaded.same_module_tie
    if make is Shared:
        assert loaded.twin is loaded.up and loaded.extra_bias is loaded.up.bias


def test_shards_are_no_larger_than_asked_and_the_index_is_of_the_usual_form(tmp_path):
    save(quantized(Tied, "svd"), tmp_path / "out", shard_bytes=1500)
    index = json.loads((tmp_path / "out" / checkpoint.INDEX).read_text())
    tensors = {}
    for file in set(index["weight_map"].values()):
        part = load_file(tmp_path / "out" / file)
        assert sum(t.nbytes for t in part.values()) <= 1500 or len(part) == 1
        assert all(index["weight_map"][name] == file for name in part)
        tensors |= part
    assert tensors.keys() == index["weight_map"].keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())


def test_an_untied_head_stays_untied(tmp_path):
    model = quantized(Tied, rules=[{"match": "head", "scheme": "w8a32", "untie": True}])
    save(model, tmp_path / "out")
    loaded = load(tmp_path / "out", model=Tied())
    assert_same(loaded, model, TOKENS)
    assert isinstance(loaded.head, QuantLinear) and loaded.embed.weight is loaded.same_module_tie


def test_overlapping_views_of_one_memory_are_saved_as_tensors_of_their_own(tmp_path):
    class Views(Net):
        def __init__(self):
            super().__init__()
            base = torch.randn(6, 5)
            self.register_buffer("base", base)
            self.register_buffer("rows", base[1:4])
            self.register_buffer("turned", base.t())

    model = quantized(Views)
    save(model, tmp_path / "out")
    assert_same(load(tmp_path / "out", model=Views()), model, TOKENS)


class Plain(nn.Module):
    """Without non-persistent buffers, so that it can be built on meta."""

    def __init__(self):
        super().__init__()
        self.seq, self.norm = nn.Sequential(nn.Linear(24, 41), nn.Linear(41, 24)), nn.BatchNorm1d(24)

    def forward(self, x):
        return self.norm(self.seq(x))


def on_meta():
    with torch.device("meta"):
        return Plain()


@pytest.mark.parametrize("model", [on_meta, lambda: on_meta, lambda: Plain, lambda: lambda: Plain().double()])
def test_a_skeleton_on_meta_and_a_factory_are_filled(tmp_path, model):
    source = Quantizer(Plain()).quantize(recipe("svd")).eval()
    save(source, tmp_path / "out")
    loaded = load(tmp_path / "out", model=model())
    assert_same(loaded, source, torch.randn(3, 24))
    assert not any(t.is_meta for t in loaded.state_dict().values())


def test_a_skeleton_on_meta_that_computes_buffers_is_refused(tmp_path):
    save(quantized(), tmp_path / "out")
    with torch.device("meta"):
        model = Net()
    with pytest.raises(CheckpointError, match="computes scratch when"):
        load(tmp_path / "out", model=model)
    assert type(model.up) is nn.Linear


def test_without_a_model_a_folder_that_is_not_of_transformers_asks_for_one(tmp_path):
    save(quantized(), tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"names no model of transformers.*load\(path, model=\.\.\.\)"):
        load(tmp_path / "out")


def test_a_factory_that_makes_no_module_is_refused(tmp_path):
    save(quantized(), tmp_path / "out")
    with pytest.raises(TypeError, match="returned a dict"):
        load(tmp_path / "out", model=dict)


def test_a_quantized_model_can_be_loaded_over_and_flags_of_the_model_stay(tmp_path):
    model, other = quantized(scheme="svd"), quantized(scheme="svd")
    save(model, tmp_path / "out")
    other.up.bias.requires_grad_(False)
    hook = other.up.register_forward_hook(lambda *_: None)
    loaded = load(tmp_path / "out", model=other)
    assert not any(m.training for m in loaded.modules())
    assert_same(loaded, model, TOKENS)
    assert not loaded.up.bias.requires_grad and loaded.down.bias.requires_grad
    hook.remove()
    assert not loaded.up._forward_hooks


def test_the_file_stops_a_reader_that_knows_nothing_of_the_quantization(tmp_path):
    save(quantized(), tmp_path / "out")
    with pytest.raises(RuntimeError, match=r"size mismatch for up\.weight"):
        Net().load_state_dict(load_file(tmp_path / "out" / "model.safetensors"), strict=False)


def test_a_model_of_transformers_keeps_its_config_and_round_trips(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    for untie in (False, True):
        rules = [{"match": "lm_head", "scheme": "w8a32", "untie": True}] if untie else []
        model = Quantizer(transformers.LlamaForCausalLM(config).eval()).quantize(recipe("svd", rules=rules))
        save(model, tmp_path / "out")
        saved = json.loads((tmp_path / "out" / "config.json").read_text())
        assert saved["model_type"] == "llama" and saved["architectures"] == ["LlamaForCausalLM"]
        assert saved["tie_word_embeddings"] == (not untie)
        loaded = load(tmp_path / "out", model=transformers.LlamaForCausalLM(config).eval())
        assert content(loaded) == content(model)
        assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)


# -- what cannot be saved ----------


def test_a_float_model_is_not_saved(tmp_path):
    with pytest.raises(CheckpointError, match="no quantized layer"):
        save(Net(), tmp_path / "out")
    assert not list(tmp_path.iterdir())


class WithState(nn.Linear):
    def get_extra_state(self):
        return {"any": "thing"}

    def set_extra_state(self, state):
        pass


@pytest.mark.parametrize(
    ("add", "words"),
    [
        (lambda m: m.add_module("x", WithState(2, 2)), "'x._extra_state' of the model's state is a dict"),
        (lambda m: m.register_buffer("x", torch.eye(3).to_sparse()), "'x' is a sparse_coo tensor"),
        (lambda m: m.register_buffer("x", torch.zeros(2, dtype=torch.complex128)), "'x' is a .*complex128"),
        (lambda m: m.register_buffer("x", torch.zeros(2, device="meta")), "'x' is on the meta device"),
        (lambda m: m.add_module("x", nn.LazyLinear(2)), "'x.weight' has no value yet"),
    ],
)
def test_state_that_safetensors_cannot_hold_is_named_and_nothing_is_written(tmp_path, add, words):
    model = quantized()
    add(model)
    with pytest.raises(CheckpointError, match=words):
        save(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())
