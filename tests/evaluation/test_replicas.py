"""What is refused before work is spread over processes, tried without any: `gather` returns what each would say."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from for_each import for_each
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from hf_parcor.evaluation.placement.replicas import all_batches, check_same_data, check_same_weights, measurable_model


def build():
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 1)).requires_grad_(False)
    model[2].to(torch.bfloat16)  # of an odd number of bytes, if they are taken by four
    model[2].bias.fill_(1.0)
    model.register_buffer("packed", torch.tensor([1, 2, 3], dtype=torch.int8))
    model.register_buffer("mask", torch.tensor([True, False]))
    model.register_buffer("wide", torch.tensor([1.0, -0.0, float("nan")], dtype=torch.float64))
    return model


def compare(one, *others):
    """Compare models as processes that have one each would."""
    found = []

    def collect(sums):
        found.append(sums)
        return found

    for model in others:
        check_same_weights(model, SimpleNamespace(gather=lambda sums: [collect(sums)[-1]]))
    check_same_weights(one, SimpleNamespace(gather=lambda sums: [sums, *found]))


def quantized():
    return torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(4, 2)), {nn.Linear}, dtype=torch.qint8)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_the_same_weights():
    model = build()
    compare(model, copy.deepcopy(model), copy.deepcopy(model))
    assert compare(nn.Identity(), nn.Identity()) is None
    torch.manual_seed(0)
    packed = quantized()
    compare(packed, copy.deepcopy(packed))
    with pytest.raises(ValueError, match=r"got others for '0\..*packed"):
        compare(packed, quantized())


SWAPPED = torch.tensor([0x803F0000 - (1 << 32)], dtype=torch.int32).view(
    torch.float32
)  # the bytes of 1 in other places
CHANGES = {
    "0.weight": lambda model: model[0].weight.data[1, 2].add_(1e-6),
    "0.bias": lambda model: model[0].bias.data[1].mul_(-1),
    "1.running_mean": lambda model: model[1].running_mean.add_(1),
    "1.num_batches_tracked": lambda model: model[1].num_batches_tracked.add_(1),
    "2.weight": lambda model: model[2].weight.data[0, 0].mul_(2),
    "packed": lambda model: model.packed[0].add_(1),
    "mask": lambda model: model.mask.fill_(True),
    "wide": lambda model: model.wide[1].abs_(),
    "more": lambda model: model.register_buffer("more", torch.ones(1)),
}


@for_each("name", CHANGES)
def test_other_weights_in_any_process(name):
    model = build()
    other = copy.deepcopy(model)
    CHANGES[name](other)
    for given in ((model, other), (other, model), (model, copy.deepcopy(model), other)):
        with pytest.raises(ValueError, match=f"got others for '{name}'"):
            compare(*given)


def exchanged(first, second):
    def exchange(rows):
        rows[[first, second]] = rows[[second, first]]

    return exchange


ORDERS = {
    "the first two": exchanged(0, 1),
    "the last two": exchanged(-2, -1),
    "first and last": exchanged(0, -1),
    "a power of two apart": exchanged(0, 2**18),
    "halves": lambda rows: rows.copy_(rows.roll(300_000)),
    "backwards": lambda rows: rows.copy_(rows.flip(0)),
}


@for_each("order", ORDERS)
def test_the_same_numbers_in_another_order(order):
    model = nn.Module()
    model.register_buffer("rows", torch.randint(-128, 127, (600_000,), dtype=torch.int8))  # are hashed piece by piece
    model.rows[[0, 1, 2**18, -2, -1]] = torch.tensor([1, 2, 3, 4, 5], dtype=torch.int8)
    other = copy.deepcopy(model)
    compare(model, other)
    ORDERS[order](other.rows)
    with pytest.raises(ValueError, match="'rows'"):
        compare(model, other)


def test_bytes_that_are_in_other_places():
    one, other = nn.Linear(1, 1), nn.Linear(1, 1)
    other.load_state_dict(one.state_dict())
    one.bias.data.fill_(1.0)
    other.bias.data.copy_(SWAPPED)
    with pytest.raises(ValueError, match="'bias'"):
        compare(one, other)


def test_other_data():
    check_same_data("batches", "ab", SimpleNamespace(gather=lambda own: [own, "ab"]))
    with pytest.raises(ValueError, match="batches: expected all data in every process"):
        check_same_data("batches", "ab", SimpleNamespace(gather=lambda own: [own, "ab", "cd"]))


def test_the_batches_of_all_processes_come_out_of_the_share_of_one():
    loader = DataLoader(range(10), batch_size=3, collate_fn=lambda rows: {"rows": rows})
    everything = list(loader)
    for index in range(2):
        share = prepare_data_loader(loader, num_processes=2, process_index=index, put_on_device=False)
        assert all_batches(share) is not share
        assert list(all_batches(share)) == everything
    alone = prepare_data_loader(loader, num_processes=1, process_index=0, put_on_device=False)
    for batches in (alone, loader, everything):
        assert all_batches(batches) is batches


def test_a_model_inside_of_a_wrapper(monkeypatch):
    model = nn.Linear(1, 1)
    wrapper = DistributedDataParallel.__new__(DistributedDataParallel)
    nn.Module.__init__(wrapper)
    wrapper.module = model
    assert measurable_model(wrapper) is measurable_model(model) is model
    for one in (model, wrapper, nn.DataParallel(model)):
        assert measurable_model(one) is model
        assert measurable_model(torch.compile(one, backend="eager")) is model
    wrapper.module = torch.compile(model, backend="eager")
    assert measurable_model(wrapper) is model
    monkeypatch.setattr("hf_parcor.evaluation.placement.replicas.model_has_dtensor", lambda model: True)
    with pytest.raises(ValueError, match="model: expected all weights in every process"):
        measurable_model(model)
