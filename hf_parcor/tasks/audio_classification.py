"""Classes of recordings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, ClassVar

import transformers
from transformers.models.auto import modeling_auto

from hf_parcor.errors import InputError
from hf_parcor.evaluation.outputs import Problem, inside_adapters
from hf_parcor.tasks.classification import Classification, problem_of_model
from hf_parcor.tasks.recordings import (
    RECORDING,
    AudioCollator,
    Recordings,
    check_features,
    extractor_of,
    frames_heard,
    say_what_is_heard,
)
from hf_parcor.tasks.rows import Rows
from hf_parcor.tasks.task import Collator, Example, Processed, Role, load_processing

_OF_EVERY_PROBLEM = frozenset({"ASTForAudioClassification"})


@cache
def audio_classifiers() -> frozenset[str]:
    """Return the classes of Transformers that classify recordings; some are named as those of texts are."""
    return frozenset(modeling_auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES.values())


class AudioClassification(Classification):
    """The class of a recording, such as a word, a speaker or a sound; a local file names recordings."""

    name = "audio-classification"
    heads = ("ForAudioClassification",)
    auto_class = "AutoModelForAudioClassification"
    examples_are_inputs = False
    roles: ClassVar[Mapping[str, Role]] = {
        "audio": Role(RECORDING),
        "label": Role(("label", "labels", "class", "target", "command", "emotion", "speaker")),
    }

    def has_head(self, architectures: Sequence[str]) -> bool:
        """Return whether a model of these architectures classifies recordings."""
        return super().has_head(architectures) or not audio_classifiers().isdisjoint(architectures)

    def load_processor(self, name: str, **settings: Any) -> Any:
        """Return the model's feature extractor."""
        loaded = load_processing("feature extractor", transformers.AutoFeatureExtractor, name, **settings)
        return extractor_of(loaded, name)

    def examples(self, rows: Rows, columns: Mapping[str, str], processed: Processed) -> Sequence[Example]:
        """Return samples and label of each row."""
        problem, kind = problem_of_model(processed.model.config), type(inside_adapters(processed.model)).__name__
        if problem is not Problem.CLASSES and kind not in _OF_EVERY_PROBLEM:
            raise InputError(
                f"{rows.source}: expected one class for each recording, since the loss of {kind} is of classes alone, "
                f"got labels of a model for {problem.value} in column {columns['label']!r}; name another column"
            )
        labels = self._labels(rows, columns, processed)
        recordings = Recordings(rows, columns["audio"], processed.processor.sampling_rate, labels)
        check_features(recordings, processed.processor)
        say_what_is_heard(recordings, processed.processor)
        frames_heard(recordings, processed.model)  # refuses what has none
        found: Any = recordings
        examples: Sequence[Example] = found
        return examples

    def collator(self, processed: Processed) -> Collator:
        """Return what makes the model's inputs of samples."""
        return AudioCollator(processed.processor, processed.model)
