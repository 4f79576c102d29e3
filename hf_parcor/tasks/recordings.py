"""Recordings as examples, which are decoded when they are needed, and batches of what a model makes of them."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from hf_parcor.batches import IGNORED_LABEL
from hf_parcor.errors import InputError, one_line
from hf_parcor.evaluation.metrics.ctc import count_frames
from hf_parcor.evaluation.outputs import inside_adapters
from hf_parcor.tasks.audio import check_installed
from hf_parcor.tasks.rows import Rows
from hf_parcor.tasks.task import Example

logger = logging.getLogger(__name__)

RECORDING = ("audio", "speech", "recording", "file", "file_name", "path")
"""Well-known names of a column with recordings."""
_FEATURES_A_SECOND = 100  # Kaldi's, of the Audio Spectrogram Transformer


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
        self._padding = {"padding": True} if _pads_to_the_longest(extractor) else {}
        self._taken = set(inspect.signature(inside_adapters(model).forward).parameters)
        self._dtype = model.dtype

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
        inputs = {  # convolutions take numbers of their own precision alone
            name: value.to(self._dtype) if value.is_floating_point() else value
            for name, value in found.items()
            if name in self._taken
        }
        return {**inputs, "labels": stacked}


def _pads_to_the_longest(extractor: Any) -> bool:
    """Return whether recordings are to be padded to the longest of a batch: they get no length of the extractor's."""
    padding = inspect.signature(extractor.__call__).parameters.get("padding")
    return padding is not None and padding.default is False


def check_features(recordings: Recordings, extractor: Any) -> None:
    """Refuse recordings of which a model's feature extractor makes no features, as Kaldi's do of less than a window.

    Args:
        recordings: The data.
        extractor: The feature extractor.

    Raises:
        InputError: It makes none of the shortest.
    """
    rows, lengths = recordings.rows, recordings.lengths
    shortest = min(range(len(recordings)), key=lengths.__getitem__)
    try:
        extractor(recordings[shortest]["audio"], sampling_rate=extractor.sampling_rate)
    except (ValueError, AssertionError, RuntimeError) as error:
        raise InputError(
            f"{rows.source}: expected recordings of which the model's feature extractor makes features, got one of "
            f"{lengths[shortest]:g} seconds, the shortest, in row {rows.number(shortest)} ({one_line(error)}); leave "
            "such rows out"
        ) from error


def say_what_is_heard(recordings: Recordings, extractor: Any) -> None:
    """Say what a model does not hear of recordings, and what it hears that is none.

    Args:
        recordings: The data.
        extractor: The model's feature extractor, which may cut recordings, or pad them without a mask.
    """
    rows, lengths = recordings.rows, recordings.lengths
    most = _longest_heard(extractor)
    longer = 0 if most is None else sum(seconds > most for seconds in lengths)
    if longer:
        logger.warning(
            f"{rows.source}: {longer:,} of {len(recordings):,} recordings are longer than the {most:g} seconds that "
            "the model hears, and are cut: cut recordings and texts before."
        )
    unmasked = getattr(extractor, "return_attention_mask", None) is False
    if unmasked and _pads_to_the_longest(extractor) and len(set(lengths)) > 1:
        logger.warning(
            f"{rows.source}: the model hears what shorter recordings of a batch are padded with, as silence (its "
            "extractor returns no mask), so that numbers depend on the batch size a little; with 1 nothing is padded."
        )


def frames_heard(recordings: Recordings, model: Any) -> list[int] | None:
    """Return how many frames a model with a head for CTC, or for classes, makes of each recording.

    Args:
        recordings: The data.
        model: The model.

    Returns:
        The counts; None where they are not known before: of features, the extractor alone knows how many it makes.

    Raises:
        InputError: A recording is too short for a frame.
    """
    if model.main_input_name != "input_values":
        return None
    lengths = recordings.lengths
    frames = count_frames(model, torch.tensor([round(seconds * recordings.rate) for seconds in lengths]))
    if frames is None:
        return None
    for row, (count, seconds) in recordings.rows.numbered(zip(frames, lengths, strict=True)):
        if not count:
            raise InputError(
                f"{recordings.rows.source}: expected recordings of a frame of the model or more, got one of "
                f"{seconds:g} seconds in row {row}; leave such rows out"
            )
    return frames


def _longest_heard(extractor: Any) -> float | None:
    """Return after how many seconds an extractor cuts recordings; None if it does not."""
    samples, features = (getattr(extractor, name, None) for name in ("n_samples", "max_length"))
    if samples is not None:
        return float(samples / extractor.sampling_rate)
    return None if features is None else float(features / _FEATURES_A_SECOND)


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
