# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Quantize a diffusion transformer
#
# A diffusion model runs the same transformer some twenty times for one image, on thousands of tokens each. So it is
# bound by multiplications, and wants *both* sides of its products in few bits: `w4a8_svd` or `w4a4_svd`. The
# transformer here is diffusers' PixArt, small and with random weights, so that it runs anywhere. With a trained one
# take `transformer = pipeline.transformer`, and the pipeline itself in place of the loop below. In a clone of the
# repository:
#
#     pip install -c constraints.txt '.[diffusers]' jupytext jupyterlab
#     jupytext --to ipynb docs/notebooks/quantize_a_diffusion_transformer.py
#     jupyter lab docs/notebooks/quantize_a_diffusion_transformer.ipynb

# %%
import os
import tempfile

import torch
from diffusers import DDIMScheduler, PixArtTransformer2DModel

from qgraft import Quantizer, load, save

# The test suite runs these cells with fewer blocks and steps.
QUICK = bool(os.environ.get("QGRAFT_NOTEBOOK_QUICK"))
BLOCKS, STEPS, IMAGES = (2, 3, 1) if QUICK else (6, 20, 4)

torch.manual_seed(0)
shape = dict(
    sample_size=32,
    num_layers=BLOCKS,
    num_attention_heads=6,
    attention_head_dim=64,
    cross_attention_dim=384,
    caption_channels=256,
    in_channels=4,
    out_channels=8,
    patch_size=2,
    use_additional_conditions=False,
)
transformer = PixArtTransformer2DModel(**shape).eval()

# %% [markdown]
# ## The loop that it lives in
#
# Start from noise; at each step the transformer says which part of it is noise, and the scheduler takes some of that
# off. A pipeline does the same, with a text encoder before and an image decoder after.

# %%
scheduler = DDIMScheduler(num_train_timesteps=1000)


@torch.no_grad()
def denoise(transformer, captions, seed, steps=STEPS):
    """captions (B, T, 256): what a text encoder would give. -> latents (B, 4, 32, 32)."""
    scheduler.set_timesteps(steps)
    latents = torch.randn(len(captions), 4, 32, 32, generator=torch.Generator().manual_seed(seed))
    for step in scheduler.timesteps:
        noise = transformer(
            hidden_states=latents,
            encoder_hidden_states=captions,
            timestep=step.expand(len(captions)),
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        ).sample[:, :4]
        latents = scheduler.step(noise, step, latents).prev_sample
    return latents


captions = torch.randn(IMAGES, 16, 256)
expected = denoise(transformer, captions, seed=1)

# %% [markdown]
# ## The plan
#
# Modulation layers (`adaln_single`), embedders and the last projection stay in float: they run once per image, or
# everything passes through them. The shipped recipe knows their names in the common families of models.

# %%
quantizer = Quantizer(transformer)
print(quantizer.plan("w4a8_svd"))

# %% [markdown]
# ## Calibrate on the loop itself
#
# Activations change from step to step: early ones are of noise, late ones of images. So calibration has to see all of
# them. Give `quantize` a function that runs the model as it is used, with captions that are not those we measure on.

# %%
others = torch.randn(IMAGES, 16, 256)
transformer = quantizer.quantize("w4a8_svd", calibration=lambda model: denoise(model, others, seed=2), progress=False)
print(quantizer.report)

# %% [markdown]
# ## How far off is the image?
#
# Latents from the same noise and captions, by both. Errors add up over the steps, so look at the end of the loop and
# not at one call.

# %%
latents = denoise(transformer, captions, seed=1)
error = ((latents - expected).norm() / expected.norm()).item()
print(f"{STEPS} steps: {100 * error:.1f} % off")
assert error < 0.15

# %% [markdown]
# ## Other recipes, side by side
#
# Mind which layers a recipe takes. `w8a16` rounds no activation to int8, and comes after `w8a8` all the same: it
# quantizes every linear layer, while `w8a8` leaves modulations, embedders and the last layer in float as the others do.

# %%
results = {"w4a8_svd": error}
for recipe in ("w8a16", "w8a8", "w4a4_svd"):
    torch.manual_seed(0)
    other = Quantizer(PixArtTransformer2DModel(**shape).eval())
    other = other.quantize(recipe, calibration=lambda model: denoise(model, others, seed=2), progress=False)
    latents = denoise(other, captions, seed=1)
    results[recipe] = ((latents - expected).norm() / expected.norm()).item()
for recipe, error in sorted(results.items(), key=lambda item: item[1]):
    print(f"{recipe:10} {100 * error:5.1f} %")
assert results["w4a8_svd"] < results["w4a4_svd"]

# %% [markdown]
# ## Save and load

# %%
folder = tempfile.mkdtemp()
save(transformer, folder)
again = load(folder, model=PixArtTransformer2DModel(**shape))
assert torch.equal(denoise(again, captions, seed=1), denoise(transformer, captions, seed=1))
