"""Boxes and classes of what images show."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor
from torch.utils.data import DataLoader

from hf_parcor.errors import InputError
from hf_parcor.evaluation import BatchMetric, DetectionMetric
from hf_parcor.evaluation.outputs import inside_adapters
from hf_parcor.tasks.classification import class_numbers, classes_of, label_numbers_of
from hf_parcor.tasks.rows import Rows
from hf_parcor.tasks.task import Collator, Example, Processed, Role, Task, load_processing

COCO, VOC = "coco", "voc"
_BOXES = ("bbox", "bboxes", "boxes", "boxes_xyxy", "bbox_xyxy")
_CLASSES = ("category", "categories", "category_id", "label", "labels", "class", "classes")
_CROWDS = ("iscrowd", "is_crowd")
_OBJECTS = "objects"


class ObjectDetection(Task):
    """Boxes with classes: of each image a list of boxes, and a list of as many classes.

    They stand in two columns, or in one that `datasets` calls `objects`, as a mapping of two lists or a list of
    mappings. Boxes are COCO's, (x, y, width, height) in pixels of the image, or VOC's, (xmin, ymin, xmax, ymax), where
    the column's name ends in `xyxy` or the encoding says so. An image may be without boxes. What lies beyond the
    image's edge is cut, as the field does it; a box that is no box, or lies outside of the image, is refused.

    A box around a crowd, where `iscrowd` is 1 as in COCO, is not trained on, and what is found there is no error.
    """

    name = "object-detection"
    heads = ("ForObjectDetection",)
    auto_class = "AutoModelForObjectDetection"
    roles: ClassVar[Mapping[str, Role]] = {
        "image": Role(("image", "img", "picture", "file_name", "file", "path")),
        "boxes": Role((*(f"{_OBJECTS}.{name}" for name in _BOXES), _OBJECTS, *_BOXES)),
        "label": Role((*(f"{_OBJECTS}.{name}" for name in _CLASSES), _OBJECTS, *_CLASSES)),
        "crowd": Role((*(f"{_OBJECTS}.{name}" for name in _CROWDS), *_CROWDS), required=False),
    }
    metrics = ("map", "map_50", "map_75", "mar_100", "loss")
    takes = frozenset({"box_format"})
    examples_are_inputs = False

    def load_processor(self, name: str, **settings: Any) -> Any:
        """Return the model's image processor."""
        return load_processing("image processor", transformers.AutoImageProcessor, name, **settings)

    def prepare(self, processed: Processed) -> None:
        """Refuse half precision, besides what a task refuses.

        Raises:
            InputError: Losses match boxes by distances that PyTorch does not compute there.
        """
        super().prepare(processed)
        if processed.model.dtype.itemsize < 4:
            kind = str(processed.model.dtype).removeprefix("torch.")
            raise InputError(
                f"dtype: expected float32 for {self.name}, whose losses match boxes by distances that PyTorch does "
                f"not compute in half precision, got {kind}; ask for float32"
            )

    def head_settings(self, parts: Sequence[tuple[Rows, Mapping[str, str]]]) -> dict[str, Any]:
        """Return the classes that the data has."""
        names = classes_of([(_objects(rows, columns), "label") for rows, columns in parts])
        numbers = {name: number for number, name in enumerate(names)}
        return {"num_labels": len(names), "id2label": dict(enumerate(names)), "label2id": numbers}

    def examples(self, rows: Rows, columns: Mapping[str, str], processed: Processed) -> Sequence[Example]:
        """Return image and annotations of each row; an image is opened whenever it is needed."""
        objects = _objects(rows, columns)
        labels = class_numbers(objects, "label", label_numbers_of(processed.model.config))
        form = processed.encoding.box_format or (VOC if columns["boxes"].endswith("xyxy") else COCO)
        if form not in (COCO, VOC):
            raise InputError(f"box_format: expected {COCO} or {VOC}, got {form!r}; name one of them")
        boxes = [
            [_checked(box, form, rows.source, row) for box in of_image]
            for row, of_image in objects.numbered(objects.column("boxes"))
        ]
        images: Any = AnnotatedImages(rows, columns["image"], boxes, labels, objects.column("crowd"))
        found: Sequence[Example] = images
        return found

    def collator(self, processed: Processed) -> Collator:
        """Return what makes pixels and targets of images and their boxes, by the model's image processor."""
        return DetectionCollator(processed.processor, processed.model)

    def smooths_labels(self, processed: Processed) -> bool:
        """Return that it cannot: which box found an object is the model's to say."""
        return False

    def batches(
        self, examples: Sequence[Example], processed: Processed, size: int, workers: int = 0
    ) -> DataLoader[Any]:
        """Return batches; where images are padded, of images of one size.

        Processors of DETR and its like make boxes shares of the padded image, and the models find shares of their own.
        """
        if not getattr(processed.processor, "do_pad", True):
            return super().batches(examples, processed, size, workers)
        images: Any = examples
        of_sizes: dict[tuple[int, int], list[int]] = {}
        for index in range(len(images)):
            of_sizes.setdefault(images.size(index), []).append(index)
        chosen = [
            of_size[start : start + size] for of_size in of_sizes.values() for start in range(0, len(of_size), size)
        ]
        return DataLoader(images, batch_sampler=chosen, collate_fn=self.collator(processed), num_workers=workers)

    def metric(self, name: str, processed: Processed, batches: DataLoader[Any]) -> BatchMetric:
        """Return average precision, recall and loss."""
        self.check_metric(name)
        return detection_metric(processed.processor, batches)


def detection_metric(processor: Any, batches: Any) -> DetectionMetric:
    """Return a metric that reads a detector's output as its image processor does.

    Raises:
        InputError: No image of `AnnotatedImages` has a box, but for crowds: known before a model is trained to be
            measured on them.
        ImportError: What computes average precision is not installed.
    """
    images = getattr(batches, "dataset", None)
    if isinstance(images, AnnotatedImages) and all(map(all, images.crowds)):
        raise InputError(
            f"{images.rows.source}: expected a box on one image at least, got none on {len(images)}; no detection can "
            "be right there: measure on other data"
        )
    read = getattr(processor, "post_process_object_detection", None)
    return DetectionMetric(batches) if read is None else DetectionMetric(batches, partial(_post_process, read))


def _post_process(read: Any, output: Any, sizes: list[tuple[int, int]]) -> Any:
    return read(output, threshold=0.0, target_sizes=sizes)  # the metric ranks them by their scores


def _objects(rows: Rows, columns: Mapping[str, str]) -> Rows:
    """Return rows with the columns `boxes`, `label` and `crowd`, lists of one length."""
    found = []
    for row, entry in rows.numbered(rows.with_columns(*(columns[role] for role in columns if role != "image"))):
        boxes = _part(rows, columns["boxes"], _BOXES, row, entry)
        labels = _part(rows, columns["label"], _CLASSES, row, entry)
        if len(boxes) != len(labels):
            raise InputError(
                f"{rows.source}: expected as many classes as boxes, got {len(labels)} and {len(boxes)} in row {row}; "
                "mend the data, or name other columns"
            )
        found.append({"boxes": boxes, "label": labels, "crowd": _crowds(rows, columns, row, entry, len(boxes))})
    names = rows.class_names.get(columns["label"])
    return replace(rows, entries=found, columns=tuple(found[0]), class_names={} if names is None else {"label": names})


def _crowds(rows: Rows, columns: Mapping[str, str], row: int, entry: Mapping[str, Any], count: int) -> list[bool]:
    """Return of each box of one row whether it is around a crowd; none is where nothing is said."""
    held = entry.get(columns["crowd"]) if "crowd" in columns else _by_name(entry.get(columns["boxes"]), _CROWDS)
    marks = [None] * count if held is None else held
    if not isinstance(marks, (list, tuple)) or len(marks) != count or any(mark not in (0, 1, None) for mark in marks):
        raise InputError(
            f"{rows.source}: expected 0 or 1 for each of {count} boxes, whether it is around a crowd, got {held!r} in "
            f"row {row}; mend the data"
        )
    return list(map(bool, marks))


def _part(rows: Rows, column: str, names: Sequence[str], row: int, entry: Mapping[str, Any]) -> list[Any]:
    """Return the list of boxes, or of classes, of one row."""
    value = entry.get(column)
    found = _by_name(value, names)
    found = value if found is None else found
    if not isinstance(found, (list, tuple)):
        raise InputError(
            f"{rows.source}: expected a list with an entry for each object, under one of {', '.join(names)} if there "
            f"are several, got {value!r} in column {column!r}, row {row}; an image without any has an empty list"
        )
    return list(found)


def _by_name(value: Any, names: Sequence[str]) -> Any:
    """Return what objects say under one of these names; None where they are no mapping, nor mappings."""
    if isinstance(value, Mapping):
        return _named(value, names)
    if isinstance(value, list) and value and all(isinstance(one, Mapping) for one in value):
        return [_named(one, names) for one in value]
    return None


def _named(values: Mapping[str, Any], names: Sequence[str]) -> Any:
    return next((values[name] for name in names if name in values), None)


def _checked(box: Any, form: str, source: str, row: int) -> list[float]:
    """Return a box as (x, y, width, height)."""
    try:
        first, second, third, fourth = numbers = [float(number) for number in box]
    except (TypeError, ValueError):
        numbers = []
    if not numbers or not all(map(math.isfinite, numbers)):
        raise InputError(f"{source}: expected four numbers for a box, got {box!r} in row {row}; mend the data")
    found = [first, second, third - first, fourth - second] if form == VOC else numbers
    if not (found[2] > 0 and found[3] > 0):
        said = "xmax > xmin and ymax > ymin" if form == VOC else "width > 0 and height > 0"
        raise InputError(
            f"{source}: expected a box with {said}, got {numbers} in row {row}; leave such boxes out, or say with the "
            f"box format whether they are {COCO}'s (x, y, width, height) or {VOC}'s (xmin, ymin, xmax, ymax)"
        )
    return found


@dataclass(frozen=True)
class AnnotatedImages:
    """Images with their boxes, opened when asked for: `image`, `annotations` as COCO has them, and `image_id`.

    Attributes:
        rows: The data.
        column: Where the images are.
        boxes: Of each image, as COCO has them.
        labels: The class of each box.
        crowds: Whether a box is around a crowd.
    """

    rows: Rows
    column: str
    boxes: Sequence[Sequence[Sequence[float]]]
    labels: Sequence[Sequence[int]]
    crowds: Sequence[Sequence[bool]]

    def __len__(self) -> int:
        return len(self.boxes)

    def size(self, index: int) -> tuple[int, int]:
        """Return width and height of an image."""
        return self.rows.image_size(self.column, index)

    def __getitem__(self, index: int) -> Example:
        image = self.rows.image(self.column, index)
        for x, y, width, height in self.boxes[index]:
            if x >= image.width or y >= image.height or x + width <= 0 or y + height <= 0:
                raise InputError(
                    f"{self.rows.source}: expected a box on the image of {image.width} x {image.height} pixels, got "
                    f"(x, y, width, height) = {(x, y, width, height)} in row {self.rows.number(index)}; boxes "
                    "are in pixels of this very image: mend the data"
                )
        annotations = [
            {"bbox": list(box), "category_id": label, "area": box[2] * box[3], "iscrowd": int(crowd)}
            for box, label, crowd in zip(self.boxes[index], self.labels[index], self.crowds[index], strict=True)
        ]
        return {"image": image, "annotations": annotations, "image_id": index}


class DetectionCollator:
    """Makes a batch of images with their annotations, as `AnnotatedImages` has them: pixels, and `labels`.

    Image processors of detectors drop crowds, which no model is trained on. What is measured has to know them, so they
    are beside what the processor makes: `crowd_boxes` and `crowd_labels`, where an image has some.

    Args:
        processor: An image processor of detectors.
        model: What it is for: of what the processor returns, it gets what its forward pass takes.
    """

    def __init__(self, processor: Any, model: Any) -> None:
        self._processor = processor
        self._taken = {*inspect.signature(inside_adapters(model).forward).parameters, "labels"}

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        """Return `pixel_values`, `labels`, and whatever else the model takes."""
        annotations = [
            {"image_id": example["image_id"], "annotations": example["annotations"]} for example in examples
        ]
        batch = self._processor(
            images=[example["image"] for example in examples], annotations=annotations, return_tensors="pt"
        )
        found = {name: value for name, value in batch.items() if name in self._taken}
        targets = [{**target, **_crowd_of(example)} for target, example in zip(found["labels"], examples, strict=True)]
        return {**found, "labels": targets}


def _crowd_of(example: Example) -> dict[str, Tensor]:
    """Return boxes around crowds as processors make boxes: cut at the edge, as center and size, in shares."""
    crowds = [one for one in example["annotations"] if one["iscrowd"]]
    if not crowds:
        return {}
    size = torch.tensor([*example["image"].size], dtype=torch.float32)
    boxes = torch.tensor([one["bbox"] for one in crowds], dtype=torch.float32)
    begin, end = ((corner / size).clamp(0, 1) for corner in (boxes[:, :2], boxes[:, :2] + boxes[:, 2:]))
    return {
        "crowd_boxes": torch.cat([(begin + end) / 2, end - begin], -1),
        "crowd_labels": torch.tensor([one["category_id"] for one in crowds]),
    }
