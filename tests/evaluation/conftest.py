"""One corruption of every kind, for what must hold for all of them, and Trainers that evaluate a tiny classifier."""

from __future__ import annotations

import pytest
import torch
from trainings import QUIET, accuracy
from transformers import Trainer, TrainingArguments

from hf_parcor.corruptions import CORRUPTIONS, Corruption


@pytest.fixture(params=list(CORRUPTIONS))
def corruption(request: pytest.FixtureRequest, one_of_each: dict[str, Corruption]) -> Corruption:
    """Return each of them in turn."""
    return one_of_each[request.param]


@pytest.fixture
def model(tiny_bert):
    torch.manual_seed(0)
    return tiny_bert(vocab_size=30, num_labels=3, initializer_range=0.3)


@pytest.fixture
def rows(labelled_rows):
    return labelled_rows[:12]


@pytest.fixture
def make(rows, tmp_path, model):
    """Build a Trainer; keyword arguments that it does not take itself go to its arguments."""

    def build(kind: type[Trainer] = Trainer, *, trained=model, **options):
        parts = ("callbacks", "defense", "compute_loss_func", "compute_metrics")
        own = {name: options.pop(name) for name in parts if name in options}
        defaults = {
            **QUIET,
            "output_dir": str(tmp_path / "out"),
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 5,
            "max_steps": 4,
            "learning_rate": 1e-2,
        }
        data = {"train_dataset": rows, "eval_dataset": options.pop("eval_dataset", rows)}
        arguments = TrainingArguments(**{**defaults, **options})
        return kind(model=trained, args=arguments, **{"compute_metrics": accuracy, **own}, **data)

    return build
