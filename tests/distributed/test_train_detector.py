"""The example of a detector on two ranks, which share images that do not come in pairs."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest
from local_models import save_yolos, write_objects

pytestmark = [
    pytest.mark.slow,  # ranks are processes of their own
    pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning"),
]


def evaluated(folder: str) -> tuple[dict[str, float], dict[str, float]]:
    """Return what the example's Trainer finds on three images, and what one process finds on them by itself."""
    import transformers.loss.loss_for_object_detection as losses
    from torch.utils.data import DataLoader
    from train_detector import TASK, DetectionTrainer
    from transformers import AutoImageProcessor, AutoModelForObjectDetection

    from hf_parcor import ParameterDefenseTrainingArguments
    from hf_parcor.tasks import Encoding, Processed, load_rows
    from hf_parcor.tasks.object_detection import detection_metric

    model = AutoModelForObjectDetection.from_pretrained(folder)
    processor = AutoImageProcessor.from_pretrained(folder)
    processed = Processed(model, processor, Encoding())
    rows = load_rows(str(Path(folder) / "rows.jsonl")).first(3)
    examples, collator = TASK.examples(rows, TASK.find_columns(rows, {}), processed), TASK.collator(processed)
    arguments = ParameterDefenseTrainingArguments(
        output_dir=folder,
        per_device_eval_batch_size=1,
        remove_unused_columns=False,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = DetectionTrainer(
        model=model, args=arguments, eval_dataset=examples, processing_class=processor, data_collator=collator
    )
    metric = detection_metric(processor, DataLoader(examples, batch_size=1, collate_fn=collator))
    trainer.evaluate()  # ends, though the loss waits for the other ranks, which have another number of images
    losses.PartialState = Namespace(_shared_state={})  # and now that of a rank by itself, to compare
    return trainer.evaluate(), metric(model.eval())


def test_each_image_counts_once(run_on_ranks, tmp_path):
    save_yolos(tmp_path)
    write_objects(tmp_path / "rows.jsonl")
    for found, alone in run_on_ranks(evaluated, 2, str(tmp_path)):
        assert {name: found[f"eval_{name}"] for name in alone} == pytest.approx(alone, rel=1e-5)
