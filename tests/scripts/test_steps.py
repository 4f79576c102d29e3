"""What benchmarks share: steps take turns, quartiles are NumPy's, and what others use does what its papers say."""

from __future__ import annotations

import time

import numpy as np
import pytest
import tiny
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from hf_parcor import SAM, CorruptionConstraint, ParameterDefenseTrainer
from scripts.benchmark import RADIUS, Peers
from scripts.training_steps import pairs_with, quartiles_of_ratios, quiet_arguments, seconds, step_of

BATCH = {"input_ids": torch.tensor([[3, 5, 7, 2], [4, 4, 1, 9]]), "labels": torch.tensor([0, 1])}


def test_each_step_follows_a_stock_step():
    order = []
    steps = {name: lambda name=name: order.append(name) for name in "ab"}
    pairs = pairs_with(lambda: order.append("stock"), steps, range(3))
    assert order == ["stock", "a", "stock", "b"] * 3
    assert {name: len(of_step) for name, of_step in pairs.items()} == {"a": 3, "b": 3}


def test_the_time_of_a_cpu_is_what_this_process_computed(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert seconds(lambda: time.sleep(0.05)) < 0.03
    assert seconds(lambda: torch.ones(10**7).sum()) > 0.001


def test_quartiles_are_of_ratios_within_a_pair():
    ours, stock = np.random.default_rng(0).uniform(1, 2, (2, 9))
    expected = np.quantile(ours / stock, [0.25, 0.5, 0.75], method="weibull")
    assert quartiles_of_ratios(zip(ours, stock, strict=True)) == pytest.approx(tuple(expected))


def bert():
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**tiny.encoder(12, layers=1), **tiny.STILL)).double()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)  # not zero, of which the AWP loop would take no notice
    return model


def moved(step):
    """Return what a step of SGD, made from a model and its optimizer, moves each weight by."""
    model = bert()
    before = [p.detach().clone() for p in model.parameters()]
    step(model, torch.optim.SGD(model.parameters(), lr=1.0))
    return [p.detach() - start for p, start in zip(model.parameters(), before, strict=True)]


def test_sam_in_two_steps_is_our_sam():
    def ours(model, optimizer):
        arguments = quiet_arguments(use_cpu=True)
        defense = SAM(CorruptionConstraint(epsilon=RADIUS))
        step_of(ParameterDefenseTrainer(model=model, args=arguments, defense=defense), model, BATCH)()
        optimizer.step()

    theirs = moved(lambda model, optimizer: Peers(model, BATCH, optimizer).sam_in_two_steps())
    torch.testing.assert_close(theirs, moved(ours), rtol=1e-6, atol=1e-9)


def test_the_awp_loop_sums_the_gradients_of_two_passes():
    def by_hand(model, optimizer):
        model(**BATCH).loss.backward()
        other = bert()
        with torch.no_grad():
            for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
                if "weight" in name and p.grad is not None and p.grad.norm() > 0:
                    shift = 0.01 * p.grad * (p.norm() + 1e-6) / (p.grad.norm() + 1e-6)
                    box = 0.01 * p.abs()
                    q.add_(shift.clamp(-box, box))
        other(**BATCH).loss.backward()
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            if p.grad is not None:
                p.grad += q.grad
        optimizer.step()

    theirs = moved(lambda model, optimizer: Peers(model, BATCH, optimizer).awp_loop())
    torch.testing.assert_close(theirs, moved(by_hand), rtol=1e-6, atol=1e-9)


def test_every_peer_takes_a_step_and_leaves_no_gradient():
    model = nn.Module.to(bert(), torch.float32)
    for name, step in Peers(model, BATCH, torch.optim.SGD(model.parameters(), lr=0.1)).steps().items():
        before = model.classifier.weight.detach().clone()
        step()
        assert not torch.equal(before, model.classifier.weight), name
        assert all(p.grad is None or not p.grad.any() for p in model.parameters()), name
