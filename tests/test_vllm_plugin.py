"""Folders of ours in vLLM's own model, by the plugin: its linear layers give what ours give, in one process and in two.

Needs vLLM: `make test-vllm`. Attention is not run, its kernels are not there without a GPU; every linear layer is.
"""

import importlib.metadata
import importlib.util
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed: make test-vllm", allow_module_level=True)

import torch.multiprocessing
from vllm_models import FUSED, HEAD, quantized, read_by_vllm, world

from qgraft import load, save
from qgraft.quantizer.errors import CheckpointError
from qgraft.quantizer.interop import vllm_plugin

SCHEMES = [
    {"name": "w4a4_svd", "rank": 16},
    {"name": "w4a4_svd", "rank": 0, "scales": "group", "rotate": False},
    {"name": "w4a8_svd", "rank": 8},
    {"name": "w4a16"},
    {"name": "w4a16", "rank": 4, "zero_point": True},
    {"name": "w8a16"},
    {"name": "w8a32"},
    {"name": "w8a8"},
    {"name": "w8a8_static"},
    {"name": "factorized_w8", "rank": 32},
]


@pytest.fixture(scope="module", autouse=True)
def one_process(tmp_path_factory):
    vllm_plugin.register()
    with world(tmp_path_factory.mktemp("store") / "store"):
        yield


def finished(model):
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if isinstance(method, vllm_plugin.VLLMLinearMethod):
            method.process_weights_after_loading(module)
    return model


def fused_layers(model):
    """(vLLM's layer, the names of ours in it), for each that the plugin made."""
    for path, layer in model.named_modules():
        home, _, leaf = path.rpartition(".")
        if hasattr(layer, "qgraft_parts"):
            yield layer, [f"{home}.{part}" for part in FUSED.get(leaf, (leaf,))]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_each_layer_gives_what_ours_give_to_the_last_bit(scheme, bias, tmp_path):
    model = quantized({"scheme": scheme, "rules": [HEAD]}, attention_bias=bias)
    if bias:
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter)
    save(model, tmp_path / "out")
    theirs = finished(read_by_vllm(tmp_path / "out"))
    count = 0
    for layer, names in fused_layers(theirs):
        ours = [model.get_submodule(name) for name in names]
        x = torch.randn(5, ours[0].in_features)
        with torch.no_grad():
            expected = torch.cat([part(x) for part in ours], -1)
            result = layer(x)[0]
        # vLLM adds the bias itself, to what 16-bit layers have rounded by then.
        close = 0 if not bias else 1e-2 if "a16" in scheme["name"] else 1e-6
        torch.testing.assert_close(result, expected, rtol=close, atol=close)
        assert not [n for n, p in layer.named_parameters(recurse=False) if n != "bias"]
        count += 1
    assert count == 8


def test_other_floats_than_those_of_the_model_are_no_matter_and_unquantized_layers_stay(tmp_path):
    rules = [HEAD, {"match": "*.1.mlp.*", "skip": "x"}, {"match": "*.v_proj", "scheme": "w8a16"}]
    model = quantized({"scheme": "w4a4_svd", "rules": rules})
    save(model, tmp_path / "out")
    theirs = finished(read_by_vllm(tmp_path / "out"))
    assert torch.equal(theirs.model.layers[1].mlp.down_proj.weight, model.model.layers[1].mlp.down_proj.weight)
    x = torch.randn(3, 128)
    layer = theirs.model.layers[0].self_attn.qkv_proj
    attention = model.model.layers[0].self_attn
    with torch.no_grad():
        expected = torch.cat([attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)], -1)
        assert torch.equal(layer(x)[0], expected), "layers of several schemes are one of vLLM's"


@pytest.mark.parametrize("scheme", ["w4a4_svd", "w8a16"])
def test_a_layer_is_one_graph_for_the_compiler_that_vllm_uses(scheme, tmp_path):
    save(quantized({"scheme": scheme, "rules": [HEAD]}), tmp_path / "out")
    layer = finished(read_by_vllm(tmp_path / "out")).model.layers[0].self_attn.qkv_proj
    compiled = torch.compile(lambda x: layer.quant_method.apply(layer, x), fullgraph=True, backend="eager")
    with torch.no_grad():
        for tokens in (5, 9):
            x = torch.randn(tokens, 128)
            assert torch.equal(compiled(x), layer(x)[0])


def process(rank, store, folder, results):
    vllm_plugin.register()
    with world(store, rank, 2):
        model = finished(read_by_vllm(folder))
        torch.manual_seed(0)
        answers = []
        for layer, _ in fused_layers(model):
            x = torch.randn(5, layer.input_size)
            if layer.input_size_per_partition < layer.input_size:  # by rows: each takes its part, the sum is whole
                x = x.chunk(2, -1)[rank]
            with torch.no_grad():
                answers.append(layer(x)[0])
        torch.save(answers, results / f"{rank}.pt")


@pytest.mark.parametrize("scheme", [SCHEMES[0], SCHEMES[2], SCHEMES[3], SCHEMES[6], SCHEMES[7]], ids=str)
def test_two_processes_give_what_one_gives(scheme, tmp_path):
    # Where q, k and v are cut, k and v have two heads, one for each process.
    model = quantized({"scheme": scheme, "rules": [HEAD]})
    save(model, tmp_path / "out")
    (tmp_path / "results").mkdir()
    arguments = (tmp_path / "store", tmp_path / "out", tmp_path / "results")
    torch.multiprocessing.spawn(process, arguments, nprocs=2)
    first, second = (torch.load(tmp_path / "results" / f"{rank}.pt") for rank in range(2))
    torch.manual_seed(0)
    whole = finished(read_by_vllm(tmp_path / "out"))
    for (layer, names), a, b in zip(fused_layers(whole), first, second, strict=True):
        x = torch.randn(5, layer.input_size)
        with torch.no_grad():
            ours = [model.get_submodule(name)(x) for name in names]
        if names[0].endswith(("o_proj", "down_proj")):
            assert torch.equal(a, b)
            # A scale a token is of the whole token here, of its half there; w4a16 rounds what it gives to 16 bits.
            limit = {"w8a32": 1e-5, "w4a16": 5e-3, "w4a4_svd": 0.2}.get(scheme["name"], 0.02)
            assert (a - ours[0]).norm() / ours[0].norm() < limit
        else:
            sizes = [part.shape[1] // 2 for part in ours]
            halves = zip(a.split(sizes, -1), b.split(sizes, -1), ours, strict=True)
            for left, right, expected in halves:
                torch.testing.assert_close(torch.cat((left, right), -1), expected, rtol=1e-5, atol=1e-5)


def test_what_cannot_be_served_is_told_when_the_model_is_built(tmp_path):
    save(quantized({"scheme": "w8a16"}), tmp_path / "head")
    with pytest.raises(CheckpointError, match="lm_head: vLLM serves heads and embeddings in float"):
        read_by_vllm(tmp_path / "head")
    save(quantized({"scheme": "w8a16", "rules": [HEAD, {"match": "*.0.*.k_proj", "skip": "x"}]}), tmp_path / "k")
    with pytest.raises(CheckpointError, match=r"one layer of .*, and model.layers.0.self_attn.k_proj is not quantized"):
        read_by_vllm(tmp_path / "k")
    save(quantized({"scheme": "w8a16", "rules": [HEAD]}), tmp_path / "old")
    config = json.loads((tmp_path / "old/config.json").read_text())
    config["quantization_config"]["version"] = 1
    with pytest.raises(CheckpointError, match="quantize the model again"):
        vllm_plugin.VLLMConfig.from_config(config["quantization_config"])
    assert load(tmp_path / "old").model.layers[0].mlp.up_proj.scheme_name == "w8a16"


def test_tensors_that_do_not_fit_are_named(tmp_path):
    folder = tmp_path / "out"
    save(quantized({"scheme": "w4a8_svd", "rules": [HEAD]}), folder)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.self_attn.k_proj.scale"
    save_file(tensors | {name: tensors[name][:-1].clone()}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"layers.1.self_attn.qkv_proj.scale: has shape .* is expected"):
        read_by_vllm(folder)
    save_file({n: t for n, t in tensors.items() if n != name}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"layers.1.self_attn.k_proj.scale' is missing"):
        finished(read_by_vllm(folder))
    guard = "model.layers.0.mlp.up_proj.weight"
    save_file(tensors | {guard: torch.zeros(256, 128)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="a float weight, where the config says it is quantized"):
        read_by_vllm(folder)


def test_vllm_finds_the_plugin_by_itself():
    (entry,) = [e for e in importlib.metadata.entry_points(group="vllm.general_plugins") if e.name == "qgraft"]
    assert entry.load() is vllm_plugin.register
