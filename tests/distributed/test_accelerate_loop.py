"""A loop without a Trainer on two ranks: one all-reduce a step of the mean of the risks, or shards under FSDP2."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from longhand import longhand
from torch import distributed, nn
from torch.nn.functional import cross_entropy

from hf_parcor import (
    SAM,
    CorruptionConstraint,
    DefendedBackward,
    GradientPenalty,
    MultiStepRisk,
    defended_backward,
    select_parameters,
)
from hf_parcor.distributed.dtensors import local_part

pytestmark = pytest.mark.slow  # ranks are processes of their own

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


def fsdp2(version: int = 2) -> Any:
    """Return an Accelerator that shards on CPUs too, where Accelerate itself takes DDP."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    AcceleratorState._reset_state()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATION)
    state = accelerator.state
    PartialState().distributed_type = state.distributed_type = DistributedType.FSDP
    state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=version, auto_wrap_policy="NO_WRAP")
    return accelerator


def sharded_loop(name: str) -> list[torch.Tensor]:
    accelerator, base = fsdp2(), network()
    model, _ = accelerator.prepare(base, torch.optim.SGD(base.parameters(), lr=0.1))
    before = [local_part(parameter).clone() for parameter in model.parameters()]
    parameters = select_parameters(accelerator.unwrap_model(model), "all") if name == "shared" else None
    for micro_batch in range(ACCUMULATION):
        inputs, labels = batch(distributed.get_rank(), micro_batch)
        with accelerator.accumulate(model):
            found = defended_backward(
                accelerator, DEFENSES[name], model, lambda x=inputs, y=labels: cross_entropy(model(x), y), parameters
            )
            assert found.norm.realised == pytest.approx(0.2)
    assert all(torch.equal(local_part(weight), old) for weight, old in zip(model.parameters(), before, strict=True))
    return [parameter.grad.full_tensor() for parameter in model.parameters()]


def refused_under_fsdp() -> None:
    for version, defense, message in (
        (1, SAM(CONSTRAINT), "expected version 2"),
        (2, GradientPenalty(weight=0.1), "expected one that differentiates once"),
    ):
        with pytest.raises(ValueError, match=message):
            defended_backward(fsdp2(version), defense, network(), lambda: torch.zeros(()))


def uneven(name: str) -> list[torch.Tensor]:
    """Train where rank 1 has a batch less; the weights in the end."""
    from accelerate import Accelerator
    from torch.distributed.algorithms.join import Join

    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(network())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    backward = DefendedBackward(accelerator, DEFENSES[name], model)
    with Join([model]):
        for micro_batch in range(3 - distributed.get_rank()):
            backward(
                lambda given: cross_entropy(model(given[0]), given[1]), batch(distributed.get_rank(), micro_batch)
            )
            optimizer.step()
            optimizer.zero_grad()
    return [parameter.detach() for parameter in model.parameters()]


def shared_is_refused_where_batches_are_uneven() -> None:
    with pytest.raises(ValueError, match="sync_perturbation: expected False inside join_uneven_inputs"):
        uneven("shared")


def loop(name: str, unwrapped: bool = False, **settings: Any) -> tuple[list[torch.Tensor], int]:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATION, **settings)
    model, rank, reductions = accelerator.prepare(network()), distributed.get_rank(), []

    def counted(state, bucket):
        reductions.append(bucket.index())
        averaged = distributed.all_reduce(bucket.buffer() / 2, async_op=True).get_future()
        return averaged.then(lambda done: done.value()[0])

    model.register_comm_hook(None, counted)
    if unwrapped:
        accelerator.unwrap_model(model)
    for micro_batch in range(ACCUMULATION):
        inputs, labels = batch(rank, micro_batch)
        with accelerator.accumulate(model):
            defended_backward(
                accelerator, DEFENSES[name], model, lambda x=inputs, y=labels: cross_entropy(model(x), y)
            )
    return [parameter.grad for parameter in model.parameters()], len(reductions)


def alone(name: str, ranks: tuple[int, ...], micro_batch: int) -> list[torch.Tensor]:
    """The gradient of the risk on the joined batch of some ranks."""
    inputs, labels = (torch.cat(parts) for parts in zip(*(batch(index, micro_batch) for index in ranks), strict=True))
    weights = [0, 1] if name == "SAM" else [1 / 3] * 3
    return list(longhand(network(), lambda call: cross_entropy(call(inputs), labels), weights).values())


def mean_of(name: str, groups: list[tuple[int, ...]]) -> list[torch.Tensor]:
    every = [alone(name, ranks, index) for ranks in groups for index in range(ACCUMULATION)]
    return [sum(parts) / len(every) for parts in zip(*every, strict=True)]


def example() -> float:
    from argparse import Namespace

    import accelerate_loop

    settings = {"epsilon": 0.1, "steps": 1, "epochs": 3, "lr": 0.01, "seed": 0, "cpu": True}
    return float(accelerate_loop.train(Namespace(gradient_accumulation_steps=1, **settings)))


def every_loop() -> dict[str, Any]:
    found: dict[str, Any] = {"example": example(), "uneven": uneven("multi-step")}
    shared_is_refused_where_batches_are_uneven()
    found |= {f"DDP, {name}": loop(name) for name in DEFENSES}
    found |= {f"compiled, {seen}": loop("multi-step", seen, dynamo_backend="eager") for seen in (False, True)}
    found |= {f"FSDP2, {name}": sharded_loop(name) for name in DEFENSES}
    refused_under_fsdp()
    return found


@pytest.fixture(scope="module")
def loops(run_on_ranks):
    return run_on_ranks(every_loop, 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", DEFENSES)
def test_one_all_reduce_of_the_mean_of_the_risks(loops, name):
    expected = mean_of(name, [(0, 1)] if name == "shared" else [(0,), (1,)])
    for rank in loops:
        found, reductions = rank[f"DDP, {name}"]
        assert reductions == 1
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("unwrapped", [False, True])
def test_compiled_as_one_it_is_the_loop_that_is_not_compiled(loops, unwrapped):
    """Accelerate loses sight of DDP where it unwraps what is compiled, and reduces each micro-batch, stock too."""
    for rank in loops:
        gradients, reductions = rank[f"compiled, {unwrapped}"]
        expected, once = rank["DDP, multi-step"]
        torch.testing.assert_close(gradients, expected, rtol=1e-9, atol=1e-12)
        assert reductions == (ACCUMULATION if unwrapped else 1) * once


def test_ranks_that_run_out_of_batches_leave_the_others_training(loops):
    first, second = (rank["uneven"] for rank in loops)
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.parametrize("name", DEFENSES)
def test_on_shards_all_corrupt_along_the_gradient_of_the_joined_batch(loops, name):
    for rank in loops:
        torch.testing.assert_close(rank[f"FSDP2, {name}"], mean_of(name, [(0, 1)]), rtol=1e-9, atol=1e-12)


def test_the_example_on_two_ranks(loops):
    first, second = (rank["example"] for rank in loops)
    assert first == second > 0.9
