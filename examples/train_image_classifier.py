"""Train a classifier of images with its parameters defended: any by name, or a small ResNet.

As Transformers' own example scripts: arguments as flags, or one JSON file as the only argument.

    python examples/train_image_classifier.py --resnet_depth 20 --train_file train.npz --validation_file test.npz \
        --output_dir out --do_train --do_eval --learning_rate 0.1 --per_device_train_batch_size 128 \
        --optim sgd --optim_args momentum=0.9,nesterov=True --weight_decay 1e-4 --lr_scheduler_type cosine \
        --num_train_epochs 200

Without the defense: `--defense none`. With `--resnet_weights FILE` the small ResNet begins with these weights; without
`--do_train` its folder is written all the same, with its code and an image processor, so that a file becomes a model
that loads by its name. With `--model_name_or_path` any image classifier of Transformers is fine-tuned.

Data are packs of images (.npz), strips without loss (.png, as a pattern), tables that name files, image folders, or a
data set on the Hub. All images are decoded once, into one array: a step then costs no decoding, and memory has to hold
them (CIFAR-10 in 150 MB; 50,000 images of 224 by 224 in 7.5 GB). In training each image is shifted and mirrored by
chance, as decided by seed, epoch and its place in the data alone: the same on one process or many, and after a
checkpoint.

With `--do_eval` the robustness is measured too, under the corruptions of paper 2, Table 1, unless `--corruptions`
names others, and `robustness.json` is written beside the other results.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from modeling_small_resnet import SmallResNetConfig, SmallResNetForImageClassification
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    EvalPrediction,
    set_seed,
)
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from hf_parcor import CorruptionEvaluator, ParameterDefenseTrainer, ParameterDefenseTrainingArguments
from hf_parcor.corruptions import corruptions_of_table_1
from hf_parcor.evaluation import ClassificationMetric, RobustnessArguments
from hf_parcor.programs import (
    NewEpoch,
    check_something_is_done,
    measure_and_save,
    push_if_asked,
    read_arguments,
    train_and_save,
)
from hf_parcor.tasks import ImageClassification, LabelledImages, Rows, decoded_images, load_rows
from hf_parcor.tasks.classification import label_numbers_of
from hf_parcor.training import checkpoint_to_resume

logger = logging.getLogger(__name__)
TASK = ImageClassification()


@dataclass
class ModelArguments:
    """Which model is trained: a small ResNet by its depth, or one of Transformers by its name."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "A model on the Hub, or a local folder."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the model on the Hub."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where downloads are kept."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that a model's folder holds."})
    resnet_depth: int | None = field(default=None, metadata={"help": "A small ResNet: 18, 34, 101, or 6n + 2."})
    resnet_weights: str | None = field(
        default=None, metadata={"help": "A safetensors file that the small ResNet begins with. Not set: by chance."}
    )


@dataclass
class DataArguments:
    """Which images it is trained and measured on, and how they are varied in training."""

    dataset_name: str | None = field(default=None, metadata={"help": "A data set on the Hub, or an image folder."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "The data set's configuration."})
    train_split: str = field(default="train", metadata={"help": "The data set's split to train on."})
    validation_split: str = field(default="validation", metadata={"help": "The data set's split to measure on."})
    train_file: str | None = field(
        default=None,
        metadata={"help": "A local .npz pack, .png strips, or a table of files, instead of the data set."},
    )
    validation_file: str | None = field(default=None, metadata={"help": "A local file to measure on."})
    image_column_name: str | None = field(default=None, metadata={"help": "The column with the image."})
    label_column_name: str | None = field(default=None, metadata={"help": "The column with the label."})
    image_size: int | None = field(
        default=None,
        metadata={"help": "Height and width of all images. Not set: what the model was made for, or as they are."},
    )
    crop_padding: int = field(
        default=4, metadata={"help": "In training, shift images by up to this many pixels, over black. 0: not at all."}
    )
    flip: bool = field(default=True, metadata={"help": "In training, mirror every second image, by chance."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on this many, drawn with the seed."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Measure on the first so many."})


class ImageBatches(Dataset[Mapping[str, Tensor]]):
    """Whole batches of images from one array.

    Args:
        images: All images.
        normalize: Mean and standard deviation of pixels in [0, 1], for a model that takes floats. None for one that
            takes bytes.
        crop_padding: Each image is shifted by up to so many pixels.
        flip: Whether every second image is mirrored.
        seed: Of shifts and mirrors. None for no variation at all.
    """

    def __init__(
        self,
        images: LabelledImages,
        normalize: tuple[Sequence[float], Sequence[float]] | None = None,
        crop_padding: int = 0,
        flip: bool = False,
        seed: int | None = None,
    ) -> None:
        self._padding = crop_padding if seed is not None else 0
        self._flip, self._seed = flip and seed is not None, seed
        pixels = torch.from_numpy(images.pixels)  # image, row, column, channel
        self._size = pixels.shape[1:3]
        sides = (self._padding, self._padding)
        self._pixels = torch.nn.functional.pad(pixels, (0, 0, *sides, *sides)) if self._padding else pixels
        self._labels = torch.from_numpy(images.labels)
        self._normalize = normalize and tuple(torch.tensor(values).view(1, -1, 1, 1) for values in normalize)
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Draw how each image is shifted and mirrored in an epoch."""
        count = len(self)
        if self._seed is None:
            self._shifts, self._mirrored = (
                torch.zeros(count, 2, dtype=torch.long),
                torch.zeros(count, dtype=torch.bool),
            )
            return
        generator = torch.Generator().manual_seed((self._seed << 20) + epoch)
        self._shifts = torch.randint(0, 2 * self._padding + 1, (count, 2), generator=generator)
        self._mirrored = (torch.rand(count, generator=generator) < 0.5) & self._flip

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> Mapping[str, Tensor]:
        return {name: values[0] for name, values in self.__getitems__([index])[0].items()}

    def __getitems__(self, indices: Sequence[int]) -> list[Mapping[str, Tensor]]:
        """Return one whole batch, for `whole_batch`."""
        chosen = torch.tensor(indices)
        height, width = self._size
        rows = self._shifts[chosen, 0, None] + torch.arange(height)
        columns = torch.arange(width).expand(len(chosen), -1)
        columns = torch.where(self._mirrored[chosen, None], columns.flip(-1), columns) + self._shifts[chosen, 1, None]
        pixels = self._pixels[chosen[:, None, None], rows[:, :, None], columns[:, None, :]]
        pixels = pixels.permute(0, 3, 1, 2).contiguous()
        if self._normalize is not None:
            mean, deviation = self._normalize
            pixels = (pixels.float() / 255 - mean) / deviation
        return [{"pixel_values": pixels, "labels": self._labels[chosen]}]


def whole_batch(batches: list[Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
    """Return the batch that `ImageBatches` has made already."""
    (batch,) = batches
    return batch


def load_data(data: DataArguments, splits: Sequence[str], seed: int) -> dict[str, Rows]:
    """Return the rows of the splits that are needed, `train` or `validation`; those to train on drawn with a seed."""
    found = {}
    for split in splits:
        file: str | None = getattr(data, f"{split}_file")
        source = file or data.dataset_name
        if source is None:
            raise ValueError(f"expected --{split}_file or --dataset_name, got neither; name the data")
        of_split = "train" if file else getattr(data, f"{split}_split")  # a file has no splits
        rows = load_rows(source, of_split, None if file else data.dataset_config_name)
        most = data.max_train_samples
        if split == "validation":
            rows = rows.first(data.max_eval_samples)
        elif most is not None and most < len(rows.entries):
            drawn = random.Random(seed).sample(range(len(rows.entries)), most)
            rows = rows.part(sorted(drawn), f"{most} drawn with seed {seed}")
        found[split] = rows
    return found


def load_model(model: ModelArguments, head: Mapping[str, Any], training: bool) -> tuple[Any, Any]:
    """Return a model and its image processor, which is None until the size of images is known.

    Args:
        model: Which.
        head: The classes of the data.
        training: Whether it will learn them; a model that is only measured keeps its own.
    """
    name, depth = model.model_name_or_path, model.resnet_depth
    if (depth is None) == (name is None):
        raise ValueError("expected --resnet_depth or --model_name_or_path, got both or neither; name one model")
    if depth is not None:
        resnet = SmallResNetForImageClassification(SmallResNetConfig(depth=depth, **head))
        if model.resnet_weights is not None:
            weights = load_file(model.resnet_weights)
            unfit = resnet.load_state_dict(weights, strict=False)
            missing = [name for name in unfit.missing_keys if not name.endswith("num_batches_tracked")]
            if missing or unfit.unexpected_keys:
                raise ValueError(
                    f"{model.resnet_weights}: expected the weights of a ResNet of {depth} layers, got "
                    f"{len(missing)} too few and {len(unfit.unexpected_keys)} others; name another depth or file"
                )
        return resnet, None
    origin = {
        "cache_dir": model.cache_dir,
        "revision": model.model_revision,
        "trust_remote_code": model.trust_remote_code,
    }
    settings = {**head, "ignore_mismatched_sizes": True} if training else {}
    loaded = AutoModelForImageClassification.from_pretrained(str(name), **origin, **settings)
    processors: Any = AutoImageProcessor
    return loaded, processors.from_pretrained(name, **origin)


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Return the share of right answers."""
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    return {"accuracy": float((logits.argmax(-1) == prediction.label_ids).mean())}


def main() -> None:
    """Train, evaluate, corrupt."""
    model_arguments, data, robustness, training = read_arguments(
        ModelArguments, DataArguments, RobustnessArguments, ParameterDefenseTrainingArguments
    )
    logger.info("processes: %d", training.world_size)
    if model_arguments.resnet_depth is None:  # a small ResNet is saved all the same
        check_something_is_done(training)
    set_seed(training.seed)
    corruptions = robustness.read(corruptions_of_table_1())  # before minutes of training

    asked = {"train": training.do_train, "validation": training.do_eval}
    splits = load_data(data, [split for split, needed in asked.items() if needed] or ["validation"], training.seed)
    named = {"image": data.image_column_name, "label": data.label_column_name}
    given = {role: name for role, name in named.items() if name is not None}
    columns = {split: TASK.find_columns(rows, given) for split, rows in splits.items()}
    head = TASK.head_settings([(rows, columns[split]) for split, rows in splits.items()])
    model, processor = load_model(model_arguments, head, training.do_train)

    side = data.image_size or _size_for(model, processor)
    size = None if side is None else (side, side)
    images = {
        split: decoded_images(rows, columns[split], label_numbers_of(model.config), size)
        for split, rows in splits.items()
    }
    if processor is None:  # what brings any picture to what this model sees, for whoever loads its folder
        height, width = next(iter(images.values())).pixels.shape[1:3]
        processor = ViTImageProcessorPil(
            size={"height": height, "width": width},
            image_mean=model.config.image_mean,
            image_std=model.config.image_std,
        )
    normalize = None if _takes_bytes(model) else (processor.image_mean, processor.image_std)
    train_rows = eval_rows = None
    if training.do_train:
        train_rows = ImageBatches(images["train"], normalize, data.crop_padding, data.flip, training.seed)
    if training.do_eval:
        eval_rows = ImageBatches(images["validation"], normalize)
    trainer = ParameterDefenseTrainer(
        model=model,
        args=training,
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        compute_metrics=accuracy,
        processing_class=processor,
        data_collator=whole_batch,
        callbacks=[NewEpoch(train_rows)] if train_rows is not None else None,
    )

    if train_rows is not None:
        train_and_save(trainer, checkpoint_to_resume(training), robustness, train_samples=len(train_rows))
    elif model_arguments.resnet_depth is not None and trainer.is_world_process_zero():
        model.save_pretrained(training.output_dir)
        processor.save_pretrained(training.output_dir)

    if eval_rows is not None:
        metrics = {**trainer.evaluate(), "eval_samples": len(eval_rows)}
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
        if not robustness.skip_corruptions:  # all processes measure together
            batches = DataLoader(eval_rows, batch_size=training.eval_batch_size, collate_fn=whole_batch)
            evaluator = CorruptionEvaluator(model, ClassificationMetric(batches), progress=not training.disable_tqdm)
            measure_and_save(trainer, evaluator, corruptions, robustness, "accuracy")
    push_if_asked(trainer)


def _takes_bytes(model: Any) -> bool:
    """Whether a model normalises pixels itself."""
    return bool(model.config.model_type == SmallResNetConfig.model_type)


def _size_for(model: Any, processor: Any) -> int | None:
    """Return the height and width that a model was made for, as far as it or its image processor says."""
    size = getattr(processor, "size", None)
    found = (size.get("height") or size.get("shortest_edge")) if size else getattr(model.config, "image_size", None)
    return int(found) if isinstance(found, int) else None


if __name__ == "__main__":
    main()
