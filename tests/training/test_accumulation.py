"""Gradient accumulation: every micro-batch climbs along its own gradient, and the optimizer gets the mean."""

from __future__ import annotations

import pytest
import tiny
import torch
from longhand import longhand
from torch import nn
from trainings import UNMOVED, logs_of, stacked
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Trainer

from hf_parcor import ACRT, SAM, CorruptionConstraint, MultiStepRisk, ParameterDefenseTrainer

L2 = CorruptionConstraint(epsilon=0.2)
SPLITS = [(8, 1), (4, 2), (1, 8)]  # batch size x accumulation steps: the same 8 rows
# Each defense with the weights of its passes in the risk.
DEFENDED = {
    "multi_step_risk, K=1": (MultiStepRisk(L2, steps=1), [1 / 2, 1 / 2]),
    "multi_step_risk, K=2": (MultiStepRisk(L2, steps=2), [1 / 3, 1 / 3, 1 / 3]),
    "acrt": (ACRT(L2, alpha=0.3), [0.7, 0.3]),
    "sam": (SAM(L2), [0.0, 1.0]),
}


def mean_over_the_step(outputs, labels, num_items_in_batch=None):
    """A user's loss that keeps the contract: the sum over this micro-batch, divided by the rows of all of them."""
    return nn.functional.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch


@pytest.fixture
def gradient_of_one_step(train, keep_gradients):
    """Return the gradient that the optimizer gets after the given rows, in micro-batches of `size`."""

    def run(model, rows, size, defense, **extra):
        options = {
            **UNMOVED,
            "per_device_train_batch_size": size,
            "gradient_accumulation_steps": len(rows) // size,
        }
        keep_gradients.kept.clear()
        train(ParameterDefenseTrainer, model, options, rows=rows, callbacks=[keep_gradients], defense=defense, **extra)
        (kept,) = keep_gradients.kept
        return kept

    return run


def assert_same(first, second, rtol=1e-9, atol=1e-12):
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def distance(first, second):
    """Relative L2 distance of two gradients."""
    apart = sum((first[name] - second[name]).square().sum() for name in first)
    return float(torch.sqrt(apart / sum(part.square().sum() for part in first.values())))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size", "accumulation"),
    [(name, *split) for name in DEFENDED for split in SPLITS if split == (4, 2) or "K=2" in name],
)
def test_every_split_is_the_mean_of_the_risk_of_each_micro_batch(
    tiny_bert, rows, gradient_of_one_step, name, size, accumulation
):
    defense, weights = DEFENDED[name]
    reference = tiny_bert(dropout=0.0).double()
    kept = gradient_of_one_step(
        tiny_bert(dropout=0.0).double(), rows[:8], size, defense, compute_loss_func=mean_over_the_step
    )
    expected = {name: torch.zeros_like(part) for name, part in kept.items()}
    for start in range(0, 8, size):
        inputs = stacked(rows[start : start + size])
        labels = inputs.pop("labels")

        def loss_of(call, inputs=inputs, labels=labels):
            return nn.functional.cross_entropy(call(**inputs).logits, labels)

        part = longhand(reference, loss_of, weights)
        expected = {name: expected[name] + part[name] / accumulation for name in expected}
    assert_same(kept, expected)


class TestEqualAndUnequalSplits:
    """A corruption belongs to the rows that it was made from, so the split of a batch matters ("m-sharpness").

    With one row in each micro-batch every row is attacked on its own: the risk is larger, and its gradient another
    one, than with eight rows attacked together. Where no corruption is made, or all micro-batches agree on it, the
    split changes nothing, as in stock training.
    """

    @pytest.mark.parametrize(("size", "accumulation"), SPLITS[1:])
    @pytest.mark.parametrize(
        ("defense", "repeated"), [(MultiStepRisk(L2, steps=0), False), (MultiStepRisk(L2, steps=2), True)]
    )
    def test_equal_where_theory_says_so(
        self, tiny_bert, rows, gradient_of_one_step, size, accumulation, defense, repeated
    ):
        used = [rows[0]] * 8 if repeated else rows[:8]
        whole, split = (
            gradient_of_one_step(
                tiny_bert(dropout=0.0).double(), used, s, defense, compute_loss_func=mean_over_the_step
            )
            for s in (8, size)
        )
        assert_same(whole, split)

    def test_different_rows_climb_different_ways(self, tiny_bert, rows, gradient_of_one_step):
        """Measured here: 8x1 and 4x2 are 6 % apart, 8x1 and 1x8 are 22 %."""
        whole, half, single = (
            gradient_of_one_step(
                tiny_bert(dropout=0.0).double(),
                rows[:8],
                size,
                MultiStepRisk(L2, steps=1),
                compute_loss_func=mean_over_the_step,
            )
            for size, _ in SPLITS
        )
        assert 0.02 < distance(whole, half) < distance(whole, single)


def causal_model(kind):
    torch.manual_seed(0)
    if kind == "gpt2":
        return GPT2LMHeadModel(GPT2Config(**tiny.gpt2(30, 16), **tiny.STILL_GPT2))
    return LlamaForCausalLM(LlamaConfig(**tiny.decoder(30, 16, inner=24)))


@pytest.fixture
def unequal_rows():
    """Rows with 7, 1, 3, 0, 5 and 2 labels, so that a mean of means is not the mean over labels."""
    generator = torch.Generator().manual_seed(2)
    rows = []
    for labelled in (7, 1, 3, 0, 5, 2):
        tokens = torch.randint(3, 30, (8,), generator=generator)
        labels = tokens.clone()
        labels[: 8 - labelled] = -100
        rows.append({"input_ids": tokens, "attention_mask": torch.ones(8, dtype=torch.long), "labels": labels})
    return rows


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("size", [1, 3])
def test_causal_models_divide_by_the_labels_of_all_micro_batches(
    unequal_rows, gradient_of_one_step, train, kind, size
):
    """`num_items_in_batch` reaches each pass; a micro-batch without a label adds nothing, and no NaN."""
    defense, weights = DEFENDED["multi_step_risk, K=2"]
    reference = causal_model(kind).double()
    kept = gradient_of_one_step(causal_model(kind).double(), unequal_rows, size, defense)
    expected = {name: torch.zeros_like(part) for name, part in kept.items()}
    for start in range(0, 6, size):
        inputs = stacked(unequal_rows[start : start + size])
        labels = inputs.pop("labels")[:, 1:].reshape(-1)

        def loss_of(call, inputs=inputs, labels=labels):
            logits = call(**inputs).logits[:, :-1].reshape(-1, 30)
            return nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum") / 18

        part = longhand(reference, loss_of, weights)
        expected = {name: expected[name] + part[name] for name in expected}
    # The models' own loss is computed in float32.
    assert_same(kept, expected, rtol=1e-4, atol=1e-7)


class TakesNoNumberOfItems(nn.Module):
    """A model that the Trainer must divide the loss for."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)).double()

    def forward(self, input_ids, attention_mask=None, labels=None):
        logits = self.layers(input_ids.double() / 30)
        return {"loss": None if labels is None else nn.functional.cross_entropy(logits, labels), "logits": logits}


def test_last_step_of_an_epoch_with_fewer_micro_batches(rows, train, keep_gradients):
    """12 rows in micro-batches of 4, two a step: the second step has one micro-batch, and is divided by one."""
    defense, weights = DEFENDED["multi_step_risk, K=2"]
    options = {**UNMOVED, "gradient_accumulation_steps": 2}
    trainer = train(
        ParameterDefenseTrainer,
        TakesNoNumberOfItems(),
        options,
        rows=rows[:12],
        callbacks=[keep_gradients],
        defense=defense,
    )
    parts = []
    for start in (0, 4, 8):
        inputs = stacked(rows[start : start + 4])
        parts.append(longhand(TakesNoNumberOfItems(), lambda call, inputs=inputs: call(**inputs)["loss"], weights))
    first, second = keep_gradients.kept
    assert_same(first, {name: (parts[0][name] + parts[1][name]) / 2 for name in first})
    assert_same(second, parts[2])
    stock = train(Trainer, TakesNoNumberOfItems(), options, rows=rows[:12])
    ours, plain = logs_of(trainer), logs_of(stock)
    assert [entry["loss_clean"] for entry in ours] == pytest.approx([entry["loss"] for entry in plain])


def test_clean_loss_of_a_classifier_that_ignores_the_number_of_items_is_the_stock_one(tiny_bert, train):
    """BERT takes **kwargs, so the Trainer does not divide its loss, and BERT does not either: as in stock training."""
    options = {"gradient_accumulation_steps": 2, "learning_rate": 0.0}
    stock = train(Trainer, tiny_bert(dropout=0.0), options)
    ours = train(ParameterDefenseTrainer, tiny_bert(dropout=0.0), options, defense=MultiStepRisk(L2, steps=1))
    logs, plain = logs_of(ours), logs_of(stock)
    assert [entry["loss_clean"] for entry in logs] == pytest.approx([entry["loss"] for entry in plain], rel=1e-6)
