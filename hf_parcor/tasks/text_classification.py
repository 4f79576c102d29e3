"""Classes of one text, or of two."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from transformers import DataCollatorWithPadding

from hf_parcor.tasks.audio_classification import audio_classifiers
from hf_parcor.tasks.classification import Classification
from hf_parcor.tasks.rows import Rows
from hf_parcor.tasks.task import Collator, Example, Processed, Role, check_tokens, say_what_is_cut

_MAX_LENGTH = 128


class TextClassification(Classification):
    """The class of a text, or of a pair of texts."""

    name = "text-classification"
    heads = ("ForSequenceClassification",)
    auto_class = "AutoModelForSequenceClassification"
    takes = frozenset({"max_length", "prefix"})
    roles: ClassVar[Mapping[str, Role]] = {
        "text": Role(("sentence", "text", "sentence1", "premise", "question1", "question", "review", "content")),
        "second_text": Role(("sentence2", "hypothesis", "question2", "answer", "text_pair"), required=False),
        "label": Role(("label", "labels", "class", "target")),
    }

    def has_head(self, architectures: Sequence[str]) -> bool:
        """Return whether a model of these architectures classifies texts: some for recordings are named alike."""
        return super().has_head([name for name in architectures if name not in audio_classifiers()])

    def prepare(self, processed: Processed) -> None:
        """Name the model the token of its padding: a decoder looks for the last token that is another."""
        super().prepare(processed)
        processed.model.config.get_text_config().pad_token_id = processed.processor.pad_token_id

    def examples(self, rows: Rows, columns: Mapping[str, str], processed: Processed) -> Sequence[Example]:
        """Return tokens and label of each row."""
        labels = self._labels(rows, columns, processed)
        texts = [processed.encoding.prefix + text for text in rows.texts(columns["text"])]
        pairs = [texts]
        if "second_text" in columns:
            pairs.append(rows.texts(columns["second_text"]))
        length = processed.length(_MAX_LENGTH)
        encoded = processed.processor(*pairs, truncation=True, max_length=length)
        say_what_is_cut(rows, columns["text"], encoded, length)
        check_tokens(rows, columns["text"], encoded["input_ids"])
        names = list(encoded)
        return [
            {**dict(zip(names, values, strict=True)), "labels": label}
            for *values, label in zip(*encoded.values(), labels, strict=True)
        ]

    def collator(self, processed: Processed) -> Collator:
        """Return what pads texts to the longest of their batch."""
        return DataCollatorWithPadding(processed.processor)
