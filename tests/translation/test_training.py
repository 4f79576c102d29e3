"""Training on batches of tokens: the bound, every sentence once, interrupted runs, and arms that share their start."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from for_each import for_each
from trainings import QUIET
from transformers import DataCollatorForSeq2Seq, TrainerCallback

from hf_parcor import (
    CorruptionConstraint,
    MultiStepRisk,
    Seq2SeqParameterDefenseTrainer,
    Seq2SeqParameterDefenseTrainingArguments,
)
from hf_parcor.translation import TokenBatchesMixin

BOUND = 60


class Recording(TokenBatchesMixin, Seq2SeqParameterDefenseTrainer):
    """Keeps what each micro-batch holds."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.seen = []

    def training_step(self, model, inputs, num_items_in_batch=None):
        labels = inputs["labels"].masked_fill(inputs["labels"] == -100, 1)
        self.seen.append((tuple(inputs["input_ids"].shape), tuple(labels.shape), labels.tolist()))
        return super().training_step(model, inputs, num_items_in_batch)


class Stop(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.fixture
def run(tiny_model, tokenizer, rows, tmp_path):
    def train(folder, *, resume=None, stop=None, target=None, defense=None, **options):
        arguments = Seq2SeqParameterDefenseTrainingArguments(
            str(tmp_path / folder), num_train_epochs=3, learning_rate=0.01, label_smoothing_factor=0.1,
            lr_scheduler_type="inverse_sqrt", warmup_steps=3, logging_steps=1, seed=3, **{**QUIET, **options},
        )  # fmt: skip
        model = tiny_model()
        trainer = Recording(
            model=model, args=arguments, train_dataset=rows, max_tokens=BOUND,
            data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
            **({"defense": defense, "target_modules": target} if defense else {}),
        )  # fmt: skip
        if stop is not None:
            trainer.add_callback(Stop(stop))
            with pytest.raises(KeyboardInterrupt):
                trainer.train()
        else:
            trainer.train(resume_from_checkpoint=resume)
        return trainer

    return train


def weights(trainer):
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def assert_same_bits(one, other):
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    assert [name for name, value in ours.items() if not torch.equal(value, theirs[name])] == []


@pytest.mark.slow
def test_bound_and_every_sentence_once(run, rows):
    trainer = run("plain", defense_steps=0)
    steps = trainer.state.max_steps // 3
    assert len(trainer.seen) == 3 * steps
    orders = []
    for epoch in range(3):
        batches = trainer.seen[epoch * steps : (epoch + 1) * steps]
        assert all(shape[0] * shape[1] <= BOUND for *shapes, _ in batches for shape in shapes)
        labels = [[token for token in row if token != 1] for *_, batch in batches for row in batch]
        assert sorted(labels) == sorted(row["labels"] for row in rows)
        orders.append(labels)
    assert orders[0] != orders[1]


def test_without_a_bound_batches_are_the_stock_ones(tiny_model, tokenizer, rows, tmp_path):
    arguments = Seq2SeqParameterDefenseTrainingArguments(str(tmp_path), per_device_train_batch_size=7, use_cpu=True)
    model = tiny_model()
    collate = DataCollatorForSeq2Seq(tokenizer, model=model)
    trainer = Recording(model=model, args=arguments, train_dataset=rows, data_collator=collate)
    sizes = [len(batch["labels"]) for batch in trainer.get_train_dataloader()]
    assert sizes == [7] * 8 + [4]


@pytest.mark.slow
def test_interrupted_within_an_epoch(run, tmp_path):
    accumulation = 2
    options = {"gradient_accumulation_steps": accumulation, "defense_epsilon": 0.05}
    whole = run("whole", **options)
    steps = whole.state.max_steps // 3
    stop = steps + 2
    run("cut", stop=stop, save_strategy="steps", save_steps=stop, **options)
    resumed = run("cut", resume=str(tmp_path / "cut" / f"checkpoint-{stop}"), **options)
    assert resumed.seen == whole.seen[stop * accumulation :]
    assert_same_bits(resumed, whole)


@pytest.fixture
def plain(run):
    return run("plain", defense_steps=0, save_strategy="epoch")


@pytest.mark.slow
@for_each("target", [None, "last-decoder-layer"])
def test_arms_share_the_epochs_before_the_defense_starts(run, plain, target):
    """From the plain run's checkpoint at the start epoch, or from the beginning: the same bits."""
    constraint = CorruptionConstraint(p=float("inf"), epsilon=0.002)
    defense = MultiStepRisk(constraint, steps=1, start_epoch=2)
    whole = run("whole", defense=defense, target=target)
    start = Path(plain.args.output_dir) / f"checkpoint-{plain.state.max_steps * 2 // 3}"
    shared = run("shared", defense=defense, target=target, resume=str(start))
    assert len(shared.seen) == len(plain.seen) // 3
    assert_same_bits(shared, whole)
    assert any(not torch.equal(value, weights(plain)[name]) for name, value in weights(shared).items())
    assert (shared.shared_prefix is not None) == (target is not None)


def test_a_sentence_longer_than_the_bound(tiny_model, tokenizer, rows, tmp_path):
    model = tiny_model()
    trainer = Recording(
        model=model,
        args=Seq2SeqParameterDefenseTrainingArguments(str(tmp_path), **QUIET),
        train_dataset=rows,
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
        max_tokens=4,
    )
    with pytest.raises(ValueError, match="max_tokens: expected room for each sentence"):
        trainer.train()
