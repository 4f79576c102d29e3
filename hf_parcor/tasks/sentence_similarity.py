"""Texts that belong together: models of sentence-transformers, which embed each text by itself."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from hf_parcor.errors import InputError
from hf_parcor.evaluation import EmbeddingMetric
from hf_parcor.tasks.adapters import file_of
from hf_parcor.tasks.classification import numbers_of
from hf_parcor.tasks.rows import Rows
from hf_parcor.tasks.task import (
    Collator,
    Example,
    Processed,
    Role,
    Task,
    check_tokens,
    load_pretrained,
    say_what_is_cut,
)

SENTENCE_TRANSFORMER = "SentenceTransformer"
"""The class of such models, which stands in no configuration of Transformers."""

_SETTINGS = "config_sentence_transformers.json"
_MAX_LENGTH = 512
_LITTLE_MORE = 1.25  # a shared call saves more, where parts of the model are corrupted one after the other
_OF_SCORES = ("spearman", "pearson", "loss")
_OF_SEARCHES = ("ndcg@10", "accuracy@1", "mrr@10", "loss")


def is_sentence_transformer(name: str, revision: str | None = None) -> bool:
    """Return whether a model was saved as one of sentence-transformers that embeds each text as one vector.

    Args:
        name: A name on the Hub, or a local folder.
        revision: Its branch, tag or commit on the Hub.

    Raises:
        InputError: Its settings cannot be read.
    """
    try:
        if file_of(name, "modules.json", revision) is None:
            return False
        settings = file_of(name, _SETTINGS, revision)
    except OSError:  # nothing of that name: who loads it says so
        return False
    try:
        said = json.loads(Path(settings).read_text(encoding="utf-8")) if settings else {}
        return bool(said.get("model_type", SENTENCE_TRANSFORMER) == SENTENCE_TRANSFORMER)
    except (ValueError, AttributeError) as error:
        raise InputError(
            f"model: expected one of sentence-transformers with a JSON object in {_SETTINGS}, got {name!r} "
            f"({error}); save the model again"
        ) from error


class SentenceSimilarity(Task):
    """Which texts are alike: rows of two texts and a score, or of a query, a right document, and perhaps a wrong one.

    Texts get the prompts that the model was saved with, as `encode_query` and `encode_document` give them where there
    is no score, and as `encode` does where there is one; a prefix replaces them all.
    """

    name = "sentence-similarity"
    heads = (SENTENCE_TRANSFORMER,)
    auto_class = SENTENCE_TRANSFORMER
    roles: ClassVar[Mapping[str, Role]] = {
        "text": Role(("sentence1", "anchor", "query", "question", "sentence_a", "text1", "premise")),
        "second_text": Role(
            ("sentence2", "positive", "document", "passage", "answer", "sentence_b", "text2", "hypothesis")
        ),
        "negative": Role(("negative",), required=False),
        "score": Role(
            ("score", "similarity_score", "similarity", "relatedness_score", "label", "labels"), required=False
        ),
    }
    metrics = tuple(dict.fromkeys((*_OF_SEARCHES, *_OF_SCORES)))
    takes = frozenset({"max_length", "prefix"})
    trained_by = "SentenceTransformerTrainer"

    def load_model(self, name: str, *, to_train: bool = False, **settings: Any) -> Any:
        """Return a model of sentence-transformers, on the CPU or where a `device_map` says; adapters are its own.

        Raises:
            InputError: There is no such model, or sentence-transformers is not installed.
        """
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise InputError(
                f"model: expected sentence-transformers, which {name!r} was saved by, got an ImportError; install it "
                "with: pip install 'hf-parcor[embeddings]'"
            ) from error

        def from_pretrained(name: str, revision: Any = None, trust_remote_code: Any = None, **settings: Any) -> Any:
            origin = {"revision": revision, "trust_remote_code": bool(trust_remote_code)}
            return SentenceTransformer(name, device="cpu", model_kwargs=settings, **origin)

        loader = SimpleNamespace(__name__=SENTENCE_TRANSFORMER, from_pretrained=from_pretrained)
        return load_pretrained("model", loader, name, **settings)

    def load_processor(self, name: str, **settings: Any) -> Any:
        """Return None: the model has its tokenizer."""
        return None

    def prepare(self, processed: Processed) -> None:
        """Let the model cut texts to the length that is asked for.

        Raises:
            InputError: As `Task.prepare`, or the model has not so many positions.
        """
        super().prepare(processed)
        model = processed.model
        if processed.encoding.max_length is not None:
            model.max_seq_length = processed.length(processed.encoding.max_length)

    def examples(self, rows: Rows, columns: Mapping[str, str], processed: Processed) -> Sequence[Example]:
        """Return the texts of each row, a number for each of them, and the score.

        Raises:
            InputError: A row has no text, or no score, where others have one; or each query is its own document, so
                that there is nothing to find.
        """
        of_texts = [column for role, column in columns.items() if role != "score"]
        if "score" in columns and "negative" in columns:
            raise InputError(
                f"{rows.source}: expected a score of two texts, or a wrong document beside a right one, got both, in "
                f"columns {columns['score']!r} and {columns['negative']!r}; take one of the columns out of the data"
            )
        texts = [rows.texts(column) for column in of_texts]
        for column, of_column in zip(of_texts, texts, strict=True):
            _check_tokens(rows, column, of_column, processed)
        numbers = {text: number for number, text in enumerate(dict.fromkeys(chain(*texts)))}
        found: list[Example] = [
            {"texts": of_row, "ids": [numbers[text] for text in of_row]} for of_row in zip(*texts, strict=True)
        ]
        if "score" in columns:
            scores = _scores(rows, columns["score"])
            return [{**example, "label": score} for example, score in zip(found, scores, strict=True)]
        if all(query == document for query, document in zip(*texts[:2], strict=True)):
            raise InputError(
                f"{rows.source}: expected a document that is not its query in one row at least, got the same texts in "
                f"columns {of_texts[0]!r} and {of_texts[1]!r}; name other columns"
            )
        return found

    def collator(self, processed: Processed) -> Collator:
        """Return what makes inputs of the texts of some rows, as the model does when it encodes them."""
        return EmbeddingCollator(processed.model, processed.encoding.prefix)

    def batches(
        self, examples: Sequence[Example], processed: Processed, size: int, workers: int = 0
    ) -> DataLoader[Any]:
        """Return batches of texts of like length, made once for all walks through them."""
        ordered = sorted(examples, key=lambda example: sum(map(len, example["texts"])))
        parts = [ordered[start : start + size] for start in range(0, len(ordered), size)]
        collate = EmbeddingCollator(processed.model, processed.encoding.prefix, together=_are_alike(parts))
        made: Any = [collate(part) for part in parts]
        return DataLoader(made, batch_size=None)

    def usual_metric(self, processed: Processed, batches: DataLoader[Any]) -> tuple[str, str]:
        """Return the rank correlation where there are scores, else the gain of searches."""
        return _metrics_of(batches)[0], ""

    def metric(self, name: str, processed: Processed, batches: DataLoader[Any]) -> EmbeddingMetric:
        """Return the metric of embeddings.

        Raises:
            InputError: There is no such metric, or it is for other data.
        """
        self.check_metric(name)
        known = _metrics_of(batches)
        if name not in known:
            having = "a score in each row" if known == _OF_SCORES else "no score in the rows"
            raise InputError(
                f"metric: expected one of {', '.join(known)} where there is {having}, got {name!r}; name one of them"
            )
        return EmbeddingMetric(batches)


def _scores(rows: Rows, column: str) -> list[float]:
    """Return the scores of a column; the numbers of two classes are scores, too."""
    names = rows.class_names.get(column, ())
    if len(names) > 2:
        raise InputError(
            f"{rows.source}: expected scores of how alike texts are, got the classes {', '.join(names)} in column "
            f"{column!r}; name another column with --column score=NAME, or leave this one out of the data"
        )
    return numbers_of(rows, column, "of how alike its texts are")


def _metrics_of(batches: DataLoader[Any]) -> tuple[str, ...]:
    return _OF_SCORES if "labels" in next(iter(batches)) else _OF_SEARCHES


def _check_tokens(rows: Rows, column: str, texts: Sequence[str], processed: Processed) -> None:
    """Refuse texts without a token, and say how many are cut, where the model has a tokenizer of Transformers."""
    tokenizer = getattr(processed.model, "tokenizer", None)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        return
    length = processed.length(processed.model.max_seq_length or _MAX_LENGTH)
    encoded = tokenizer(list(texts), truncation=True, max_length=length)
    say_what_is_cut(rows, column, encoded, length)
    check_tokens(rows, column, encoded["input_ids"])


def _are_alike(parts: Sequence[Sequence[Example]]) -> bool:
    """Return whether the texts of all columns can be padded to one length for little more in all."""
    padded = apart = 0
    for part in parts:
        longest = [max(map(len, column)) for column in zip(*(example["texts"] for example in part), strict=True)]
        padded += len(part) * len(longest) * max(longest)
        apart += len(part) * sum(longest)
    return padded <= _LITTLE_MORE * apart


class EmbeddingCollator:
    """Makes batches for an `EmbeddingMetric` of rows with `texts`, `ids`, and perhaps a `label`.

    Args:
        model: Of sentence-transformers, which knows its tokenizer and its prompts.
        prefix: Put before each text instead of the model's prompts; "" for these.
        together: Whether columns with the same prompt are one input, padded to one length, so that one call of the
            model embeds them.
    """

    def __init__(self, model: Any, prefix: str = "", *, together: bool = False) -> None:
        self._model, self._prefix, self._together = model, prefix, together

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        """Return `ids`, `inputs`, and `labels` if the rows have one."""
        labelled = "label" in examples[0]
        columns = zip(*(example["texts"] for example in examples), strict=True)
        texts: list[tuple[str | None, list[str]]] = []
        for place, column in enumerate(columns):
            prompt = self._prompt(None if labelled else place > 0)
            if self._together and texts and texts[-1][0] == prompt:
                texts[-1][1].extend(column)
            else:
                texts.append((prompt, list(column)))
        inputs = {
            f"texts {number}": self._model.preprocess(some, prompt=prompt)
            for number, (prompt, some) in enumerate(texts, start=1)
        }
        labels = {"labels": torch.tensor([example["label"] for example in examples])} if labelled else {}
        return {"ids": torch.tensor([example["ids"] for example in examples]), "inputs": inputs, **labels}

    def _prompt(self, is_document: bool | None) -> str | None:
        """Return what stands before a document, a query, or a text that may be either (None)."""
        if self._prefix:
            return self._prefix
        prompts: Mapping[str, str] = self._model.prompts
        names = {None: (), True: ("document", "passage", "corpus"), False: ("query",)}[is_document]
        named = next((name for name in names if name in prompts), self._model.default_prompt_name)
        return prompts.get(named) if named is not None else None
