"""What processes tell each other: averages and agreement, in few calls."""

from __future__ import annotations

import pytest
import torch
from torch import distributed

from hf_parcor.distributed import processes as process_group
from hf_parcor.distributed.processes import MeasuringProcesses, TrainingProcesses

pytestmark = pytest.mark.slow  # ranks are processes of their own


def talk(bucket):
    process_group._BUCKET = bucket
    calls = []
    for name in ("all_reduce", "broadcast"):
        setattr(distributed, name, counted(getattr(distributed, name), calls))
    rank = distributed.get_rank()
    results = []
    for method in (TrainingProcesses().average_, TrainingProcesses().agree_):
        tensors = [
            torch.full((2, 3), 1.0 + rank),
            torch.tensor(10.0 * rank),
            torch.arange(6.0).reshape(2, 3).t() * rank,  # not contiguous
            torch.full((4,), 2.0 + rank, dtype=torch.float64),
            torch.zeros(0),
        ]
        method(tensors)
        results.append(tensors)
    return results, calls


def counted(call, calls):
    def counting(tensor, *args, **kwargs):
        calls.append(tensor.numel())
        return call(tensor, *args, **kwargs)

    return counting


def test_averages_and_agrees(run_on_ranks):
    table = torch.arange(6.0).reshape(2, 3).t()
    double = torch.full((4,), 2.5, dtype=torch.float64)
    expected = [
        [torch.full((2, 3), 1.5), torch.tensor(5.0), table / 2, double, torch.zeros(0)],
        [torch.full((2, 3), 1.0), torch.tensor(0.0), table * 0, double - 0.5, torch.zeros(0)],
    ]
    for (averages, agreed), calls in run_on_ranks(talk, 2, 25 * 2**20):
        torch.testing.assert_close([averages, agreed], expected, rtol=0, atol=0)
        assert calls == 2 * [13, 4, 0]  # neighbours of one kind together
    for (averages, agreed), calls in run_on_ranks(talk, 2, 7 * 4):
        torch.testing.assert_close([averages, agreed], expected, rtol=0, atol=0)
        assert calls == 2 * [7, 6, 4, 0]  # and as many as fit


def exchange():
    processes = MeasuringProcesses.launched()

    def tensors():
        table = torch.arange(6.0).view(2, 3) * (1 + processes.index)
        return {
            "real": torch.full((3,), 1.0 + processes.index),
            "whole": torch.arange(2) * (1 + processes.index),
            "table": table if processes.index else table.t().contiguous().t(),  # as if one were channels_last
        }

    own, here, train = 2**62 - 1 - processes.index, torch.device("cpu"), TrainingProcesses()
    seeds = [
        train.seed(own, here, shared=True),
        train.seed(own, here, shared=False),
        train.seed(7, here, shared=False),
    ]
    return processes, processes.sum(tensors()), processes.hand_round(tensors(), 1), processes.gather(seeds)


def test_processes_that_measure_or_train_exchange_tensors_and_seeds(run_on_ranks):
    for rank, (processes, sums, of_second, seeds) in enumerate(run_on_ranks(exchange, 2)):
        assert processes == MeasuringProcesses(2, rank)
        assert {name: value.tolist() for name, value in sums.items()} == {
            **{"real": [3.0] * 3, "whole": [0, 3]},
            "table": [[0.0, 3.0, 6.0], [9.0, 12.0, 15.0]],
        }
        assert {name: value.tolist() for name, value in of_second.items()} == {
            **{"real": [2.0] * 3, "whole": [0, 2]},
            "table": [[0.0, 2.0, 4.0], [6.0, 8.0, 10.0]],
        }
        shared, own, alike = zip(*seeds, strict=True)
        assert shared == (2**62 - 1,) * 2
        for seeds_of_all in (own, alike):
            assert len(set(seeds_of_all)) == 2
            assert all(isinstance(seed, int) and 0 <= seed < 2**62 for seed in seeds_of_all)


def overflow():
    tensors = [torch.tensor([60000.0], dtype=torch.float16), torch.tensor([1.0, torch.nan][distributed.get_rank()])]
    TrainingProcesses().average_(tensors)
    return tensors


@pytest.mark.slow
def test_half_precision_does_not_overflow_and_what_is_no_number_reaches_everyone(run_on_ranks):
    for half, no_number in run_on_ranks(overflow, 2):
        assert half == 60000.0
        assert no_number.isnan()
