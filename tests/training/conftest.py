"""A tiny classifier and a handful of rows, and a way to train with either Trainer."""

from __future__ import annotations

import warnings
from dataclasses import fields

import pytest
import tiny
import torch
from trainings import QUIET, KeepGradients
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from hf_parcor import CorruptionConstraint, CorruptionRisk, GaussianNoise, GradientCorruption
from hf_parcor.defenses import DEFENSES


@pytest.fixture
def tiny_bert():
    def build(dropout: float = 0.1, **options):
        torch.manual_seed(0)
        config = BertConfig(
            **tiny.encoder(30, 16, inner=24),
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
            num_labels=3,
            **options,
        )
        return BertForSequenceClassification(config)

    return build


@pytest.fixture
def rows(labelled_rows):
    return labelled_rows


@pytest.fixture
def arguments(tmp_path):
    def build(kind=TrainingArguments, **options):
        defaults = {
            **QUIET,
            "output_dir": str(tmp_path),
            "logging_steps": 1,
            "per_device_train_batch_size": 4,
            "num_train_epochs": 1,
            "learning_rate": 1e-2,
        }
        return kind(**{**defaults, **options})

    return build


@pytest.fixture
def train(rows, arguments):
    """Train a model with a Trainer class; returns the trainer."""

    def run(trainer_class: type[Trainer], model, options=None, kind=TrainingArguments, **extra):
        trainer = trainer_class(
            model=model, args=arguments(kind, **(options or {})), train_dataset=extra.pop("rows", rows), **extra
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*")
            trainer.train()
        return trainer

    return run


@pytest.fixture
def defense_of():
    """Build a defense of the catalogue with its defaults, small enough to train with."""

    def build(name: str, **settings):
        kind = DEFENSES[name]
        if "constraint" in {setting.name for setting in fields(kind)}:
            settings.setdefault("constraint", CorruptionConstraint(epsilon=0.1))
        if kind is CorruptionRisk:
            settings.setdefault(
                "corruption", [GradientCorruption(CorruptionConstraint(epsilon=0.1)), GaussianNoise(0.02)]
            )
        return kind(**settings)

    return build


@pytest.fixture
def said(caplog):
    """Return a function that finds the warnings so far that hold a phrase."""
    return lambda phrase: [record.getMessage() for record in caplog.records if phrase in record.getMessage()]


@pytest.fixture
def keep_gradients():
    return KeepGradients()
