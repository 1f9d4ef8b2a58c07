"""A vision transformer and a diffusion transformer from a seed, with the outliers that trained ones have.

No weights of either come in a pip package. Gaussian weights and inputs would flatter every quantizer, because what
makes trained models hard is missing: weights with heavy tails, rows of different size, and a few channels of the
hidden state that are many times larger than the others, always the same ones (Dettmers et al. 2022, "LLM.int8()";
Darcet et al. 2023 for vision transformers; Li et al. 2024, "SVDQuant", for diffusion). `_roughen` puts them in.
The kinds are real, the degrees are a choice: the numbers compare schemes and say nothing about any trained model.
"""

import torch
from torch import Tensor, nn

TAILS = 5  # degrees of freedom of Student's t that the weights follow; 30 would be as good as Gaussian
ROWS = 0.3  # standard deviation of the logarithm of a row's size
LOUD = 0.01  # share of the channels that are outliers, at least two
LOUDNESS = (8.0, 20.0)  # how many times as large they are


def vit(seed: int = 0) -> nn.Module:
    """transformers' ViTModel, 6 layers of width 384 (ViT-S, half as deep), images (B, 3, 224, 224)."""
    from transformers import ViTConfig, ViTModel

    with _seeded(seed):
        config = ViTConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=6, intermediate_size=1536)
        model = ViTModel(config, add_pooling_layer=False).eval()
        _roughen(model)
        for norm in (m for m in model.modules() if isinstance(m, nn.LayerNorm)):
            norm.weight.data = _loud(norm.weight.data)
    return model


def dit(seed: int = 0) -> nn.Module:
    """diffusers' PixArtTransformer2DModel, 6 layers of width 384, latents (B, 4, 32, 32), 77 tokens of text."""
    from diffusers import PixArtTransformer2DModel

    with _seeded(seed):
        model = PixArtTransformer2DModel(
            num_attention_heads=6, attention_head_dim=64, num_layers=6, sample_size=32, in_channels=4, out_channels=8,
            cross_attention_dim=384, caption_channels=256, use_additional_conditions=False,
        ).eval()  # fmt: skip
        _roughen(model)
        # Its norms have no weight of their own: rows 1 and 4 of the table scale what attention and the MLP read.
        for block in model.transformer_blocks:
            for row in (1, 4):
                table = block.scale_shift_table.data
                table[row] = _loud(1 + table[row]) - 1
    return model


def images(count: int, seed: int) -> list[dict[str, Tensor]]:
    """Batches of one image: noise on every scale, which like a photograph has most of its energy in the coarse ones."""
    random = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(count):
        image = torch.zeros(1, 3, 224, 224)
        for side in (4, 14, 56, 224):
            noise = torch.randn(1, 3, side, side, generator=random) * (4 / side) ** 0.5
            image += nn.functional.interpolate(noise, size=224, mode="bilinear")
        batches.append({"pixel_values": image})
    return batches


def latents(count: int, seed: int) -> list[dict[str, Tensor]]:
    """Batches of one step of denoising: a smooth latent with noise by its time step, and text with loud channels."""
    random = torch.Generator().manual_seed(seed)
    loud = torch.ones(256)
    loud[[17, 101, 200]] = 15.0  # the same in every text, as in T5
    batches = []
    for _ in range(count):
        step = torch.randint(0, 1000, (1,), generator=random)
        signal = (1 - step / 1000) ** 0.5
        picture = nn.functional.interpolate(torch.randn(1, 4, 8, 8, generator=random), size=32, mode="bilinear")
        noisy = signal * picture + (1 - signal**2) ** 0.5 * torch.randn(1, 4, 32, 32, generator=random)
        text = torch.randn(1, 77, 256, generator=random) * loud
        batches.append({"hidden_states": noisy, "encoder_hidden_states": text, "timestep": step})
    return batches


class _seeded:
    """The global generator, which models are initialized from, at a seed; afterwards as it was."""

    def __init__(self, seed: int):
        self.seed = seed

    def __enter__(self) -> None:
        self.state = torch.get_rng_state()
        torch.manual_seed(self.seed)

    def __exit__(self, *_: object) -> None:
        torch.set_rng_state(self.state)


def _roughen(model: nn.Module) -> None:
    """Weights of linear layers: Student's t with the usual variance of 1/K, rows of log-normal size."""
    t = torch.distributions.StudentT(torch.tensor(float(TAILS)))
    for linear in (m for m in model.modules() if isinstance(m, nn.Linear)):
        n, k = linear.weight.shape
        unit = t.sample((n, k)) / (TAILS / (TAILS - 2)) ** 0.5
        linear.weight.data = unit * k**-0.5 * (ROWS * torch.randn(n, 1)).exp()


def _loud(gains: Tensor) -> Tensor:
    """Gains of channels (C,), a few of them made many times larger."""
    gains = gains.clone()
    low, high = LOUDNESS
    chosen = torch.randperm(len(gains))[: max(2, int(LOUD * len(gains)))]
    gains[chosen] *= low + (high - low) * torch.rand(len(chosen))
    return gains
