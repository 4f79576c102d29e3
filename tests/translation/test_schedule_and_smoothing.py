"""The schedule of Transformers against fairseq's formula, and label smoothing under the defense."""

from __future__ import annotations

import math

import pytest
import torch
from for_each import for_each
from longhand import longhand
from torch.nn import functional
from trainings import QUIET, KeepGradients
from transformers import DataCollatorForSeq2Seq, Seq2SeqTrainingArguments, get_scheduler

from hf_parcor import CorruptionConstraint, MultiStepRisk, Seq2SeqParameterDefenseTrainer
from hf_parcor.translation import TokenBatchesMixin

EPSILON, SMOOTHING = 0.05, 0.1


class Trainer(TokenBatchesMixin, Seq2SeqParameterDefenseTrainer):
    pass


@for_each("warmup", [8000, 4])
def test_inverse_square_root(warmup):
    """fairseq: peak · step / warmup, then peak · sqrt(warmup / step)."""
    peak = 0.0015
    parameter = torch.nn.Parameter(torch.zeros(1))
    schedule = get_scheduler("inverse_sqrt", torch.optim.Adam([parameter], lr=peak), num_warmup_steps=warmup)
    for step in (0, 1, warmup // 2, warmup - 1, warmup, warmup + 1, 4 * warmup, 25 * warmup + 3):
        expected = peak * step / warmup if step < warmup else peak * math.sqrt(warmup / step)
        assert peak * schedule.lr_lambdas[0](step) == pytest.approx(expected, rel=1e-12)


def smoothed(logits, labels, items):
    logarithms = functional.log_softmax(logits, -1)
    known = labels != -100
    right = logarithms.gather(-1, labels.clamp(min=0)[..., None])[..., 0][known]
    spread = logarithms.mean(-1)[known]
    return -((1 - SMOOTHING) * right + SMOOTHING * spread).sum() / items


def risk_gradient(model, batches, selected, items, steps):
    """The gradient of the mean of the smoothed losses at w + a_k, a_k from this micro-batch alone."""
    parts = []
    for batch in batches:
        inputs = {name: value for name, value in batch.items() if name != "labels"}

        def loss_of(call, inputs=inputs, labels=batch["labels"]):
            return smoothed(call(**inputs).logits, labels, items)

        parts.append(longhand(model, loss_of, [1 / (steps + 1)] * (steps + 1), EPSILON, selected))
    return {name: sum(part[name] for part in parts) for name in parts[0]}


class Keeping(Trainer):
    """Keeps the batches of an optimizer step."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.batches = []

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.batches.append({name: value.clone() for name, value in inputs.items()})
        return super().training_step(model, inputs, num_items_in_batch)


@pytest.mark.slow
@pytest.mark.parametrize("target", [None, "last-decoder-layer"])
@pytest.mark.parametrize("steps", [1, 2])
def test_smoothed_risk_against_longhand(tiny_model, tokenizer, rows, tmp_path, target, steps):
    model = tiny_model(dropout=0.0, attention_dropout=0.0, activation_dropout=0.0).double()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    arguments = Seq2SeqTrainingArguments(
        str(tmp_path), max_steps=1, gradient_accumulation_steps=2, label_smoothing_factor=SMOOTHING,
        max_grad_norm=0.0, **QUIET,
    )  # fmt: skip
    keep = KeepGradients()
    trainer = Keeping(
        model=model, args=arguments, train_dataset=rows[:12], max_tokens=40,
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
        defense=MultiStepRisk(CorruptionConstraint(epsilon=EPSILON), steps=steps), target_modules=target,
        callbacks=[keep],
    )  # fmt: skip
    trainer.train()
    assert (trainer.shared_prefix is not None) == (target is not None)
    tokens = [int((batch["labels"] != -100).sum()) for batch in trainer.batches]
    assert len(tokens) == 2
    assert tokens[0] != tokens[1], "a mean of means would show"
    model.load_state_dict(before)
    model.train()
    selected = [name for name in trainer.defended_parameters() if "embed_positions" not in name]
    expected = risk_gradient(model, trainer.batches, selected, sum(tokens), steps)
    for name, gradient in keep.kept[0].items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-6, atol=1e-9)
