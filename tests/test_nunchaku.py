"""SVDQuant layers of nunchaku in and out, against a packer and a kernel written lane by lane from PTX's fragments."""

import pytest
import torch
from torch import nn

from qgraft import Quantizer, SVDQW4A4Linear, SVDQW4A8Linear, W4A16Linear
from qgraft.kernels.packing import unpack_int4
from qgraft.quantizer.interop import nunchaku

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


def pack_codes(codes):
    n, k = codes.shape
    nibbles = [int(codes[at]) & 15 for at in codes_of_lanes(n, k)]
    packed = [low | high << 4 for low, high in zip(nibbles[::2], nibbles[1::2], strict=True)]
    return torch.tensor(packed, dtype=torch.uint8).view(torch.int8).reshape(n, k // 2)


def pack_scales(scale):
    n, groups = scale.shape
    rows = list(rows_of_lanes(n))
    order = [scale[row, g] for start in range(0, n, 128) for g in range(groups) for row in rows[start : start + 128]]
    return torch.stack(order).reshape(groups, n)


def pack_vector(vector):
    return torch.stack([vector[row] for row in rows_of_lanes(len(vector))])


def pack_up(up):
    return torch.stack([up[at] for at in factors_of_lanes(*up.shape)]).reshape(up.shape)


def pack_down(down):
    """The down-projection has the ranks as the rows of its fragments; blocks of inputs stay the slowest."""
    k, rank = down.shape
    order = [
        (16 * block + column, 16 * step + row)
        for block in range(k // 16)
        for step in range(rank // 16)
        for row, column in factors_of_lanes(16, 16)
    ]
    return torch.stack([down[at] for at in order]).reshape(k, rank)


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
        "smooth_factor": pack_vector(truth["smooth_factor"]),
        "proj_down": pack_down(truth["proj_down"]),
        "proj_up": pack_up(truth["proj_up"]),
    }
    if truth["bias"] is not None:
        tensors["bias"] = pack_vector(truth["bias"])
    if old_names:
        tensors = {LEAVES.get(name, name): t for name, t in tensors.items()} | {"smooth_orig": tensors["smooth_factor"]}
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


def pack_awq(codes):
    """TinyChat's order, element by element: (N, K) in 0..15 -> (N / 4, K / 2) int32."""
    n, k = codes.shape
    words = torch.zeros(n // 4, k, dtype=torch.int32)  # 16 bits each
    for row in range(n):
        for column in range(k):
            block, inside = divmod(column, 64)
            half, place = divmod(inside, 32)
            at = block * 64 + (row % 4) * 16 + half * 8 + place % 8
            words[row // 4, at] |= int(codes[row, column]) << 4 * (place // 8)
    return words.to(torch.int16).view(torch.int32)


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
    assert torch.allclose(layer.bias.float(), bias, atol=2**-7)
    with pytest.raises(ValueError, match="no multiple"):
        nunchaku.import_awq(tensors | {"wzeros": tensors["wzeros"] * 1.05}, (n, k))
