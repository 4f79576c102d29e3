"""A loop without a Trainer on two ranks: one all-reduce a step, of the mean of each rank's own risk."""

from __future__ import annotations

import math

import pytest
import torch
from torch import distributed, nn
from torch.nn.functional import cross_entropy

from hf_parcor import SAM, CorruptionConstraint, MultiStepRisk, defended_backward

CONSTRAINT = CorruptionConstraint(epsilon=0.2)
DEFENSES = {"multi-step": MultiStepRisk(CONSTRAINT, steps=2), "SAM": SAM(CONSTRAINT)}
DEFENSES["shared"] = MultiStepRisk(CONSTRAINT, steps=2, sync_perturbation=True)
ACCUMULATION = 2


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def batch(rank: int, micro_batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(10 * micro_batch + rank)
    return torch.randn(5, 4, generator=draw).double(), torch.randint(3, (5,), generator=draw)


def loop(name: str) -> tuple[list[torch.Tensor], int]:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATION)
    model, rank, reductions = accelerator.prepare(network()), distributed.get_rank(), []

    def counted(state, bucket):
        reductions.append(bucket.index())
        averaged = distributed.all_reduce(bucket.buffer() / 2, async_op=True).get_future()
        return averaged.then(lambda done: done.value()[0])

    model.register_comm_hook(None, counted)
    for micro_batch in range(ACCUMULATION):
        inputs, labels = batch(rank, micro_batch)
        with accelerator.accumulate(model):
            defended_backward(
                accelerator, DEFENSES[name], model, lambda x=inputs, y=labels: cross_entropy(model(x), y)
            )
    return [parameter.grad for parameter in model.parameters()], len(reductions)


def alone(name: str, rank: int, micro_batch: int) -> list[torch.Tensor]:
    """The gradient of one rank's risk on one batch, or on the joined batch, by autograd at copies of the weights."""
    base, ranks = network(), (0, 1) if name == "shared" else (rank,)
    inputs, labels = (torch.cat(parts) for parts in zip(*(batch(index, micro_batch) for index in ranks), strict=True))
    weights = [parameter.detach() for parameter in base.parameters()]
    names = [key for key, _ in base.named_parameters()]
    corruption, at_passes = [torch.zeros_like(weight) for weight in weights], []
    passes, radius = (2, 0.2) if name == "SAM" else (3, 0.15)
    for _ in range(passes):
        values = [(weight + part).requires_grad_() for weight, part in zip(weights, corruption, strict=True)]
        output = torch.func.functional_call(base, dict(zip(names, values, strict=True)), inputs)
        parts = torch.autograd.grad(cross_entropy(output, labels), values)
        at_passes.append(parts)
        length = math.sqrt(sum(float(part.square().sum()) for part in parts))
        corruption = [a + radius * part / length for a, part in zip(corruption, parts, strict=True)]
        size = math.sqrt(sum(float(part.square().sum()) for part in corruption))
        corruption = [part * min(1.0, 0.2 / size) for part in corruption]
    if name == "SAM":
        return list(at_passes[1])
    return [sum(parts) / 3 for parts in zip(*at_passes, strict=True)]


@pytest.mark.parametrize("name", DEFENSES)
def test_one_all_reduce_of_the_mean_of_the_risks(run_on_ranks, name):
    ranks = run_on_ranks(loop, 2, name)
    expected = [
        sum(parts) / 4
        for parts in zip(
            *(alone(name, rank, index) for rank in range(2) for index in range(ACCUMULATION)), strict=True
        )
    ]
    for found, reductions in ranks:
        assert reductions == 1
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def example() -> float:
    import importlib.util
    from argparse import Namespace
    from pathlib import Path

    script = Path(__file__).parents[2] / "examples" / "accelerate_loop.py"
    spec = importlib.util.spec_from_file_location("accelerate_loop", script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    settings = {"epsilon": 0.1, "steps": 1, "epochs": 3, "lr": 0.01, "seed": 0, "cpu": True}
    return float(module.train(Namespace(gradient_accumulation_steps=1, **settings)))


def test_the_example_on_two_ranks(run_on_ranks):
    first, second = run_on_ranks(example, 2)
    assert first == second > 0.9
