"""How work is shared between processes, counted out in one: no piece is lost, none is done twice."""

from __future__ import annotations

import itertools
from dataclasses import replace
from types import SimpleNamespace

import pytest
from accelerate.state import AcceleratorState, PartialState
from hypothesis import given
from hypothesis import strategies as st

from hf_parcor.distributed.processes import ALONE, MeasuringProcesses, ProcessError, check_all_joined


@given(count=st.integers(1, 5), total=st.integers(0, 12))
def test_each_piece_is_in_one_share_and_comes_back_in_its_place(count, total):
    pieces = list(range(total))
    processes = [MeasuringProcesses(count, index) for index in range(count)]
    shares = [list(one.share(pieces)) for one in processes]
    assert sorted(itertools.chain(*shares)) == pieces
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    for one, share in zip(processes, shares, strict=True):
        assert one.size(total) == len(share)
        assert {one.owner(piece) for piece in share} <= {one.index}
        told = SimpleNamespace(count=count, owner=one.owner, gather=lambda _: shares)
        assert MeasuringProcesses.collect(told, share) == pieces
        assert list(one.rounds(pieces)) == [(piece, True) for piece in share]


@given(count=st.integers(1, 5), total=st.integers(0, 12))
def test_in_step_all_processes_are_in_the_same_round_and_each_piece_counts_once(count, total):
    pieces = list(range(total))
    of_all = [list(MeasuringProcesses(count, index, in_step=True).rounds(pieces)) for index in range(count)]
    for index, rounds in enumerate(of_all):
        assert [piece for piece, counts in rounds if counts] == list(MeasuringProcesses(count, index).share(pieces))
        assert [piece // count for piece, _ in rounds] == list(range(-(-total // count)))


@pytest.mark.parametrize("in_step", [False, True])
def test_one_process_does_all_of_it(in_step):
    alone = replace(MeasuringProcesses(), in_step=in_step)
    assert alone.each(str, range(3)) == ["0", "1", "2"]
    assert alone.gather("said") == ["said"]
    with pytest.raises(OSError, match="the disk is full"), alone.failing_together():
        raise OSError("the disk is full")


@pytest.mark.parametrize("size", [None, "1"])
def test_who_is_alone_leaves_accelerate_as_it_is(monkeypatch, size):
    """A measurement before `Accelerator(cpu=True)` must not choose its device."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if size is not None:
        monkeypatch.setenv("WORLD_SIZE", size)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert MeasuringProcesses.launched() == ALONE
    assert not PartialState._shared_state


@pytest.fixture
def hear(monkeypatch):
    """Return what sets the failure of another process, and returns the list of what this one tells it."""

    def other(failure):
        told = []

        def tell(value, own):
            told.append((value, own))
            return [(value, own), ("of the other", failure)]

        monkeypatch.setattr(MeasuringProcesses, "_tell", staticmethod(tell))
        return told

    return other


def test_all_get_what_each_says_unless_one_has_failed(hear):
    hear(None)
    assert MeasuringProcesses(2).gather("mine") == ["mine", "of the other"]
    hear("OSError: the disk is full")
    with pytest.raises(ProcessError, match="process 1: OSError: the disk is full"):
        MeasuringProcesses(2).gather("mine")


@pytest.mark.parametrize(
    ("raised", "theirs", "seen", "told"),
    [
        (None, None, None, [(None, None)]),
        (None, "OSError: full", ProcessError, [(None, None)]),
        (KeyError("x"), None, KeyError, [(None, "KeyError: 'x'")]),
        (ProcessError("another failed"), None, ProcessError, []),  # all know, and nobody would listen
    ],
)
def test_whoever_fails_says_so_once(hear, raised, theirs, seen, told):
    heard = hear(theirs)

    def work():
        with MeasuringProcesses(2).failing_together():
            if raised is not None:
                raise raised

    if seen is None:
        work()
    else:
        with pytest.raises(seen):
            work()
    assert heard == told


@pytest.mark.parametrize(
    ("environment", "joined", "is_refused"),
    [
        ({}, 1, False),
        ({"WORLD_SIZE": "2"}, 1, False),  # a variable that is left over says nothing without a rank
        ({"WORLD_SIZE": "1", "RANK": "0"}, 1, False),
        ({"WORLD_SIZE": "2", "RANK": "0"}, 1, True),
        ({"WORLD_SIZE": "2", "RANK": "1"}, 2, False),
        ({"WORLD_SIZE": "4", "RANK": "1"}, 2, True),
    ],
)
def test_processes_that_were_launched_and_did_not_join(monkeypatch, environment, joined, is_refused):
    for name in ("WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if is_refused:
        with pytest.raises(ProcessError, match=f"the {environment['WORLD_SIZE']} that were launched .* got {joined}"):
            check_all_joined(joined)
    else:
        check_all_joined(joined)
