"""Vectors spread over ranks: every function gives what it gives for the same tensors in one process."""

from __future__ import annotations

import math

import pytest
import torch
from another_device.device import cases_here, rank_device
from torch import distributed
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from hf_parcor import (
    CorruptionConstraint,
    GaussianNoise,
    Interpolation,
    RandomCorruption,
    UniformNoise,
    WorstBitFlips,
    corrupted,
)
from hf_parcor.defenses import DefendedStep
from hf_parcor.functional import (
    conductance_drift,
    constrained_maximum,
    constrained_maximum_value,
    flip_random_bits,
    gaussian_noise,
    inner_product,
    keep_top_n,
    max_magnitude,
    project,
    project_,
    prune,
    prune_together,
    quantize,
    quantize_to_float,
    relative,
    uniform_noise,
    vector_norm,
)
from hf_parcor.injection import Injection

pytestmark = pytest.mark.slow  # ranks are processes of their own

# On 2 ranks and more: even, uneven, empty on the last rank, without entries, and a tensor that each rank has whole.
SHAPES = [(8, 3), (7, 2), (1, 5), (0, 4), (3,), (3, 4)]
WHOLE = 4
LAYOUTS = {  # how many ranks, the mesh, and what each of its dimensions does
    "one dimension": (3, (3,), [Shard(0)]),
    "one rank": (1, (1,), [Shard(0)]),
    "replicas of shards": (4, (2, 2), [Replicate(), Shard(0)]),
    "two dimensions": (4, (2, 2), [Shard(0), Shard(0)]),
    "replicas": (2, (2,), [Replicate()]),
}


def vectors():
    """Return vectors by name: ordinary, with ties everywhere, out of range for squares, zero, not finite."""
    generator = torch.Generator().manual_seed(3)
    ordinary = [torch.randn(shape, generator=generator).to(rank_device()) for shape in SHAPES]
    tied = [torch.randint(-2, 3, shape, generator=generator).float().to(rank_device()) for shape in SHAPES]
    with_nan, with_infinity = ([part.clone() for part in ordinary] for _ in range(2))
    with_nan[0][7, 1], with_infinity[1][0, 0] = math.nan, -math.inf
    return {
        "ordinary": ordinary,
        "tied": tied,
        "huge": [part * 1e30 for part in ordinary],
        "tiny": [part * 1e-38 for part in ordinary],
        "zero": [part * 0 for part in ordinary],
        "NaN": with_nan,
        "infinite": with_infinity,
        "half": [part.bfloat16() for part in ordinary],
        "mixed": [part.double() if index % 2 else part for index, part in enumerate(ordinary)],
    }


def spread(tensors, mesh, placements):
    return [
        part.clone() if index == WHOLE else distribute_tensor(part, mesh, placements)
        for index, part in enumerate(tensors)
    ]


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def in_step(draw):
    """Return a function of the tensors and a generator as one of the tensors; on shards the others' are off."""

    def function(tensors):
        off = distributed.get_rank() if any(isinstance(tensor, DTensor) for tensor in tensors) else 0
        return draw(tensors, torch.Generator().manual_seed(5 + off))

    return function


def towards_others(tensors):
    """Return the tensors a quarter of the way to others, which every rank has whole."""
    weights = {str(place): tensor for place, tensor in enumerate(tensors)}
    source = torch.Generator().manual_seed(7)
    others = {name: torch.randn(weight.shape, generator=source) for name, weight in weights.items()}
    found = Interpolation(0.25, others)(weights)
    for name, weight in weights.items():
        if isinstance(weight, DTensor):  # others that are spread in the same way stay where they are
            mesh, placements = weight.device_mesh, weight.placements
            alike = {name: distribute_tensor(others[name].to(rank_device()), mesh, placements)}
            again = Interpolation(0.25, alike)({name: weight})[name]
            assert torch.equal(bits_of(whole(again)), bits_of(whole(found[name])))
            with pytest.raises(ValueError, match="of its own"):
                Interpolation(0.25, alike)({name: whole(weight)})
    return list(found.values())


FUNCTIONS = {
    "max_magnitude": max_magnitude,
    "norm 2": vector_norm,
    "norm 3.5": lambda v: vector_norm(v, 3.5),
    "inner product": lambda v: inner_product(v, v),
    "maximum": lambda v: constrained_maximum(v, 2, 0.5),
    "projection": lambda v: project(v, 2, 0.3),
}
EXACT = {  # to the last bit, since what is random is drawn as one process draws it
    "quantized": lambda v: [quantize(tensor, 4) for tensor in v],
    "flipped": in_step(lambda v, source: flip_random_bits(v, count=40, generator=source)),
    "flipped at a rate": in_step(lambda v, source: flip_random_bits(v, "exponent", rate=0.1, generator=source)),
    "flipped codes": in_step(lambda v, source: flip_random_bits(v, count=40, of="int8", generator=source)),
    "pruned together": lambda v: list(prune_together(v, 0.3)),
    "towards others": towards_others,
    "Gaussian": in_step(lambda v, source: gaussian_noise(v, 0.1, source)),
    "uniform": in_step(lambda v, source: uniform_noise(v, 0.1, source)),
}
BY_BLOCKS = {  # to the last bit too
    "quantized, asymmetric": lambda v: [quantize(tensor, 4, symmetric=False) for tensor in v],
    "quantized per channel": lambda v: [quantize(tensor, 4, "channel") for tensor in v],
    "quantized per group": lambda v: [quantize(tensor, 4, tensor.shape[-1], code_range="full") for tensor in v],
    "pruned": lambda v: [prune(tensor, 0.4) for tensor in v],
    "pruned per channel": lambda v: [prune(tensor, 0.4, "channel") for tensor in v],
    "pruned per group": lambda v: [prune(tensor, 0.5, tensor.shape[-1]) for tensor in v],
    "in FP8": lambda v: [quantize_to_float(tensor, "fp8_e4m3") for tensor in v],
    "in FP8 per channel": lambda v: [quantize_to_float(tensor, "fp8_e5m2", "channel") for tensor in v],
    **{
        f"relative to {what}": in_step(
            lambda v, source, what=what: [
                relative(noise, tensor, what) for noise, tensor in zip(gaussian_noise(v, 0.1, source), v, strict=True)
            ]
        )
        for what in ("tensor", "channel", "weight")
    },
    "drifted": in_step(lambda v, source: list(conductance_drift(v, 100.0, 0.05, 0.01, source))),
}
MORE = {
    **{f"pruned together {s}": lambda v, s=s: list(prune_together(v, s)) for s in (0.0, 0.5, 0.9, 1.0)},
    **{f"top {n}": lambda v, n=n: keep_top_n(v, n) for n in (1, 13, 30, 57, 58)},
    **{f"maximum {p}": lambda v, p=p: constrained_maximum(v, p, 0.5, 11) for p in (1, 2, 3.5, math.inf)},
    "value": lambda v: constrained_maximum_value(v, 2, 0.5, 20),
    "inside": lambda v: project(v, 2, 1e6),
    "projection with top n": lambda v: project(v, 2, 0.3, 11),
    "clipped": lambda v: project(v, math.inf, 0.3),
}

NOT_FOR = {"NaN": ("projection",), "infinite": ("projection",)}


def bits_of(tensor):
    return tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.dtype.itemsize])


def as_list(value):
    return value if isinstance(value, list) else [value]


def rounding(tensor, of_sums):
    """Return how far apart results may be: as far as sums in another order, or the neighbours of bfloat16 numbers."""
    return 2.0**-7 if tensor.dtype == torch.bfloat16 else of_sums


def compare_functions(mesh, placements):
    compared = 0
    for kind, tensors in vectors().items():
        functions = {**FUNCTIONS, **(MORE if kind in ("ordinary", "tied") else {})}
        functions |= EXACT if kind in ("ordinary", "NaN", "half", "mixed") else {}
        functions |= BY_BLOCKS if kind in ("ordinary", "half") else {}
        for name, function in functions.items():
            if name in NOT_FOR.get(kind, ()):
                continue
            expected, given = as_list(function(tensors)), spread(tensors, mesh, placements)
            found = as_list(function(given))
            for place, (mine, theirs) in enumerate(zip(found, expected, strict=True)):
                assert (isinstance(mine, DTensor)) == (len(found) > 1 and place != WHOLE)
                case, mine = f"{kind}, {name}, tensor {place}", whole(mine)
                tolerance = {"rtol": rounding(theirs, 2e-6), "atol": 0.0, "equal_nan": True}
                torch.testing.assert_close(mine, theirs, **tolerance, msg=lambda text, case=case: f"{case}: {text}")
                if name.startswith(("top", "pruned")) or name in {**EXACT, **BY_BLOCKS}:
                    assert torch.equal(bits_of(mine), bits_of(theirs)), case
                compared += 1
    return compared


def displace_and_restore(mesh, placements):
    """Return norms and counts of injections into sharded and into whole weights, one beside the other."""
    answers = []
    for kind in ("ordinary", "half"):
        plain = dict(zip("abcdef", vectors()[kind], strict=True))
        sharded = dict(zip("abcdef", spread(list(plain.values()), mesh, placements), strict=True))
        before = {name: whole(weight).clone() for name, weight in sharded.items()}
        with pytest.raises(NotImplementedError, match="sharded"):
            WorstBitFlips(1, search="data-free")(sharded)
        first, second = (dict(zip("abcdef", vectors()[other], strict=True)) for other in ("tied", "ordinary"))
        for p in (2, math.inf):
            seen = []
            for weights, across in ((plain, None), (sharded, mesh)):
                injection = Injection(weights)
                for update in (first, second):
                    here = (
                        update
                        if across is None
                        else dict(zip("abcdef", spread(list(update.values()), mesh, placements), strict=True))
                    )
                    injection.displace(here, lambda a, p=p: project_(a, p, 0.7, 20))
                moved, size = {name: whole(weight).clone() for name, weight in weights.items()}, injection.size()
                seen.append((moved, size, injection.withdraw(p)))
            (moved, size, norm), (moved_here, size_here, norm_here) = seen
            for name, weight in moved.items():
                torch.testing.assert_close(moved_here[name], weight, rtol=rounding(weight, 1e-6), atol=1e-7)
                assert torch.equal(whole(sharded[name]), before[name])
            answers.append((size.changed, size_here.changed))
            numbers = [(size.norm, size_here.norm), (norm.asked, norm_here.asked), (norm.realised, norm_here.realised)]
            assert all(float(here) == pytest.approx(float(there), rel=1e-5) for there, here in numbers)
    return answers


def draw_and_refuse(mesh, placements):
    torch.manual_seed(distributed.get_rank())  # ranks may be out of step
    weights = {
        "sharded": distribute_tensor(torch.zeros(2000, 3, device=rank_device()), mesh, placements),
        "whole": torch.zeros(1000, device=rank_device()),
    }
    drawn = {}
    for corruption in (GaussianNoise(0.1), UniformNoise(0.1), RandomCorruption(CorruptionConstraint(epsilon=0.1))):
        noise = corruption(weights)
        with corrupted(weights, noise):
            drawn[str(corruption)] = [whole(weight).clone() for weight in weights.values()]
            assert all(torch.equal(whole(noise[name]), whole(weight)) for name, weight in weights.items())
        assert not any(whole(weight).any() for weight in weights.values())
    with pytest.raises(ValueError, match="sharded over the ranks as its weight is"):
        Injection(weights).displace({"sharded": torch.zeros(2000, 3, device=rank_device())})
    with pytest.raises(TypeError, match="expected a tensor that is sharded or replicated"):
        max_magnitude([DTensor.from_local(torch.ones(2, device=rank_device()), mesh, [Partial()] * mesh.ndim)])
    columns = distribute_tensor(torch.randn(4, 64, device=rank_device()), mesh, [Shard(1)] * mesh.ndim)
    for cut in (
        lambda: quantize(columns, 4, "channel"),
        lambda: quantize(columns, 4, 4),
        lambda: quantize_to_float(columns, "nvfp4"),
        lambda: quantize_to_float(columns, "nf4"),
        lambda: quantize_to_float(distribute_tensor(torch.randn(8, 8, device=rank_device()), mesh, placements), "nf4"),
        lambda: relative(torch.zeros_like(columns), columns, "channel"),
    ):
        with pytest.raises(NotImplementedError, match="shard"):
            cut()
    for held in ("nvfp4", "mxfp4", "nf4"):
        weights = torch.randn(6, 64, generator=torch.Generator().manual_seed(1)).to(rank_device())
        found = quantize_to_float(distribute_tensor(weights, mesh, placements), held)
        assert torch.equal(whole(found), quantize_to_float(weights, held))
    return drawn


def draw_numbers(mesh, placements):
    torch.manual_seed(distributed.get_rank())  # as dropout moves generators apart
    weights = {"sharded": distribute_tensor(torch.zeros(8, 3, device=rank_device()), mesh, placements)}
    step = DefendedStep(weights, None, 1, [])
    return [step.draw(1000) for _ in range(8)]


CHECKS = {
    draw_numbers: ["one dimension", "replicas of shards"],
    compare_functions: list(LAYOUTS),
    displace_and_restore: ["one dimension", "replicas of shards"],
    draw_and_refuse: ["replicas of shards"],
}


def every_check():
    found = {}
    for layout in cases_here(list(LAYOUTS), ["replicas of shards"]):
        ranks, shape, placements = LAYOUTS[layout]
        mesh = DeviceMesh(rank_device().type, torch.arange(ranks).reshape(shape))
        for check, layouts in CHECKS.items():
            if layout in layouts and distributed.get_rank() < ranks:
                found[check.__name__, layout] = check(mesh, placements)
    return found


@pytest.fixture(scope="module")
def checked(run_on_ranks, device_of_ranks):
    return run_on_ranks(every_check, 4, device=device_of_ranks)


def by_layout(checked, check):
    """Return what a check found on each of its ranks, by layout; on the CPU in all of its layouts."""
    layouts = [layout for layout in CHECKS[check] if (check.__name__, layout) in checked[0]]
    assert "replicas of shards" in layouts
    return {layout: [found[check.__name__, layout] for found in checked[: LAYOUTS[layout][0]]] for layout in layouts}


@pytest.mark.slow
def test_functions_equal_those_of_one_process(checked):
    assert all(min(compared) > 200 for compared in by_layout(checked, compare_functions).values())


def test_injections_equal_those_of_one_process(checked):
    for layout, ranks in by_layout(checked, displace_and_restore).items():
        for answers in ranks:
            assert all(here == there > 0 for there, here in answers), layout


def test_what_is_drawn_for_one_model_is_the_same_on_its_ranks(checked):
    for layout, (first, *others) in by_layout(checked, draw_numbers).items():
        assert len(set(first)) > 1, layout
        assert all(drawn == first for drawn in others), layout


def test_noise_differs_between_shards_and_not_between_replicas(checked):
    first, *others = by_layout(checked, draw_and_refuse)["replicas of shards"]
    for drawn in others:
        for name, tensors in first.items():
            assert all(torch.equal(one, other) for one, other in zip(tensors, drawn[name], strict=True))
    for name, (sharded, _) in first.items():
        upper, lower = sharded[:1000].flatten(), sharded[1000:].flatten()
        assert abs(float(torch.corrcoef(torch.stack([upper, lower]))[0, 1])) < 0.06, name
    assert float(first["Gaussian σ=0.1"][0].std()) == pytest.approx(0.1, rel=0.05)
    assert float(first["uniform b=0.1"][0].abs().max()) == pytest.approx(0.1, rel=0.01)
    assert float(vector_norm(first["random L2 ε=0.1"])) == pytest.approx(0.1, rel=1e-5)
