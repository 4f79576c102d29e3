"""Classes of the words of a sentence: names, parts of speech."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch.utils.data import DataLoader
from transformers import DataCollatorForTokenClassification

from hf_parcor.batches import IGNORED_LABEL
from hf_parcor.errors import InputError
from hf_parcor.evaluation import BatchMetric, EntityScore, PredictionMetric
from hf_parcor.evaluation.metrics.scores import check_tags
from hf_parcor.tasks.classification import Classification
from hf_parcor.tasks.rows import Rows
from hf_parcor.tasks.task import Collator, Example, Processed, Role, check_tokens, say_what_is_cut

_MAX_LENGTH = 256


class TokenClassification(Classification):
    """The class of each word; where a word has several tokens, the first one counts."""

    name = "token-classification"
    heads = ("ForTokenClassification",)
    auto_class = "AutoModelForTokenClassification"
    takes = frozenset({"max_length"})
    of_words = True
    metrics = ("accuracy", *EntityScore.names, "loss")
    roles: ClassVar[Mapping[str, Role]] = {
        "words": Role(("tokens", "words", "form")),
        "label": Role(("ner_tags", "labels", "tags", "pos_tags", "upos", "label")),
    }

    def examples(self, rows: Rows, columns: Mapping[str, str], processed: Processed) -> Sequence[Example]:
        """Return tokens of each row, with the label of a word at its first token."""
        labels = self._labels(rows, columns, processed)
        words = rows.column(columns["words"])
        for row, (of_words, of_labels) in rows.numbered(zip(words, labels, strict=True)):
            if not isinstance(of_words, list) or not isinstance(of_labels, list) or len(of_words) != len(of_labels):
                raise InputError(
                    f"{rows.source}: expected a list of words and one of as many labels in each row, got "
                    f"{of_words!r} and {of_labels!r} in row {row}; name other columns, or convert the data to JSON"
                )
        texts = [[rows.text(word, columns["words"], row) for word in of_row] for row, of_row in rows.numbered(words)]
        length = processed.length(_MAX_LENGTH)
        before = {number: " " * _needs_space(processed.processor, "1" if number else "a") for number in (False, True)}
        encoded = processed.processor(
            [[*of_row[:1], *(before[word[:1].isnumeric()] + word for word in of_row[1:])] for of_row in texts],
            is_split_into_words=True,
            truncation=True,
            max_length=length,
        )
        say_what_is_cut(rows, columns["words"], encoded, length)
        check_tokens(rows, columns["words"], encoded["input_ids"])
        return [
            {
                **{name: values[index] for name, values in encoded.items()},
                "labels": _at_first_tokens(encoded.word_ids(index), labels[index]),
            }
            for index in range(len(words))
        ]

    def usual_metric(self, processed: Processed, batches: DataLoader[Any]) -> tuple[str, str]:
        """Return the F1 of entities where the classes are tags of them and seqeval is installed, else the accuracy."""
        usual, _ = super().usual_metric(processed, batches)
        try:
            check_tags(_tags(processed))
        except ValueError:
            return usual, ""
        try:
            EntityScore()
        except ImportError:
            return usual, (
                "the classes are tags of entities, and the accuracy of tags is mostly that of O; for the F1 of "
                "entities: pip install 'hf-parcor[entities]'"
            )
        return EntityScore.names[0], "the classes are tags of entities, so F1 is theirs; --metric accuracy is of tags"

    def metric(self, name: str, processed: Processed, batches: DataLoader[Any]) -> BatchMetric:
        """Return accuracy and loss of tags, the F1 of entities, or a metric of `evaluate`.

        Raises:
            InputError: The model's classes are no tags of entities, or seqeval is not installed.
        """
        if name not in EntityScore.names:
            return super().metric(name, processed, batches)
        tags = _tags(processed)
        try:
            check_tags(tags)
            return PredictionMetric(batches, EntityScore(), class_names=tags)
        except (ImportError, ValueError) as error:
            raise InputError(f"metric {name}: {error}") from error

    def collator(self, processed: Processed) -> Collator:
        """Return what pads tokens and labels to the longest of their batch."""
        return DataCollatorForTokenClassification(processed.processor)


def _needs_space(tokenizer: Any, word: str) -> bool:
    """Return whether a word is a part of the one before without a space, as to byte-level tokenizers such as GPT-2's.

    They were trained on texts, and so were the models; Transformers 5 no longer says so of words. Where a tokenizer
    puts the space before each word by itself (`add_prefix_space`), or has a token for it, words stay as they are.
    """
    apart, spaced = (
        tokenizer(words, is_split_into_words=True, add_special_tokens=False)["input_ids"]
        for words in (["a", word], ["a", f" {word}"])
    )
    of_text = tokenizer(f"a {word}", add_special_tokens=False)["input_ids"]
    return len(apart) == len(spaced) and apart != spaced == of_text


def _tags(processed: Processed) -> list[str]:
    """Return the names of the model's classes, in the order of their numbers."""
    names = processed.model.config.id2label
    return [names[number] for number in sorted(names)]


def _at_first_tokens(words: Sequence[Any], labels: Sequence[int]) -> list[int]:
    """Return a label for each token.

    Examples:
        >>> _at_first_tokens([None, 0, 0, 1, None], [7, 8])
        [-100, 7, -100, 8, -100]
    """
    before = [None, *words]
    return [
        IGNORED_LABEL if word is None or word == previous else labels[word]
        for previous, word in zip(before, words, strict=False)
    ]
