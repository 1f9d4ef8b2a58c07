"""Signs for the features of a group before its rotation: which of the equally good rotations does best here.

    x' = (x diag(d)) H,   d in {-1, 1}^K

is as orthogonal as H alone, and costs nothing where x is divided by a smooth_factor anyway: d goes into that. H alone
has a weak spot: its first column adds a whole group up, so that features with a common mean, as after a GELU, make an
outlier of it. Random signs are the randomized Hadamard transform of QuIP# (Tseng et al., arXiv 2402.04396) and
QuaRot (Ashkboos et al., arXiv 2404.00456). How good a random rotation is varies (SpinQuant, Liu et al., arXiv
2405.16406), so each group takes the best of several.
"""

import torch
from torch import Tensor

from ...kernels.reference import rotate_groups
from .rounding import row_chunks

# Signs tried for each group.
TRIES = 32
# What an extreme of a weight counts beside one of an activation: its step is searched, and GPTQ makes up for much.
WEIGHT_SHARE = 0.5


def random_signs(features: int, seed: int = 0) -> Tensor:
    """(K,) float32 of -1 and 1 on the CPU; same seed, same signs."""
    return 2.0 * torch.randint(0, 2, (features,), generator=torch.Generator().manual_seed(seed)) - 1


def search_signs(inputs: Tensor, weight: Tensor, group_size: int) -> Tensor:
    """For each group of features the signs of the least expected rounding noise, of TRIES; the first are all 1.

    inputs (M, Kp) and weight (N, Kp) float32 as they are before the rotation, Kp a multiple of group_size, a power of
    two. A step of either is as large as the extremes of its group, and its noise is multiplied by the energy that the
    other has there. Returns (Kp,) float32 of -1 and 1.
    """
    input_energy, weight_energy = (_in_groups(t, group_size).square().sum(-1).mean(0) for t in (inputs, weight))
    best = torch.ones_like(weight[0])
    least = None
    for seed in range(TRIES):
        signs = random_signs(len(best), seed).to(best) if seed else best
        noise = _extremes(inputs, signs, group_size) * weight_energy
        noise += WEIGHT_SHARE * _extremes(weight, signs, group_size) * input_energy
        if least is None:
            least = noise
            continue
        better = noise < least  # (Kp // G,)
        best = torch.where(better.repeat_interleave(group_size), signs, best)
        least = torch.where(better, noise, least)
    return best


def _in_groups(rows: Tensor, group_size: int) -> Tensor:
    return rows.unflatten(1, (-1, group_size))


def _extremes(rows: Tensor, signs: Tensor, group_size: int) -> Tensor:
    """The mean square of the largest magnitude in each group, (M, Kp) -> (Kp // G,)."""
    total = torch.zeros(rows.shape[1] // group_size, device=rows.device)
    for part in row_chunks(*rows.shape):
        turned = rotate_groups(rows[part] * signs, group_size)
        total += _in_groups(turned, group_size).abs().amax(-1).square().sum(0)
    return total / len(rows)
