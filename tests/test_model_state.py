"""Buffers: put back whatever was done to them, and moved by the passes of a step as by one clean run."""

from __future__ import annotations

import itertools

import pytest
import torch
from for_each import for_each
from torch import nn

from hf_parcor import CorruptionEvaluator, Quantization
from hf_parcor.model_state import BufferSnapshot, StepBuffers


class Counts(nn.Module):
    """Computes with what it counts."""

    def __init__(self, move, size=1):
        super().__init__()
        self.register_buffer("calls", torch.zeros(size))
        self.move, self.seen = move, []

    def forward(self, x):
        self.seen.append(self.calls.clone())
        self.move(self)
        return x + self.seen[-1].sum()


def replace(module):
    module.calls = module.calls + 1


MOVES = {
    "in place": lambda module: module.calls.add_(1),
    "unseen by versions": lambda module: module.calls.data.add_(1),
    "replaced": replace,
}


@for_each("size", [1, 70_000])
@for_each("move", [*MOVES, "taken away", "not moved"])
def test_a_snapshot_says_whether_buffers_moved_and_puts_them_back(move, size):
    module = Counts({"taken away": lambda module: setattr(module, "calls", None), **MOVES}.get(move, id), size)
    buffer = module.calls
    snapshot = BufferSnapshot(module.modules())
    module.move(module)
    assert snapshot.moved() == (move != "not moved")
    snapshot.put_back()
    assert module.calls is buffer
    assert torch.equal(buffer, torch.zeros(size))


def test_buffers_that_begin_at_one_place_in_memory():
    """One is a row of the other; empty ones all lie nowhere."""
    module = nn.Module()
    table = torch.arange(6.0).view(3, 2)
    for name, buffer in {"row": table[0], "table": table, "none": torch.empty(0), "no": torch.empty(0, 3)}.items():
        module.register_buffer(name, buffer)
    snapshot = BufferSnapshot([module])
    assert not snapshot.moved()
    table.data[2] += 1
    assert snapshot.moved()
    snapshot.put_back()
    assert torch.equal(table, torch.arange(6.0).view(3, 2))


def test_buffers_whose_entries_share_memory_are_left_alone_and_do_not_keep_the_others():
    module = nn.Module()
    module.register_buffer("expanded", torch.ones(1).expand(4))
    module.register_buffer("calls", torch.zeros(3))
    snapshot = BufferSnapshot([module])
    module.calls.add_(1)
    assert snapshot.moved()
    snapshot.put_back()
    assert not module.calls.any()


class Pair(nn.Module):
    def __init__(self, move):
        super().__init__()
        self.first, self.last = Counts(move), Counts(move)

    def forward(self, x):
        return self.last(self.first(x))


class Sends(nn.Module):
    """Sends the buffers of the first process before its first call, as DDP does; the others follow without."""

    def __init__(self, module):
        super().__init__()
        self.module, self.sends = module, True

    def forward(self, *arguments):
        if self.sends:
            for buffer in self.module.buffers():
                buffer.fill_(7)
        self.sends = False
        return self.module(*arguments)


@pytest.mark.parametrize("move", MOVES)
def test_every_pass_computes_as_the_first_and_buffers_move_once(move, subtests):
    for reused, moving, sends, passes in itertools.product((False, True), (False, True), (False, True), (1, 2, 4)):
        with subtests.test(reused=reused, moving=moving, sends=sends, passes=passes):
            model = Pair(MOVES[move])
            model.register_forward_pre_hook(lambda model, _: model.last.move(model.last))
            whole = Sends(model) if sends else model
            recorded = []
            buffers = StepBuffers(list(whole.modules()), lambda recorded=recorded: recorded, model if sends else None)
            assert not buffers.moved()
            if moving:
                with buffers.moving():
                    whole(torch.ones(1))
                assert buffers.moved()
            if reused:
                with buffers.of_pass(-1), pytest.MonkeyPatch.context() as patch:
                    patch.setattr(model.last, "forward", lambda x: x)  # it ends before
                    whole(torch.ones(1))
                    recorded.append(model.first)
            for index in range(passes):
                with buffers.of_pass(index), pytest.MonkeyPatch.context() as patch:
                    if reused:
                        patch.setattr(model.first, "forward", lambda x, first=model.first: (first.move(first), x)[1])
                    whole(torch.ones(1))
            begin = 7 if sends else 0
            assert set(map(float, model.first.seen)) == {begin}
            assert set(map(float, model.last.seen)) == {begin + 1}
            assert [float(buffer) for buffer in model.buffers()] == [begin + 1, begin + 2]


class Folds(nn.Module):
    """Computes something of its weights once, and keeps it."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[3.0, 4.0]]))
        self.register_buffer("doubled", None, persistent=False)

    def forward(self, x):
        if self.doubled is None:
            self.doubled = 2 * self.weight.detach()
        return x @ self.doubled.T


def test_what_is_computed_once_is_computed_anew_under_each_corruption():
    model = Folds()
    evaluator = CorruptionEvaluator(model, lambda model: {"sum": float(model(torch.ones(1, 2)).sum())}, progress=False)
    record = evaluator.evaluate([Quantization(bits) for bits in (2, 8)])
    expected = [(Quantization(bits)({"w": model.weight})["w"]).sum() * 2 for bits in (2, 8)]
    assert [row.mean("sum") for row in record.rows()] == pytest.approx([14.0, *map(float, expected)])
    assert model.doubled is None
