"""The pure functions that quantize() composes."""

import time

import pytest
import torch

from qgraft.kernels.reference import rotate_groups
from qgraft.layers import Stats
from qgraft.layers.algorithms.alternation import alternate
from qgraft.layers.algorithms.gptq import DAMPING, GPTQError, gptq_int4
from qgraft.layers.algorithms.lowrank import low_rank, randomized_svd
from qgraft.layers.algorithms.rounding import (
    quantize_rows_int8,
    round_int4,
    round_to_groups,
    search_group_ranges,
    search_group_steps,
    two_level_ranges,
    two_level_scales,
)
from qgraft.layers.algorithms.signs import random_signs, search_signs
from qgraft.layers.algorithms.smoothing import search_alpha, smooth_by_activations, smooth_by_weights


def spectrum_matrix(n: int, k: int, decay: float) -> torch.Tensor:
    u = torch.linalg.qr(torch.randn(n, min(n, k))).Q
    v = torch.linalg.qr(torch.randn(k, min(n, k))).Q
    return u * (torch.arange(1, min(n, k) + 1) ** -decay) @ v.t()


@pytest.mark.parametrize("decay", [0.0, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("n, k", [(300, 200), (128, 400)])
def test_randomized_svd_leaves_a_residual_within_two_parts_in_a_thousand(n, k, decay):
    weight = spectrum_matrix(n, k, decay)
    residual = {}
    for solver in ("randomized", "exact"):
        up, down = low_rank(weight, 32, solver)
        assert up.shape == (n, 32) and down.shape == (32, k)
        residual[solver] = (weight - up @ down).norm()
    assert residual["exact"] * 0.9999 <= residual["randomized"] <= residual["exact"] * 1.002


def test_randomized_svd_gives_the_same_answer_twice_and_leaves_the_global_generator_alone():
    weight = torch.randn(60, 50)
    state = torch.get_rng_state()
    first, second = randomized_svd(weight, 8), randomized_svd(weight, 8)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(state, torch.get_rng_state())


def test_randomized_svd_of_a_large_layer_takes_seconds_not_minutes():
    weight = torch.randn(4096, 4096)
    start = time.perf_counter()
    low_rank(weight, 32)
    assert time.perf_counter() - start < 20  # about a second on two quiet cores; the full SVD takes minutes


def test_a_full_rank_split_is_exact():
    weight = torch.randn(40, 24)
    for solver in ("randomized", "exact"):
        up, down = low_rank(weight, 24, solver)
        torch.testing.assert_close(up @ down, weight, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_int8_rows_are_as_accurate_as_their_step_allows(dtype):
    weight = (torch.randn(50, 301) * 0.05).to(dtype)
    codes, scale = quantize_rows_int8(weight)
    assert codes.dtype is torch.int8 and codes.min() >= -127 and scale.dtype is torch.float32
    inside = codes.abs() < 127
    error = (codes.float() * scale[:, None] - weight.float()).abs()
    assert (error <= 0.5001 * scale[:, None])[inside].all()


def test_searched_group_steps_beat_absmax_steps():
    weight = torch.randn(40, 256)
    steps = search_group_steps(weight, 64)
    top = weight.unflatten(1, (-1, 64)).abs().amax(-1) / 7

    def error(s):
        wide = s.repeat_interleave(64, 1)
        return (round_int4(weight, wide) * wide - weight).square().sum()

    assert steps.shape == (40, 4) and error(steps) < 0.97 * error(top)


@pytest.mark.parametrize("spread", [0.1, 1.0, 3.0])
def test_two_level_integers_are_the_best_of_all_sixteen_or_nearly(spread):
    weight = (torch.randn(24, 8, 64) * (spread * torch.randn(24, 8, 1)).exp()).flatten(1)
    scale, integer = two_level_scales(weight, 64)
    assert integer.dtype is torch.int8 and integer.min() >= 1 and integer.max() <= 16

    def error(i):
        step = (scale[:, None] * i).repeat_interleave(64, 1)
        return (round_int4(weight, step) * step - weight).square().unflatten(1, (-1, 64)).sum(-1)

    best = torch.stack([error(torch.full_like(integer, i)) for i in range(1, 17)]).amin(0)
    assert error(integer).sum() < 1.03 * best.sum()


@pytest.mark.parametrize("spread", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("shift", [0.0, 1.0, 100.0])
def test_two_level_ranges_fit_an_int8_and_are_near_the_float_ones(spread, shift):
    weight = torch.randn(24, 8, 64) + shift * torch.randn(24, 8, 1)
    weight = (weight * (spread * torch.randn(24, 8, 1)).exp()).flatten(1)
    weight[0], weight[1, :64], weight[2, 64:] = 0, 7, 0
    scale, integer, zero = two_level_ranges(weight, 64)
    assert integer.dtype is zero.dtype is torch.int8 and (scale > 0).all()
    assert integer.min() >= 1 and integer.max() <= 16 and zero.min() >= -8 and zero.max() <= 7
    assert (integer * (7 - zero.int())).max() <= 127 and (integer * (zero.int() + 8)).max() <= 128

    def error(steps, zero):
        wide, center = steps.repeat_interleave(64, 1), zero.repeat_interleave(64, 1)
        return ((round_int4(weight, wide, center) - center) * wide - weight).square().sum(1)

    two_level, floats = error(scale[:, None] * integer, zero), error(*search_group_ranges(weight, 64))
    assert two_level[0] == 0 and (spread or shift or two_level.sum() < 1.1 * floats.sum())
    plain_scale, plain = two_level_scales(weight, 64)
    symmetric = error(plain_scale[:, None] * plain, torch.zeros_like(zero)).sum()
    assert spread or two_level.sum() < 0.95 * symmetric


def test_two_level_scales_cost_a_few_percent_over_float_ones():
    weight = torch.randn(64, 1024)
    steps = search_group_steps(weight, 64)
    scale, integer = two_level_scales(weight, 64)

    def error(s):
        wide = s.repeat_interleave(64, 1)
        return (round_int4(weight, wide) * wide - weight).norm()

    assert error(scale[:, None] * integer) < 1.04 * error(steps)


def test_gptq_on_white_inputs_is_rounding_to_nearest():
    weight = torch.randn(30, 128)
    steps = search_group_steps(weight, 64)
    codes = gptq_int4(weight, steps, torch.eye(128), 64)
    assert torch.equal(codes.float(), round_int4(weight, steps.repeat_interleave(64, 1)))


def test_gptq_equals_the_textbook_column_loop():
    torch.set_default_dtype(torch.float64)
    try:
        k, n = 192, 20
        x = torch.randn(500, k) @ torch.randn(k, k) * 0.1
        weight, moment = torch.randn(n, k), x.t() @ x / 500
        steps = search_group_steps(weight, 64).double()
        fast = gptq_int4(weight.float(), steps.float(), moment.float(), 64)
        order = torch.argsort(moment.float().diagonal(), descending=True)
        damped = moment + DAMPING * moment.diagonal().mean() * torch.eye(k)
        inverse = torch.linalg.inv(damped[order][:, order])
        todo, codes = weight[:, order].clone(), torch.empty(n, k)
        for j in range(k):
            step = steps[:, order[j] // 64]
            codes[:, j] = (todo[:, j] / step).round().clamp(-8, 7)
            error = (todo[:, j] - codes[:, j] * step) / inverse[0, 0]
            todo[:, j + 1 :] -= error[:, None] * inverse[0, 1:]
            inverse = (inverse - inverse[:, :1] @ inverse[:1] / inverse[0, 0])[1:, 1:]
        assert (fast[:, order].double() == codes).double().mean() > 0.97  # float32 against float64, ties and all
    finally:
        torch.set_default_dtype(torch.float32)


def test_gptq_copes_with_few_tokens_and_says_when_it_cannot():
    weight = torch.randn(10, 128)
    steps = search_group_steps(weight, 64)
    x = torch.randn(3, 128)
    assert gptq_int4(weight, steps, x.t() @ x, 64).abs().max() <= 8
    with pytest.raises(GPTQError, match="calibration"):
        gptq_int4(weight, steps, torch.full((128, 128), float("nan")), 64)


def test_smooth_factors_balance_and_survive_dead_channels():
    weight, top = torch.randn(32, 64), torch.rand(64) + 0.1
    top[3], weight[:, 7] = 0.0, 0.0
    for factor in (smooth_by_activations(weight, top, 0.5), smooth_by_weights(weight, 0.5)):
        assert factor.shape == (64,) and torch.isfinite(factor).all() and (factor > 0).all()
        assert factor[7] == 1 and abs(factor.log().sum()) < 1e-3
    half = smooth_by_activations(weight, top, 0.5)
    live = (top > 0) & (weight.abs().amax(0) > 0)
    ratio = (top / half) / (weight * half).abs().amax(0)
    assert ratio[live].max() / ratio[live].min() < 1.001  # alpha 0.5 makes both sides equally wide, up to a constant


def test_stats_are_those_of_all_tokens():
    batches = [torch.randn(2, 7, 24), torch.randn(40, 24).bfloat16(), torch.randn(24), torch.empty(0, 24)]
    stats = Stats()
    for batch in batches:
        stats.update(batch)
    tokens = torch.cat([b.reshape(-1, 24).float() for b in batches])
    assert stats.tokens == len(tokens)
    torch.testing.assert_close(stats.absmax, tokens.abs().amax(0))
    torch.testing.assert_close(stats.second_moment, tokens.t() @ tokens / len(tokens))
    assert all((row == tokens).all(1).any() for row in stats.sample)
    with pytest.raises(ValueError, match="NaN"):
        stats.update(torch.full((2, 24), float("inf")))


def test_the_search_for_alpha_finds_the_least_error_on_a_grid_of_twentieths():
    for best in (0.0, 0.3, 0.45, 0.95, 1.0):
        asked = []

        def error(alpha, best=best, asked=asked):
            asked.append(alpha)
            return abs(alpha - best)

        assert search_alpha(error) == best
        assert len(asked) <= 13


def test_alternation_starts_at_the_plain_branch_and_lowers_the_rounding_error():
    weight = torch.randn(200, 192) + torch.randn(200, 40) @ torch.randn(40, 192) * 0.3

    def lost(up, down):
        rest = weight - up @ down
        return (rest - round_to_groups(rest, 64)).square().sum()

    plain, error = alternate(weight, 16, "randomized", lambda rest: round_to_groups(rest, 64), 0), []
    assert all(torch.equal(a, b) for a, b in zip(plain, low_rank(weight, 16), strict=True))
    for turns in (0, 2, 8):
        error.append(lost(*alternate(weight, 16, "exact", lambda rest: round_to_groups(rest, 64), turns)))
    assert error[2] < error[1] < 0.97 * error[0]


def test_alternation_stops_when_the_error_grows_and_keeps_the_best():
    weight, asked = torch.randn(60, 64), []

    def rounded(rest):  # the third turn is made bad, the fourth would be good
        asked.append(rest)
        return rest - rest / len(asked) if len(asked) != 3 else torch.zeros_like(rest)

    up, down = alternate(weight, 8, "exact", rounded, 10)
    assert len(asked) == 3
    torch.testing.assert_close(weight - up @ down, asked[1])


def test_alternation_copes_with_a_weight_of_zeros_and_with_full_rank():
    up, down = alternate(torch.zeros(40, 64), 4, "randomized", lambda rest: round_to_groups(rest, 64), 4)
    assert not (up @ down).any()
    weight = torch.randn(20, 64)
    up, down = alternate(weight, 20, "exact", lambda rest: round_to_groups(rest, 64), 4)
    torch.testing.assert_close(up @ down, weight, rtol=1e-3, atol=1e-3)


def test_a_rough_rounding_to_groups_is_near_the_searched_one():
    weight = torch.randn(700, 256) * torch.rand(700, 1)
    wide = search_group_steps(weight, 64).repeat_interleave(64, 1)
    searched = (round_int4(weight, wide) * wide - weight).norm()
    assert searched <= (round_to_groups(weight, 64) - weight).norm() < 1.1 * searched
    wide, zero = (part.repeat_interleave(64, 1) for part in search_group_ranges(weight, 64))
    searched = ((round_int4(weight, wide, zero) - zero) * wide - weight).norm()
    assert searched <= (round_to_groups(weight, 64, zero_point=True) - weight).norm() < 1.1 * searched


def test_searched_signs_spread_a_common_mean_and_come_back_the_same():
    inputs, weight = torch.randn(200, 192) + 2, torch.randn(50, 192)
    inputs[:, 64:128] -= 2
    signs = search_signs(inputs, weight, 64)
    assert torch.equal(signs.abs(), torch.ones(192)) and torch.equal(signs, search_signs(inputs, weight, 64))

    def extremes(d):
        return rotate_groups(inputs * d, 64).unflatten(1, (-1, 64)).abs().amax(-1).square().mean(0)

    plain, chosen, random = (extremes(d) for d in (torch.ones(192), signs, random_signs(192)))
    assert (chosen[[0, 2]] < 0.25 * plain[[0, 2]]).all() and (chosen[[0, 2]] <= 1.01 * random[[0, 2]]).all()
    assert chosen[1] < 1.03 * plain[1]


def test_random_signs_depend_on_the_seed_alone():
    state = torch.get_rng_state()
    assert torch.equal(random_signs(100), random_signs(100)) and not torch.equal(
        random_signs(100), random_signs(100, 1)
    )
    assert torch.equal(state, torch.get_rng_state())
    assert set(random_signs(100).tolist()) == {-1.0, 1.0}
