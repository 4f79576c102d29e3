"""Answers that stand in a text: where do they begin and end?"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding

from hf_parcor.errors import InputError
from hf_parcor.evaluation import BatchMetric, Question, QuestionAnsweringMetric
from hf_parcor.tasks.rows import Rows
from hf_parcor.tasks.task import Collator, Example, Processed, Role, Task, check_tokens

logger = logging.getLogger(__name__)

_MAX_LENGTH = 384
_OVERLAP = 128
_ANSWERS = "answers"
_TEXT, _START = "text", "answer_start"
_WHOLE_NUMBER = re.compile(r"-?[0-9]{1,15}(?:\.0+)?")
_POSITIONS = ("start_positions", "end_positions")

Answer = tuple[str, int]
"""A right answer, and where it begins, in characters of the text."""


class QuestionAnswering(Task):
    """The answer to a question as a part of a text, as in SQuAD; a text may have none.

    Right answers, and where they begin, stand in two columns, or in one that `datasets` calls `answers`: a mapping of
    two lists, `text` and `answer_start`, empty where the text has no answer. Of several the first one is trained on,
    and all are right.

    A text that is too long beside its question becomes several windows. Two of them share 128 tokens, or half of the
    room that a text has where that is less. Where an answer is not in a window, the token that is marked is [CLS].
    """

    name = "question-answering"
    heads = ("ForQuestionAnswering", "ForQuestionAnsweringSimple")
    auto_class = "AutoModelForQuestionAnswering"
    roles: ClassVar[Mapping[str, Role]] = {
        "question": Role(("question", "query")),
        "context": Role(("context", "passage", "paragraph", "document")),
        "answer": Role((f"{_ANSWERS}.{_TEXT}", _ANSWERS, "answer", "answer_text")),
        "start": Role((f"{_ANSWERS}.{_START}", _START, _ANSWERS, "start")),
    }
    takes = frozenset({"max_length"})
    metrics = ("f1", "exact_match", "loss")

    def load_processor(self, name: str, **settings: Any) -> Any:
        """Return the model's tokenizer.

        Raises:
            InputError: There is none, it cannot pad, or it does not know which characters its tokens stand for.
        """
        tokenizer = super().load_processor(name, **settings)
        if not tokenizer.is_fast:
            raise InputError(
                f"tokenizer: expected one that knows which characters its tokens stand for, got "
                f"{type(tokenizer).__name__}, written in Python; name a model with a tokenizer.json"
            )
        return tokenizer

    def head_settings(self, parts: Sequence[tuple[Rows, Mapping[str, str]]]) -> dict[str, Any]:
        """Return that two scores are needed, whatever classes the model had: of a begin, and of an end."""
        return {"num_labels": 2}

    def examples(self, rows: Rows, columns: Mapping[str, str], processed: Processed) -> Sequence[Example]:
        """Return the windows over the text of each row, behind its question; before it where padding comes first.

        Raises:
            InputError: An answer is not in its text, a text is empty, or a question leaves it no room.
        """
        questions, contexts = rows.texts(columns["question"]), rows.texts(columns["context"])
        answers = _answers(rows, columns, contexts)
        tokenizer, length = processed.processor, processed.length(_MAX_LENGTH)
        of_overlap: dict[int, list[int]] = {}
        for index, room in enumerate(_rooms(rows, columns["question"], questions, tokenizer, length)):
            of_overlap.setdefault(min(_OVERLAP, room // 2), []).append(index)
        windows: list[tuple[int, Example]] = []
        for overlap, indices in of_overlap.items():
            asked, read = ([texts[index] for index in indices] for texts in (questions, contexts))
            for source, inputs, spans in _windows(asked, read, tokenizer, length, overlap):
                index = indices[source]
                if not (spans[:, 1] > spans[:, 0]).any():
                    raise InputError(
                        f"{rows.source}: expected a token or more in each text of column {columns['context']!r}, got "
                        f"none in row {rows.number(index)}; leave such rows out"
                    )
                positions = zip(_POSITIONS, _positions(spans, next(iter(answers[index]), None)), strict=True)
                question = Question(index, contexts[index], spans, tuple(text for text, _ in answers[index]))
                windows.append((index, {**inputs, **dict(positions), "questions": question}))
        return [example for _, example in sorted(windows, key=lambda window: window[0])]

    def collator(self, processed: Processed) -> Collator:
        """Return what pads windows to the longest of their batch, and moves positions behind padding at the left."""
        return QuestionAnsweringCollator(processed.processor)

    def smooths_labels(self, processed: Processed) -> bool:
        """Return that it cannot: it knows of no labels, where a model takes positions."""
        return False

    def metric(self, name: str, processed: Processed, batches: DataLoader[Any]) -> BatchMetric:
        """Return exact match, F1 and loss.

        Raises:
            InputError: There is no such metric.
        """
        self.check_metric(name)
        return QuestionAnsweringMetric(batches)


class QuestionAnsweringCollator:
    """Makes a batch of windows: what the model takes, with positions of the answers, and `questions` if there are.

    Args:
        tokenizer: Pads.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._pad = DataCollatorWithPadding(tokenizer)

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        """Return a batch of all windows."""
        apart = (*_POSITIONS, "questions")
        inputs = [{name: one for name, one in example.items() if name not in apart} for example in examples]
        batch = dict(self._pad(inputs))
        width, at_left = batch["input_ids"].shape[1], self._pad.tokenizer.padding_side == "left"
        before = [(width - len(example["input_ids"])) * at_left for example in examples]
        for name in _POSITIONS:
            batch[name] = torch.tensor([one[name] + more for one, more in zip(examples, before, strict=True)])
        if "questions" in examples[0]:
            batch["questions"] = [example["questions"] for example in examples]
        return batch


def _answers(rows: Rows, columns: Mapping[str, str], contexts: Sequence[str]) -> list[tuple[Answer, ...]]:
    """Return the right answers of each row.

    Raises:
        InputError: There are not as many texts as places where they begin, or an answer is not in its text.
    """
    found: list[tuple[Answer, ...]] = []
    moved = 0
    entries = rows.with_columns(columns["answer"], columns["start"])
    for (row, entry), context in zip(rows.numbered(entries), contexts, strict=True):
        texts = _listed(entry.get(columns["answer"]), _TEXT)
        starts = [_number(start) for start in _listed(entry.get(columns["start"]), _START)]
        if len(texts) != len(starts) or not all(isinstance(start, int) for start in starts):
            raise InputError(
                f"{rows.source}: expected answers, and as many numbers of the characters where they begin, got "
                f"{texts!r} and {starts!r} in row {row}; mend the data, or name other columns"
            )
        answers: list[Answer] = []
        for start, text in zip(starts, (rows.text(text, columns["answer"], row) for text in texts), strict=True):
            if text:
                answers.append((text, _place(text, start, context, rows, row)))
                moved += answers[-1][1] != start
        found.append(tuple(answers))
    if moved:
        logger.warning(
            f"{rows.source}: {moved:,} answers do not begin where the data say; they were looked for in their texts, "
            "and the nearest place is taken."
        )
    return found


def _listed(value: Any, name: str) -> list[Any]:
    """Return the texts of answers, or their begins, in whatever form a row has them."""
    if isinstance(value, Mapping):
        value = value.get(name)
    if isinstance(value, list):
        return [one.get(name) if isinstance(one, Mapping) else one for one in value]
    return [] if value in (None, "") else [value]


def _number(start: Any) -> Any:
    """Return a whole number; a table where some cells are empty has texts, or fractions where pandas wrote it."""
    return int(float(start)) if _WHOLE_NUMBER.fullmatch(str(start)) else start


def _place(text: str, start: int, context: str, rows: Rows, row: int) -> int:
    """Return where an answer begins: where the data say, or else the nearest place, since many are off by a few.

    Raises:
        InputError: It is nowhere in the text.
    """
    if start >= 0 and context.startswith(text, start):
        return start
    places = [place for place in range(len(context)) if context.startswith(text, place)]
    if not places:
        raise InputError(
            f"{rows.source}: expected answers that are parts of their text, got {text!r} in row {row}, which is "
            "nowhere in it; mend the data, or leave such rows out"
        )
    return min(places, key=lambda place: abs(place - start))


def _rooms(rows: Rows, column: str, questions: Sequence[str], tokenizer: Any, length: int) -> Iterator[int]:
    """Yield how many tokens of the text fit beside each question.

    Raises:
        InputError: A question has no token, or too many.
    """
    around = tokenizer.num_special_tokens_to_add(pair=True)
    encoded = tokenizer(list(questions), add_special_tokens=False, verbose=False)["input_ids"]
    check_tokens(rows, column, encoded)
    for row, tokens in rows.numbered(encoded):
        room = length - around - len(tokens)
        if room < 1:
            raise InputError(
                f"{rows.source}: expected questions that leave room for their text within {length:,} tokens, got "
                f"{len(tokens):,} tokens of column {column!r} in row {row}; raise --max-length, or leave such rows out"
            )
        yield room


def _windows(
    questions: Sequence[str], contexts: Sequence[str], tokenizer: Any, length: int, overlap: int
) -> Iterator[tuple[int, Example, torch.Tensor]]:
    """Yield the windows over texts: the index of the text, what the model takes, and the characters of its tokens.

    Args:
        questions: What is asked of each text.
        contexts: The texts.
        tokenizer: Puts the question before the text, or behind it where it pads at the left.
        length: How many tokens a window has at most.
        overlap: How many tokens of a text two windows share.
    """
    at_left = tokenizer.padding_side == "left"
    encoded = tokenizer(
        *((contexts, questions) if at_left else (questions, contexts)),
        truncation="only_first" if at_left else "only_second",
        max_length=length,
        stride=overlap,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    sources, offsets = encoded.pop("overflow_to_sample_mapping"), encoded.pop("offset_mapping")
    for place, source in enumerate(sources):
        inputs = {name: values[place] for name, values in encoded.items()}
        of_context = [part == (0 if at_left else 1) for part in encoded.sequence_ids(place)]
        none = _token_of_none(inputs["input_ids"], of_context, tokenizer)
        yield source, inputs, _spans(offsets[place], of_context, none)


def _token_of_none(tokens: Sequence[int], of_context: Sequence[bool], tokenizer: Any) -> int:
    """Return which token is marked where there is no answer: [CLS], else the first one, else one of the question."""
    for name in ("cls_token_id", "bos_token_id"):
        if getattr(tokenizer, name, None) in tokens:
            return tokens.index(getattr(tokenizer, name))
    return of_context.index(False)


def _spans(offsets: Sequence[tuple[int, int]], of_context: Sequence[bool], none: int) -> torch.Tensor:
    """Return the characters of each token as `Question` has them; tokens without a character are none of the text."""
    spans = torch.tensor(
        [span if inside and span[1] > span[0] else (-1, -1) for span, inside in zip(offsets, of_context, strict=True)],
        dtype=torch.int32,
    )
    spans[none] = 0
    return spans


def _positions(spans: torch.Tensor, answer: Answer | None) -> tuple[int, int]:
    """Return the first and the last token of an answer; the token for none where it is not all in the window.

    Examples:
        >>> spans = torch.tensor([(0, 0), (-1, -1), (4, 8), (9, 12), (13, 20), (-1, -1)])
        >>> _positions(spans, ("was good", 9)), _positions(spans, ("The film", 0)), _positions(spans, None)
        ((3, 4), (0, 0), (0, 0))
    """
    if answer is not None:
        text, begin = answer
        inside = (spans[:, 1] > spans[:, 0]).nonzero()[:, 0]
        begins, ends = spans[inside].unbind(-1)
        if begins[0] <= begin and begin + len(text) <= ends[-1]:
            first, last = int(inside[ends > begin][0]), int(inside[begins < begin + len(text)][-1])
            if first <= last:  # between tokens, an answer has none
                return first, last
    none = int((spans == 0).all(-1).nonzero()[0, 0])
    return none, none
