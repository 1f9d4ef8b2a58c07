"""compressed-tensors both ways, against the stock clients: transformers with the package compressed-tensors."""

import copy
import json
import warnings
from typing import get_args

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from qgraft import Quantizer, QuantLinear, Recipe, export, load, save
from qgraft.layers import SCHEMES
from qgraft.quantizer import cli
from qgraft.quantizer.errors import CheckpointError, PlanError
from qgraft.quantizer.interop import compressed_tensors as compressed_tensors_of_ours
from qgraft.quantizer.interop.huggingface import ModelFolder
from qgraft.quantizer.interop.packed import pack, unpack, words

transformers = pytest.importorskip("transformers")
compressed_tensors = pytest.importorskip("compressed_tensors")
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32  # noqa: E402
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme  # noqa: E402

HEAD = {"match": "lm_head", "skip": "head"}
WEIGHT_ONLY = [
    {"name": "w8a16"},
    {"name": "w8a32"},
    {"name": "w8_group", "group_size": 64},
    {"name": "w8_group", "group_size": 32, "zero_point": True},
    {"name": "w4a16", "rotate": False},
    {"name": "w4a16", "rotate": False, "group_size": 32, "zero_point": True},
    {"name": "w4a16", "rotate": False, "group_size": "channel"},
    {"name": "w4_group", "group_size": 64, "zero_point": True},
]
WITH_ACTIVATIONS = [
    {"name": "w8a8"},
    {"name": "w8a8", "zero_point": True},
    {"name": "w8a8_static"},
    {"name": "w8a8_static", "act_range": "absmax"},
    {"name": "w4a4_svd", "rank": 0, "rotate": False, "smooth": "none", "zero_point": False},
    {"name": "w4a4_svd", "rank": 0, "rotate": False, "smooth": "none", "scales": "group"},
    {"name": "w4a8_svd", "rank": 0, "rotate": False, "smooth": "none", "zero_point": False},
]


def llama(tied=False, dtype=torch.float32, **changes):
    config = transformers.LlamaConfig(**{
        "vocab_size": 97, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": tied, "attention_bias": True,
    } | changes)  # fmt: skip
    model = transformers.LlamaForCausalLM(config).to(dtype).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return model


def quantized(scheme, model=None, rules=(HEAD,)):
    recipe = Recipe.from_dict({"scheme": scheme, "rules": list(rules)})
    data = [torch.randint(0, 97, (2, 30)) for _ in range(3)] if scheme["name"] == "w8a8_static" else None
    return Quantizer(model or llama()).quantize(recipe, calibration=data, progress=False)


def dense(model, activations=lambda layer, x: x):
    """The model with each layer as float64-free plain torch: its dequantized weight, and what inputs are rounded to."""
    model = copy.deepcopy(model)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, QuantLinear):
            linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
            linear.weight.data = layer.dequantize()
            linear.bias = layer.bias
            linear.register_forward_pre_hook(lambda _, args, layer=layer: (activations(layer, args[0]),))
            model.set_submodule(name, linear)
    return model


def stock(folder, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return model.eval()


def as_dense():
    # Without it, transformers 5 has no place for zero points.
    return {"quantization_config": transformers.CompressedTensorsConfig(dequantize=True)}


def layers_of(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, QuantLinear)}


# ---- out ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(2, 9))
def test_codes_are_packed_as_the_package_packs_them(bits):
    for n, k in ((3, 7), (5, 64), (1, 1), (9, 331)):
        codes = torch.randint(-(1 << bits - 1), 1 << bits - 1, (n, k), dtype=torch.int8)
        packed = pack(codes, bits)
        assert packed.shape == (n, words(k, bits)) and torch.equal(packed, pack_to_int32(codes, bits))
        assert torch.equal(unpack(packed, bits, k), codes)
        assert torch.equal(pack(codes.t().contiguous(), bits).t(), pack_to_int32(codes, bits, packed_dim=0))


@pytest.mark.filterwarnings("ignore:zero points")
@pytest.mark.parametrize("scheme", WEIGHT_ONLY, ids=str)
def test_stock_transformers_computes_exactly_what_the_dequantized_weights_do(scheme, tmp_path):
    model, ids = quantized(scheme), torch.randint(0, 97, (2, 11))
    export(model, tmp_path / "out", format="compressed-tensors")
    if scheme.get("zero_point") and transformers.__version__ < "5":
        with pytest.raises(RuntimeError, match="weight_zero_point"):
            stock(tmp_path / "out")
        return
    theirs = stock(tmp_path / "out", dtype=torch.float32, **(as_dense() if scheme.get("zero_point") else {}))
    with torch.no_grad():
        assert (theirs(ids).logits - dense(model)(ids).logits).abs().max().item() == 0.0
    for name, layer in layers_of(model).items():
        assert torch.equal(theirs.get_submodule(name).weight, layer.dequantize())


def fake_quantized(layer, x):
    """Activations as compressed-tensors rounds them: dynamic scales are half the range of codes, 127.5 or 7.5."""
    x = x.float()
    if layer.scheme_name == "w8a8_static":
        codes = (x / layer.act_scale + layer.act_zero_point).round().clamp(-128, 127)
        return (codes - layer.act_zero_point) * layer.act_scale
    bits = getattr(layer, "act_bits", 8)
    half = (2**bits - 1) / 2
    groups = x if bits == 8 else x.unflatten(-1, (-1, layer.group_size))
    scale = groups.abs().amax(-1, keepdim=True) / half
    groups = (groups / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale
    return groups.reshape(x.shape)


@pytest.mark.filterwarnings("ignore:zero points")
@pytest.mark.parametrize("scheme", WITH_ACTIVATIONS, ids=str)
def test_formats_with_activations_are_what_they_say(scheme, tmp_path):
    model, ids = quantized(scheme), torch.randint(0, 97, (2, 11))
    export(model, tmp_path / "out")
    theirs = stock(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        logits = theirs(ids).logits
        expected = dense(model, fake_quantized)(ids).logits
        # Rounding of activations has edges: a difference in the last bit may move a code.
        assert (logits - expected).norm() / expected.norm() < 2e-3
        ours = model(ids).logits
        assert (logits - ours).norm() / ours.norm() < (0.5 if scheme["name"] == "w4a4_svd" else 0.05)
    for name, layer in layers_of(model).items():
        assert torch.equal(theirs.get_submodule(name).weight, layer.dequantize())


@pytest.mark.skipif(transformers.__version__ < "5", reason="4 does not dequantize while it loads")
def test_models_that_stock_transformers_only_loads_dequantized_have_our_weights_then(tmp_path):
    size = {"vocab_size": 97, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 1, "num_heads": 4}
    t5 = transformers.T5ForConditionalGeneration(transformers.T5Config(**size)).eval()
    model = Quantizer(t5).quantize("w8a16", progress=False)
    export(model, tmp_path / "out")
    theirs = type(t5).from_pretrained(tmp_path / "out", dtype=torch.float32, **as_dense())
    for name, layer in layers_of(model).items():
        assert torch.equal(theirs.get_submodule(name).weight, layer.dequantize())


def test_a_bfloat16_model_differs_by_the_rounding_of_its_weights_only(tmp_path):
    model, ids = quantized({"name": "w4a16", "rotate": False}, llama(dtype=torch.bfloat16)), torch.arange(9)[None]
    export(model, tmp_path / "out")
    theirs = stock(tmp_path / "out", dtype=torch.bfloat16)  # transformers 4 takes float16 where nothing is said
    assert theirs.dtype is torch.bfloat16
    with torch.no_grad():
        logits, expected = theirs(ids).logits.float(), model(ids).logits.float()
    assert (logits - expected).norm() / expected.norm() < 0.02


@pytest.mark.parametrize("tied", [False, True])
def test_several_schemes_shards_and_tied_heads(tied, tmp_path):
    rules = [HEAD, {"match": "*.down_proj", "scheme": "w8a16"}, {"match": "re:.*layers\\.1\\.self_attn\\..*",
             "scheme": {"name": "w4a16", "rotate": False, "group_size": 32}}]  # fmt: skip
    model = quantized({"name": "w4a16", "rotate": False}, llama(tied), rules)
    export(model, tmp_path / "out", shard_bytes=40_000)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    ids = torch.randint(0, 97, (1, 5))
    with torch.no_grad():
        theirs = stock(tmp_path / "out", dtype=torch.float32)
        assert torch.equal(theirs(ids).logits, dense(model)(ids).logits)
        assert (theirs.lm_head.weight is theirs.model.embed_tokens.weight) is tied
        ours = load(tmp_path / "out")
    for name, layer in layers_of(model).items():
        assert torch.equal(ours.get_submodule(name).dequantize(), layer.dequantize())
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) is tied


def test_a_quantized_head_lies_apart_and_embeddings_become_float(tmp_path):
    rules = [{"match": "model.embed_tokens", "scheme": "embedding_w8"}]
    model = quantized({"name": "w8a32"}, llama(tied=True), rules)
    with pytest.warns(UserWarning, match="the output head shared the codes"):
        export(model, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    ids = torch.randint(0, 97, (1, 5))
    with torch.no_grad():
        logits = stock(tmp_path / "out", dtype=torch.float32)(ids).logits
        assert torch.equal(logits, dense(model)(ids).logits)


@pytest.mark.filterwarnings("ignore:zero points")
def test_the_config_is_one_that_the_package_validates_and_names_every_layer(tmp_path):
    for i, scheme in enumerate((*WEIGHT_ONLY[3::2], *WITH_ACTIVATIONS[1::2])):
        model = quantized(scheme)
        export(model, tmp_path / str(i))
        config = json.loads((tmp_path / str(i) / "config.json").read_text())["quantization_config"]
        parsed = QuantizationConfig.model_validate(config)
        assert all(isinstance(group, QuantizationScheme) for group in parsed.config_groups.values())
        matched = [
            name
            for name, module in llama().named_modules()
            if compressed_tensors.utils.match.match_targets(name, module, parsed.config_groups["group_0"].targets)
        ]
        assert matched == list(layers_of(model)) and parsed.ignore == ["lm_head"]


def test_what_the_format_cannot_say_is_refused_with_the_option_to_change(tmp_path):
    for scheme, message in (
        ("w4a16", r"rotated; quantize with rotate: false \(recipe w4a16_ct does\) \(14 layers: model.layers.0"),
        ({"name": "w4a16", "rotate": False, "rank": 4}, "low-rank branch; quantize with rank: 0"),
        ({"name": "w4a4_svd", "rank": 0, "rotate": False}, "smoothed; quantize with smooth: none"),
        ({"name": "w4a8_svd", "rank": 0, "rotate": False, "smooth": "none"}, "quantize with zero_point: false"),
        ("w4a8_svd", "rotate: false, and it has .* with rank: 0, and its activations .* with smooth: none"),
        ({"name": "w8a8", "rotate": True}, r"w8a8: its groups are rotated; .* \(recipe w8a8_ct does\) \("),
        ({"name": "w8a8", "smooth": "auto"}, "smoothed; quantize with smooth: none"),
        ({"name": "w8a8_static", "rotate": True}, "rotated; quantize with rotate: false"),
        ({"name": "w4_group", "offset": True}, "quantize with zero_point: true instead"),
        ({"name": "w4_group", "order": True}, "act-order"),
        ({"name": "w8_group", "group_size": 256}, "groups of 256 do not divide its 128 input features"),
    ):
        with pytest.raises(CheckpointError, match=message):
            export(quantized(scheme if isinstance(scheme, dict) else {"name": scheme}), tmp_path / "out")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="format 'onnx'; one of compressed-tensors"):
        export(llama(), tmp_path / "out", format="onnx")
    with pytest.raises(CheckpointError, match="no quantized linear layer"):
        export(llama(), tmp_path / "out")
    model = Quantizer(nn.Sequential(nn.Linear(64, 64))).quantize("w8a16", progress=False)
    with pytest.raises(CheckpointError, match="no transformers model"):
        export(model, tmp_path / "out")
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_embd=64, n_head=2, vocab_size=50))
    gpt2 = Quantizer(gpt2).quantize(Recipe.from_dict({"scheme": "w8a16", "rules": [HEAD]}), progress=False)
    with pytest.raises(CheckpointError, match=r"nn.Linear only, and 4 quantized layers are something else.*Conv1D"):
        export(gpt2, tmp_path / "out")
    small = {"hidden_size": 64, "intermediate_size": 64, "intermediate_size_mlp": 64, "num_hidden_layers": 1,
             "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "vocab_size": 50, "pad_token_id": 0,
             "num_local_experts": 2, "interleave_moe_layer_step": 1}  # fmt: skip
    llama4 = transformers.Llama4ForCausalLM(transformers.Llama4TextConfig(**small))
    with pytest.raises(CheckpointError, match=r"Llama4TextExperts: .* random numbers. Save with qgraft.save"):
        export(quantized({"name": "w8a16"}, llama4), tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(CheckpointError, match="no empty folder"):
        export(quantized({"name": "w8a16"}), tmp_path / "full")


PLAIN = {"rank": 0, "rotate": False, "smooth": "none", "zero_point": False, "iterations": 1}


def variants():
    """Each scheme as plain as it can be, and so but for one option, with each value that it can have."""
    for name, cls in SCHEMES.items():
        kinds = {option: field.annotation for option, field in cls.Scheme.model_fields.items()}
        plain = {"rank": 8} if name.startswith("factorized") else {k: v for k, v in PLAIN.items() if k in kinds}
        yield name, plain
        for option, kind in kinds.items():
            values = (True, False) if bool in (kind, *get_args(kind)) else get_args(kind)
            yield from ((name, {**plain, option: value}) for value in values if isinstance(value, (bool, int, str)))


@pytest.mark.filterwarnings("ignore:bitnet is a format to train in")
def test_whatever_its_options_a_layer_is_refused_or_written_with_its_very_weight():
    written = set()
    for name, options in variants():
        model = nn.Sequential(nn.Linear(256, 32, bias=False))
        recipe = {"scheme": {"name": name, **options}, "min_features": 1}
        try:
            data = [torch.randn(40, 256) * torch.linspace(0.1, 3, 256)]
            layer = Quantizer(model).quantize(Recipe.from_dict(recipe), calibration=data, progress=False)[0]
        except PlanError:
            continue  # options that exclude each other
        try:
            group, tensors = compressed_tensors_of_ours.export_layer(layer)
        except ValueError:
            continue
        scheme = QuantizationScheme(targets=["Linear"], **group)
        compressor = compressed_tensors.compressors.BaseCompressor.get_value_from_registry(group["format"])
        weight = compressor.decompress(dict(tensors), scheme)["weight"]
        assert torch.equal(weight, layer.dequantize()), (name, options)
        written.add(name)
    assert written == {s["name"] for s in (*WEIGHT_ONLY, *WITH_ACTIVATIONS)}


@pytest.mark.parametrize("recipe", ["w4a16_ct", "w8a8_ct"])
def test_the_shipped_recipes_export(recipe, tmp_path):
    data = [torch.randint(0, 97, (2, 12))]
    model = Quantizer(llama()).quantize(recipe, calibration=data, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        export(model, tmp_path / "out")
    ids = torch.randint(0, 97, (1, 5))
    theirs = stock(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        logits, expected = theirs(ids).logits, dense(model)(ids).logits
    if recipe == "w4a16_ct":
        assert torch.equal(logits, expected)
    for name, layer in layers_of(model).items():
        assert torch.equal(theirs.get_submodule(name).weight, layer.dequantize())


def test_the_command_line_exports_a_folder_and_says_what_the_library_warns_of(tmp_path, capsys):
    model = quantized({"name": "w8_group", "zero_point": True})
    save(model, tmp_path / "ours")
    assert cli.main(["export", str(tmp_path / "ours"), "--out", str(tmp_path / "out")]) == 0
    assert "warning: zero points: transformers 5 loads them only with" in capsys.readouterr().err
    for name, layer in layers_of(load(tmp_path / "out")).items():
        assert torch.equal(layer.dequantize(), model.get_submodule(name).dequantize())
    save(quantized({"name": "w4a16"}), tmp_path / "rotated")
    assert cli.main(["export", str(tmp_path / "rotated"), "--out", str(tmp_path / "no")]) == 1
    assert "quantize with rotate: false" in capsys.readouterr().err and not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    "scheme, rules, message",
    [
        ({"name": "w8a16"}, [{"match": "*.q_proj", "skip": "x"}], r"vLLM fuses.*self_attn.\{q_proj,k_proj,v_proj\}"),
        ({"name": "w8a16"}, [{"match": "*.0.mlp.up_proj", "scheme": "w8a8"}], r"model.layers.0.mlp.\{gate_proj,up"),
        ({"name": "w8_group", "zero_point": True}, [], "vLLM has 8-bit weights without only"),
        ({"name": "w4a16", "rotate": False, "zero_point": True}, [], "dequantize=True"),
        ({"name": "w8a8", "zero_point": True}, [], "int8 activations: vLLM has none"),
        ({"name": "w8_group", "group_size": 256}, [{"match": "re:(?!.*o_proj).*", "skip": "x"}], "groups of 256"),
    ],
)
def test_what_clients_will_not_load_is_said(scheme, rules, message, tmp_path):
    wide = llama(hidden_size=256, num_attention_heads=4)
    with pytest.warns(UserWarning, match=message):
        export(quantized(scheme, wide, [*rules, HEAD | {"optional": True}]), tmp_path / "out")


def test_static_ranges_of_which_vllm_would_keep_one_are_said(tmp_path):
    model = quantized({"name": "w8a8_static", "act_range": "absmax"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        export(model, tmp_path / "one")
    model.model.layers[1].self_attn.v_proj.act_scale *= 1.5
    with pytest.warns(UserWarning, match=r"one static range.*differ: model.layers.1.self_attn.\{q.*act_range") as said:
        export(model, tmp_path / "several")
    assert "layers.0" not in str(said[0].message)


# ---- in -------------------------------------------------------------------------------------------------------------


def written_by_the_package(folder, weights, dtype=torch.float32, activations=None, form=None, model=None):
    """A checkpoint as llm-compressor makes it: random scales and codes, compressed by the package. Returns the float
    model with the weights that it decompresses to, and the codes."""
    model = model or llama(dtype=dtype)
    args = compressed_tensors.quantization.QuantizationArgs(**weights)
    form = form or "pack-quantized"
    scheme = QuantizationScheme(targets=["Linear"], weights=args, input_activations=activations, format=form)
    compressor = compressed_tensors.compressors.BaseCompressor.get_value_from_registry(form)
    state = {n: t.clone() for n, t in model.state_dict().items() if n != "lm_head.weight"}
    codes = {}
    for name, linear in model.model.named_modules(prefix="model"):
        if not isinstance(linear, nn.Linear):
            continue
        n, k = linear.weight.shape
        groups = -(-k // args.group_size) if args.strategy == "group" else 1
        rows = 1 if args.strategy == "tensor" else n
        scale = (torch.rand(rows, groups) * 0.01 + 0.001).to(dtype)
        low, high = -(2 ** (args.num_bits - 1)), 2 ** (args.num_bits - 1)
        zero = torch.zeros(rows, groups, dtype=torch.int8)
        if not args.symmetric:
            zero = torch.randint(low, high, (rows, groups), dtype=torch.int8)
        q = torch.randint(low, high, (n, k), dtype=torch.int8)
        size = k if args.strategy != "group" else args.group_size
        each = [t.repeat_interleave(size, 1)[:, :k] for t in (scale, zero)]
        local = {
            "weight": (q.to(dtype) - each[1]) * each[0], "weight_scale": scale, "weight_zero_point": zero,
        }  # fmt: skip
        packed = compressor.compress(local, scheme)
        linear.weight.data = compressor.decompress(dict(packed), scheme)["weight"].to(dtype)
        if activations and not activations["dynamic"]:
            packed["input_scale"] = torch.rand(1) * 0.05 + 0.01
            packed["input_zero_point"] = torch.randint(-128, 128, (1,), dtype=torch.int8)
        state.pop(f"{name}.weight")
        state.update({f"{name}.{leaf}": t.contiguous() for leaf, t in packed.items()})
        codes[name] = q
    state["lm_head.weight"] = model.lm_head.weight.detach()
    folder.mkdir()
    save_file(state, folder / "model.safetensors")
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations, "output_activations": None}
    quantization = {
        "quant_method": "compressed-tensors", "format": form, "quantization_status": "compressed",
        "ignore": ["lm_head"], "config_groups": {"group_0": group},
    }  # fmt: skip
    config = json.loads(model.config.to_json_string()) | {
        "quantization_config": quantization, "architectures": ["LlamaForCausalLM"], "dtype": str(dtype)[6:],
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return model, codes


def weights_of(bits, strategy="group", size=32, symmetric=True):
    return {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": strategy,
            "group_size": size if strategy == "group" else None, "dynamic": False}  # fmt: skip


WRITTEN = [
    (weights_of(4, size=32), torch.float32),
    (weights_of(4, size=64), torch.bfloat16),
    (weights_of(4, size=64, symmetric=False), torch.float16),
    (weights_of(4, "channel"), torch.bfloat16),
    (weights_of(8, size=32, symmetric=False), torch.float32),
    (weights_of(8, "channel"), torch.float16),
    (weights_of(8, "channel", symmetric=False), torch.float32),
    (weights_of(8, "tensor"), torch.float32),
    (weights_of(2, size=32), torch.float32),
    (weights_of(3, "channel", symmetric=False), torch.float32),
    (weights_of(6, size=64), torch.float32),
]


class LargestFloat(TorchDispatchMode):
    """The number of elements of the largest float tensor that any operation makes."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in (
            () if func is torch.ops.aten.detach.default else out if isinstance(out, (tuple, list)) else (out,)
        ):
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and not tensor.is_meta:
                self.largest = max(self.largest, tensor.numel())
        return out


@pytest.mark.parametrize("weights, dtype", WRITTEN, ids=str)
def test_any_integer_checkpoint_comes_in_packed_and_exact(weights, dtype, tmp_path):
    reference, codes = written_by_the_package(tmp_path / "ct", weights, dtype)
    skeleton = ModelFolder(tmp_path / "ct").skeleton()
    with LargestFloat() as watch:
        model = load(tmp_path / "ct", model=skeleton)
    assert watch.largest < 0.7 * 128 * 192  # no float weight was made; vocabulary and scales are smaller
    packed = sum(t.numel() * t.element_size() for n, t in model.named_buffers() if "rotary" not in n)
    bits = 4 if weights["num_bits"] <= 4 else 8
    assert packed < 1.25 * sum(q.numel() for q in codes.values()) * (bits + (2 if bits == 4 else 1.2)) / 8
    for name, layer in layers_of(model).items():
        exact = reference.get_submodule(name).weight.float()
        # In 16 bits, the package rounds each dequantized weight; ours is the product as it is.
        torch.testing.assert_close(layer.dequantize(), exact, rtol=1e-6 if dtype is torch.float32 else 5e-3, atol=1e-9)
        assert (layer.dequantize().unique(dim=None).numel()) >= 4
    assert set(layers_of(model)) == set(codes)
    ids = torch.randint(0, 97, (2, 9))
    with torch.no_grad():
        logits, expected = model(ids).logits.float(), reference(ids).logits.float()
    limit = 1e-4 if dtype is torch.float32 else 0.05
    assert (logits - expected).norm() / expected.norm() < limit
    save(model, tmp_path / "ours")
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "ours")(ids).logits.float(), logits)


@pytest.mark.parametrize("dynamic", [True, False])
def test_int8_activations_come_in_too(dynamic, tmp_path):
    activations = {"num_bits": 8, "type": "int", "symmetric": dynamic, "strategy": "token" if dynamic else "tensor",
                   "dynamic": dynamic}  # fmt: skip
    reference, codes = written_by_the_package(
        tmp_path / "ct", weights_of(8, "channel"), activations=activations, form="int-quantized"
    )
    model, tensors = load(tmp_path / "ct"), load_file(tmp_path / "ct" / "model.safetensors")
    for name, layer in layers_of(model).items():
        assert layer.scheme_name == ("w8a8" if dynamic else "w8a8_static")
        assert torch.equal(layer.qweight, codes[name])
        assert torch.equal(layer.dequantize(), reference.get_submodule(name).weight)
        if not dynamic:
            assert layer.act_scale == tensors[f"{name}.input_scale"]
            assert layer.act_zero_point == tensors[f"{name}.input_zero_point"]
    ids = torch.randint(0, 97, (2, 9))
    with torch.no_grad():
        theirs = stock(tmp_path / "ct", dtype=torch.float32)
        if dynamic:  # random static scales clip at random
            logits, expected = model(ids).logits, theirs(ids).logits
            assert (logits - expected).norm() / expected.norm() < 0.25  # random codes are far from a trained weight
    save(model, tmp_path / "ours")
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "ours")(ids).logits, model(ids).logits)


@pytest.mark.filterwarnings("ignore:zero points")
@pytest.mark.parametrize("scheme", [*WEIGHT_ONLY[::2], *WITH_ACTIVATIONS[::2]], ids=str)
def test_what_was_exported_comes_back_with_the_same_weights(scheme, tmp_path):
    model = quantized(scheme)
    export(model, tmp_path / "out")
    again = load(tmp_path / "out")
    assert layers_of(again).keys() == layers_of(model).keys()
    for name, layer in layers_of(again).items():
        assert torch.equal(layer.dequantize(), model.get_submodule(name).dequantize())


def rewrite(folder, **changes):
    """Change tensors and the quantization_config of a folder: {"tensors": {name: tensor or None}, key: value}."""
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in changes.pop("tensors", {}).items():
        tensors.pop(name, None)
        if tensor is not None:
            tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"].update(changes)
    (folder / "config.json").write_text(json.dumps(config))


def test_features_in_another_order_are_put_in_order(tmp_path):
    _, codes = written_by_the_package(tmp_path / "ct", weights_of(4, size=32))
    name = "model.layers.0.mlp.down_proj"
    tensors, k = load_file(tmp_path / "ct" / "model.safetensors"), 192
    g_idx = (torch.arange(k, dtype=torch.int32) // 32)[torch.randperm(k)]
    rewrite(tmp_path / "ct", tensors={f"{name}.weight_g_idx": g_idx})
    layer = load(tmp_path / "ct").get_submodule(name)
    scale = tensors[f"{name}.weight_scale"].double()
    expected = codes[name].double() * scale[:, g_idx.long()]
    torch.testing.assert_close(layer.dequantize().double(), expected, rtol=1e-6, atol=0)
    x = torch.randn(3, k)
    torch.testing.assert_close(layer(x).double(), x.double() @ expected.t(), rtol=1e-4, atol=1e-5)
    rewrite(tmp_path / "ct", tensors={f"{name}.weight_g_idx": torch.zeros(k, dtype=torch.int32)})
    with pytest.raises(CheckpointError, match=f"layer '{name}': g_idx does not deal the features out in groups of 32"):
        load(tmp_path / "ct")


def test_a_preset_and_targets_by_name_and_expression(tmp_path):
    written_by_the_package(tmp_path / "ct", weights_of(4, size=64))
    config = json.loads((tmp_path / "ct" / "config.json").read_text())
    group = config["quantization_config"]["config_groups"]["group_0"]
    del group["weights"]["strategy"]  # the group size says it
    split = [r"re:.*self_attn\.", "model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj", "re:.*(gate|down)_proj"]
    rewrite(tmp_path / "ct", config_groups={"a": group | {"targets": split}}, ignore=["re:lm_.*"])
    assert len(layers_of(load(tmp_path / "ct"))) == 14
    written_by_the_package(tmp_path / "preset", weights_of(4, size=128), model=llama(intermediate_size=256))
    rewrite(tmp_path / "preset", config_groups={"W4A16": ["Linear"]})
    assert len(layers_of(load(tmp_path / "preset"))) == 14


def test_what_cannot_be_read_is_refused_and_the_model_left_as_it_was(tmp_path):
    def attempt(message, **changes):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        reference, _ = written_by_the_package(folder, weights_of(4, size=32))
        rewrite(folder, **changes)
        model = transformers.LlamaForCausalLM(reference.config).eval()
        before = {name: (id(t), t.clone()) for name, t in model.state_dict(keep_vars=True).items()}
        with pytest.raises(CheckpointError, match=message):
            load(folder, model=model)
        for name, tensor in model.state_dict(keep_vars=True).items():
            assert id(tensor) == before[name][0] and torch.equal(tensor, before[name][1])

    up = "model.layers.0.mlp.up_proj"
    group = {"targets": ["Linear"], "weights": weights_of(4, size=32)}
    attempt(f"'{up}.weight_scale' is missing", tensors={f"{up}.weight_scale": None})
    attempt(r"mlp.gate_proj.weight_g_idx' is missing",
            config_groups={"g": group | {"weights": weights_of(4, size=32) | {"actorder": "group"}}})  # fmt: skip
    attempt(r"weight_packed' is int32 \(192, 3\) in the file, int32 \(192, 16\) is needed",
            tensors={f"{up}.weight_packed": torch.zeros(192, 3, dtype=torch.int32)})  # fmt: skip
    attempt("has NaN or infinite values", tensors={f"{up}.weight_scale": torch.full((192, 4), float("nan"))})
    attempt(r"weight_shape says \[1, 2\]", tensors={f"{up}.weight_shape": torch.tensor([1, 2])})
    attempt(r"weight_surprise' is nothing that such a layer has", tensors={f"{up}.weight_surprise": torch.zeros(1)})
    attempt("1 tensors are not the model's: surprise", tensors={"surprise": torch.zeros(1)})
    attempt("1 tensors are missing: model.norm.weight", tensors={"model.norm.weight": None})
    attempt("'model.norm.weight' has shape", tensors={"model.norm.weight": torch.zeros(1)})
    attempt("quantized key-value cache", kv_cache_scheme={"num_bits": 8})
    attempt("rotations of the whole model", transform_config={"config_groups": {}, "x": 1})
    attempt("sparse", sparsity_config={"format": "sparse-24-bitmask"})
    attempt("not 'compressed'", quantization_status="frozen")
    attempt("no config_groups", config_groups={})
    attempt("type float", config_groups={"g": group | {"weights": weights_of(8) | {"type": "float"}}})
    attempt("groups of 48 features", config_groups={"g": group | {"weights": weights_of(4, size=48)}})
    attempt("output_activations", config_groups={"g": group | {"output_activations": {"num_bits": 8}}})
    attempt("no layer for the preset 'FP8'", config_groups={"FP8": ["Linear"]})
    attempt("no layer of qgraft computes that", config_groups={"g": group | {"input_activations": {
        "num_bits": 4, "type": "int", "strategy": "token", "dynamic": True, "symmetric": True}}})  # fmt: skip
    attempt("none of its quantized layers", config_groups={"g": group | {"targets": ["re:nothing"]}})


def test_an_index_cannot_lead_out_of_the_folder(tmp_path):
    written_by_the_package(tmp_path / "ct", weights_of(4, size=32))
    for name in ("../model.safetensors", "/etc/model.safetensors", "model.bin"):
        index = {"weight_map": {"a": name}}
        (tmp_path / "ct" / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(CheckpointError, match="names files that are none of this folder"):
            load(tmp_path / "ct")
