"""GPTQ and AWQ checkpoints into our layers, against files packed element by element from the published formulas."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from qgraft import QuantLinear, load, save
from qgraft.layers import W4A16Linear, W4GroupLinear, W8A16Linear, W8GroupLinear
from qgraft.quantizer.errors import CheckpointError

transformers = pytest.importorskip("transformers")

K, N = 64, 96  # of down_proj


def signed(word: int) -> int:
    return word - (1 << 32) if word >= 1 << 31 else word


def gptq(k, n, bits, group_size, symmetric, v1, desc_act, dtype):
    """One layer as AutoGPTQ's `pack` writes it, in plain integers: its tensors, and its weight (N, K) in float64."""
    size = k if group_size == -1 else group_size
    groups, per = -(-k // size), 32 // bits
    scale = (torch.rand(groups, n) * 0.02 + 0.001).to(dtype)
    low = 1 if v1 else 0  # v1 stores zero - 1
    zero = torch.full((groups, n), 1 << bits - 1) if symmetric else torch.randint(low, 1 << bits, (groups, n))
    g_idx = torch.arange(k) // size
    if desc_act:
        g_idx = g_idx[torch.randperm(k)]
    codes = torch.randint(0, 1 << bits, (k, n))
    weight = torch.zeros(n, k, dtype=torch.float64)
    for i in range(k):
        g = int(g_idx[i])
        weight[:, i] = scale[g].double() * (codes[i] - zero[g]).double()
    qweight = [
        [signed(sum(int(codes[row * per + i, column]) << bits * i for i in range(per))) for column in range(n)]
        for row in range(k // per)
    ]
    stored = zero - 1 if v1 else zero
    qzeros = [
        [signed(sum(int(stored[g, word * per + i]) << bits * i for i in range(per))) for word in range(n // per)]
        for g in range(groups)
    ]
    tensors = {
        "qweight": torch.tensor(qweight, dtype=torch.int32),
        "qzeros": torch.tensor(qzeros, dtype=torch.int32),
        "scales": scale,
        "g_idx": g_idx.to(torch.int32),
    }
    return tensors, weight


def awq(k, n, group_size, dtype):
    """One layer as AutoAWQ's WQLinear_GEMM packs it."""
    scale = (torch.rand(k // group_size, n) * 0.02 + 0.001).to(dtype)
    zero = torch.randint(0, 16, (k // group_size, n))
    codes = torch.randint(0, 16, (k, n))
    each = [t.repeat_interleave(group_size, 0).double() for t in (scale, zero)]
    order = [0, 2, 4, 6, 1, 3, 5, 7]

    def pack(rows):
        return torch.tensor(
            [
                [signed(sum(int(row[8 * word + order[i]]) << 4 * i for i in range(8))) for word in range(len(row) // 8)]
                for row in rows.tolist()
            ],
            dtype=torch.int32,
        )

    return {"qweight": pack(codes), "qzeros": pack(zero), "scales": scale}, ((codes - each[1]) * each[0]).t()


def checkpoint(folder, quantization, make, dtype=torch.float16, bias=False):
    """A small Llama whose projections are packed by `make(k, n)`; returns the float64 weights by name."""
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=N, intermediate_size=K, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).to(dtype)
    state = {name: t.clone() for name, t in model.state_dict().items() if name != "lm_head.weight"}
    weights = {}
    for name, linear in model.model.named_modules(prefix="model"):
        if isinstance(linear, nn.Linear):
            tensors, weights[name] = make(linear.in_features, linear.out_features)
            del state[f"{name}.weight"]
            if bias:  # AutoGPTQ writes one of zeros where the model has none
                tensors["bias"] = torch.zeros(linear.out_features, dtype=dtype)
            state.update({f"{name}.{leaf}": tensor for leaf, tensor in tensors.items()})
    folder.mkdir()
    save_file(state, folder / "model.safetensors")
    written = json.loads(config.to_json_string()) | {
        "architectures": ["LlamaForCausalLM"], "dtype": str(dtype)[6:], "quantization_config": quantization,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(written))
    return weights


def check(folder, weights, dtype, tmp_path):
    model = load(folder)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, QuantLinear)}
    assert layers.keys() == weights.keys() and model.lm_head.weight is model.model.embed_tokens.weight
    for name, layer in layers.items():
        torch.testing.assert_close(layer.dequantize().double(), weights[name], rtol=1e-6, atol=1e-12)
        x = torch.randn(3, layer.in_features).to(dtype)
        exact = x.double() @ weights[name].t()
        assert (layer(x).double() - exact).norm() < (1e-5 if dtype is torch.float32 else 5e-3) * exact.norm()
    save(model, tmp_path / "ours")
    ids = torch.randint(0, 50, (1, 7))
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "ours")(ids).logits, model(ids).logits)
    return layers


@pytest.mark.parametrize(
    "bits, group_size, symmetric, v1",
    [
        (4, 32, True, True),
        (4, 32, False, True),
        (4, 32, False, False),
        (4, -1, False, True),
        (8, -1, True, True),
        (8, 32, True, False),
        (8, 32, False, True),
        (2, 32, False, True),
    ],
)
def test_gptq_is_its_formula(bits, group_size, symmetric, v1, tmp_path):
    quantization = {
        "quant_method": "gptq", "bits": bits, "group_size": group_size, "sym": symmetric, "desc_act": False,
        "checkpoint_format": "gptq" if v1 else "gptq_v2",
    }  # fmt: skip
    weights = checkpoint(
        tmp_path / "gptq", quantization, lambda k, n: gptq(k, n, bits, group_size, symmetric, v1, False, torch.float16)
    )
    layers = check(tmp_path / "gptq", weights, torch.float16, tmp_path)
    kinds = {type(layer) for layer in layers.values()}
    if bits == 8:
        assert kinds == {W8A16Linear if symmetric and group_size == -1 else W8GroupLinear}
    else:
        assert kinds == {W4A16Linear}
    assert all(layer.scheme.zero_point is not symmetric for layer in layers.values() if kinds != {W8A16Linear})


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_act_order_is_kept_as_an_order_of_features(bits, dtype, tmp_path):
    quantization = {"quant_method": "gptq", "bits": bits, "group_size": 32, "sym": False, "desc_act": True}
    weights = checkpoint(
        tmp_path / "gptq", quantization, lambda k, n: gptq(k, n, bits, 32, False, True, True, dtype), dtype, bias=True
    )
    layers = check(tmp_path / "gptq", weights, dtype, tmp_path)
    assert {type(layer) for layer in layers.values()} == {W4GroupLinear if bits == 4 else W8GroupLinear}
    assert all(layer.scheme.order and not layer.bias.any() for layer in layers.values())


def test_zero_points_of_v1_that_borrowed_from_their_neighbours_come_back(tmp_path):
    """GPTQModel makes v1 from v2 by subtracting 0x11111111 from whole words, whatever is in them."""
    quantization = {"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "gptq"}

    def make(k, n):
        tensors, weight = gptq(k, n, 4, 32, False, False, False, torch.float16)
        return tensors | {"qzeros": tensors["qzeros"] - 0x11111111}, weight

    weights = checkpoint(tmp_path / "gptq", quantization, make)
    check(tmp_path / "gptq", weights, torch.float16, tmp_path)


@pytest.mark.parametrize("group_size", [32, 16])
def test_awq_is_its_formula_and_what_compressed_tensors_makes_of_it(group_size, tmp_path):
    quantization = {"quant_method": "awq", "bits": 4, "group_size": group_size, "zero_point": True, "version": "gemm"}
    weights = checkpoint(tmp_path / "awq", quantization, lambda k, n: awq(k, n, group_size, torch.float16))
    if group_size == 16:
        with pytest.raises(CheckpointError, match="groups of 16 features: only multiples of 32"):
            load(tmp_path / "awq")
        return
    layers = check(tmp_path / "awq", weights, torch.float16, tmp_path)
    assert {type(layer) for layer in layers.values()} == {W4A16Linear}
    converter = pytest.importorskip("compressed_tensors.entrypoints.convert.converters.autoawq").AutoAWQConverter
    codes, scale, zero = converter.from_autoawq_config(quantization)._convert_gemm_module(*(
        load_file(tmp_path / "awq" / "model.safetensors")[f"model.layers.0.mlp.up_proj.{leaf}"]
        for leaf in ("qweight", "scales", "qzeros")
    ))  # fmt: skip
    theirs = (codes - zero.repeat_interleave(32, 1)).float() * scale.float().repeat_interleave(32, 1)
    assert torch.equal(layers["model.layers.0.mlp.up_proj"].dequantize(), theirs)


def test_what_cannot_be_read_is_refused(tmp_path):
    good = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    checkpoint(tmp_path / "gptq", good, lambda k, n: gptq(k, n, 4, 32, True, True, False, torch.float16))
    config = json.loads((tmp_path / "gptq" / "config.json").read_text())

    def attempt(message, **changes):
        (tmp_path / "gptq" / "config.json").write_text(json.dumps(config | {"quantization_config": good | changes}))
        with pytest.raises(CheckpointError, match=message):
            load(tmp_path / "gptq")

    attempt("bits: 3; 2, 4, 8 can be read", bits=3)
    attempt("checkpoint_format 'marlin'", checkpoint_format="marlin")
    attempt("gives layers other bits", dynamic={r"+:.*down.*": {"bits": 8}})
    attempt(r"qweight' is int32 \(12, 96\) in the file, int32 \(24, 96\) is needed", bits=8)
    attempt("version 'gemv' of AWQ", quant_method="awq", version="gemv")
    attempt("not a qgraft checkpoint", quant_method="exl2")
    (tmp_path / "gptq" / "config.json").write_text(json.dumps(config))
    (tmp_path / "gptq" / "model.safetensors").rename(tmp_path / "gptq" / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pickled weights"):
        load(tmp_path / "gptq")
