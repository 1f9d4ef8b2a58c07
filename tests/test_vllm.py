"""What `export` writes is read by vLLM's own parser and its own model class, to the same weights.

Needs vLLM: `make test-vllm` makes an environment for it. Without a GPU its kernels do not run, so everything up to the
product is tested: its config parser, the scheme it chooses for each layer, its parameters and their loaders (q, k and v
in one, gate and up in one), and for weight-only layers its unpacking, whose product is torch's here.
"""

import importlib.util
import json

import pytest
import torch

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed: make test-vllm", allow_module_level=True)

from vllm_models import FUSED, HEAD, quantized, read_by_vllm, vllm, world

# isort: split

from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from vllm.model_executor.layers.quantization.compressed_tensors.schemes import (
    compressed_tensors_wNa16 as wna16,
)
from vllm.model_executor.layers.quantization.utils import marlin_utils
from vllm.scalar_type import scalar_types

from qgraft import export, load_recipe

SCHEMES = [
    ({"name": "w8a16"}, "CompressedTensorsWNA16"),
    ({"name": "w8a32"}, "CompressedTensorsWNA16"),
    ({"name": "w8_group", "group_size": 64}, "CompressedTensorsWNA16"),
    ({"name": "w4a16", "rotate": False}, "CompressedTensorsWNA16"),
    ({"name": "w4a16", "rotate": False, "group_size": 32, "zero_point": True}, "CompressedTensorsWNA16"),
    ({"name": "w4a16", "rotate": False, "group_size": "channel"}, "CompressedTensorsWNA16"),
    ({"name": "w4_group", "group_size": 64, "zero_point": True}, "CompressedTensorsWNA16"),
    ({"name": "w8a8"}, "CompressedTensorsW8A8Int8"),
    ({"name": "w8a8_static", "act_range": "minmax"}, "CompressedTensorsW8A8Int8"),
    ({"name": "w8a8_static", "act_range": "absmax"}, "CompressedTensorsW8A8Int8"),
    ({"name": "w8a8_static", "act_range": "percentile", "percentile": 99}, "CompressedTensorsW8A8Int8"),
    (
        {"name": "w4a8_svd", "rank": 0, "rotate": False, "smooth": "none", "zero_point": False},
        "CompressedTensorsWNA8Int",
    ),
    (
        {"name": "w4a4_svd", "rank": 0, "rotate": False, "smooth": "none", "zero_point": False},
        "CompressedTensorsWNA4Int",
    ),
]


@pytest.fixture(scope="module", autouse=True)
def one_process(tmp_path_factory):
    with world(tmp_path_factory.mktemp("store") / "store"):
        yield


def weight_in_vllm(layer, monkeypatch):
    """(N, K) float32: what this layer of vLLM multiplies with."""
    scheme, k = layer.scheme, layer.input_size
    if isinstance(scheme, wna16.CompressedTensorsWNA16):
        monkeypatch.setattr(wna16, "matmul_batch_invariant", torch.matmul)
        return scheme.apply_weights(layer, torch.eye(k), None).t()
    if hasattr(layer, "weight_packed"):
        n = layer.weight_packed.shape[0]
        codes = unpack_from_int32(layer.weight_packed, scheme.num_bits, torch.Size((n, k)))
    else:
        codes = layer.weight
    return (codes.float().unflatten(1, (layer.weight_scale.shape[1], -1)) * layer.weight_scale[..., None]).flatten(1)


@pytest.mark.parametrize("scheme, name", SCHEMES, ids=str)
@pytest.mark.filterwarnings("error:vLLM", "ignore:zero points")
def test_vllm_reads_the_same_weights(scheme, name, tmp_path, monkeypatch):
    model = quantized({"scheme": scheme, "rules": [HEAD]})
    export(model, tmp_path / "out")
    theirs = read_by_vllm(tmp_path / "out")
    seen = 0
    for path, layer in theirs.named_modules():
        home, _, leaf = path.rpartition(".")
        if leaf not in (*FUSED, "o_proj", "down_proj"):
            continue
        assert type(layer.scheme).__name__ == name
        ours = [model.get_submodule(f"{home}.{part}") for part in FUSED.get(leaf, (leaf,))]
        expected = torch.cat([part.dequantize().float() for part in ours])
        assert torch.equal(weight_in_vllm(layer, monkeypatch), expected)
        if scheme["name"] == "w8a8_static":
            assert {part.act_scale.item() for part in ours} == {layer.input_scale.item()}
            if layer.input_zero_point is not None:
                assert {part.act_zero_point.item() for part in ours} == {layer.input_zero_point.item()}
        seen += 1
    assert seen == 8
    assert torch.equal(theirs.lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize("recipe", ["w4a16_ct", "w8a8_ct"])
def test_the_shipped_recipes(recipe, tmp_path, monkeypatch):
    model = quantized(load_recipe(recipe))
    export(model, tmp_path / "out")
    theirs = read_by_vllm(tmp_path / "out")
    down = model.model.layers[1].mlp.down_proj.dequantize()
    assert torch.equal(weight_in_vllm(theirs.model.layers[1].mlp.down_proj, monkeypatch), down)


def test_unquantized_layers_stay_so(tmp_path):
    part = quantized({"scheme": "w8a16", "rules": [HEAD, {"match": "*.1.mlp.*", "skip": "x"}]})
    export(part, tmp_path / "part")
    theirs = read_by_vllm(tmp_path / "part")
    assert torch.equal(theirs.model.layers[1].mlp.down_proj.weight, part.model.layers[1].mlp.down_proj.weight)


@pytest.mark.parametrize(
    "rules, scheme, said, error",
    [
        ([{"match": "*.q_proj", "skip": "x"}], "w8a16", "vLLM fuses", ValueError),
        # It takes the scheme of one of the two for both, and finds no place for the other's tensors.
        ([{"match": "*.0.mlp.up_proj", "scheme": "w8a8"}], "w8a16", "vLLM fuses", AttributeError),
        ([], {"name": "w8a8", "zero_point": True}, "vLLM has none", NotImplementedError),
    ],
    ids=str,
)
def test_what_export_warns_of_vllm_does_refuse(rules, scheme, said, error, tmp_path):
    model = quantized({"scheme": scheme, "rules": [*rules, HEAD]})
    with pytest.warns(UserWarning, match=said):
        export(model, tmp_path / "out")
    with pytest.raises(error):
        read_by_vllm(tmp_path / "out")


def test_the_range_that_vllm_keeps_is_one_of_those_that_export_warns_of(tmp_path):
    model = quantized({"scheme": "w8a8_static", "rules": [HEAD]})
    model.model.layers[0].self_attn.k_proj.act_scale *= 1.5
    with pytest.warns(UserWarning, match="one static range"):
        export(model, tmp_path / "out")
    kept = read_by_vllm(tmp_path / "out").model.layers[0].self_attn.qkv_proj.input_scale
    ours = {model.get_submodule(f"model.layers.0.self_attn.{leaf}").act_scale.item() for leaf in FUSED["qkv_proj"]}
    assert kept.numel() == 1 < len(ours) and kept.item() in ours


def test_the_groups_and_zero_points_of_its_kernel_on_gpus(monkeypatch):
    monkeypatch.setattr(type(vllm.platforms.current_platform), "is_cpu", lambda self: False)

    def takes(kind, group, zero_point=False):
        return marlin_utils.check_marlin_supported(kind, group, zero_point, device_capability=90)

    assert takes(scalar_types.uint8b128, -1) and takes(scalar_types.uint4b8, 64)
    assert takes(scalar_types.uint4, 32, zero_point=True)
    assert not takes(scalar_types.uint4b8, 256)
    assert not takes(scalar_types.uint8, -1, zero_point=True)


def test_a_config_says_what_it_has_to(tmp_path):
    export(quantized({"scheme": "w8a16", "rules": [HEAD]}), tmp_path / "out")
    written = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    theirs = read_by_vllm(tmp_path / "out").quant_config
    assert theirs.quant_format == written["format"] and len(theirs.target_scheme_map) >= 1
