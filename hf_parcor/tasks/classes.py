"""Labels of data as the numbers of a model's classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hf_parcor.input_error import InputError, nearest
from hf_parcor.tasks.rows import Rows


def class_numbers(rows: Rows, column: str, label_numbers: Mapping[str, int]) -> list[Any]:
    """Return the labels of a column as numbers, where a value is a label or a list of labels.

    A name is looked up among the model's, whatever its case. A number is that of the model's class, unless the data
    have a name for it that the model has too: the two may count in another order.

    Args:
        rows: The data.
        column: Where the labels are.
        label_numbers: The model's `label2id`.

    Raises:
        InputError: A label is missing, unknown to the model, or out of range.
    """
    numbers = {str(name).lower(): number for name, number in label_numbers.items()}
    values = rows.column(column)
    names = rows.class_names.get(column, ())
    if any(name.lower() not in numbers for name in names):  # names such as LABEL_0, or those of another language
        names = ()

    def number(label: Any, row: int) -> int:
        if isinstance(label, int) and 0 <= label < len(names):
            return numbers[names[label].lower()]
        if isinstance(label, str) and label.lower() in numbers:
            return numbers[label.lower()]
        if isinstance(label, (int, float)) and label in numbers.values():
            return int(label)
        raise InputError(
            f"{rows.source}: expected a label of the model ({_shown(label_numbers)}), got {label!r} in column "
            f"{column!r}, row {row}{nearest(str(label), list(label_numbers))}; choose data with labels, or name their "
            "column"
        )

    return [
        [number(label, row) for label in value] if isinstance(value, (list, tuple)) else number(value, row)
        for row, value in enumerate(values, start=1)
    ]


def classes_of(rows: Rows, column: str) -> list[str]:
    """Return the names of the classes that a column has, for a model that is to learn them.

    Names come in the data's order where these have one, else sorted; numbers n stand for themselves.

    Raises:
        InputError: A row has no label, or a negative one.
    """
    if column in rows.class_names:
        return list(rows.class_names[column])
    values = rows.column(column)
    labels = {label for value in values for label in (value if isinstance(value, (list, tuple)) else [value])}
    numbers = [label for label in labels if isinstance(label, int)]
    if len(numbers) < len(labels):
        return sorted(map(str, labels))
    if min(numbers) < 0:
        raise InputError(
            f"{rows.source}: expected labels from 0 on, got {min(numbers)} in column {column!r}; choose data with "
            "labels"
        )
    return [str(number) for number in range(max(numbers) + 1)]


def _shown(names: Mapping[str, int]) -> str:
    shown: Sequence[str] = [f"{name} = {number}" for name, number in list(names.items())[:8]]
    return ", ".join(shown) + ("…" if len(names) > 8 else "")
