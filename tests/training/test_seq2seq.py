"""Defended translation models: the decoder's last layer alone, and generation during evaluation."""

from __future__ import annotations

import pytest
import tiny
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    Seq2SeqTrainer,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
)

from hf_parcor import (
    CorruptionConstraint,
    MultiStepRisk,
    Seq2SeqParameterDefenseTrainer,
    Seq2SeqParameterDefenseTrainingArguments,
)


def tiny_bart():
    return BartForConditionalGeneration(BartConfig(**tiny.seq2seq(30, 16, inner=24), dropout=0.0))


def tiny_t5():
    return T5ForConditionalGeneration(T5Config(**tiny.t5(30, 16, inner=24), dropout_rate=0.0))


def tokens(prediction):
    return {"tokens": float(prediction.predictions.sum())}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Using the model-agnostic default:UserWarning")
@pytest.mark.parametrize(("build", "layer"), [(tiny_bart, "decoder.layers.1."), (tiny_t5, "decoder.block.1.")])
def test_last_decoder_layer(build, layer, arguments):
    torch.manual_seed(0)
    model = build()
    rows = [{"input_ids": torch.randint(3, 30, (6,)), "labels": torch.randint(3, 30, (5,))} for _ in range(16)]
    trainer = Seq2SeqParameterDefenseTrainer(
        model=model,
        args=arguments(
            Seq2SeqParameterDefenseTrainingArguments,
            defense_target_modules=["last-decoder-layer"],
            predict_with_generate=True,
            num_train_epochs=5,
        ),
        train_dataset=rows,
        eval_dataset=rows,
        defense=MultiStepRisk(CorruptionConstraint(epsilon=0.1), steps=2),
        compute_metrics=tokens,
    )
    assert trainer.defended_parameters()
    assert all(layer in name for name in trainer.defended_parameters())
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert logs[-1]["loss_clean"] < logs[0]["loss_clean"]
    assert logs[0]["sharpness"] > 0
    stock = Seq2SeqTrainer(model=trainer.model, args=trainer.args, eval_dataset=rows, compute_metrics=tokens)
    ours, theirs = trainer.evaluate(), stock.evaluate()
    assert ours["eval_loss"] == theirs["eval_loss"]
    assert ours["eval_tokens"] > 0  # it generated


@pytest.mark.slow
def test_a_last_batch_of_fewer_rows_counts_for_as_many(arguments):
    torch.manual_seed(0)
    settings = arguments(Seq2SeqParameterDefenseTrainingArguments, per_device_eval_batch_size=4)
    rows = [{"input_ids": torch.randint(3, 30, (6,)), "labels": torch.randint(3, 30, (5,))} for _ in range(5)]
    model = tiny_t5()
    ours, plain, stock = (
        kind(model=model, args=settings, eval_dataset=rows).evaluate()["eval_loss"]
        for kind in (Seq2SeqParameterDefenseTrainer, Trainer, Seq2SeqTrainer)
    )
    assert ours == plain != stock
