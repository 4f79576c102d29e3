"""Detectors on two ranks, which share images that do not come in pairs: the example's Trainer, and an evaluator."""

from __future__ import annotations

from pathlib import Path

import pytest
from local_models import save_yolos, write_objects
from trainings import QUIET

pytestmark = pytest.mark.slow  # ranks are processes of their own


def evaluated(folder: str) -> list[dict[str, float]]:
    """Return what the example's Trainer finds on three images, and an evaluator, as they are and corrupted."""
    from torch.utils.data import DataLoader
    from train_detector import TASK, DetectionTrainer
    from transformers import AutoImageProcessor, AutoModelForObjectDetection

    from hf_parcor import (
        CorruptionConstraint,
        CorruptionEvaluator,
        GradientCorruption,
        ParameterDefenseTrainingArguments,
        Quantization,
    )
    from hf_parcor.tasks import Encoding, Processed, load_rows
    from hf_parcor.tasks.object_detection import detection_metric

    model = AutoModelForObjectDetection.from_pretrained(folder)
    processor = AutoImageProcessor.from_pretrained(folder)
    processed = Processed(model, processor, Encoding())
    rows = load_rows(str(Path(folder) / "rows.jsonl")).first(3)
    examples, collator = TASK.examples(rows, TASK.find_columns(rows, {}), processed), TASK.collator(processed)
    arguments = ParameterDefenseTrainingArguments(
        output_dir=folder, per_device_eval_batch_size=1, remove_unused_columns=False, **QUIET
    )
    trainer = DetectionTrainer(
        model=model, args=arguments, eval_dataset=examples, processing_class=processor, data_collator=collator
    )
    batches = DataLoader(examples, batch_size=1, collate_fn=collator)
    metric = detection_metric(processor, batches)
    corruptions = [Quantization(4), GradientCorruption(CorruptionConstraint(epsilon=0.5))]
    record = CorruptionEvaluator(model, metric, batches, progress=False).evaluate(corruptions)
    names = list(record.clean.metrics)
    of_trainer = trainer.evaluate()
    return [
        {name: of_trainer[f"eval_{name}"] for name in names},
        *({name: row.mean(name) for name in names} for row in (record.clean, *record.corruptions)),
    ]


def test_each_image_counts_once_and_nobody_waits(run_on_ranks, tmp_path):
    """The model divides its loss by the boxes of its own batch, though Transformers' takes the mean over all ranks."""
    save_yolos(tmp_path)
    write_objects(tmp_path / "rows.jsonl")
    (alone,) = run_on_ranks(evaluated, 1, str(tmp_path))
    assert alone[0] == pytest.approx(alone[1])
    assert len({rows["loss"] for rows in alone}) == 3
    for found in run_on_ranks(evaluated, 2, str(tmp_path), timeout=120.0):
        for row, expected in zip(found, alone, strict=True):
            assert row == pytest.approx(expected, rel=1e-4)
