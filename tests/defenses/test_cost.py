"""Every defense costs what it says, counted in floating-point operations."""

from __future__ import annotations

import sys

import pytest
import torch
from for_each import for_each
from torch.utils.flop_counter import FlopCounterMode

from hf_parcor import AWP, SAM, CorruptionConstraint, MultiStepRisk, select_parameters
from hf_parcor.defenses import DEFENSES, ConstrainedDefense, DefendedStep
from hf_parcor.functional.top_n import keep_top_n_

L2 = CorruptionConstraint(epsilon=0.1)
DEFENDED = [
    *(kind(L2) if issubclass(kind, ConstrainedDefense) else kind() for kind in DEFENSES.values()),
    MultiStepRisk(L2, steps=3),
    AWP(L2, steps=2, input_steps=3),
    AWP(L2, steps=2, input_epsilon=0),
    MultiStepRisk(L2, steps=2, batch_share=0.5),
    SAM(L2, batch_share=0.25),
]


@for_each("defense", DEFENDED)
def test_operations(tiny_bert, defense):
    model = tiny_bert(hidden_size=32, intermediate_size=64)
    batch = {"input_ids": torch.randint(20, (4, 8)), "labels": torch.tensor([0, 1, 0, 1])}

    def run_pass(objective, index):
        count = round(4 * defense.share_of_batch(index))
        loss = objective(model(**{name: rows[:count] for name, rows in batch.items()}).loss)
        loss.backward()
        return loss.detach()

    with FlopCounterMode(display=False) as stock:
        model(**batch).loss.backward()
    with FlopCounterMode(display=False) as ours:  # noqa: SIM117
        with DefendedStep(
            select_parameters(model), run_pass, defense.passes, embedding=model.get_input_embeddings()
        ) as step:
            defense.minimize(step)
    assert ours.get_total_flops() == defense.cost * stock.get_total_flops()


@pytest.mark.parametrize(("steps", "random_start", "selections"), [(1, False, 1), (3, False, 5), (1, True, 2)])
def test_the_largest_entries_are_selected_no_oftener_than_needed(
    tiny_bert, monkeypatch, steps, random_start, selections
):
    """Once for each step and once for each projection, but for the first from zero, which has n entries already."""
    model, selected = tiny_bert(), []
    parameters = select_parameters(model)
    batch = {"input_ids": torch.randint(20, (4, 8)), "labels": torch.tensor([0, 1, 0, 1])}

    def run_pass(objective, index):
        loss = objective(model(**batch).loss)
        loss.backward()
        return loss.detach()

    def counting(tensors, n):
        selected.append(n)
        keep_top_n_(tensors, n)

    for module in ("constrained_maximum", "projections"):  # functions of these names hide the modules
        monkeypatch.setattr(sys.modules[f"hf_parcor.functional.{module}"], "keep_top_n_", counting)
    defense = MultiStepRisk(CorruptionConstraint(epsilon=0.1, top_n=10), steps=steps, random_start=random_start)
    with DefendedStep(parameters, run_pass, defense.passes) as step:
        defense.minimize(step)
    started = 1 if random_start else 0
    assert selected == [10] * (selections + started)
