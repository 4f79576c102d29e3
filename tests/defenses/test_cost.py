"""Every defense costs what it says, counted in floating-point operations."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hf_parcor import AWP, SAM, CorruptionConstraint, MultiStepRisk, select_parameters
from hf_parcor.defenses import DEFENSES, ConstrainedDefense, DefendedStep

L2 = CorruptionConstraint(epsilon=0.1)
DEFENDED = [
    *(kind(L2) if issubclass(kind, ConstrainedDefense) else kind() for kind in DEFENSES.values()),
    MultiStepRisk(L2, steps=3),
    AWP(L2, steps=2, input_steps=3),
    AWP(L2, steps=2, input_epsilon=0),
    MultiStepRisk(L2, steps=2, batch_share=0.5),
    SAM(L2, batch_share=0.25),
]


@pytest.mark.parametrize("defense", DEFENDED, ids=str)
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
