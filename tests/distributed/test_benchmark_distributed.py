"""The benchmark of what steps send, on a tiny model and two gloo ranks, and its model on paper, by hand."""

from __future__ import annotations

import pytest

from scripts.benchmark_distributed import ARMS, Cluster, bert, bytes_on_the_wire, step_time, train

pytestmark = pytest.mark.slow  # ranks are processes of their own

SIZE = 4 * sum(parameter.numel() for parameter in bert("tiny").parameters())


def count_ddp():
    return {label: train("DDP", arm, "tiny", length=8, corruption_steps=1) for label, arm in ARMS["DDP"].items()}


def count_fsdp2():
    return {label: train("FSDP2", arm, "tiny", length=8, corruption_steps=1) for label, arm in ARMS["FSDP2"].items()}


def test_counts_under_ddp(run_on_ranks):
    for arms in run_on_ranks(count_ddp, 2):
        sent = {label: arm["collectives"]["all_reduce"] for label, arm in arms.items()}
        assert sent["stock"]["bytes"] - SIZE in range(1024), "every gradient once, and what says which are used"
        assert sent["whole model, local"] == sent["stock"]
        assert sent["last layer, local"] == sent["stock"]
        assert sent["whole model, global"]["bytes"] - sent["stock"]["bytes"] in range(SIZE, SIZE + 1024)
        assert 0 < sent["last layer, global"]["bytes"] - sent["stock"]["bytes"] < SIZE
        assert arms["whole model, local"]["operations"] == 2 * arms["stock"]["operations"]
        assert arms["last layer, local"]["operations"] < 2 * arms["stock"]["operations"]


@pytest.mark.slow
def test_counts_under_fsdp2(run_on_ranks):
    for arms in run_on_ranks(count_fsdp2, 2):
        stock, whole = (arms[label]["collectives"] for label in ("stock", "whole model, global"))
        for collective in ("all_gather", "reduce_scatter"):
            beyond = whole[collective]["bytes"] - 2 * stock[collective]["bytes"]
            assert beyond in range(1024), "twice for two passes, and some norms"
        assert stock["reduce_scatter"]["bytes"] >= SIZE


@pytest.mark.parametrize(
    ("collective", "ranks", "expected"),
    [
        ("all_reduce", 1, 0),
        ("all_reduce", 8, 175),
        ("all_gather", 8, 87.5),
        ("reduce_scatter", 4, 75),
        ("broadcast", 4, 100),
        ("broadcast", 1, 0),
    ],
)
def test_bytes_on_the_wire(collective, ranks, expected):
    assert bytes_on_the_wire(collective, 100, ranks) == pytest.approx(expected)


def test_time_of_a_step():
    """64 ranks: 1.6 GB sent of 2 × 63/64, at 50 GB/s, and 3 calls that wait for 6 levels of 5 µs."""
    sent = {"all_reduce": {"calls": 3, "bytes": 1_600_000_000}}
    time = step_time(sent, 4.945e12, 64, Cluster())
    assert time.compute == pytest.approx(0.01)
    assert time.communicate == pytest.approx(0.063 + 3 * 30e-6)
    assert time.one_after_the_other == pytest.approx(time.compute + time.communicate)
    assert time.overlapped == time.communicate
    inside = step_time(sent, 4.945e12, 8, Cluster())
    assert inside.communicate == pytest.approx(1.6 * 1.75 / 450 + 3 * 15e-6)


@pytest.mark.parametrize(("collective", "ranks"), [("gossip", 2), ("all_reduce", 0)])
def test_wrong_arguments(collective, ranks):
    with pytest.raises(ValueError, match="expected"):
        bytes_on_the_wire(collective, 1, ranks)
