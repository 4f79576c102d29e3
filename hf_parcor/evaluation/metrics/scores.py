"""Numbers from predictions and references: what any library computes, and those of sacrebleu, seqeval and jiwer."""

from __future__ import annotations

import importlib.metadata
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from hf_parcor.records.metric_info import POINTS, SHARE, MetricInfo, evaluate_module

_TAG = re.compile(r"[BIELSU]-.")
_SACREBLEU = {"bleu": "BLEU", "chrf": "CHRF", "ter": "TER"}


class Score(Protocol):
    """Compares predictions with references; the `compute` of a metric of `evaluate` is one."""

    def __call__(self, *, predictions: list[Any], references: list[Any]) -> Mapping[str, Any] | float | None:
        """Return numbers by name, or one number."""
        ...


def scored(score: Score, predictions: list[Any], references: list[Any]) -> dict[str, float]:
    """Return the numbers of a score by name, without the lists among them.

    One number without a name is `score`, or has the name of the metric of `evaluate` that it comes from.

    Raises:
        ValueError: It returned no number.

    Examples:
        >>> scored(lambda predictions, references: {"f1": 0.5, "of_each": [0.0, 1.0]}, ["a"], ["a"])
        {'f1': 0.5}
    """
    found: Any = score(predictions=predictions, references=references)
    named = found if isinstance(found, Mapping) else {evaluate_module(score) or "score": found}
    plain = {name: without_shape(value) for name, value in named.items()}
    numbers = {name: float(value) for name, value in plain.items() if isinstance(value, Real)}
    if not numbers:
        raise ValueError(f"score: expected a number, or numbers by name, got {found!r}; return {{'bleu': 31.4}}, say")
    return numbers


def without_shape(value: object) -> object:
    """Return a tensor or an array of one entry as its number, all else as it is.

    Examples:
        >>> import torch
        >>> without_shape(torch.tensor([0.5])), without_shape(np.array(0.5)), without_shape([0.5])
        (0.5, 0.5, [0.5])
    """
    if isinstance(value, (Tensor, np.ndarray, np.generic)) and math.prod(value.shape) == 1:
        number: object = value.item()
        return number
    return value


class SacrebleuScore:
    """Corpus BLEU, chrF or TER of texts by sacrebleu, with its signature as a note for the record.

    Args:
        kind: "bleu", "chrf" or "ter".
        **settings: Arguments of sacrebleu's own class, such as `lowercase=True`, `tokenize="zh"`, or `word_order=2`
            for chrF++.

    Raises:
        ValueError: There is no such kind.
        ImportError: sacrebleu is not installed.

    Examples:
        >>> score = SacrebleuScore("chrf")
        >>> score(predictions=["a good film"], references=["a good film"])
        {'chrf': 100.0}
        >>> score.notes
        ('sacrebleu signature of chrf: nrefs:1|case:mixed|eff:yes|nc:6|nw:0|space:no|version:...',)
    """

    def __init__(self, kind: str = "bleu", **settings: Any) -> None:
        if kind not in _SACREBLEU:
            raise ValueError(f"kind: expected one of {', '.join(_SACREBLEU)}, got {kind!r}; name one of them")
        try:
            from sacrebleu import metrics
        except ImportError as error:
            raise ImportError(
                "SacrebleuScore needs sacrebleu; install it with: pip install 'hf-parcor[translation]'"
            ) from error
        self._kind, self._metric = kind, getattr(metrics, _SACREBLEU[kind])(**settings)
        self._settings, self._version = settings, importlib.metadata.version("sacrebleu")
        self._scored = False

    def __call__(self, *, predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
        """Return the score of a corpus, in points of 100."""
        score = float(self._metric.corpus_score(list(predictions), [list(references)]).score)
        self._scored = True
        return {self._kind: score}

    def info_of(self, name: str) -> MetricInfo | None:
        """Return what the number means: points of 100; small is good for TER, large for the others."""
        return MetricInfo(self._kind != "ter", POINTS) if name == self._kind else None

    def identity(self) -> dict[str, Any]:
        """Return kind, settings and version, which determine the signature."""
        return {"kind": self._kind, "settings": self._settings, "version": self._version}

    @property
    def notes(self) -> tuple[str, ...]:
        """The signature, once a corpus was scored: it contains the number of references."""
        return (f"sacrebleu signature of {self._kind}: {self._metric.get_signature()}",) if self._scored else ()


class TranscriptScore:
    """Word and character error rate of transcripts, by jiwer: the edits that lead to the reference, by its length.

    Texts are compared as speech has them, in lower case, without punctuation and with single spaces: "Don't stop." is
    "dont stop". So models that write as people do and those that know capital letters alone are measured alike.

    Args:
        normalized: Whether they are. Default True; False compares every character.

    Raises:
        ImportError: jiwer is not installed.

    Examples:
        >>> TranscriptScore()(predictions=["a good Film"], references=["A good, good film."])
        {'wer': 0.25, 'cer': 0.3125}
        >>> TranscriptScore(normalized=False)(predictions=["a film"], references=["A film."])["wer"]
        1.0
    """

    names = ("wer", "cer")
    """Its numbers, shares of the words and of the characters of all references together; they can exceed 1."""

    def __init__(self, normalized: bool = True) -> None:
        try:
            import jiwer
        except ImportError as error:
            raise ImportError(
                "TranscriptScore needs jiwer; install it with: pip install 'hf-parcor[audio]'"
            ) from error
        library: Any = jiwer
        as_spoken = [library.ToLowerCase(), library.RemovePunctuation()] if normalized else []
        spaced = [*as_spoken, library.RemoveMultipleSpaces(), library.Strip()]
        self._library, self._normalized = library, normalized
        self._words = library.Compose([*spaced, library.ReduceToListOfListOfWords()])
        self._characters = library.Compose([*spaced, library.ReduceToListOfListOfChars()])

    def __call__(self, *, predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
        """Return both rates.

        Raises:
            ValueError: No reference has a word.
        """
        said, heard = list(references), list(predictions)
        if not any(self._words(said)):
            raise ValueError(f"references: expected a word in one of {len(said)}, got none; measure on other data")
        words = self._library.process_words(
            said, heard, reference_transform=self._words, hypothesis_transform=self._words
        )
        characters = self._library.process_characters(
            said, heard, reference_transform=self._characters, hypothesis_transform=self._characters
        )
        return {"wer": float(words.wer), "cer": float(characters.cer)}

    def info_of(self, name: str) -> MetricInfo | None:
        """Return what the numbers mean: shares; small is good."""
        return MetricInfo(False, SHARE) if name in self.names else None

    def identity(self) -> dict[str, Any]:
        """Return whether texts are normalized, and the version of jiwer."""
        return {"normalized": self._normalized, "version": importlib.metadata.version("jiwer")}

    @property
    def notes(self) -> tuple[str, ...]:
        """How texts are compared."""
        return ("transcripts are compared in lower case, without punctuation",) if self._normalized else ()


class EntityScore:
    """F1, precision and recall of entities by seqeval, and the accuracy of tags.

    An entity is right if its type and all its words are, as in the evaluation of CoNLL: one wrong tag makes the whole
    entity wrong. If there is no entity to find, or none was found, a score that would divide by zero is 0.

    Raises:
        ImportError: seqeval is not installed.

    Examples:
        >>> truth = [["B-PER", "I-PER", "O"], ["O", "B-LOC"]]
        >>> EntityScore()(predictions=[["B-PER", "O", "O"], ["O", "B-LOC"]], references=truth)
        {'f1': 0.5, 'precision': 0.5, 'recall': 0.5, 'accuracy': 0.8}
    """

    names = ("f1", "precision", "recall")
    """The scores of entities."""

    def __init__(self) -> None:
        try:
            from seqeval.metrics import sequence_labeling
        except ImportError as error:
            raise ImportError(
                "EntityScore needs seqeval; install it with: pip install 'hf-parcor[entities]'"
            ) from error
        self._library = sequence_labeling

    def __call__(
        self, *, predictions: Sequence[Sequence[str]], references: Sequence[Sequence[str]]
    ) -> dict[str, float]:
        """Return the scores of tags, one list a sentence. Tags are "O", or a type after "B-", "I-" and the like.

        Raises:
            ValueError: A tag is none of these.
        """
        check_tags({tag for sentence in (*predictions, *references) for tag in sentence})
        precision, recall, f1, _ = self._library.precision_recall_fscore_support(
            references, predictions, average="micro", zero_division=0
        )
        found = {"f1": float(f1), "precision": float(precision), "recall": float(recall)}
        return {**found, "accuracy": float(self._library.accuracy_score(references, predictions))}

    def info_of(self, name: str) -> MetricInfo | None:
        """Return what the numbers mean: shares; large is good."""
        return MetricInfo(True, SHARE) if name in (*self.names, "accuracy") else None

    def identity(self) -> dict[str, Any]:
        """Return the version of seqeval."""
        return {"version": importlib.metadata.version("seqeval")}


def check_tags(tags: Iterable[str]) -> None:
    """Refuse tags that name no entity.

    Raises:
        ValueError: One is neither "O" nor has a type behind "B-", "I-", "E-", "L-", "S-" or "U-".
    """
    other = sorted(tag for tag in tags if tag != "O" and not _TAG.match(tag))
    if other:
        raise ValueError(
            f"tags: expected those of entities, O, B-PER, I-PER and the like, got {other[0]!r}; measure the accuracy "
            "of other classes"
        )
