"""Classes of images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor

from hf_parcor.errors import InputError, one_line
from hf_parcor.tasks.classification import Classification
from hf_parcor.tasks.rows import Rows
from hf_parcor.tasks.task import Collator, Example, Processed, Role, load_pretrained


class ImageClassification(Classification):
    """The class of an image, which is decoded whenever it is needed; a local file names the images' files."""

    name = "image-classification"
    heads = ("ForImageClassification",)
    auto_class = "AutoModelForImageClassification"
    roles: ClassVar[Mapping[str, Role]] = {
        "image": Role(("image", "img", "picture", "file", "path")),
        "label": Role(("label", "labels", "fine_label", "class", "target")),
    }

    def load_processor(self, name: str, revision: str = "main") -> Any:
        """Return the model's image processor."""
        return load_pretrained("image processor", transformers.AutoImageProcessor, name, revision=revision)

    def examples(self, rows: Rows, columns: Mapping[str, str], processed: Processed) -> Sequence[Example]:
        """Return pixels and label of each row."""
        images: Any = _Images(rows, columns["image"], self._labels(rows, columns, processed), processed.processor)
        found: Sequence[Example] = images
        return found

    def collator(self, processed: Processed) -> Collator:
        """Return what stacks images, which are all of one size."""
        return _stacked


@dataclass(frozen=True)
class _Images:
    rows: Rows
    column: str
    labels: Sequence[int]
    processor: Any

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Example:
        image = self._opened(self.rows.entries[index][self.column], index).convert("RGB")
        pixels = self.processor(images=image, return_tensors="pt")["pixel_values"][0]
        return {"pixel_values": pixels, "labels": self.labels[index]}

    def _opened(self, image: Any, index: int) -> Any:
        if isinstance(image, int):  # a file by the name of a number, as tables are read
            image = str(image)
        if not isinstance(image, str):
            return image
        from PIL import Image

        try:
            return Image.open(Path(self.rows.source).parent / image)
        except OSError as error:
            raise InputError(
                f"{self.rows.source}: expected the file of an image in row {index + 1}, got {image!r} "
                f"({one_line(error)}); paths are relative to the data file"
            ) from error


def _stacked(examples: Sequence[Example]) -> dict[str, Tensor]:
    return {
        "pixel_values": torch.stack([example["pixel_values"] for example in examples]),
        "labels": torch.tensor([example["labels"] for example in examples]),
    }
