"""Train a detector of objects on images, with its parameters defended: Faster R-CNN, or any one of Transformers.

As Transformers' own example scripts: arguments as flags, or one JSON file as the only argument.

    python examples/train_detector.py --train_file train.npz --validation_file test.npz --model_type faster_rcnn \
        --image_size 640 --output_dir out --do_train --do_eval

Data are a data set of the Hub or a folder of images (`--dataset_name`), or local files, as `hf-parcor evaluate --task
object-detection` takes them. Without `--model_name_or_path` the model is new, of the kind `--model_type`, changed by
`--config_overrides`, of which Faster R-CNN needs torchvision. Without the defense: `--defense none`. With `--do_eval`
the robustness is measured too, and `robustness.json` is written beside the other results.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from modeling_faster_rcnn import FasterRCNNConfig
from torch.utils.data import DataLoader
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForObjectDetection,
    DetrImageProcessor,
    set_seed,
)
from transformers.trainer_utils import EvalLoopOutput

from hf_parcor import CorruptionEvaluator, ParameterDefenseTrainer, ParameterDefenseTrainingArguments
from hf_parcor.corruptions import corruptions_of_table_1
from hf_parcor.distributed.processes import MeasuringProcesses
from hf_parcor.evaluation import RobustnessArguments
from hf_parcor.evaluation.measurement import measure
from hf_parcor.programs import (
    NewEpoch,
    check_something_is_done,
    measure_and_save,
    push_if_asked,
    read_arguments,
    train_and_save,
)
from hf_parcor.tasks import TASKS, Encoding, Processed, Rows, load_rows
from hf_parcor.tasks.object_detection import detection_metric
from hf_parcor.training import checkpoint_to_resume

logger = logging.getLogger(__name__)
TASK = TASKS["object-detection"]


@dataclass
class ModelArguments:
    """Which model is trained."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "A detector on the Hub, or a local folder, to be fine-tuned. Not set: a new one."},
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the model on the Hub."})
    model_type: str = field(
        default=FasterRCNNConfig.model_type,
        metadata={"help": "The kind of a new model: faster_rcnn, yolos, detr, ..."},
    )
    config_overrides: str = field(
        default="{}",
        metadata={"help": 'What a new model\'s configuration has otherwise, as JSON: {"backbone": "resnet18"}'},
    )
    cache_dir: str | None = field(default=None, metadata={"help": "Where downloads are kept."})
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run the code that a model brings, as a saved Faster R-CNN does."}
    )


@dataclass
class DataArguments:
    """Which data it is trained on, and measured on."""

    dataset_name: str | None = field(
        default=None, metadata={"help": "A data set on the Hub, or a local folder of images with metadata.jsonl."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "The data set's configuration."})
    train_split: str = field(default="train", metadata={"help": "The data set's split to train on."})
    validation_split: str = field(default="validation", metadata={"help": "The data set's split to measure on."})
    train_file: str | None = field(
        default=None,
        metadata={"help": "A local file instead: an .npz with images, or .json(l) with the names of images' files."},
    )
    validation_file: str | None = field(default=None, metadata={"help": "A local file to measure on."})
    box_format: str | None = field(
        default=None,
        metadata={
            "help": "coco: boxes are (x, y, width, height); voc: (xmin, ymin, xmax, ymax). Not set: coco, or voc "
            "where the name of the column ends in xyxy."
        },
    )
    image_size: int | None = field(
        default=None,
        metadata={"help": "Images are resized to this longest side. Not set: 640, or what the model was saved with."},
    )
    flip: bool = field(default=True, metadata={"help": "Mirror half of the training images."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on the first so many."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Measure on the first so many."})


class Flipped:
    """Examples, of which each is mirrored or not in an epoch, as the seed, the epoch and its place alone decide.

    So it is the same on one process or many, with workers that read ahead, and after a checkpoint.

    Args:
        examples: All examples.
        seed: Of what is mirrored.
    """

    def __init__(self, examples: Sequence[dict[str, Any]], seed: int) -> None:
        self._examples = examples
        self._seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Draw which examples are mirrored in an epoch."""
        generator = torch.Generator().manual_seed((self._seed << 20) + epoch)
        self._mirrored = torch.rand(len(self), generator=generator) < 0.5

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = self._examples[index]
        if not self._mirrored[index]:
            return example
        image = example["image"].transpose(0)  # left to right
        annotations = []
        for one in example["annotations"]:
            x, y, width, height = one["bbox"]
            annotations.append({**one, "bbox": [image.width - x - width, y, width, height]})
        return {**example, "image": image, "annotations": annotations}


class DetectionTrainer(ParameterDefenseTrainer):
    """Measures boxes: they are of other numbers on each image, where the stock loop would join tensors."""

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """Return the batches that the task is measured on; gradients are taken on them, too."""
        images: Any = super().get_eval_dataloader(eval_dataset).dataset
        processed = Processed(self.model, self.processing_class)
        return TASK.batches(images, processed, self.args.eval_batch_size, self.args.dataloader_num_workers)

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Return average precision and loss; no predictions."""
        self.callback_handler.eval_dataloader = dataloader  # as in the stock loop: callbacks measure on the same data
        model: Any = self.model
        model.eval()
        metric = detection_metric(self.processing_class, dataloader)
        found = measure(model, metric, MeasuringProcesses.launched())  # each image once
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        images: Any = dataloader.dataset
        return EvalLoopOutput(None, None, metrics, len(images))  # type: ignore[arg-type]


def load_splits(data: DataArguments) -> dict[str, Rows]:
    """Return the rows of `train` and `validation` that there are."""
    files = {"train": data.train_file, "validation": data.validation_file}
    given = {split: file for split, file in files.items() if file is not None}
    if given:
        splits = {split: load_rows(file) for split, file in given.items()}
    elif data.dataset_name is None:
        raise ValueError("expected --dataset_name, or --train_file and --validation_file, got none; name the data")
    else:
        names = {"train": data.train_split, "validation": data.validation_split}
        splits = {split: load_rows(data.dataset_name, name, data.dataset_config_name) for split, name in names.items()}
    most = {"train": data.max_train_samples, "validation": data.max_eval_samples}
    return {split: rows.first(most[split]) for split, rows in splits.items()}


def load_model(arguments: ModelArguments, data: DataArguments, head: dict[str, Any]) -> tuple[Any, Any]:
    """Return a model for these classes, and what prepares its images."""
    side = data.image_size or 640
    size = {"max_height": side, "max_width": side}
    if arguments.model_name_or_path is None:
        overrides = json.loads(arguments.config_overrides)
        if arguments.model_type == "yolos":  # positions are learned for one size, and interpolated for others
            overrides = {"image_size": [side, side], **overrides}
        config = AutoConfig.for_model(arguments.model_type, **head, **overrides)
        model: Any = AutoModelForObjectDetection.from_config(config)  # type: ignore[no-untyped-call]
        return model, DetrImageProcessor(size=size)
    origin = {
        "cache_dir": arguments.cache_dir,
        "revision": arguments.model_revision,
        "trust_remote_code": arguments.trust_remote_code,
    }
    resized = {} if data.image_size is None else {"size": size}
    loader: Any = AutoImageProcessor
    processor = loader.from_pretrained(arguments.model_name_or_path, **origin, **resized)
    model = AutoModelForObjectDetection.from_pretrained(
        arguments.model_name_or_path, **head, ignore_mismatched_sizes=True, **origin
    )
    return model, processor


def main() -> None:
    """Train, evaluate, corrupt."""
    model_arguments, data, robustness, training = read_arguments(
        ModelArguments, DataArguments, RobustnessArguments, ParameterDefenseTrainingArguments
    )
    logger.info("processes: %d", training.world_size)
    check_something_is_done(training)
    training.remove_unused_columns = False  # the collator needs them all
    set_seed(training.seed)
    corruptions = robustness.read(corruptions_of_table_1())  # before minutes of training

    splits = load_splits(data)
    columns = {split: TASK.find_columns(rows, {}) for split, rows in splits.items()}
    # A model that is measured only keeps the classes that it knows.
    learns = training.do_train or model_arguments.model_name_or_path is None
    parts = [(rows, columns[split]) for split, rows in splits.items()]
    head = TASK.head_settings(parts) if learns else {}
    model, processor = load_model(model_arguments, data, head)
    processed = Processed(model, processor, Encoding(box_format=data.box_format))

    def prepare(split: str) -> Any:
        if split not in splits:
            raise ValueError(f"expected a split {split!r}, found {', '.join(splits)}; give --{split}_file")
        return TASK.examples(splits[split], columns[split], processed)

    train_examples = prepare("train") if training.do_train else None
    eval_examples = prepare("validation") if training.do_eval else None
    collator = TASK.collator(processed)
    metric = None
    if eval_examples is not None:  # before minutes of training, since it may lack a library
        workers = training.dataloader_num_workers
        batches = TASK.batches(eval_examples, processed, training.eval_batch_size, workers)
        metric = detection_metric(processor, batches)
    flipped = Flipped(train_examples, training.seed) if data.flip and train_examples is not None else None
    trainer = DetectionTrainer(
        model=model,
        args=training,
        train_dataset=train_examples if flipped is None else flipped,
        eval_dataset=eval_examples,
        processing_class=processor,
        data_collator=collator,
        callbacks=None if flipped is None else [NewEpoch(flipped)],
    )

    if train_examples is not None:
        train_and_save(trainer, checkpoint_to_resume(training), robustness, train_samples=len(train_examples))

    if eval_examples is not None and metric is not None:
        metrics = {**trainer.evaluate(), "eval_samples": len(eval_examples)}
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
        if not robustness.skip_corruptions:  # all processes measure together
            evaluator = CorruptionEvaluator(model, metric, progress=not training.disable_tqdm)
            measure_and_save(trainer, evaluator, corruptions, robustness, "map_50", "map_50")
    push_if_asked(trainer)


if __name__ == "__main__":
    main()
