"""The fixture that runs functions on several ranks: what it returns, and that nothing hangs."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch
from torch import distributed

pytestmark = pytest.mark.slow  # ranks are processes of their own


def summed(value):
    total = torch.tensor(value * (distributed.get_rank() + 1))
    distributed.all_reduce(total)
    return distributed.get_rank(), total


def raise_on_rank_1():
    if distributed.get_rank() == 1:
        raise ValueError("this rank has nothing to say")


def die_on_rank_0():
    if distributed.get_rank() == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    distributed.barrier()


def sleep():
    time.sleep(600)


def test_returns_what_each_rank_returned(run_on_ranks):
    assert run_on_ranks(summed, 2, 10) == [(0, torch.tensor(30)), (1, torch.tensor(30))]


@pytest.mark.parametrize(
    ("function", "timeout", "message"),
    [
        (raise_on_rank_1, 60, "this rank has nothing to say"),
        (die_on_rank_0, 60, "rank 0 ended with -9"),
        (sleep, 3, "rank 1 ended with -9"),
    ],
)
def test_says_which_rank_failed(run_on_ranks, function, timeout, message):
    started = time.monotonic()
    with pytest.raises(AssertionError, match=message):
        run_on_ranks(function, 2, timeout=timeout)
    assert time.monotonic() - started < 300, "the other rank would have slept for 600 s"
