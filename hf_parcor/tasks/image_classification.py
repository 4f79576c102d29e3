"""Classes of images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
import transformers
from torch import Tensor

from hf_parcor.errors import InputError
from hf_parcor.tasks.classification import Classification, class_numbers
from hf_parcor.tasks.images import LabelledImages, Size, stacked_pixels
from hf_parcor.tasks.rows import Rows
from hf_parcor.tasks.task import Collator, Example, Processed, Role, load_processing


class ImageClassification(Classification):
    """The class of an image, which is decoded whenever it is needed; a local file names images, or holds them."""

    name = "image-classification"
    heads = ("ForImageClassification",)
    auto_class = "AutoModelForImageClassification"
    roles: ClassVar[Mapping[str, Role]] = {
        "image": Role(("image", "img", "picture", "file_name", "file", "path")),
        "label": Role(("label", "labels", "fine_label", "class", "target")),
    }

    def load_processor(self, name: str, **settings: Any) -> Any:
        """Return the model's image processor."""
        return load_processing("image processor", transformers.AutoImageProcessor, name, **settings)

    def examples(self, rows: Rows, columns: Mapping[str, str], processed: Processed) -> Sequence[Example]:
        """Return pixels and label of each row."""
        images: Any = _Images(rows, columns["image"], self._labels(rows, columns, processed), processed.processor)
        found: Sequence[Example] = images
        return found

    def collator(self, processed: Processed) -> Collator:
        """Return what stacks images, which are all of one size."""
        return partial(_stacked, dtype=processed.model.dtype)


def decoded_images(
    rows: Rows, columns: Mapping[str, str], label_numbers: Mapping[str, int], size: Size | None = None
) -> LabelledImages:
    """Return all images of some rows in one array, decoded once, and their classes, for whoever walks through often.

    Args:
        rows: The data.
        columns: The columns of `image` and `label`, as `find_columns` returns them.
        label_numbers: The numbers of the model's classes, by their names.
        size: Height and width that all images are brought to. Default None: as they are, of one size.

    Raises:
        InputError: An image cannot be decoded or has another size, or a label is unknown to the model.
    """
    labels = np.array(class_numbers(rows, columns["label"], label_numbers), dtype=np.int64)
    held = rows.entries
    if isinstance(held, LabelledImages) and size in (None, held.pixels.shape[1:3]):
        return replace(held, labels=labels, names=())
    opened = (rows.image(columns["image"], index) for index in range(len(labels)))
    return LabelledImages(stacked_pixels(opened, len(labels), rows.source, size), labels)


@dataclass(frozen=True)
class _Images:
    rows: Rows
    column: str
    labels: Sequence[int]
    processor: Any

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Example:
        image = self.rows.image(self.column, index)
        pixels = self.processor(images=image, return_tensors="pt")["pixel_values"][0]
        return {"pixel_values": pixels, "labels": self.labels[index]}


def _stacked(examples: Sequence[Example], dtype: torch.dtype) -> dict[str, Tensor]:
    sizes = {tuple(example["pixel_values"].shape): None for example in examples}
    if len(sizes) > 1:
        raise InputError(
            f"pixel_values: expected images that the image processor brings to one size, got "
            f"{' and '.join(map(str, sizes))} in one batch; set its size to a height and a width, or let it crop "
            "(do_center_crop)"
        )
    return {
        "pixel_values": torch.stack([example["pixel_values"] for example in examples]).to(dtype),
        "labels": torch.tensor([example["labels"] for example in examples]),
    }
