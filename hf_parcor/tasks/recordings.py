"""Recordings as examples, which are decoded when they are needed, and batches of what a model makes of them."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from hf_parcor.batches import IGNORED_LABEL
from hf_parcor.errors import InputError
from hf_parcor.tasks.audio import check_installed
from hf_parcor.tasks.rows import Rows
from hf_parcor.tasks.task import Example

RECORDING = ("audio", "speech", "recording", "file", "file_name", "path")
"""Well-known names of a column with recordings."""


@dataclass(frozen=True)
class Recordings:
    """Recordings with their labels, decoded when asked for: `audio`, samples at a rate, and `labels`.

    Attributes:
        rows: The data.
        column: Where the recordings are.
        rate: Samples a second.
        labels: Of each recording: the number of its class, or tokens of its text.
        lengths: How long each is, in seconds.

    Raises:
        InputError: One cannot be read.
    """

    rows: Rows
    column: str
    rate: int
    labels: Sequence[Any]
    lengths: Sequence[float] = field(init=False)

    def __post_init__(self) -> None:
        found = [self.rows.audio_seconds(self.column, index) for index in range(len(self))]
        object.__setattr__(self, "lengths", found)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Example:
        return {"audio": self.rows.audio(self.column, index, self.rate), "labels": self.labels[index]}


class AudioCollator:
    """Makes a batch of `Recordings`: what the model's feature extractor makes of their samples, and `labels`.

    Where the extractor does not bring recordings to one length of its own, they are padded to the longest. Labels of
    several tokens are padded with −100.

    Args:
        extractor: A feature extractor of sound.
        model: What it is for: of what the extractor returns, it gets what its forward pass takes.
    """

    def __init__(self, extractor: Any, model: Any) -> None:
        self._extractor = extractor
        padding = inspect.signature(extractor.__call__).parameters.get("padding")
        self._padding = {"padding": True} if padding is not None and padding.default is False else {}
        self._taken = set(inspect.signature(model.forward).parameters)

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        """Return the inputs of the model, and `labels`."""
        sounds = [example["audio"] for example in examples]
        rate = self._extractor.sampling_rate
        found = self._extractor(sounds, sampling_rate=rate, return_tensors="pt", **self._padding)
        labels = [torch.as_tensor(example["labels"]) for example in examples]
        stacked = (
            torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=IGNORED_LABEL)
            if labels[0].ndim
            else torch.stack(labels)
        )
        return {**{name: value for name, value in found.items() if name in self._taken}, "labels": stacked}


def extractor_of(processor: Any, name: str) -> Any:
    """Return the feature extractor of a processor of sound.

    Args:
        processor: What `AutoProcessor` or `AutoFeatureExtractor` loaded.
        name: The model, for the message.

    Raises:
        InputError: It has none that says its sampling rate, or what reads recordings is not installed.
    """
    try:
        check_installed()
    except ImportError as error:
        raise InputError(str(error)) from error
    extractor = getattr(processor, "feature_extractor", processor)
    if not getattr(extractor, "sampling_rate", None):
        raise InputError(
            f"processor: expected one for sound, with a sampling rate, got {type(extractor).__name__} of {name!r}; "
            "save the model's feature extractor beside it"
        )
    return extractor
