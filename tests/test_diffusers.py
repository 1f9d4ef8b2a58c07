"""Diffusion models of diffusers: quantized in place, saved and loaded by qgraft and by diffusers itself."""

import copy
import json
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from qgraft import Quantizer, QuantLinear, load, save
from qgraft.quantizer import CheckpointError

diffusers = pytest.importorskip("diffusers")
WEIGHTS = "diffusion_pytorch_model.safetensors"


def flux():
    return diffusers.FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=32, num_attention_heads=3,
        joint_attention_dim=48, pooled_projection_dim=40, axes_dims_rope=(8, 12, 12),
    )  # fmt: skip


def flux_batch(dtype):
    return {
        "hidden_states": torch.randn(2, 21, 16, dtype=dtype),
        "encoder_hidden_states": torch.randn(2, 7, 48, dtype=dtype),
        "pooled_projections": torch.randn(2, 40, dtype=dtype),
        "timestep": torch.rand(2, dtype=dtype),
        "img_ids": torch.randn(21, 3),
        "txt_ids": torch.zeros(7, 3),
    }


def pixart():
    return diffusers.PixArtTransformer2DModel(
        num_attention_heads=3, attention_head_dim=32, in_channels=4, out_channels=4, num_layers=2,
        cross_attention_dim=96, sample_size=8, caption_channels=40, norm_num_groups=1, use_additional_conditions=False,
    )  # fmt: skip


def sana():
    return diffusers.SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=3, attention_head_dim=32, num_layers=2,
        num_cross_attention_heads=3, cross_attention_head_dim=32, cross_attention_dim=96, caption_channels=40,
        sample_size=8,
    )  # fmt: skip


def image_batch(dtype):
    return {
        "hidden_states": torch.randn(2, 4, 8, 8, dtype=dtype),
        "encoder_hidden_states": torch.randn(2, 5, 40, dtype=dtype),
        "timestep": torch.randint(0, 1000, (2,)),
    }


def pixart_batch(dtype):
    return {**image_batch(dtype), "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}


MODELS = {"flux": (flux, flux_batch), "pixart": (pixart, pixart_batch), "sana": (sana, image_batch)}
BOUNDS = {"w8a16": 0.02, "w4a8_svd": 0.05, "w4a4_svd": 0.15}
# Each model by each recipe; each model, and each recipe, in both types.
TYPES = [torch.float32, torch.bfloat16]
CASES = [(model, recipe, TYPES[(i + j) % 2]) for i, model in enumerate(MODELS) for j, recipe in enumerate(BOUNDS)]


def relative(got, wanted):
    return ((got.double() - wanted.double()).norm() / wanted.double().norm()).item()


@torch.no_grad()
def run(model, batch):
    return model.eval()(**batch, return_dict=False)[0]


@pytest.fixture(scope="module")
def quantized():
    model, data = flux(), [flux_batch(torch.float32) for _ in range(2)]
    return Quantizer(model).quantize("w4a8_svd", calibration=data, progress=False)


@pytest.mark.parametrize(("name", "recipe", "dtype"), CASES)
def test_a_transformer_is_quantized_and_comes_back_from_disk_to_the_last_bit(name, recipe, dtype, tmp_path):
    build, batch_of = MODELS[name]
    model, batch = build(), batch_of(dtype)
    for parameter in model.parameters():  # as from_pretrained casts: what is computed when it is built stays float32
        parameter.data = parameter.data.to(dtype)
    wanted = run(model, batch)
    Quantizer(model).quantize(recipe, calibration=[batch_of(dtype) for _ in range(3)], progress=False)
    got = run(model, batch)
    assert got.dtype == dtype and 0 < relative(got, wanted) < BOUNDS[recipe]
    model.save_pretrained(tmp_path / "theirs", max_shard_size="100KB" if recipe == "w4a4_svd" else "10GB")
    theirs, info = type(model).from_pretrained(tmp_path / "theirs", output_loading_info=True)
    assert not any(info.values()) and torch.equal(run(theirs, batch), got)
    assert {n: t.dtype for n, t in theirs.state_dict().items()} == {n: t.dtype for n, t in model.state_dict().items()}
    save(model, tmp_path / "ours")
    assert torch.equal(run(load(tmp_path / "ours", model=build()), batch), got)


def test_what_diffusers_keeps_in_float32_comes_back_in_float32(tmp_path):
    """Wan has such parts, quantized ones and others, beside the rest in bfloat16."""
    wan = diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=32, in_channels=4, out_channels=4, text_dim=48, freq_dim=32,
        ffn_dim=96, num_layers=1, rope_max_seq_len=16,
    )  # fmt: skip
    wan.save_pretrained(tmp_path / "float")
    model = diffusers.WanTransformer3DModel.from_pretrained(tmp_path / "float", torch_dtype=torch.bfloat16)
    Quantizer(model).quantize("w8a16", progress=False)
    layers = model.condition_embedder.time_embedder.linear_1, model.blocks[0].attn1.to_q
    assert [layer.dtype for layer in layers] == [torch.float32, torch.bfloat16]
    batch = {
        "hidden_states": torch.randn(2, 4, 2, 8, 8).bfloat16(),
        "encoder_hidden_states": torch.randn(2, 5, 48).bfloat16(),
        "timestep": torch.randint(0, 1000, (2,)),
    }
    got = run(model, batch)
    model.save_pretrained(tmp_path / "ours")
    for options in ({}, {"torch_dtype": torch.bfloat16}):
        again = diffusers.WanTransformer3DModel.from_pretrained(tmp_path / "ours", **options)
        assert torch.equal(run(again, batch), got)
        layers = again.condition_embedder.time_embedder.linear_1, again.blocks[0].attn1.to_q
        assert [layer.dtype for layer in layers] == [torch.float32, torch.bfloat16]
        types = {name: t.dtype for name, t in again.state_dict().items()}
        assert types == {name: t.dtype for name, t in model.state_dict().items()}


def test_eight_bit_activations_are_more_accurate_than_four():
    model, data = flux(), [flux_batch(torch.float32) for _ in range(3)]
    wanted, errors = run(model, data[0]), {}
    for recipe in ("w4a4_svd", "w4a8_svd"):
        copy = Quantizer(model).quantize(recipe, calibration=data[1:], inplace=False, progress=False)
        errors[recipe] = relative(run(copy, data[0]), wanted)
    assert errors["w4a8_svd"] < 0.8 * errors["w4a4_svd"]


def test_the_recipes_leave_what_is_small_and_what_everything_passes_through():
    """On meta, in full size: outside the blocks nothing is quantized, and no norm, modulation or embedder inside."""
    names = ("Flux", "Flux2", "PixArt", "Sana", "SD3", "QwenImage", "DiT", "Chroma", "CogView4")
    cases = {f"{name}Transformer2DModel": {} if name == "DiT" else {"num_layers": 1} for name in names}
    cases["WanTransformer3DModel"] = cases["StableAudioDiTModel"] = {"num_layers": 1}
    cases["HunyuanDiT2DModel"] = {
        "num_layers": 2, "num_attention_heads": 16, "attention_head_dim": 64, "hidden_size": 1024, "patch_size": 2,
        "in_channels": 4, "sample_size": 32,
    }  # fmt: skip
    for name, options in cases.items():
        with torch.device("meta"):
            model = getattr(diffusers, name)(**options)
        layers = [layer.name for layer in Quantizer(model).plan("w4a4_svd").todo]
        assert len(layers) >= 5, name
        for layer in layers:
            assert re.search(r"blocks\.\d", layer), (name, layer)
            assert not re.search(r"norm|modulation|mod\.|embed|adaln", layer), (name, layer)


def test_a_component_of_a_pipeline_is_quantized_in_place_and_saved_with_it(tmp_path):
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=32, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        num_embeds_ada_norm=1000, norm_num_groups=1,
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
    pipe = diffusers.DiTPipeline(transformer.eval(), vae.eval(), diffusers.DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)

    def images(pipe):
        generator = torch.Generator().manual_seed(0)
        return torch.from_numpy(pipe([3, 7], num_inference_steps=2, generator=generator, output_type="np").images)

    before = images(pipe)
    model = Quantizer(pipe.transformer).quantize("w4a8_svd", calibration=lambda _: images(pipe), progress=False)
    assert model is pipe.transformer
    kinds = {name: type(m).__name__ for name, m in model.named_modules() if isinstance(m, (nn.Linear, QuantLinear))}
    assert {kinds[f"transformer_blocks.1.{n}"] for n in ("attn1.to_q", "ff.net.0.proj", "ff.net.2")} == {
        "SVDQW4A8Linear"
    }
    assert {kinds[n] for n in ("transformer_blocks.1.norm1.linear", "proj_out_1", "proj_out_2")} == {"Linear"}
    after = images(pipe)
    assert 0 < (after - before).abs().max() < 0.05
    pipe.save_pretrained(tmp_path)
    again = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(images(again), after)


def test_a_lora_of_the_float_model_goes_onto_the_quantized_one_and_off_again(tmp_path):
    peft = pytest.importorskip("peft")
    from qgraft.quantizer.interop.peft import on_quantized

    def config(**options):
        targets = ["to_q", "proj_mlp", "norm1.linear"]  # the last is in float
        return peft.LoraConfig(r=4, lora_alpha=4, target_modules=targets, **options)

    model, batch = flux(), flux_batch(torch.float32)
    tuned = copy.deepcopy(model)
    tuned.add_adapter(config(init_lora_weights=False))
    tuned.save_lora_adapter(tmp_path / "lora")
    wanted, plain = run(tuned, batch), run(model, batch)
    Quantizer(model).quantize("w4a8_svd", progress=False)
    quantized = run(model, batch)
    file = {"pretrained_model_name_or_path_or_dict": tmp_path / "lora", "prefix": None}
    with pytest.raises(ValueError, match=r"SVDQW4A8Linear.* is not supported"):
        model.load_lora_adapter(**file, weight_name="pytorch_lora_weights.safetensors")
    model.unload_lora()  # diffusers has put adapters into float layers before it came to one of ours
    assert torch.equal(run(model, batch), quantized)
    model.add_adapter(on_quantized(config()), "style")
    tensors = load_file(tmp_path / "lora" / "pytorch_lora_weights.safetensors")
    assert not peft.set_peft_model_state_dict(model, tensors, "style").unexpected_keys
    change, meant = run(model, batch) - quantized, wanted - plain
    assert (change - meant).norm() < 0.5 * meant.norm()
    model.save_lora_adapter(tmp_path / "again", adapter_name="style")
    saved = load_file(tmp_path / "again" / "pytorch_lora_weights.safetensors")
    assert saved.keys() == tensors.keys() and all(torch.equal(t, saved[name]) for name, t in tensors.items())
    with pytest.raises(CheckpointError, match=r"Take adapters off first: save_lora_adapter"):
        model.save_pretrained(tmp_path / "out")
    model.unload_lora()
    model.save_pretrained(tmp_path / "out")
    assert torch.equal(run(type(model).from_pretrained(tmp_path / "out"), batch), quantized)


def test_another_type_is_that_of_the_floats_and_not_of_scales(quantized, tmp_path):
    quantized.save_pretrained(tmp_path)
    model = diffusers.FluxTransformer2DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    layer, was = model.transformer_blocks[0].attn.to_q, quantized.transformer_blocks[0].attn.to_q
    assert layer.dtype == layer.bias.dtype == model.proj_out.weight.dtype == torch.bfloat16
    assert layer.scale.dtype == torch.float32 and torch.equal(layer.dequantize(), was.dequantize())
    assert torch.equal(model.to(torch.float32).transformer_blocks[0].attn.to_q.dequantize(), was.dequantize())
    model.save_pretrained(tmp_path / "again")
    again = diffusers.FluxTransformer2DModel.from_pretrained(tmp_path / "again", torch_dtype=torch.float32)
    assert torch.equal(again.transformer_blocks[0].attn.to_q.dequantize(), was.dequantize())


def test_a_folder_that_does_not_fit_is_refused_before_anything_is_loaded(quantized, tmp_path):
    quantized.save_pretrained(tmp_path)
    tensors, config = load_file(tmp_path / WEIGHTS), json.loads((tmp_path / "config.json").read_text())
    name = "transformer_blocks.0.attn.to_q"
    for change, words in (
        ({f"{name}.scale": None}, "1 tensors are missing: .*to_q.scale"),
        ({f"{name}.qweight": torch.zeros(96, 8, dtype=torch.uint8)}, r"to_q.qweight' has shape \(96, 8\) in the file"),
        ({"proj_out.weight": None}, "missing: proj_out.weight"),
        ({"strange": torch.zeros(2)}, "1 tensors are not the model's: strange"),
    ):
        save_file({n: t for n, t in (tensors | change).items() if t is not None}, tmp_path / WEIGHTS)
        with pytest.raises(CheckpointError, match=words):
            diffusers.FluxTransformer2DModel.from_pretrained(tmp_path)
    save_file(tensors, tmp_path / WEIGHTS)
    for change, words in (
        ({"version": 99}, "version 99"),
        ({"layers": {"x": {}}}, "no layer 'x' in the model"),
        ({"layers": 3}, "layers is missing or no mapping"),
    ):
        changed = {**config, "quantization_config": {**config["quantization_config"], **change}}
        (tmp_path / "config.json").write_text(json.dumps(changed))
        with pytest.raises(CheckpointError, match=words):
            diffusers.FluxTransformer2DModel.from_pretrained(tmp_path)


def test_what_diffusers_would_do_with_pickle_or_a_disk_is_refused(quantized, tmp_path):
    with pytest.raises(CheckpointError, match="safetensors only"):
        quantized.save_pretrained(tmp_path / "bin", safe_serialization=False)
    quantized.save_pretrained(tmp_path / "out")
    with pytest.raises(CheckpointError, match="not offloaded to disk"):
        diffusers.FluxTransformer2DModel.from_pretrained(
            tmp_path / "out", device_map={"": "disk"}, offload_folder=tmp_path
        )


def test_a_config_of_ours_quantizes_nothing_while_diffusers_loads(quantized, tmp_path):
    flux().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"load the float model, and call qgraft.Quantizer"):
        diffusers.FluxTransformer2DModel.from_pretrained(
            tmp_path, quantization_config=quantized.config.quantization_config
        )


def test_diffusers_without_qgraft_stops_and_loads_nothing_random(quantized, tmp_path):
    quantized.save_pretrained(tmp_path)
    code = f"from diffusers import FluxTransformer2DModel; FluxTransformer2DModel.from_pretrained({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode and "Unknown quantization type, got qgraft" in done.stderr
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match=r"weight expected shape torch.Size\(\[\d+, \d+\]\), but got torch.Size\(\[0\]\)"
    ):
        diffusers.FluxTransformer2DModel.from_pretrained(tmp_path)
