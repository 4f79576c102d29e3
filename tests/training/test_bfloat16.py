"""bf16=True, and weights in bfloat16."""

from __future__ import annotations

import pytest
import torch
from longhand import longhand
from torch import nn
from trainings import IN_ORDER, stacked
from transformers import Trainer

from hf_parcor import CorruptionConstraint, MultiStepRisk, ParameterDefenseTrainer

L2 = CorruptionConstraint(epsilon=0.2)


def longhand_under_autocast(model, rows, steps):
    inputs = stacked(rows)
    labels = inputs.pop("labels")

    def loss_of(call):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = call(**inputs).logits
        return nn.functional.cross_entropy(logits.float(), labels)

    return longhand(model, loss_of, [1 / (steps + 1)] * (steps + 1))


class TestBFloat16:
    @pytest.mark.parametrize("accumulation", [1, 2])
    def test_autocast(self, tiny_bert, rows, train, keep_gradients, accumulation):
        """The weights stay in float32, the corruption has the norm asked for, and each pass sees corrupted weights."""
        options = {"bf16": True, "max_steps": 1, "gradient_accumulation_steps": accumulation, **IN_ORDER}
        stock = train(Trainer, tiny_bert(dropout=0.0), options)
        model = tiny_bert(dropout=0.0)
        ours = train(
            ParameterDefenseTrainer, model, options, callbacks=[keep_gradients], defense=MultiStepRisk(L2, steps=2)
        )
        (log, plain), (kept,) = (t.state.log_history[0] for t in (ours, stock)), keep_gradients.kept
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        assert log["loss_clean"] == plain["loss"]
        assert log["corruption_norm"] == pytest.approx(0.2, rel=1e-3)
        assert log["corruption_norm_asked"] == pytest.approx(0.2, rel=1e-3)
        reference = tiny_bert(dropout=0.0)
        parts = [longhand_under_autocast(reference, rows[4 * i : 4 * i + 4], 2) for i in range(accumulation)]
        # BERT does not divide by the number of micro-batches, in stock training neither.
        expected = {name: sum(part[name] for part in parts) for name in kept}
        apart = sum((kept[name] - expected[name]).square().sum() for name in kept)
        size = sum(part.square().sum() for part in expected.values())
        assert float(torch.sqrt(apart / size)) < 0.01

    def test_weights_come_back_bit_for_bit(self, tiny_bert, train, bits_of):
        model = tiny_bert().to(torch.bfloat16)
        before = bits_of(model)
        trainer = train(ParameterDefenseTrainer, model, {"learning_rate": 0.0}, defense=MultiStepRisk(L2, steps=2))
        assert trainer.state.log_history[0]["corruption_norm"] == pytest.approx(0.2, rel=0.05)
        assert bits_of(model) == before

    @pytest.mark.slow
    def test_weights_learn(self, tiny_bert, train):
        trainer = train(
            ParameterDefenseTrainer,
            tiny_bert(dropout=0.0).to(torch.bfloat16),
            {"num_train_epochs": 6, "logging_strategy": "epoch"},
            defense=MultiStepRisk(L2, steps=2),
        )
        logs = [entry["loss_clean"] for entry in trainer.state.log_history if "loss" in entry]
        assert logs[-1] < 0.95 * logs[0]
