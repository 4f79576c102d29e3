"""Batches of tokens on 2 ranks through Accelerate: every sentence on one of them, once an epoch; also resumed."""

from __future__ import annotations

import pytest
import torch
from trainings import QUIET
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

from hf_parcor.translation import TokenBatchesMixin

pytestmark = pytest.mark.slow  # ranks are processes of their own

BOUND, COUNT = 40, 25
SETTINGS = {**QUIET, "num_train_epochs": 3, "save_strategy": "steps", "save_steps": 1}


class Recording(TokenBatchesMixin, Trainer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.seen = []

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.seen.append((inputs["number"].tolist(), tuple(inputs["input_ids"].shape)))
        return super().training_step(model, {k: v for k, v in inputs.items() if k != "number"}, num_items_in_batch)


class Stop(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


def collate(rows):
    longest = max(len(row["input_ids"]) for row in rows)
    tokens = [row["input_ids"] + [0] * (longest - len(row["input_ids"])) for row in rows]
    return {
        "input_ids": torch.tensor(tokens),
        "labels": torch.zeros(len(rows), dtype=torch.long),
        "number": torch.tensor([row["number"] for row in rows]),
    }


def trained(folder, stop=None, resume=None):
    """Train on this rank; returns what it saw, the steps of an epoch, and a sum of the weights."""
    torch.manual_seed(0)
    shape = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    model = BertForSequenceClassification(BertConfig(vocab_size=9, max_position_embeddings=16, **shape))
    rows = [{"number": n, "input_ids": [1 + n % 5] * (1 + n % 9), "labels": [0]} for n in range(COUNT)]
    arguments = TrainingArguments(folder, remove_unused_columns=False, **SETTINGS)
    trainer = Recording(model=model, args=arguments, train_dataset=rows, data_collator=collate, max_tokens=BOUND)
    if stop is not None:
        trainer.add_callback(Stop(stop))
    trainer.train(resume_from_checkpoint=resume)
    total = sum(float(p.double().sum()) for p in model.parameters())
    return trainer.seen, trainer.state.max_steps // 3, total


def test_two_ranks(run_on_ranks, tmp_path):
    ranks = run_on_ranks(trained, 2, str(tmp_path / "whole"))
    steps = ranks[0][1]
    assert {len(seen) for seen, *_ in ranks} == {3 * steps}, "as many batches on each"
    assert all(rows * longest <= BOUND for seen, *_ in ranks for _, (rows, longest) in seen)
    epochs = []
    for epoch in range(3):
        batches = [numbers for seen, *_ in ranks for numbers, _ in seen[epoch * steps : (epoch + 1) * steps]]
        assert sorted(number for numbers in batches for number in numbers) == list(range(COUNT))
        epochs.append(batches)
    assert epochs[0] != epochs[1]


@pytest.mark.slow
def test_resumed_within_an_epoch(run_on_ranks, tmp_path):
    whole = run_on_ranks(trained, 2, str(tmp_path / "whole"))
    stop = whole[0][1] + 1
    run_on_ranks(trained, 2, str(tmp_path / "cut"), stop)
    resumed = run_on_ranks(trained, 2, str(tmp_path / "cut"), None, str(tmp_path / "cut" / f"checkpoint-{stop}"))
    for (seen, _, total), (rest, _, after) in zip(whole, resumed, strict=True):
        assert rest == seen[stop:]
        assert after == total
