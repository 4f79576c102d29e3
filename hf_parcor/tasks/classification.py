"""What classifiers of sequences, tokens and images share: labels as the model takes them, and their metrics."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

from torch.utils.data import DataLoader

from hf_parcor.errors import InputError, nearest
from hf_parcor.evaluation import BatchMetric, ClassificationMetric, PredictionMetric
from hf_parcor.evaluation.outputs import Problem, stated_problem
from hf_parcor.tasks.rows import Rows
from hf_parcor.tasks.task import Processed, Task, library_score

# As numbers are usually written: "01" is a code, "+1" and "-0" are names like any other. Zeros behind the point make
# no other number of it, since JSON files and tables write 1 as 1.0 where a column once had fractions.
_WHOLE_NUMBER = re.compile(r"(0|-?[1-9][0-9]{0,17})(?:\.0+)?")
_LIKE_A_NUMBER = re.compile(r"([+-]?[0-9]{1,18})(?:\.0+)?")


def class_numbers(rows: Rows, column: str, label_numbers: Mapping[str, int]) -> list[Any]:
    """Return the labels of a column as numbers, where a value is a label or a list of labels.

    A label is looked up among the model's names as it is written, so that 2 is the class "2" of a model that counts
    stars from 1. If there is no such name, a number is that of the model's class, unless the model has other numbers
    for names. At last, names are compared whatever their case. A file's kind makes no difference: "2" is 2.

    Where the data have names for their numbers, these names are looked up: the two may count in another order. If the
    model knows none of them, or knows some by the same numbers, numbers are those of the model's classes.

    Args:
        rows: The data.
        column: Where the labels are.
        label_numbers: The model's, of `label_numbers_of`.

    Raises:
        InputError: A label is missing, unknown to the model, out of range, or may mean several classes.
    """
    classes = _Classes(label_numbers)
    names = rows.class_names.get(column, ())
    of_names = [classes.named(name) for name in names]
    as_in_data = all(found in ([], [index]) for index, found in enumerate(of_names))
    numbers: dict[str, list[int]] = {}  # of token labels there are many, of different ones few

    def number(label: Any, row: int) -> int:
        shown = repr(label)
        if names and isinstance(label, int) and not isinstance(label, bool):
            known = 0 <= label < len(names)
            found = of_names[label] if known else []
            if known and not found and as_in_data and label in classes.numbers:
                found = [label]
            shown = f"{label} = {names[label]}" if known else shown
        else:
            text = _text(rows, column, label, row)
            if text is not None and text not in numbers:
                numbers[text] = classes.named(text, numbered=True)
            found = [] if text is None else numbers[text]
        if len(found) == 1:
            return found[0]
        at = f"got {shown} in column {column!r}, row {row}"
        if found:
            meant = " or ".join(f"{name} = {entry}" for name, entry in label_numbers.items() if entry in found)
            raise InputError(
                f"{rows.source}: expected a label that means one class, {at}, which may be {meant}; write it as the "
                "model does"
            )
        raise InputError(
            f"{rows.source}: expected a label of the model ({_shown(label_numbers)}), {at}"
            f"{nearest(str(label), list(label_numbers))}; choose data with labels, or name their column"
        )

    values = rows.column(column)
    return [
        [number(label, row) for label in value] if isinstance(value, (list, tuple)) else number(value, row)
        for row, value in rows.numbered(values)
    ]


def label_numbers_of(config: Any) -> dict[str, int]:
    """Return the numbers of a model's classes by their names.

    They are those of `id2label`, as everywhere in Transformers; a configuration may lack `label2id`, or have there
    what a model had before its classes got names.

    Examples:
        >>> from transformers import BertConfig
        >>> label_numbers_of(BertConfig(id2label={0: "bad", 1: "good"}))
        {'bad': 0, 'good': 1}
    """
    given = {name: int(number) for name, number in (config.label2id or {}).items()}
    return {**given, **{name: number for number, name in config.id2label.items()}}


def classes_of(columns: Sequence[tuple[Rows, str]]) -> list[str]:
    """Return the names of the classes that columns have, for a model that is to learn them.

    Names come in the data's order where these have one, else sorted. A number is the name of a class as well, and
    only those that occur are: 0 and 100000 are two classes.

    Args:
        columns: Rows with the name of their column; of training first, which decides where data have names.

    Raises:
        InputError: A row has no label, or a negative one.
    """
    rows, column = columns[0]
    if column in rows.class_names:
        return list(rows.class_names[column])
    names: set[str] = set()
    for rows, column in columns:
        for row, label in _labels(rows, column):
            text = _text(rows, column, label, row)
            if text is None:
                raise InputError(
                    f"{rows.source}: expected names or numbers, or lists of these, got {label!r} in column "
                    f"{column!r}, row {row}; name another column"
                )
            names.add(_plain(text))
    numbers = [int(name) for name in names if _WHOLE_NUMBER.fullmatch(name)]
    if len(numbers) < len(names):
        return sorted(names)
    if min(numbers, default=0) < 0:  # what the Hub's data have where a label is held back
        raise InputError(
            f"{rows.source}: expected labels from 0 on, got {min(numbers)} in column {column!r}; choose data with "
            "labels, or write names for them"
        )
    return [str(number) for number in sorted(numbers)]


class _Classes:
    """A model's classes by what a label may say."""

    def __init__(self, label_numbers: Mapping[str, int]) -> None:
        names = {str(name): number for name, number in label_numbers.items()}
        self.numbers = frozenset(names.values())
        # Names may be alike: each way to write them leads to all that are written so.
        self._by_form = [
            (form, _grouped((form(name), number) for name, number in names.items()))
            for form in (str, _plain, _in_lower_case)
        ]
        # In a model that calls its first class "01", a 1 may be this name, from a table that dropped the zero, as well
        # as the number of its second class.
        like_numbers = [(_LIKE_A_NUMBER.fullmatch(name.strip()), number) for name, number in names.items()]
        self._counts_otherwise = any(found and int(found[1]) != number for found, number in like_numbers)

    def named(self, text: str, numbered: bool = False) -> list[int]:
        """Return the classes that a text may mean: one, if all is well.

        Args:
            text: A label, as it is written.
            numbered: Whether a number may be that of a class.
        """
        for form, numbers in self._by_form:
            if form is _in_lower_case and numbered and not self._counts_otherwise:
                whole = _WHOLE_NUMBER.fullmatch(_plain(text))
                if whole and int(whole[1]) in self.numbers:
                    return [int(whole[1])]
            if form(text) in numbers:
                return numbers[form(text)]
        return []


def _plain(text: str) -> str:
    """Return a label without space around it, and a whole number without a point.

    Examples:
        >>> _plain(" good "), _plain("1.0"), _plain("01"), _plain("1.5")
        ('good', '1', '01', '1.5')
    """
    text = text.strip()
    whole = _WHOLE_NUMBER.fullmatch(text)
    return whole[1] if whole else text


def _in_lower_case(text: str) -> str:
    return _plain(text).lower()


def _grouped(pairs: Iterable[tuple[str, int]]) -> dict[str, list[int]]:
    grouped: dict[str, list[int]] = {}
    for text, number in pairs:
        grouped.setdefault(text, []).append(number)
    return grouped


def _labels(rows: Rows, column: str) -> Iterator[tuple[int, Any]]:
    for row, value in rows.numbered(rows.column(column)):
        for label in _of_row(value):
            yield row, label


def _of_row(value: Any) -> Sequence[Any]:
    """Return the labels of a row, which may have one without a list."""
    return value if isinstance(value, (list, tuple)) else [value]


def _text(rows: Rows, column: str, label: Any, row: int) -> str | None:
    """Return a label as a file has it, or None for what is no label.

    Raises:
        InputError: There is no label: an empty cell, or what stands for one in JSON and tables.
    """
    if label is None or label != label or (isinstance(label, str) and not label.strip()):  # NaN differs from itself
        raise InputError(
            f"{rows.source}: expected a label in each row, got {label!r} in column {column!r}, row {row}; leave such "
            "rows out, or name the label that they have"
        )
    if isinstance(label, bool):
        return "true" if label else "false"  # as JSON has it; Python takes it for a number
    return str(label) if isinstance(label, (str, int, float)) else None


def _shown(names: Mapping[str, int]) -> str:
    shown: Sequence[str] = [f"{name} = {number}" for name, number in list(names.items())[:8]]
    return ", ".join(shown) + ("…" if len(names) > 8 else "")


# What is measured of each kind of labels, the usual number first.
_METRICS = {
    Problem.CLASSES: ("accuracy", "loss"),
    Problem.LABELS: ("f1", "accuracy", "loss"),
    Problem.NUMBERS: ("pearson", "mse", "loss"),
}


class Classification(Task):
    """A task whose labels are classes of the model: one a row, or any number of them; or numbers, of a regression.

    Attributes:
        of_words: Whether a row has a class for each of its words.
    """

    metrics: ClassVar[tuple[str, ...]] = _METRICS[Problem.CLASSES]
    of_words: ClassVar[bool] = False

    def head_settings(self, parts: Sequence[tuple[Rows, Mapping[str, str]]]) -> dict[str, Any]:
        """Return the classes that the data has, and how many a row; or of numbers with fractions a regression."""
        columns = [(rows, columns["label"]) for rows, columns in parts]
        problem = Problem.CLASSES if self.of_words else _problem_of_data(columns)
        if problem is Problem.NUMBERS:
            return {"num_labels": 1, "problem_type": problem.value}
        names = classes_of(columns)
        if problem is Problem.CLASSES and len(names) < 2:
            rows, column = columns[0]
            raise InputError(
                f"{rows.source}: expected two classes or more, got {names[0]!r} alone in column {column!r}; name "
                "another column, or other data"
            )
        numbers = {name: number for number, name in enumerate(names)}
        return {
            "num_labels": len(names),
            "id2label": dict(enumerate(names)),
            "label2id": numbers,
            "problem_type": problem.value,  # of one class a row too: a model without its head remembers another
        }

    def usual_metric(self, processed: Processed, batches: DataLoader[Any]) -> tuple[str, str]:
        """Return the accuracy; the F1 where a row has any number of classes, and of numbers Pearson's correlation."""
        return _METRICS[problem_of_model(processed.model.config)][0], ""

    def smooths_labels(self, processed: Processed) -> bool:
        """Return whether a row has one class."""
        return problem_of_model(processed.model.config) is Problem.CLASSES

    def metric(self, name: str, processed: Processed, batches: DataLoader[Any]) -> BatchMetric:
        """Return the task's own metrics, or, where a row has one class, a metric of `evaluate`.

        Raises:
            InputError: There is no such metric for this kind of labels.
        """
        problem = problem_of_model(processed.model.config)
        own = _METRICS[problem]
        if name in own:
            return ClassificationMetric(batches)
        if problem is not Problem.CLASSES:
            raise InputError(
                f"metric: expected one of {', '.join(own)} for a model of {problem.value}, got {name!r}"
                f"{nearest(name, own)}; name one of them"
            )
        return PredictionMetric(batches, library_score(name, self.metrics))

    def _labels(self, rows: Rows, columns: Mapping[str, str], processed: Processed) -> list[Any]:
        """Return the number of each row's class, or of words a list of them; 0 and 1 for each class; or numbers.

        Raises:
            InputError: The model is of another kind, or does not know a label, or a row has not as many as it takes.
        """
        config, column = processed.model.config, columns["label"]
        problem = problem_of_model(config)
        if self.of_words and problem is not Problem.CLASSES:
            raise InputError(
                f"model: expected a classifier of one class for each word, got one for {problem.value}; measure it "
                "from Python: ClassificationMetric knows its scores"
            )
        if problem is Problem.NUMBERS:
            return numbers_of(rows, column, f"for a model of {problem.value}", len(config.id2label))
        if problem is Problem.LABELS:
            _check_no_vectors(rows, column)
        labels = class_numbers(rows, column, label_numbers_of(config))
        if problem is Problem.LABELS:
            chosen = [{*label} if isinstance(label, list) else {label} for label in labels]
            return [[float(number in found) for number in range(len(config.id2label))] for found in chosen]
        for row, label in rows.numbered(labels):
            if not self.of_words and isinstance(label, list) and len(label) != 1:
                raise InputError(
                    f"{rows.source}: expected one label in each row, got {len(label)} in column {column!r}, row "
                    f"{row}; name another column, or leave such rows out"
                )
        return labels


def _check_no_vectors(rows: Rows, column: str) -> None:
    """Refuse a 0 or a 1 for each class, as a Trainer takes them: here a 1 in a list is the class of that number.

    Raises:
        InputError: A row has such a list.
    """
    for row, value in rows.numbered(rows.column(column)):
        labels = _of_row(value)
        if all(label in (0, 1) for label in labels) and len({*labels}) < len(labels):
            with_1 = [place for place, label in enumerate(labels) if label]
            raise InputError(
                f"{rows.source}: expected the classes of each row by their names or numbers, got {value!r} in column "
                f"{column!r}, row {row}; write {with_1}, which have the 1"
            )


def problem_of_model(config: Any) -> Problem:
    """Return what a model is for, as it says or as Transformers infers it.

    Raises:
        InputError: It says what Transformers does not know.
    """
    try:
        stated = stated_problem(config)
    except ValueError as error:
        raise InputError(f"model: {error}") from error
    return stated or (Problem.NUMBERS if len(config.id2label) == 1 else Problem.CLASSES)


def _problem_of_data(columns: Sequence[tuple[Rows, str]]) -> Problem:
    """Return what a new head is for: numbers if some have a fraction, several classes if some rows have not one."""
    of_rows = [_of_row(value) for rows, column in columns for value in rows.column(column)]
    if any(len(labels) != 1 for labels in of_rows):
        return Problem.LABELS
    numbers = [_number(label) for (label,) in of_rows]
    fractions = [number for number in numbers if number is not None and number % 1]
    return Problem.NUMBERS if fractions and None not in numbers else Problem.CLASSES


def _number(value: Any) -> float | None:
    """Return a finite number that a label is, or is written as; None if it is none."""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def numbers_of(rows: Rows, column: str, purpose: str, count: int = 1) -> list[Any]:
    """Return the numbers of a column: of each row one, or a list of so many.

    Args:
        rows: The data.
        column: The column.
        purpose: What the numbers are for, for the message.
        count: How many there are in a row.

    Raises:
        InputError: A row has something else.
    """
    found = []
    for row, value in rows.numbered(rows.column(column)):
        several = [_number(label) for label in _of_row(value)]
        if len(several) != count or None in several:
            wanted = "a number" if count == 1 else f"{count} numbers"
            raise InputError(
                f"{rows.source}: expected {wanted} in each row, {purpose}, got {value!r} in column {column!r}, row "
                f"{row}; name another column, or mend the data"
            )
        found.append(several[0] if count == 1 else several)
    return found
