"""SVDQuant layers of nunchaku in and out, against a packer and a kernel written lane by lane from PTX's fragments."""

import copy
import functools
import random
import sys
from types import SimpleNamespace

import pytest
import torch
from forging import damage
from safetensors.torch import load_file, save_file
from torch import nn

from qgraft import Quantizer, Recipe, SVDQW4A4Linear, SVDQW4A8Linear, W4A16Linear, load, save
from qgraft.kernels.packing import unpack_int4
from qgraft.quantizer import CheckpointError
from qgraft.quantizer.interop import nunchaku
from qgraft.quantizer.interop.nunchaku_models import load_nunchaku, save_nunchaku

OPTIONS = {"rotate": False, "scales": "group_half", "rank": 16}
LEAVES = {"proj_down": "lora_down", "proj_up": "lora_up", "smooth_factor": "smooth"}


# ---- the layout, written a second time: which element each lane of a warp holds --------------------------------------


def codes_of_lanes(n, k):
    """(row, column) of each code in the order of the file; matrix B of two mma.m16n8k64 a 16-byte load."""
    for block in range(n // 128):
        for step in range(k // 64):
            for tile in range(8):
                for lane in range(32):
                    for register in range(4):
                        row = 128 * block + 16 * tile + 8 * (register // 2) + lane // 4
                        for nibble in range(8):
                            yield row, 64 * step + 32 * (register % 2) + 8 * (lane % 4) + nibble


def rows_of_lanes(n):
    """The rows whose scales the 32 lanes load, four each: those of their accumulators."""
    for block in range(n // 128):
        for lane in range(32):
            first = 128 * block + 16 * (lane // 4) + 2 * (lane % 4)
            yield from (first, first + 1, first + 8, first + 9)


def factors_of_lanes(n, k):
    """(row, column) of each 16-bit number of a factor; matrix B of two mma.m16n8k16 a load, blocks of 16 x 16."""
    for block in range(n // 16):
        for step in range(k // 16):
            for lane in range(32):
                for register in range(4):
                    row = 16 * block + 8 * (register // 2) + lane // 4
                    column = 16 * step + 8 * (register % 2) + 2 * (lane % 4)
                    yield from ((row, column), (row, column + 1))


def down_of_lanes(k, rank):
    """The same of the down-projection: ranks are the rows of its fragments, and blocks of inputs stay the slowest."""
    for block in range(k // 16):
        for step in range(rank // 16):
            yield from ((16 * block + column, 16 * step + row) for row, column in factors_of_lanes(16, 16))


@functools.cache
def places(lanes, *shape):
    """Where each element of a file stands in the row-major tensor of this shape."""
    return torch.tensor([at[0] * shape[1] + at[1] if len(shape) == 2 else at for at in lanes(*shape)])


def pack(tensor, lanes):
    return tensor.flatten()[places(lanes, *tensor.shape)].reshape(tensor.shape)


def unpack(tiles, lanes):
    return torch.empty_like(tiles).flatten().index_copy(0, places(lanes, *tiles.shape), tiles.flatten()).view_as(tiles)


def pack_codes(codes):
    nibbles = pack(codes.view(torch.uint8) & 15, codes_of_lanes)
    return (nibbles[:, ::2] | nibbles[:, 1::2] << 4).view(torch.int8)


def unpack_codes(qweight):
    nibbles = torch.stack((qweight & 15, qweight >> 4 & 15), -1).flatten(1)
    return unpack(torch.where(nibbles > 7, nibbles - 16, nibbles), codes_of_lanes)


def pack_scales(scale):
    blocks = [part[places(rows_of_lanes, 128)].t() for part in scale.split(128)]  # (G, 128) each
    return torch.cat([block.flatten() for block in blocks]).reshape(scale.shape[1], -1)


def unpack_scales(tiles):
    groups, n = tiles.shape
    scale = tiles.new_empty(n, groups)
    for start, block in zip(range(0, n, 128), tiles.reshape(-1, groups, 128), strict=True):
        scale[start + places(rows_of_lanes, 128)] = block.t()
    return scale


def random_truth(n, k, rank=16, bias=True, dtype=torch.bfloat16):
    """Row-major tensors of a layer; codes reach -8, as GPTQ's do."""
    return {
        "codes": torch.randint(-8, 8, (n, k), dtype=torch.int8),
        "scale": (torch.rand(n, k // 64) * 0.02 + 1e-3).to(dtype),
        "smooth_factor": (torch.rand(k) + 0.5).to(dtype),
        "proj_down": (torch.randn(k, rank) / k**0.5).to(dtype),
        "proj_up": torch.randn(n, rank).to(dtype),
        "bias": torch.randn(n).to(dtype) if bias else None,
    }


def file_of(truth, old_names=False):
    tensors = {
        "qweight": pack_codes(truth["codes"]),
        "wscales": pack_scales(truth["scale"]),
        "smooth_factor": pack(truth["smooth_factor"], rows_of_lanes),
        "proj_down": pack(truth["proj_down"], down_of_lanes),
        "proj_up": pack(truth["proj_up"], factors_of_lanes),
    }
    if truth["bias"] is not None:
        tensors["bias"] = pack(truth["bias"], rows_of_lanes)
    if old_names:
        tensors = {LEAVES.get(name, name): t for name, t in tensors.items()} | {
            "smooth_orig": tensors["smooth_factor"].clone()
        }
    return tensors


def weight_of(truth):
    """The weight seen from x as it comes, float64."""
    t = {name: None if x is None else x.double() for name, x in truth.items()}
    residual = (t["codes"].unflatten(1, (-1, 64)) * t["scale"][..., None]).flatten(1) / t["smooth_factor"]
    return residual + t["proj_up"] @ t["proj_down"].t()


def engine(x, truth, shift=0.0):
    """What nunchaku computes, in float64: codes signed with absmax / 7, or of shifted inputs unsigned with max / 15."""
    t = {name: None if v is None else v.double() for name, v in truth.items()}
    branch = (x.double() @ t["proj_down"]) @ t["proj_up"].t()
    groups = ((x.double() + shift) / t["smooth_factor"]).unflatten(1, (-1, 64))
    low, high = (0, 15) if shift else (-8, 7)
    step = (groups.abs().amax(-1, keepdim=True) / high).clamp_min(1e-30)  # padding
    act = ((groups / step).round().clamp(low, high) * step).flatten(1)
    residual = (t["codes"].unflatten(1, (-1, 64)) * t["scale"][..., None]).flatten(1)
    return act @ residual.t() + branch + (0 if t["bias"] is None else t["bias"])


def relative(got, wanted):
    return ((got.double() - wanted.double()).norm() / wanted.double().norm()).item()


# ---- layers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "k", "rank", "bias"), [(128, 128, 16, True), (256, 128, 48, False), (128, 384, 32, True)]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_file_goes_in_and_out_again_bit_for_bit(n, k, rank, bias, dtype):
    truth = random_truth(n, k, rank, bias, dtype)
    tensors = file_of(truth)
    layer = nunchaku.import_layer(tensors)
    assert type(layer) is SVDQW4A4Linear and layer.dtype == dtype and not layer.scheme.rotate
    assert torch.equal(unpack_int4(layer.qweight), truth["codes"])
    for name in ("scale", "smooth_factor", "proj_down", "proj_up"):
        assert torch.equal(getattr(layer, name), truth[name].to(getattr(layer, name).dtype)), name
    again = nunchaku.export_layer(layer, rank)
    assert again.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert again[name].dtype == tensor.dtype and torch.equal(again[name], tensor), name
    old = nunchaku.import_layer(file_of(truth, old_names=True))
    assert all(torch.equal(t, layer.state_dict()[name]) for name, t in old.state_dict().items())


@pytest.mark.parametrize("rank", [0, 16, 21])
@pytest.mark.parametrize("smooth", ["auto", "none"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_layer_of_ours_goes_out_and_in_again_bit_for_bit(rank, smooth, dtype):
    linear = nn.Linear(256, 128).to(dtype)
    x = torch.randn(64, 256, dtype=dtype)
    layer = SVDQW4A4Linear.from_linear(linear, calibration=x, **OPTIONS | {"rank": rank, "smooth": smooth})
    again = nunchaku.import_layer(nunchaku.export_layer(layer))
    assert again.scheme.rank == (32 if rank == 21 else 16)  # zeros fill the branch to a multiple of 16
    assert torch.equal(again.qweight, layer.qweight) and torch.equal(again.scale, layer.scale)
    assert torch.equal(again.bias, layer.bias)
    assert torch.equal(again.dequantize(), layer.dequantize())
    if rank == 16 and smooth == "auto":
        assert torch.equal(again(x), layer(x))
        assert all(torch.equal(t, again.state_dict()[name]) for name, t in layer.state_dict().items())


def test_an_imported_layer_computes_what_the_engine_does():
    truth = random_truth(128, 256)
    layer, x = nunchaku.import_layer(file_of(truth)), torch.randn(40, 256)
    assert torch.allclose(layer.dequantize().double(), weight_of(truth), atol=1e-5)
    assert relative(layer(x), engine(x, truth)) < 1e-3  # ties of float32 and of float64
    assert relative(layer(x.bfloat16()), engine(x.bfloat16(), truth)) < 0.01


def test_the_layer_after_a_gelu_takes_its_input_unshifted():
    """The file's bias is b - R shift, R the residual before rounding, because the branch sees x unshifted."""
    truth = random_truth(128, 256)
    x = nn.functional.gelu(torch.randn(200, 256))
    layer = nunchaku.import_layer(file_of(truth), input_shift=nunchaku.GELU_SHIFT)
    assert type(layer) is SVDQW4A8Linear
    exact = (x.double() + 0.171875) @ (
        weight_of(truth) - truth["proj_up"].double() @ truth["proj_down"].double().t()
    ).t()
    exact += (x.double() @ truth["proj_down"].double()) @ truth["proj_up"].double().t() + truth["bias"].double()
    ours = relative(layer(x), exact)
    assert ours < 0.02 and ours < 0.5 * relative(engine(x, truth, 0.171875), exact)


def test_padded_files_are_cut_and_only_zeros_are_cut_off():
    truth = random_truth(256, 256)
    truth["codes"][200:], truth["codes"][:, 170:] = 0, 0
    truth["proj_up"][200:], truth["proj_down"][170:], truth["bias"][200:] = 0, 0, 0
    truth["smooth_factor"][170:] = 0  # as deepcompressor pads it
    layer = nunchaku.import_layer(file_of(truth), (200, 170))
    assert (layer.out_features, layer.in_features) == (200, 170)
    truth["smooth_factor"][170:] = 1
    x = torch.randn(9, 170)
    assert torch.allclose(layer.dequantize().double(), weight_of(truth)[:200, :170], atol=1e-5)
    assert relative(layer(x), engine(nn.functional.pad(x, (0, 86)), truth)[:, :200]) < 1e-3
    truth["codes"][3, 171] = 1
    with pytest.raises(ValueError, match=r"what a 200 x 170 one would cut off is not zero"):
        nunchaku.import_layer(file_of(truth), (200, 170))
    with pytest.raises(ValueError, match=r"a 100 x 170 layer, padded to multiples of 128, is not 256 x 256"):
        nunchaku.import_layer(file_of(truth), (100, 170))


def test_parts_of_a_fused_layer_compute_its_parts():
    layer, x = nunchaku.import_layer(file_of(random_truth(384, 128))), torch.randn(7, 128)
    parts = nunchaku.split_rows(layer, [128, 100, 156])
    assert torch.equal(torch.cat([part(x) for part in parts], 1), layer(x))
    assert parts[0].smooth_factor.data_ptr() != parts[1].smooth_factor.data_ptr()
    with pytest.raises(ValueError, match="parts of 128, 128 rows do not make the 384 of the layer"):
        nunchaku.split_rows(layer, [128, 128])


def test_layers_joined_over_their_inputs_compute_their_sum():
    first, second = (nunchaku.import_layer(file_of(random_truth(128, k, rank))) for k, rank in ((128, 16), (256, 32)))
    joined, x = nunchaku.join_columns([first, second]), torch.randn(7, 384)
    assert joined.scheme.rank == 48 and type(joined) is SVDQW4A4Linear
    wanted = first(x[:, :128]) + second(x[:, 128:])
    assert relative(joined(x), wanted) < 4e-3  # the sum of the biases, in bfloat16
    assert torch.equal(joined.dequantize(), torch.cat([first.dequantize(), second.dequantize()], 1))


def test_what_is_no_int4_layer_is_refused_in_words():
    tensors = file_of(random_truth(128, 128))
    for broken, message in (
        ({"wcscales": torch.ones(128)}, "an NVFP4 layer"),
        ({"wscales": torch.ones(8, 128).to(torch.float8_e4m3fn)}, "an NVFP4 layer"),
        ({"qweight": tensors["qweight"].view(torch.uint8)}, "qweight must be int8"),
        ({"qweight": tensors["qweight"][:64]}, "tiles are of 128 x 128"),
        ({"wscales": tensors["wscales"][:1]}, r"wscales must be bfloat16 or float16 \(2, 128\)"),
        ({"bias": tensors["bias"].float()}, r"bias must be bfloat16 or float16 \(128,\)"),
        ({"bias": tensors["bias"].half()}, "bias is torch.float16, and proj_down torch.bfloat16"),
        ({"smooth_factor": torch.zeros(128).bfloat16()}, "smooth_factor holds values that are not positive"),
        ({"wscales": tensors["wscales"] * float("nan")}, "wscales has NaN"),
        ({"lora_up": tensors["proj_up"]}, "proj_up: there under the old name and the new one"),
        ({"weight": tensors["bias"]}, "strange weight"),
    ):
        with pytest.raises(ValueError, match=message):
            nunchaku.import_layer(tensors | broken)
    with pytest.raises(ValueError, match="missing wscales"):
        nunchaku.import_layer({name: t for name, t in tensors.items() if name != "wscales"})


@pytest.mark.parametrize(
    ("options", "sizes", "dtype", "words"),
    [
        ({"rotate": True}, (128, 128), torch.bfloat16, "rotate: false, scales: group_half, group_size: 64"),
        ({"scales": "two_level"}, (128, 128), torch.bfloat16, "see recipe w4a4_nunchaku"),
        ({"group_size": 32}, (128, 128), torch.bfloat16, "group_size: 64"),
        ({}, (128, 192), torch.bfloat16, "multiples of 128 features, and this layer is 192 x 128"),
        ({}, (128, 128), torch.float32, "quantize a bfloat16 or float16 model"),
        ({"scales": "group"}, (128, 128), torch.bfloat16, "scale does not fit in torch.bfloat16 without rounding"),
    ],
)
def test_a_layer_that_does_not_fit_is_not_exported_and_says_what_would(options, sizes, dtype, words):
    layer = SVDQW4A4Linear.from_linear(nn.Linear(*sizes).to(dtype), **OPTIONS | options)
    with pytest.raises(ValueError, match=words):
        nunchaku.export_layer(layer)


def test_other_layers_are_not_exported():
    model = nn.Sequential(nn.Conv2d(128, 128, 1)).bfloat16()
    Quantizer(model).quantize(Recipe.from_dict({"scheme": {"name": "w4a4_svd", **OPTIONS}}), progress=False)
    with pytest.raises(ValueError, match=r"replaces nn\.Linear only, and this is a 1x1 convolution"):
        nunchaku.export_layer(model[0])
    with pytest.raises(ValueError, match="no layer like SVDQW4A8Linear, only w4a4_svd"):
        nunchaku.export_layer(SVDQW4A8Linear.from_linear(nn.Linear(128, 128).bfloat16(), **OPTIONS))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_scales_cost_next_to_nothing(dtype):
    linear = nn.Linear(512, 256, bias=False).to(dtype)
    errors = {
        scales: relative(SVDQW4A4Linear.from_linear(linear, **OPTIONS | {"scales": scales}).dequantize(), linear.weight)
        for scales in ("group", "group_half")
    }
    assert errors["group_half"] < 1.01 * errors["group"]


def test_float16_scales_of_tiny_weights_do_not_vanish():
    linear = nn.Linear(128, 128).half()
    linear.weight.data *= 1e-7
    layer = SVDQW4A4Linear.from_linear(linear, **OPTIONS)
    assert (layer.scale > 0).all() and torch.isfinite(layer(torch.randn(3, 128).half())).all()


def test_the_shipped_recipe_makes_layers_that_can_be_exported():
    model = nn.Sequential(nn.Linear(256, 384), nn.GELU(), nn.Linear(384, 128)).bfloat16()
    data = [torch.randn(64, 256).bfloat16()]
    Quantizer(model).quantize("w4a4_nunchaku", calibration=data, progress=False)
    for layer in (model[0], model[2]):
        assert nunchaku.import_layer(nunchaku.export_layer(layer)).dequantize().equal(layer.dequantize())


# ---- AWQ layers ------------------------------------------------------------------------------------------------------


def codes_of_words(n, k):
    """(row, column) of each code of an AWQ layer in TinyChat's order: 16-bit words of columns that lie 8 apart."""
    for rows in range(n // 4):
        for block in range(k // 64):
            for row in range(4):
                for word in range(16):
                    for nibble in range(4):
                        yield 4 * rows + row, 64 * block + 32 * (word // 8) + 8 * nibble + word % 8


def pack_awq(codes):
    """(N, K) in 0..15 -> (N / 4, K / 2) int32."""
    n, k = codes.shape
    nibbles = pack(codes, codes_of_words).view(-1, 4).to(torch.int32)
    words = sum(nibbles[:, i] << 4 * i for i in range(4))
    return words.to(torch.int16).view(torch.int32).reshape(n // 4, k // 2)


@pytest.mark.parametrize("chunks", [0, 3, 6])
def test_awq_layers_become_w4a16_with_modulations_in_diffusers_order(chunks):
    k = 64 if chunks else 192
    n = chunks * k or 40
    codes = torch.randint(0, 16, (n, k), dtype=torch.int8)
    scale = (torch.rand(n, k // 64) * 0.02 + 1e-3).bfloat16()
    bias = torch.randn(n).bfloat16().float()
    weight = (codes.unflatten(1, (-1, 64)) - 7.0) * scale.double()[..., None]
    order = torch.arange(n) if not chunks else torch.tensor([c * k + i for i in range(k) for c in range(chunks)])
    stored_bias = bias.clone()
    if chunks:
        for chunk in {1, chunks - 2}:
            stored_bias[chunk * k : (chunk + 1) * k] += 1
    tensors = {
        "qweight": pack_awq(codes[order]),
        "wscales": nn.functional.pad(scale[order].t(), (0, 0, 0, 13)),  # deepcompressor pads the groups
        "wzeros": nn.functional.pad((-7 * scale.float()[order].t()).bfloat16(), (0, 0, 0, 13)),
        "bias": stored_bias[order].bfloat16(),
    }
    layer = nunchaku.import_awq(tensors, (n, k), modulation=bool(chunks))
    assert type(layer) is W4A16Linear
    assert torch.allclose(layer.dequantize().double(), weight.flatten(1), atol=1e-9)
    assert torch.allclose(layer.bias.float(), bias, atol=2**-5)  # rounded twice, up to 5
    with pytest.raises(ValueError, match="no multiple"):
        nunchaku.import_awq(tensors | {"wzeros": tensors["wzeros"] * 1.05}, (n, k))


# ---- whole models ----------------------------------------------------------------------------------------------------


def flux(**options):
    """FLUX as diffusers has it, with blocks of 128 features, which nunchaku's tiles want, and random biases."""
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=64, num_attention_heads=2,
        joint_attention_dim=48, pooled_projection_dim=40, axes_dims_rope=(16, 24, 24), **options,
    )  # fmt: skip
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


def flux_batch(dtype=torch.float32):
    return {
        "hidden_states": torch.randn(2, 21, 16, dtype=dtype),
        "encoder_hidden_states": torch.randn(2, 7, 48, dtype=dtype),
        "pooled_projections": torch.randn(2, 40, dtype=dtype),
        "timestep": torch.rand(2, dtype=dtype),
        "img_ids": torch.randn(21, 3),
        "txt_ids": torch.zeros(7, 3),
    }


# nunchaku's file layer (old name, new name), the model's layers in it, part of the input, after a GELU
DOUBLE, SINGLE = "transformer_blocks.0", "single_transformer_blocks.0"
FLUX_LAYERS = [
    (DOUBLE, "qkv_proj", "attn.to_qkv", ["attn.to_q", "attn.to_k", "attn.to_v"], slice(None), False),
    (DOUBLE, "qkv_proj_context", "attn.add_qkv_proj", ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"],
     slice(None), False),
    (DOUBLE, "out_proj", "attn.to_out.0", ["attn.to_out.0"], slice(None), False),
    (DOUBLE, "out_proj_context", "attn.to_add_out", ["attn.to_add_out"], slice(None), False),
    (DOUBLE, "mlp_fc1", "ff.net.0.proj", ["ff.net.0.proj"], slice(None), False),
    (DOUBLE, "mlp_fc2", "ff.net.2", ["ff.net.2"], slice(None), True),
    (DOUBLE, "mlp_context_fc1", "ff_context.net.0.proj", ["ff_context.net.0.proj"], slice(None), False),
    (DOUBLE, "mlp_context_fc2", "ff_context.net.2", ["ff_context.net.2"], slice(None), True),
    (SINGLE, "qkv_proj", "attn.to_qkv", ["attn.to_q", "attn.to_k", "attn.to_v"], slice(None), False),
    (SINGLE, "mlp_fc1", "mlp_fc1", ["proj_mlp"], slice(None), False),
    (SINGLE, "out_proj", "attn.to_out", ["proj_out"], slice(0, 128), False),
    (SINGLE, "mlp_fc2", "mlp_fc2", ["proj_out"], slice(128, None), True),
]  # fmt: skip
FLUX_NORMS = [(DOUBLE, "norm1.linear"), (DOUBLE, "norm1_context.linear"), (SINGLE, "norm.linear")]


def quantized_in_the_manner_of_the_engine(weight, smooth):
    """A truth near a float weight (N, K): the branch by SVD, the residual to nearest."""
    u, s, vh = torch.linalg.svd(weight.double() * smooth)
    up, down = (u[:, :16] * s[:16]).bfloat16(), (vh[:16] / smooth).t().bfloat16()
    rest = (weight.double() - up.double() @ down.double().t()) * smooth
    groups = rest.unflatten(1, (-1, 64))
    scale = (groups.abs().amax(-1) / 7).bfloat16()
    codes = (groups / scale.double()[..., None]).round().clamp(-8, 7).flatten(1).to(torch.int8)
    return {"codes": codes, "scale": scale, "smooth_factor": smooth.bfloat16(), "proj_down": down, "proj_up": up}


def published_file(model, old):
    """A file as nunchaku publishes it, made of a float model, and that model with the weights that the file means."""
    meant = copy.deepcopy(model)
    tensors = {}
    for block, before, after, parts, columns, shifted in FLUX_LAYERS:
        linears = [meant.get_submodule(f"{block}.{part}") for part in parts]
        weight = torch.cat([linear.weight.data for linear in linears])[:, columns]
        truth = quantized_in_the_manner_of_the_engine(weight, (torch.rand(weight.shape[1]) + 0.5).bfloat16().double())
        bias = torch.cat([linear.bias.data for linear in linears])
        if before == "out_proj" and block == SINGLE:
            bias = torch.zeros_like(bias)  # the whole of it is with mlp_fc2
        effective = weight_of(truth | {"bias": None})
        residual = effective - truth["proj_up"].double() @ truth["proj_down"].double().t()
        truth["bias"] = (bias - 0.171875 * residual.sum(1) if shifted else bias).bfloat16()
        start = 0
        for linear in linears:
            linear.weight.data[:, columns] = effective[start : start + linear.out_features].float()
            start += linear.out_features
        stored = file_of(truth, old_names=old)
        tensors |= {f"{block}.{before if old else after}.{leaf}": t for leaf, t in stored.items()}
    for block, name in FLUX_NORMS:
        linear = meant.get_submodule(f"{block}.{name}")
        (n, k), chunks = linear.weight.shape, len(linear.weight) // len(linear.weight[0])
        groups = linear.weight.data.double().unflatten(1, (-1, 64))
        scale = (groups.abs().amax(-1) / 7).bfloat16()
        codes = (groups / scale.double()[..., None]).round().clamp(-7, 7)
        linear.weight.data = (codes * scale.double()[..., None]).flatten(1).float()
        bias = linear.bias.data.clone().unflatten(0, (chunks, k))
        bias[{3: [1], 6: [1, 4]}[chunks]] += 1
        rows = torch.arange(n).unflatten(0, (chunks, k)).t().flatten()
        tensors |= {
            f"{block}.{name}.qweight": pack_awq((codes.flatten(1) + 7).to(torch.int8)[rows]),
            f"{block}.{name}.wscales": scale[rows].t().contiguous(),
            f"{block}.{name}.wzeros": (-7 * scale[rows].float()).bfloat16().t().contiguous(),
            f"{block}.{name}.bias": bias.flatten()[rows].bfloat16(),
        }
    taken = [f"{b}.{p}." for b, _, _, parts, _, _ in FLUX_LAYERS for p in parts] + [f"{b}.{n}." for b, n in FLUX_NORMS]
    for name, t in model.state_dict().items():
        if not name.startswith(tuple(taken)):
            tensors[name.replace(".attn.norm_", ".norm_") if old else name] = t
    return tensors, meant


@pytest.mark.parametrize("old", [True, False])
def test_a_published_flux_file_fills_the_model_of_diffusers(tmp_path, old):
    tensors, meant = published_file(flux(), old)
    save_file({name: t.contiguous() for name, t in tensors.items()}, tmp_path / "svdq-int4.safetensors")
    model = load_nunchaku(tmp_path / "svdq-int4.safetensors", flux())
    for name, linear in meant.named_modules():
        layer = model.get_submodule(name)
        if isinstance(linear, nn.Linear) and not isinstance(layer, nn.Linear):
            assert relative(layer.dequantize(), linear.weight.data) < 1e-5, name
            assert torch.allclose(layer.bias.float(), linear.bias, atol=0.02), name
    kinds = [type(model.get_submodule(f"{b}.{p[0]}")).__name__ for b, _, _, p, _, _ in FLUX_LAYERS]
    assert [name == "SVDQW4A8Linear" for name in kinds] == [s or p == ["proj_out"] for *_, p, _, s in FLUX_LAYERS]
    assert type(model.get_submodule(f"{DOUBLE}.norm1.linear")) is W4A16Linear
    batch = flux_batch()
    with torch.no_grad():
        assert relative(model(**batch)[0], meant(**batch)[0]) < 0.02
    save(model, tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "out", model=flux())(**batch)[0], model(**batch)[0])


def test_a_file_that_does_not_fit_changes_nothing_and_says_what_is_wrong(tmp_path):
    tensors, _ = published_file(flux(), old=False)
    model = flux()
    before, names = copy.deepcopy(model.state_dict()), [type(m) for m in model.modules()]
    qkv, k = f"{DOUBLE}.attn.to_qkv", "proj_out.weight"
    for change, words in (
        ({k: None}, "'proj_out.weight' is missing"),
        ({k: torch.zeros(3, 128)}, r"'proj_out.weight' has shape \(3, 128\) in the file, \(16, 128\) in the model"),
        ({"extra": torch.zeros(1)}, "'extra' is not the model's"),
        ({f"{qkv}.wscales": None}, f"'{qkv}': no SVDQ layer: missing wscales"),
        ({f"{qkv}.wcscales": torch.ones(384)}, "an NVFP4 layer"),
        (
            {"blocks.7.to_x.qweight": torch.zeros(128, 64, dtype=torch.int8)},
            "no linear layer 'blocks.7.to_x' in the model",
        ),
        ({f"{DOUBLE}.attn.to_q.qweight": torch.zeros(128, 64, dtype=torch.int8)}, "would get two layers of the file"),
    ):
        changed = {name: t.contiguous() for name, t in (tensors | change).items() if t is not None}
        save_file(changed, tmp_path / "file.safetensors")
        with pytest.raises(CheckpointError, match=words):
            load_nunchaku(tmp_path / "file.safetensors", model)
        assert [type(m) for m in model.modules()] == names
        assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    save_file({"a": torch.zeros(1)}, tmp_path / "file.safetensors")
    with pytest.raises(CheckpointError, match="holds no layer of nunchaku"):
        load_nunchaku(tmp_path / "file.safetensors", model)


def test_any_damage_of_a_tensor_is_read_or_refused(tmp_path):
    tensors = {name: t.contiguous() for name, t in published_file(flux(), old=False)[0].items()}
    model = flux()
    before = {name: id(t) for name, t in model.state_dict(keep_vars=True).items()}
    codes = [name for name in tensors if name.endswith("qweight")]
    for i in range(40):
        leaf = random.choice(codes if i % 4 == 0 else sorted(tensors))
        changed = dict(tensors)
        if random.random() < 0.2:
            del changed[leaf]
        else:
            changed[leaf] = damage(tensors[leaf]).contiguous()
        save_file(changed, tmp_path / "file.safetensors")
        print(leaf, changed.get(leaf))
        try:
            load_nunchaku(tmp_path / "file.safetensors", model)
        except CheckpointError:
            assert before == {name: id(t) for name, t in model.state_dict(keep_vars=True).items()}
        else:
            model = flux()
            before = {name: id(t) for name, t in model.state_dict(keep_vars=True).items()}


def test_names_say_where_the_layers_of_another_model_go(tmp_path):
    truth = random_truth(256, 128)
    save_file({f"a.{leaf}": t for leaf, t in file_of(truth).items()}, tmp_path / "file.safetensors")
    model = nn.ModuleDict({"x": nn.Linear(128, 96), "y": nn.Linear(128, 160)})
    model = load_nunchaku(tmp_path / "file.safetensors", model, names={"a": ("x", "y")})
    whole = torch.cat([model["x"].dequantize(), model["y"].dequantize()])
    assert torch.allclose(whole.double(), weight_of(truth), atol=1e-5)
    with pytest.raises(CheckpointError, match="names: the file has no layer 'b'"):
        load_nunchaku(tmp_path / "file.safetensors", nn.Linear(1, 1), names={"b": "x"})


def test_convolutions_of_one_pixel_take_a_layer_of_the_file_and_give_none(tmp_path):
    truth, x = random_truth(128, 128), torch.randn(2, 128, 5, 6)
    save_file({f"a.{leaf}": t for leaf, t in file_of(truth).items()}, tmp_path / "file.safetensors")
    model = load_nunchaku(tmp_path / "file.safetensors", nn.Sequential(nn.Conv2d(128, 128, 1)), names={"a": "0"})
    wanted = engine(x.movedim(1, -1).reshape(-1, 128), truth).reshape(2, 5, 6, 128).movedim(-1, 1)
    assert relative(model(x), wanted) < 1e-3
    sana = pytest.importorskip("diffusers").SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=64, num_layers=1, mlp_ratio=2.0,
        num_cross_attention_heads=2, cross_attention_head_dim=64, cross_attention_dim=128, caption_channels=40,
        sample_size=8,
    )  # fmt: skip
    Quantizer(sana.bfloat16()).quantize("w4a4_nunchaku", progress=False)
    assert type(sana.transformer_blocks[0].ff.conv_point) is nn.Conv2d
    save_nunchaku(sana, tmp_path / "out")
    again = load_nunchaku(tmp_path / "out", type(sana).from_config(sana.config))
    assert all(torch.equal(t, again.state_dict()[name]) for name, t in sana.state_dict().items())


def made_for_nunchaku():
    model = flux().bfloat16()
    data = [flux_batch(torch.bfloat16) for _ in range(2)]
    return Quantizer(model).quantize("w4a4_nunchaku", calibration=data, progress=False)


def test_a_nunchaku_lite_folder_goes_out_and_in_again_bit_for_bit(tmp_path):
    model, batch = made_for_nunchaku(), flux_batch(torch.bfloat16)
    save_nunchaku(model, tmp_path / "out")
    again = load_nunchaku(tmp_path / "out", flux())
    state = again.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(t, state[name]) and t.dtype == state[name].dtype for name, t in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(again(**batch)[0], model(**batch)[0])
    save_nunchaku(again, tmp_path / "twice")
    first, second = (load_file(tmp_path / name / "diffusion_pytorch_model.safetensors") for name in ("out", "twice"))
    assert first.keys() == second.keys() and all(torch.equal(t, second[name]) for name, t in first.items())
    with pytest.raises(CheckpointError, match="exists and is not an empty folder"):
        save_nunchaku(model, tmp_path / "out")


class Kernels:
    """The two kernels that diffusers calls, in float64 from the tiles; what passes between them is row-major."""

    @staticmethod
    def quantize_w4a4_act_fuse_lora(x, codes, scales, down, branch, smooth, fuse_glu, fp4):
        assert not fuse_glu and not fp4
        rows = len(x)
        branch[:rows] = (x.double() @ unpack(down, down_of_lanes).double()).float()
        groups = (x.double() / unpack(smooth, rows_of_lanes).double()).unflatten(1, (-1, 64))
        step = (groups.abs().amax(-1) / 7).clamp_min(1e-30)
        nibbles = (groups / step[..., None]).round().clamp(-8, 7).flatten(1).to(torch.int64) & 15
        codes[:rows] = (nibbles[:, ::2] | nibbles[:, 1::2] << 4).to(torch.uint8)
        scales[:, :rows] = step.t().to(scales.dtype)

    @staticmethod
    def gemm_w4a4(*args):
        act, weight, out, _, act_scales, scales, _, _, branch, up, *_ = args
        bias, act_unsigned, lora_scales, _, nvfp4 = args[15], *args[19:23]
        assert not act_unsigned and not nvfp4 and set(lora_scales) == {1.0}
        rows = len(out)
        nibbles = torch.stack((act & 15, act >> 4), -1).flatten(1).to(torch.int64)
        codes = torch.where(nibbles > 7, nibbles - 16, nibbles)[:rows].unflatten(1, (-1, 64)).double()
        x = (codes * act_scales.t()[:rows, :, None].double()).flatten(1)
        w = unpack_codes(weight).unflatten(1, (-1, 64)) * unpack_scales(scales).double()[..., None]
        y = x @ w.flatten(1).t() + branch[:rows].double() @ unpack(up, factors_of_lanes).double().t()
        out.copy_(y if bias is None else y + unpack(bias, rows_of_lanes).double())


def test_the_stock_loader_of_diffusers_takes_the_folder_and_computes_the_same(tmp_path, monkeypatch):
    """All of diffusers' own code but for the kernels, which want a GPU, and the check that there is one."""
    model, batch = made_for_nunchaku(), flux_batch(torch.bfloat16)
    save_nunchaku(model, tmp_path / "out")
    from diffusers import FluxTransformer2DModel
    from diffusers.quantizers.nunchaku import NunchakuLiteQuantizer
    from diffusers.utils import constants, import_utils

    monkeypatch.setattr(import_utils, "_kernels_available", True)
    monkeypatch.setattr(import_utils, "_kernels_version", "0.17.2")
    monkeypatch.setattr(constants, "DIFFUSERS_TRUST_REMOTE_KERNELS", True)
    get_kernel = SimpleNamespace(get_kernel=lambda *_, **__: SimpleNamespace(ops=Kernels))
    monkeypatch.setitem(sys.modules, "kernels", get_kernel)
    monkeypatch.delitem(sys.modules, "diffusers.quantizers.nunchaku.utils", raising=False)
    monkeypatch.setattr(NunchakuLiteQuantizer, "validate_environment", lambda *_, **__: None)
    theirs, info = FluxTransformer2DModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    from diffusers.quantizers.nunchaku import utils

    utils.check_strict_state_dict_match(theirs, load_file(tmp_path / "out" / "diffusion_pytorch_model.safetensors"))
    assert not any(info.values()) and type(theirs.proj_out) is nn.Linear
    assert sum(isinstance(m, utils.SVDQW4A4Linear) for m in theirs.modules()) == 17
    with torch.no_grad():
        assert relative(theirs(**batch)[0], model(**batch)[0]) < 0.01
    layer, other = (m.get_submodule(f"{SINGLE}.proj_out") for m in (model, theirs))
    x = torch.randn(300, 640).bfloat16()
    assert relative(other(x), layer(x)) < 0.005


def test_a_model_that_nunchaku_lite_cannot_hold_is_not_written(tmp_path):
    model = flux().bfloat16()
    Quantizer(model).quantize("w4a4_svd_fast", progress=False)
    with pytest.raises(CheckpointError, match=r"layer 'transformer_blocks.0.attn.to_q': .*recipe w4a4_nunchaku"):
        save_nunchaku(model, tmp_path / "out")
    with pytest.raises(CheckpointError, match="no quantized layer"):
        save_nunchaku(flux(), tmp_path / "out")
    with pytest.raises(CheckpointError, match="a Linear is no model of diffusers"):
        save_nunchaku(nn.Linear(1, 1), tmp_path / "out")
    assert not list(tmp_path.iterdir())
