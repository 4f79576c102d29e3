"""Noise is what it is said to be: by seed, by moments, and by distribution."""

from __future__ import annotations

import math
import sys
from unittest.mock import patch

import pytest
import torch
from for_each import for_each
from scipy import stats

from hf_parcor.functional import conductance_drift, gaussian_noise, random_signs, relative, uniform_noise

NOISES = [gaussian_noise, uniform_noise]
SIZE = 200_000


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@for_each("noise", NOISES)
def test_a_seed_means_one_vector(noise, same_bits) -> None:
    like = [torch.zeros(30, 7), torch.zeros(5)]
    first = noise(like, 0.1, seeded(3))
    assert same_bits(first, noise([torch.randn_like(part) for part in like], 0.1, seeded(3)))
    assert not same_bits(first, noise(like, 0.1, seeded(4)))
    torch.manual_seed(3)
    from_global = noise(like, 0.1)
    torch.manual_seed(3)
    assert same_bits(from_global, noise(like, 0.1))


@for_each("noise", NOISES)
def test_a_given_generator_leaves_the_global_one_alone(noise) -> None:
    before = torch.get_rng_state()
    noise([torch.zeros(10)], 0.1, seeded(0))
    assert torch.equal(torch.get_rng_state(), before)


@for_each("noise", NOISES)
def test_a_larger_scale_is_the_same_direction(noise) -> None:
    like = [torch.zeros(100)]
    torch.testing.assert_close(noise(like, 0.8, seeded(0))[0], 8 * noise(like, 0.1, seeded(0))[0])


@pytest.mark.slow
@for_each("dtype", [torch.float32, torch.float64])
@for_each(
    ("noise", "distribution"), [(gaussian_noise, stats.norm(0, 0.02)), (uniform_noise, stats.uniform(-0.02, 0.04))]
)
def test_distribution(noise, distribution, dtype: torch.dtype) -> None:
    like = [torch.zeros(SIZE // 2, dtype=dtype), torch.zeros(SIZE // 4, 2, dtype=dtype)]
    drawn = torch.cat([part.reshape(-1) for part in noise(like, 0.02, seeded(0))]).double().numpy()
    deviation = distribution.std()
    assert stats.kstest(drawn, distribution.cdf).pvalue > 1e-3
    assert abs(drawn.mean()) < 5 * deviation / math.sqrt(SIZE)
    assert drawn.std() == pytest.approx(deviation, rel=0.01)
    assert stats.kurtosis(drawn) == pytest.approx(float(distribution.stats("k")), abs=0.05)
    assert abs(stats.pearsonr(drawn[:-1], drawn[1:]).statistic) < 5 / math.sqrt(SIZE)  # neighbours are independent
    assert len(set(drawn.tolist())) > 0.95 * SIZE


@for_each("noise", NOISES)
def test_tensors_are_independent(noise) -> None:
    first, second = noise([torch.zeros(10_000), torch.zeros(10_000)], 1.0, seeded(0))
    assert abs(stats.pearsonr(first.numpy(), second.numpy()).statistic) < 0.05


def test_uniform_stays_within_its_bound() -> None:
    (drawn,) = uniform_noise([torch.zeros(SIZE)], 0.5, seeded(0))
    assert float(drawn.abs().max()) <= 0.5
    assert float(drawn.max()) > 0.499
    assert float(drawn.min()) < -0.499


@for_each("noise", NOISES)
@for_each(
    ("dtype", "drawn"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
)
def test_shape_device_and_precision(noise, dtype: torch.dtype, drawn: torch.dtype) -> None:
    like = [
        torch.full((3, 0, 2), math.nan, dtype=dtype),
        torch.ones(4, 6, dtype=dtype).t(),
        torch.tensor(1.0, dtype=dtype),
    ]
    made = noise(like, 1.0, seeded(0))
    assert [(part.shape, part.device, part.dtype) for part in made] == [
        (part.shape, part.device, drawn) for part in like
    ]


@for_each("noise", NOISES)
def test_low_precision_gets_the_noise_of_float32(noise, same_bits) -> None:
    assert same_bits(
        noise([torch.zeros(50, dtype=torch.bfloat16)], 1.0, seeded(0)), noise([torch.zeros(50)], 1.0, seeded(0))
    )


@for_each("noise", NOISES)
def test_drawn_on_the_generators_device_and_moved_to_the_tensors(noise) -> None:
    (drawn,) = noise([torch.empty(4, device="meta")], 1.0, seeded(0))
    assert drawn.device.type == "meta"


@for_each("noise", NOISES)
def test_no_noise(noise) -> None:
    (drawn,) = noise([torch.ones(100)], 0.0, seeded(0))
    assert not drawn.any()
    assert noise([], 1.0) == []


@for_each("noise", NOISES)
def test_parameters_are_only_looked_at(noise) -> None:
    (drawn,) = noise([torch.nn.Parameter(torch.ones(3))], 1.0)
    assert not drawn.requires_grad


@for_each(("noise", "name"), [(gaussian_noise, "std"), (uniform_noise, "bound")])
@for_each("size", [-0.1, math.nan, math.inf])
def test_bad_sizes(noise, name: str, size: float) -> None:
    with pytest.raises(ValueError, match=rf"{name}: expected 0 <= {name} < inf, got"):
        noise([torch.ones(3)], size)
    with pytest.raises(TypeError, match=rf"{name}: .* got None"):
        noise([torch.ones(3)], None)


@for_each("dtype", [torch.float32, torch.float64])
def test_signs_are_fair_coins(dtype, same_bits) -> None:
    like = [torch.zeros(SIZE // 2, dtype=dtype), torch.zeros(SIZE // 4, 2, dtype=dtype)]
    drawn = random_signs(like, seeded(0))
    assert same_bits(drawn, random_signs(like, seeded(0)))
    assert not same_bits(drawn, random_signs(like, seeded(1)))
    assert [part.dtype for part in drawn] == [dtype, dtype]
    joined = torch.cat([part.reshape(-1) for part in drawn]).double().numpy()
    assert set(joined.tolist()) == {-1.0, 1.0}
    assert abs(joined.mean()) < 5 / math.sqrt(SIZE)
    assert abs(stats.pearsonr(joined[:-1], joined[1:]).statistic) < 5 / math.sqrt(SIZE)


@for_each(
    ("to", "magnitudes"),
    [
        (None, [[1.0, 1, 1], [1, 1, 1]]),
        ("tensor", [[4.0, 4, 4], [4, 4, 4]]),
        ("channel", [[4.0, 4, 4], [1, 1, 1]]),
        ("weight", [[1.0, 4, 2], [0, 1, 0.5]]),
    ],
)
@for_each("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_relative_noise_is_noise_times_a_magnitude(to, magnitudes, dtype: torch.dtype, same_bits) -> None:
    weights = torch.tensor([[1, -4, 2], [0, 1, -0.5]], dtype=dtype)
    (noise,) = gaussian_noise([weights], 0.1, seeded(0))
    expected = noise * torch.tensor(magnitudes, dtype=noise.dtype)
    assert same_bits([relative(noise.clone(), weights, to)], [expected])


def test_relative_noise_of_other_shapes() -> None:
    kernels = torch.randn(3, 2, 2)
    found = relative(torch.ones(3, 2, 2), kernels, "channel")
    assert torch.equal(found[:, 0, 0], kernels.abs().flatten(1).amax(1))
    vector = torch.randn(5)
    assert torch.equal(relative(torch.ones(5), vector, "channel"), vector.abs())
    assert relative(torch.empty(0, 2), torch.empty(0, 2), "tensor").shape == (0, 2)
    with pytest.raises(ValueError, match=r"relative_to: .*channel.*'row'"):
        relative(torch.ones(5), vector, "row")


def test_multiplicative_noise_is_log_normal_to_first_order() -> None:
    weights, std = torch.randn(SIZE).abs(), 1e-3
    (noise,) = gaussian_noise([weights], std, seeded(0))
    log_normal = weights * noise.exp()
    torch.testing.assert_close(
        weights + relative(noise.clone(), weights, "weight"), log_normal, rtol=20 * std**2, atol=0
    )


@for_each("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_exponents_of_drift(dtype: torch.dtype) -> None:
    weights = torch.randn(SIZE).add(3).to(dtype)
    (found,) = conductance_drift([weights], 100.0, 0.05, 0.01, seeded(0))
    assert found.dtype == dtype
    if dtype != torch.bfloat16:
        exponents = -torch.log(found.double() / weights.double()).div(math.log(100.0)).numpy()
        assert stats.kstest(exponents, stats.norm(0.05, 0.01).cdf).pvalue > 1e-3
    (folded,) = conductance_drift([torch.ones(1000)], 100.0, 0.0, 0.01, seeded(0))
    assert float(folded.max()) <= 1  # no conductance grows
    (kept,) = conductance_drift([weights], 1.0, 0.05, 0.01, seeded(0))
    assert torch.equal(kept, weights)


@for_each("inference", [False, True])
@for_each("threads", [2, 5])
@for_each(
    ("draw", "one_by_one"),
    [
        (gaussian_noise, lambda noise, source: noise.normal_(generator=source)),
        (uniform_noise, lambda noise, source: noise.uniform_(-1, 1, generator=source)),
    ],
)
def test_in_threads_it_is_what_one_draws(draw, one_by_one, threads, inference) -> None:
    """And the generator is left where one thread leaves it, the global one too."""
    sizes = [5, 31, 64, 65, 127, (9, 15), 1000, 2049, 0]
    like = [torch.empty(size) for size in sizes] + [torch.empty(300, dtype=torch.float64)]
    alone, ours = seeded(3), seeded(3)
    expected = [one_by_one(torch.empty_like(part), alone).mul_(0.1) for part in like]
    module = sys.modules["hf_parcor.functional.noise"]
    with (
        patch.object(module, "_BLOCK", 32),
        patch.object(torch, "get_num_threads", lambda: threads),
        patch.object(module, "_fill", side_effect=module._fill) as beside,
        torch.inference_mode(inference),
    ):
        found = draw(like, 0.1, ours)
        torch.manual_seed(3)
        of_global = draw(like, 0.1)
    blocks = sum(entries // 32 - 1 for entries in (part.numel() for part in like[:-1]) if entries >= 64)
    assert beside.call_count == 2 * blocks, "the last block of a tensor is drawn where the others are handed out"
    for drawn in (found, of_global):
        assert all(torch.equal(one, other) for one, other in zip(drawn, expected, strict=True))
    assert torch.equal(alone.get_state(), ours.get_state())
    assert torch.equal(torch.randn(40), torch.randn(40, generator=alone))
